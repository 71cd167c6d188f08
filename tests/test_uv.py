"""`uv run` installs what requirements.txt asks for: it reads the head of the script."""

import re
import tomllib

import pytest
from helpers import AGENTS, ROOT


@pytest.mark.parametrize("script", [script.__name__ for script in AGENTS])
def test_the_head_of_a_script_asks_for_requirements_txt(script):
    (block,) = re.findall(r"(?m)^# /// script\n((?:#.*\n)*?)# ///$", (ROOT / f"{script}.py").read_text())
    head = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    assert head == {"requires-python": ">=3.11", "dependencies": (ROOT / "requirements.txt").read_text().split()}
