"""The recipes of docs/results.md: their commands run, and their tables say what the results file says."""

import importlib
import json
import re
import shlex
import shutil
import sys
from importlib.metadata import version

import gymnasium as gym
import numpy as np
import pytest
from helpers import ROOT, quick_args, scalars
from PIL import Image
from test_faults import PENDULUM
from test_resume import run_killed

from steadyrl.arguments import check_args, parse_args
from steadyrl.checkpoints import load_checkpoint
from steadyrl.run_folder import read_evaluations

sys.path.insert(0, str(ROOT / "benchmarks"))
import family
import film
import recipes

SHORT = (
    " --total-timesteps 300 --learning-starts 200 --eval-frequency 200 --eval-episodes 1 --max-episode-steps 50 --no-cuda"
    " --accelerate eager --final-episodes 2"
)


def args_of(task: str, more: str = ""):
    """The arguments of a recipe's command, with more flags after it."""
    _, script, *words = shlex.split(recipes.command(recipes.RECIPES[task]) + more)
    args_class = importlib.import_module(script.removesuffix(".py")).Args
    return parse_args(args_class, words, args_class())


@pytest.mark.parametrize("task", recipes.RECIPES)
def test_a_recipe_is_understood(task):
    assert args_of(task).env_id == recipes.RECIPES[task].env_id
    check_args(args_of(task))


@pytest.mark.slow
@pytest.mark.parametrize("task", recipes.RECIPES)
def test_a_recipe_runs(run, task):
    """Its own flags, for a few hundred steps; too few to compile anything."""
    module = recipes.RECIPES[task].env_id.rpartition(":")[0]
    if module:  # of another package
        pytest.importorskip(module)
        if task.startswith("fetch") and version("mujoco") > "3.3.7":
            pytest.skip("it needs an older MuJoCo")
    assert (run(args_of(task, SHORT)).run_dir / "evaluation.json").exists()


def test_the_table_of_three_algorithms(monkeypatch):
    """It stands in docs/results.md; medians over seeds; a seed that never reached the goal counts as the last of them."""
    _, rest = recipes.PAGE.read_text().split(family.MARKS[0])
    assert rest.split(family.MARKS[1])[0] == family.table()
    steps = {1: ("10016", "90"), 2: ("30016", "60"), 3: ("", "")}
    rows = [{"seed": str(n), "goal_step": step, "goal_seconds": seconds} for n, (step, seconds) in steps.items()]
    monkeypatch.setattr(family, "results", lambda: {"inverted_pendulum_dqn": rows, "inverted_pendulum": rows[:2]})
    assert family.table().splitlines()[2:] == [
        "| DQN | 10,016; 30,016; not reached | 30,016 | 1.5; 1.0; not reached | 1.5 |",
        "| DDPG | 10,016; 30,016 | 20,016 | 1.5; 1.0 | 1.2 |",
    ]


def test_the_results_and_the_evaluations_agree():
    """Last five, q_bias at the end and the first to reach the goal, from the evaluations that the pictures are drawn from."""
    rows = recipes.read_results()
    assert rows
    for row in rows:
        curve = ROOT / "benchmarks" / "results" / "curves" / f"{row['task']}-{row['seed']}" / "evaluations.csv"
        evaluations = np.genfromtxt(curve, delimiter=",", names=True)
        assert float(row["last_five"]) == pytest.approx(evaluations["mean"][-5:].mean(), abs=0.006)
        assert float(row["q_bias"]) == pytest.approx(evaluations["q_bias"][-1], abs=0.006)
        column, goal = recipes.RECIPES[row["task"]].aim
        reached = evaluations["global_step"][evaluations[column] >= (np.inf if goal is None else goal)]
        assert row["goal_step"] == (f"{reached[0]:.0f}" if len(reached) else "")


def test_returns_beside_published_ones(tmp_path, monkeypatch):
    """Means over seeds at the steps of the columns; a task that was not run has no row, and a short run an empty cell. Training
    returns are means over the seeds of which they are known."""
    results = [{"task": "hopper", "seed": str(n), "training_return": value} for n, value in enumerate(["", "900", "1000"], 1)]
    for seed, returns in ((1, (100.0, 3000)), (2, (200.0, 4000)), (3, (300.0, 5000))):
        (tmp_path / f"hopper-{seed}").mkdir()
        rows = "".join(f"{step},{value}\n" for step, value in zip((100_000, 300_000), returns, strict=True))
        (tmp_path / f"hopper-{seed}" / "evaluations.csv").write_text("global_step,mean\n" + rows)
    monkeypatch.setattr(recipes, "CURVES", tmp_path)
    monkeypatch.setattr(recipes, "read_results", lambda: results)
    ours = [row for row in recipes.beside_published()[2:] if "published" not in row]
    assert ours == ["| Hopper-v4 | DDPG | 3 | 200 | 4,000 |  |  |", "| Hopper-v4 | DDPG, training | 2 |  |  |  | 950 +- 71 |"]


