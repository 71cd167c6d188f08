"""The speed benchmark measures what it says, and the README's table says what it measured."""

import csv
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import speed


def test_the_readme_and_the_results_agree():
    _, rest = (ROOT / "README.md").read_text().split(speed.MARKS[0])
    assert rest.split(speed.MARKS[1])[0] == speed.table()


def test_it_measures_side_by_side(tmp_path, monkeypatch):
    """Real processes, in short slices; without its buffer of 1,000,000 transitions the script stays below 700 MB."""
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "speed.csv")
    options = speed.Options(env_id="Pendulum-v1", sides=("eager", "stable-baselines3"), rounds=2, seconds=0.5, threads=1)
    speed.compare(1, 50_000, options)
    with open(tmp_path / "speed.csv", newline="") as file:
        ours, theirs = csv.DictReader(file)
    assert ours["side"] == "eager" and theirs["side"] == ours["compared_with"] == "stable-baselines3"
    assert float(ours["rate"]) > 0 < float(theirs["rate"]) and float(theirs["ratio"]) == 1
    assert 0 < float(ours["matrix_limit_share"]) < 1
    assert 100 < float(ours["megabytes"]) < 700


def test_a_side_that_fails_is_said(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA"):
        speed.Side("cudagraph", 1, 0, speed.Options(env_id="Pendulum-v1", cuda=False), tmp_path)
