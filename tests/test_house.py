"""The houses: arrows point downwards, and no room of steadyrl/ but one knows an algorithm."""

import ast
import re
from pathlib import Path

import pytest
from helpers import ROOT

from steadyrl import family

# From the roof to the ground. A room imports from rooms below it; the scripts stand on the roof, beside the tools.
FLOORS = [
    ["tune"],
    ["sweep", "compare"],
    ["command_line", "run"],
    ["hub"],
    ["policies", "evaluation", "acceleration", "checks"],
    ["environments", "models", "logs", "checkpoints", "record", "device", "hindsight_replay"],
    ["agent", "episodes", "run_folder", "prioritized_replay"],
    ["arguments", "spaces", "files", "replay_buffer", "noise", "signals"],
    ["errors", "family", "output", "normalization"],
]
ROOMS = sorted((ROOT / "steadyrl").glob("*.py"))


def imports(path: Path) -> list[str]:
    """Everything that a file imports by a statement, as dotted names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            where = ["steadyrl"] * (node.level > 0) + ([node.module] if node.module else [])
            names += [".".join([*where, alias.name]) for alias in node.names]
    return names


def test_every_room_has_a_floor():
    assert sorted(path.stem for path in ROOMS if path.stem != "__init__") == sorted(room for floor in FLOORS for room in floor)


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_arrows_point_downwards(path):
    floors = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    others = {name.split(".")[1] for name in imports(path) if name.startswith("steadyrl.")} - {path.stem}  # sweep as a program
    assert all(floors[other] > floors[path.stem] for other in others), others


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_nothing_in_the_house_imports_a_script(path):
    assert not {*family.SCRIPTS} & {name.split(".")[0] for name in imports(path)}


def test_the_root_holds_the_scripts_alone():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(family.SCRIPTS)


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_one_room_names_algorithms_and_none_builds_a_network(path):
    text = path.read_text()
    if path.stem not in ("family", "compare"):  # compare.py says where its reference scores come from
        assert not re.findall(r"\b(ddpg|sac|dqn|td3|epsilon|q_network|target_\w*(?:actor|critic))\b", text, re.IGNORECASE)
    text = re.sub(r"torch\.nn\.Module(Dict)?\b", "", text)  # to hold an agent's networks is not to build any
    assert not re.findall(r"\bnn\.|torch\.nn\b|\bModule\b", text)