def test_when_the_goal_was_reached(run):
    """Its step is that of the first evaluation at or above the goal, its time lies within the run's."""
    folder = run(quick_args(eval_frequency=100)).run_dir
    evaluations = np.genfromtxt(folder / "evaluations.csv", delimiter=",", names=True)
    goal = np.sort(evaluations["mean"])[1]
    events = recipes.read_events(folder)
    step, seconds = recipes.first_at(goal, folder, events)
    assert step == evaluations["global_step"][np.argmax(evaluations["mean"] >= goal)]
    assert 0 <= seconds <= load_checkpoint(folder / "checkpoints")["run"]["elapsed"] + 1  # rounded
    assert recipes.first_at(np.inf, folder, events) == recipes.first_at(None, folder, events) == ("", "")


def test_the_training_return_is_of_the_last_100_episodes(run):
    folder = run(quick_args(max_episode_steps=2, reward_scale=0.5)).run_dir
    returns = [value for _, value in scalars(folder)["charts/episodic_return"]]
    assert len(returns) == 150
    assert recipes.training_return(recipes.read_events(folder)) == pytest.approx(sum(returns[50:]) / 100)


def test_a_run_without_git_or_checkpoints_is_collected(run, tmp_path, monkeypatch):
    folder = run(quick_args(eval_frequency=100)).run_dir
    settings = json.loads((folder / "args.json").read_text())
    settings["code"]["commit"] = None
    (folder / "args.json").write_text(json.dumps(settings))
    shutil.rmtree(folder / "checkpoints")
    monkeypatch.setattr(recipes, "RESULTS", tmp_path / "recipes.csv")
    monkeypatch.setattr(recipes, "CURVES", tmp_path / "curves")
    recipes.collect("pendulum", folder)
    (row,) = recipes.read_results()
    assert (row["seed"], row["wall_seconds"], row["commit"]) == ("1", "", "")
    assert "| 300 |  | " in recipes.table()


def test_the_table_and_the_results_agree():
    _, rest = recipes.PAGE.read_text().split(recipes.MARKS[0])
    assert rest.split(recipes.MARKS[1])[0] == recipes.table()


def test_readme_and_pages_say_what_the_results_say():
    """Each command of a recipe in the README, and each triple of returns, which are those of seeds 1, 2 and 3."""
    means: dict[str, list[str]] = {}
    for row in sorted(recipes.read_results(), key=lambda row: int(row["seed"])):
        means.setdefault(row["task"], []).append(f"{float(row['mean']):.1f}")
    known = {(recipes.RECIPES[task].env_id, "; ".join(each)) for task, each in means.items()}
    readme = (ROOT / "README.md").read_text()
    pages = [readme, *(path.read_text() for path in (ROOT / "docs" / "algorithms").glob("*.md"))]
    said = [found for text in pages for found in re.findall(r"^\| ([\w-]+-v\d)\b.* (\S+; \S+; \S+) \|$", text, re.MULTILINE)]
    assert len(said) > 15 and set(said) <= known
    (block,) = re.findall(r"## Six tasks\n.*?```bash\n(.*?)```", readme, re.DOTALL)
    assert len(block.splitlines()) == 6 and set(block.splitlines()) <= set(map(recipes.command, recipes.RECIPES.values()))


def test_the_page_of_sac_says_what_its_long_runs_say():
    """The best models, the means of the last five evaluations, and where a policy fell back."""
    page = (ROOT / "docs" / "algorithms" / "sac.md").read_text()
    for task, env_id in (("hopper_sac", "Hopper-v4"), ("half_cheetah_sac", "HalfCheetah-v4")):
        rows = [row for row in recipes.read_results() if row["task"] == task]
        seeds, best = ", ".join(row["seed"] for row in rows), "; ".join(f"{float(row['mean']):.1f}" for row in rows)
        assert f"| {env_id}, seeds {seeds} | 1,000,000 | {best} |\n" in page
        scores = [float(row["last_five"]) for row in rows]
        assert f"| {env_id} | {'; '.join(f'{score:,.0f}' for score in scores)} | {np.mean(scores):,.0f} | " in page
    curve = dict(read_evaluations(ROOT / "benchmarks" / "results" / "curves" / "hopper_sac-1"))
    fall = ", ".join(f"{curve[step]:,.0f}" for step in (600_000, 650_000)) + f" and {curve[700_000]:,.0f}"
    assert f"evaluations had {fall} after 600,000" in recipes.PAGE.read_text()


