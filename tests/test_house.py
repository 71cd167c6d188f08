"""The houses: arrows point downwards, and training/ knows no algorithm."""

import ast
import re

import pytest
from helpers import ROOT

# From the roof to the ground. A room imports from rooms below it; the scripts stand on the roof.
FLOORS = [
    ["command_line", "run"],
    ["hub"],
    ["policies"],
    ["evaluation", "acceleration"],
    ["environments", "setup", "checkpoints", "models", "logs"],
    ["episodes", "spaces", "arguments", "files", "replay_buffer", "signals"],
    ["errors"],
]
ROOMS = sorted((ROOT / "training").glob("*.py"))


def imported_rooms(path) -> set[str]:
    """The rooms of training/ that a file imports from."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "training":
            rooms |= {alias.name for alias in node.names}
        names = [node.module] if isinstance(node, ast.ImportFrom) else getattr(node, "names", [])
        for name in names:
            name = name if isinstance(name, str) else getattr(name, "name", "")
            if name and name.startswith("training."):
                rooms.add(name.split(".")[1])
    return rooms


@pytest.mark.parametrize("room", [path.stem for path in ROOMS if path.stem != "__init__"])
def test_arrows_point_downwards(room):
    floors = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    assert room in floors, "a room without a floor"
    assert all(floors[other] > floors[room] for other in imported_rooms(ROOT / "training" / f"{room}.py"))


def test_nothing_in_the_house_imports_a_script():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in ROOMS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not scripts & {name.split(".")[0] for name in names}, path


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_training_names_no_algorithm_and_builds_no_network(path):
    text = path.read_text()
    assert not re.findall(r"\b(ddpg|sac|dqn|td3|epsilon|q_network|target_\w*(?:actor|critic))\b", text, re.IGNORECASE)
    text = re.sub(r"torch\.nn\.Module(Dict)?\b", "", text)  # to hold an agent's networks is not to build any
    assert not re.findall(r"\bnn\.|torch\.nn\b|\bModule\b", text)
