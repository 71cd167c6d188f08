"""The README's recipes: their commands run, and their table says what the results file says."""

import shlex
import sys

import pytest
from conftest import ROOT
from test_faults import PENDULUM
from test_resume import run_killed

import ddpg_continuous_action as ddpg
from training import command_line
from training.arguments import check_args

sys.path.insert(0, str(ROOT / "benchmarks"))
import plot
import recipes

PLOTTED = (
    "--env-id Pendulum-like-v0 --total-timesteps 300 --learning-starts 100 --batch-size 16 --buffer-size 1000 "
    "--eval-frequency 100 --eval-episodes 1 --no-cuda"
)
SHORT = "--total-timesteps 400 --learning-starts 200 --eval-frequency 200 --eval-episodes 1 --max-episode-steps 50 --no-cuda"


@pytest.mark.parametrize("task", recipes.RECIPES)
def test_a_recipe_runs(run, task):
    """Its own flags, for a few hundred steps."""
    arguments = shlex.split(recipes.RECIPES[task].flags)
    args = command_line.parse_args(ddpg.Args, arguments, ddpg.Args())
    assert args.env_id == recipes.RECIPES[task].title
    check_args(args)
    assert (
        run(command_line.parse_args(ddpg.Args, [*arguments, *SHORT.split()], ddpg.Args())).run_dir / "evaluation.json"
    ).exists()


def test_the_readme_and_the_results_agree():
    before, rest = (ROOT / "README.md").read_text().split(recipes.MARKS[0])
    assert rest.split(recipes.MARKS[1])[0] == recipes.table()


def test_finished_seeds_are_not_run_again_and_a_failing_one_stops_no_other(tmp_path, monkeypatch):
    """Seed 2 fails; the next call runs it alone. A row of another command counts as not run."""
    monkeypatch.setattr(recipes, "RESULTS", tmp_path / "results" / "recipes.csv")
    ran, broken = [], {2}

    def run_seed(task, seed, interrupted, children):
        ran.append(seed)
        if seed in broken:
            raise RuntimeError("broken")
        return dict.fromkeys(recipes.COLUMNS, 0) | {
            "task": task,
            "seed": seed,
            "command": recipes.command(recipes.RECIPES[task]),
        }

    monkeypatch.setattr(recipes, "run_seed", run_seed)
    options = recipes.Options(task="pendulum", seeds=(1, 2, 3))
    assert recipes.run_all(options) == 1 and sorted(ran) == [1, 2, 3]
    ran.clear(), broken.clear()
    assert recipes.run_all(options) == 0 and ran == [2]
    monkeypatch.setitem(recipes.RECIPES, "pendulum", recipes.RECIPES["pendulum"]._replace(flags="--env-id Pendulum-v1"))
    ran.clear()
    assert recipes.run_all(options) == 0 and sorted(ran) == [1, 2, 3]


def test_an_interrupted_seed_goes_on(tmp_path, monkeypatch):
    """A run of another seed and a finished one are let alone; once finished, the seed would start anew."""
    for name in ("ROOT", "CURVES"):
        monkeypatch.setattr(recipes, name, tmp_path)
    monkeypatch.setitem(recipes.RECIPES, "pendulum", recipes.Recipe("Pendulum-v1", f"{PENDULUM} --num-threads 1", None))
    for seed, step in (("1", 250), ("2", 10)):
        killed = run_killed(tmp_path, "step", step, *recipes.RECIPES["pendulum"].flags.split(), "--seed", seed)
        assert killed.returncode == -9, killed.stderr
    row = recipes.run_seed("pendulum", 1, recipes.find_interrupted("pendulum", 1), [])
    assert int(row["steps"]) == 600 and len(row["returns"].split()) == 20 and row["wall_seconds"] >= 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert recipes.find_interrupted("pendulum", 1) is None


def test_curves_are_drawn_over_seeds(run, tmp_path):
    """Two runs of one environment are one curve: the mean of their evaluations at each step."""
    folders = [
        run(command_line.parse_args(ddpg.Args, f"--seed {seed} {PLOTTED}".split(), ddpg.Args())).run_dir for seed in (1, 2)
    ]
    name, steps, means = plot.load(folders[0])
    assert name.startswith("Pendulum-like-v0") and list(steps) == [100, 200, 300] and len(means) == 3
    plot.draw(tuple(folders), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