def test_the_page_and_the_comparison_agree():
    """The tables are those that compare.py wrote. Those of TD3 are of all runs that there are. So are the README's scores."""
    places = [ROOT / "benchmarks" / "results" / f"{name}.md" for name in ("prioritized", "td3_flags", "two_critics")]
    tables = [place.read_text().split("\n\n")[0] for place in places]
    assert all(table in recipes.PAGE.read_text() for table in tables)
    algorithms = {"two": "TD3", "plain": "DDPG", "others": "TD3", "defaults": "TD3, CleanRL's defaults"}
    tasks = {(recipe.env_id, recipe.algorithm): task for task, recipe in recipes.RECIPES.items()}

    def scores(env_id: str, algorithm: str) -> list[float]:
        task = tasks[env_id, algorithm]
        return [float(row["last_five"]) for row in recipes.read_results() if row["task"] == task]

    lines = [line for table in tables[1:] for line in table.splitlines()[2:] if " tasks, normalised " not in line]
    for line in lines:
        env_id, group, runs, _, mean, *_ = line.strip("| ").split(" | ")
        found = scores(env_id, algorithms[group])
        assert int(runs) == len(found) and float(mean.split()[0].replace(",", "")) == pytest.approx(np.mean(found), abs=0.06)
    readme = (ROOT / "README.md").read_text()
    (said,) = re.findall(r"^With TD3, one seed.*?much there\.$", readme, re.MULTILINE | re.DOTALL)
    order = [("defaults", "Hopper-v4"), ("defaults", "Walker2d-v4"), ("plain", "Hopper-v4"), ("plain", "Walker2d-v4")]
    order += [("defaults", "HalfCheetah-v4"), ("plain", "HalfCheetah-v4")]
    means = [f"{np.mean(scores(env_id, algorithms[group])):,.0f}" for group, env_id in order]
    assert re.findall(r"\d+,\d+", said) == means


@pytest.mark.slow
def test_a_film_is_of_the_first_episode_of_the_final_evaluation(run, tmp_path, monkeypatch, capsys):
    """Its first picture is the start of that episode; it shows six seconds, as wide as the bytes allow."""
    folder = run(quick_args(env_id="Pendulum-v1", eval_frequency=0)).run_dir
    env = gym.make("Pendulum-v1", render_mode="rgb_array")
    env.reset(seed=20_000)
    start = env.render()
    pictures = film.film(folder)
    assert len(pictures) == 75 and np.array_equal(pictures[0], start) and not np.array_equal(pictures[-1], start)
    film.main(film.Options(folder, tmp_path / "film.gif", width=100))
    with Image.open(tmp_path / "film.gif") as gif:
        assert gif.size == (100, 100) and gif.n_frames > 60 and gif.info["loop"] == 0  # equal pictures become one
    monkeypatch.setattr(film, "MOST_BYTES", 30_000)
    film.main(film.Options(folder, tmp_path / "film.gif", width=200))
    assert (tmp_path / "film.gif").stat().st_size <= 30_000 and "75 pictures" in capsys.readouterr().out


@pytest.mark.slow
def test_recipes_run_what_has_no_result_and_go_on_with_the_rest(tmp_path, monkeypatch, capsys):
    """Seed 1 was killed and goes on; the seeds are finished once; a row of another command counts as no result."""
    monkeypatch.chdir(tmp_path)
    for name in ("CURVES", "RESULTS"):
        monkeypatch.setattr(recipes, name, tmp_path / name)
    flags = PENDULUM.removeprefix("--env-id Pendulum-v1 ") + " --eval-frequency 100"
    monkeypatch.setattr(recipes, "RECIPES", {"pendulum": recipes.Recipe("Pendulum-v1", f"{flags} --num-threads 1", None)})
    killed = run_killed(tmp_path, "step", 250, *f"{PENDULUM} --eval-frequency 100 --num-threads 1 --seed 1".split())
    assert killed.returncode == -9, killed.stderr
    options = recipes.Options(seeds=(1, 2), engine="local")
    assert recipes.run_all(options) == 0
    rows = recipes.read_results()
    assert [(row["task"], row["seed"], row["steps"]) for row in rows] == [("pendulum", "1", "600"), ("pendulum", "2", "600")]
    assert all(len(row["returns"].split()) == 5 for row in rows) and (tmp_path / "CURVES" / "pendulum-2" / "args.json").exists()
    assert len(list((tmp_path / "runs").glob("Pendulum*"))) == 2
    means = np.genfromtxt(tmp_path / "CURVES" / "pendulum-2" / "evaluations.csv", delimiter=",", names=True)["mean"]
    assert float(rows[1]["last_five"]) == pytest.approx(means[-5:].mean(), abs=0.006)
    returns = [value for _, value in scalars(next((tmp_path / "runs").glob("*__2__*")))["charts/episodic_return"]]
    assert float(rows[1]["training_return"]) == pytest.approx(np.mean(returns), abs=0.006)  # it has few episodes
    capsys.readouterr()
    assert recipes.run_all(options) == 0 and recipes.read_results() == rows
    assert capsys.readouterr().out.startswith("every seed has its row")
    changed = recipes.Recipe("Pendulum-v1", f"{flags} --num-threads 1 --tau 0.01", None)
    monkeypatch.setitem(recipes.RECIPES, "pendulum", changed)
    options.status = True
    assert recipes.run_all(options) == 0 and "2 new" in capsys.readouterr().out and recipes.read_results() == []
