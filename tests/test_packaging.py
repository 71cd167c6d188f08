"""What is installed: the ranges of pyproject.toml, the pins of requirements.txt, and the names that both promise."""

import re
import tomllib

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

from steadyrl import family, record

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"].values()
RANGES = [*PROJECT["project"]["dependencies"], *(one for extra in EXTRAS for one in extra)]
PINS = [(ROOT / name).read_text().split() for name in ("requirements.txt", "tests/requirements.txt")]


@pytest.mark.parametrize("pin", [pin for pins in PINS for pin in pins])
def test_each_pin_is_inside_its_range(pin):
    pinned = Requirement(pin)
    (version,) = [specifier.version for specifier in pinned.specifier]
    ranges = [each for each in map(Requirement, RANGES) if each.name == pinned.name]
    assert ranges and all(version in each.specifier for each in ranges)


def test_a_downloaded_folder_asks_for_what_the_scripts_need():
    """The pins that are written from the installed versions name what requirements.txt and pyproject.toml name."""
    names = {pin.partition("==")[0] for pin in PINS[0]}
    assert set(record.DEPENDENCIES) == names == {re.split("[>=<]", one)[0] for one in PROJECT["project"]["dependencies"]}
    assert record.pins() == [f"{name}=={record.version(name.partition('[')[0]).split('+')[0]}" for name in record.DEPENDENCIES]


def test_the_scripts_are_installed_as_modules():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert scripts == set(family.SCRIPTS) == set(PROJECT["tool"]["setuptools"]["py-modules"])


def test_one_version_everywhere():
    version = PROJECT["project"]["version"]
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_package_holds_its_data():
    data = PROJECT["tool"]["setuptools"]["package-data"]["steadyrl"]
    assert all((ROOT / "steadyrl" / name).exists() for name in data) and set(data) == {"py.typed", "tune.toml"}
