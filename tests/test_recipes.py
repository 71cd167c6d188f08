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
import recipes

SHORT = "--total-timesteps 400 --learning-starts 200 --eval-frequency 200 --eval-episodes 1 --max-episode-steps 50 --no-cuda"


@pytest.mark.parametrize("task", recipes.RECIPES)
def test_a_recipe_runs(run, task):
    """Its own flags, for a few hundred steps."""
    arguments = shlex.split(recipes.command(recipes.RECIPES[task]))[2:]
    args = command_line.parse_args(ddpg.Args, arguments, ddpg.Args())
    assert args.env_id == recipes.RECIPES[task].env_id
    check_args(args)
    assert (
        run(command_line.parse_args(ddpg.Args, [*arguments, *SHORT.split()], ddpg.Args())).run_dir / "evaluation.json"
    ).exists()


def test_the_readme_and_the_results_agree():
    before, rest = (ROOT / "README.md").read_text().split(recipes.MARKS[0])
    assert rest.split(recipes.MARKS[1])[0] == recipes.table()


@pytest.mark.slow
def test_recipes_run_what_has_no_result_and_go_on_with_the_rest(tmp_path, monkeypatch, capsys):
    """Seed 1 was killed and goes on; the seeds are finished once; a row of another command counts as no result."""
    monkeypatch.chdir(tmp_path)
    for name in ("CURVES", "RESULTS"):
        monkeypatch.setattr(recipes, name, tmp_path / name)
    flags = PENDULUM.removeprefix("--env-id Pendulum-v1 ")
    monkeypatch.setattr(recipes, "RECIPES", {"pendulum": recipes.Recipe("Pendulum-v1", f"{flags} --num-threads 1", None)})
    killed = run_killed(tmp_path, "step", 250, *PENDULUM.split(), "--num-threads", "1", "--seed", "1")
    assert killed.returncode == -9, killed.stderr
    options = recipes.Options(seeds=(1, 2), engine="local")
    assert recipes.run_all(options) == 0
    rows = recipes.read_results()
    assert [(row["task"], row["seed"], row["steps"]) for row in rows] == [("pendulum", "1", "600"), ("pendulum", "2", "600")]
    assert (
        all(len(row["returns"].split()) == 20 for row in rows) and (tmp_path / "CURVES" / "pendulum-2" / "args.json").exists()
    )
    assert len(list((tmp_path / "runs").glob("Pendulum*"))) == 2
    capsys.readouterr()
    assert recipes.run_all(options) == 0 and recipes.read_results() == rows and capsys.readouterr().out == ""
    changed = recipes.Recipe("Pendulum-v1", f"{flags} --num-threads 1 --tau 0.01", None)
    monkeypatch.setitem(recipes.RECIPES, "pendulum", changed)
    options.status = True
    assert recipes.run_all(options) == 0 and "2 new" in capsys.readouterr().out and recipes.read_results() == []
