"""The recipes of the README: tasks, the one command that solves each, and what it reached over seeds.

    python benchmarks/recipes.py --task pendulum --seeds 1 2 3 --jobs 2   # run; finished seeds are not run again, and
                                                                          # interrupted ones go on where they were
    python benchmarks/recipes.py --readme                                 # write the README's table from the results

Each seed is a run of the script itself, at one thread. Results go to benchmarks/results/recipes.csv, a row per seed, and
the run's evaluations to benchmarks/results/curves/, from which benchmarks/plot.py draws. To run a seed again, delete its row.
"""

import contextlib
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import ddpg_continuous_action as ddpg  # noqa: E402
from training.checkpoints import load_checkpoint  # noqa: E402
from training.command_line import load_args, parse_args  # noqa: E402
from training.errors import UsageError  # noqa: E402

SCRIPT = ROOT / "ddpg_continuous_action.py"
RESULTS = ROOT / "benchmarks" / "results" / "recipes.csv"
CURVES = ROOT / "benchmarks" / "results" / "curves"
MARKS = "<!-- recipes: written by benchmarks/recipes.py --readme -->\n", "<!-- end of recipes -->\n"
COLUMNS = ("task", "seed", "steps", "wall_seconds", "mean", "std", "returns", "model_step", "date", "versions", "command")


class Recipe(NamedTuple):
    """A task: its name in the table, the flags that solve it, the greedy mean it must reach on every seed, and what has
    to be installed for it."""

    title: str
    flags: str
    goal: float | None
    install: str = ""


RECIPES = {
    "pendulum": Recipe(
        "Pendulum-v1",
        "--env-id Pendulum-v1 --total-timesteps 30000 --learning-starts 1000 --eval-frequency 2000 "
        "--noise ou --exploration-noise 0.3 --critic-loss huber --actor-learning-rate 5e-4 --critic-learning-rate 1e-3 "
        "--gamma 0.98 --batch-size 128 --buffer-size 30000",
        -200,
    ),
    "mountain_car": Recipe(
        "MountainCarContinuous-v0",
        "--env-id MountainCarContinuous-v0 --total-timesteps 100000 --learning-starts 1000 --eval-frequency 5000 "
        "--noise ou --exploration-noise 0.5 --learning-rate 1e-3 --batch-size 128 --hidden-sizes 64 64 --buffer-size 100000",
        90,
    ),
    "lunar_lander": Recipe(
        "LunarLanderContinuous-v3",
        "--env-id LunarLanderContinuous-v3 --total-timesteps 500000 --learning-starts 10000 --eval-frequency 10000 "
        "--eval-episodes 50 --target-return 240 --gamma 0.98 --learning-rate 1e-3 --batch-size 128 --hidden-sizes 400 300 "
        "--policy-frequency 1 --exploration-noise 0.2 --exploration-noise-end 0.05 --exploration-fraction 0.5 "
        "--buffer-size 200000",
        200,
        'pip install "gymnasium[box2d]==1.4.0"',
    ),
    "inverted_pendulum": Recipe(
        "InvertedPendulum-v5",
        """--env-id InvertedPendulum-v5 --env-kwargs '{"reset_noise_scale": 0.2}' --total-timesteps 150000 """
        "--learning-starts 5000 --eval-frequency 10000 --eval-episodes 20 --num-envs 32 --gradient-steps 8 "
        "--reward-scale 0.1 --exploration-noise 0.3 --exploration-noise-end 0.05 --exploration-fraction 0.5 "
        "--learning-rate 1e-3 --batch-size 128 --hidden-sizes 64 64 --buffer-size 150000",
        950,
    ),
    "hopper": Recipe("Hopper-v4", "--env-id Hopper-v4", None),
}


@dataclass
class Options:
    """Run the recipes."""

    task: Literal["all", *RECIPES] = "all"
    """which of them"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds to run"""
    jobs: int = 2
    """runs side by side, one thread each"""
    readme: bool = False
    """write the README's table from the results instead of running anything"""


def command(recipe: Recipe) -> str:
    """The command as the README prints it."""
    return f"python ddpg_continuous_action.py {recipe.flags}"


def read_results() -> list[dict[str, str]]:
    """The rows of recipes.csv that the commands as they are now have given."""
    if not RESULTS.exists():
        return []
    with open(RESULTS, newline="") as file:
        return [row for row in csv.DictReader(file) if row["command"] == command(RECIPES[row["task"]])]


def find_interrupted(task: str, seed: int) -> Path | None:
    """The folder of a run of this seed that has not come to its end, the latest."""
    args = parse_args(ddpg.Args, [*shlex.split(RECIPES[task].flags), "--seed", str(seed)], ddpg.Args())
    for path in sorted((ROOT / "runs").glob("*/args.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(UsageError):  # a damaged one
            if load_args(path.parent, ddpg.Args) == args and not (path.parent / "evaluation.json").exists():
                return path.parent
    return None


def run_seed(task: str, seed: int, interrupted: Path | None, children: list[subprocess.Popen]) -> dict[str, str | int | float]:
    """Run one seed of a recipe, or go on with its interrupted run, showing the evaluations.

    Returns:
        its row for recipes.csv.

    Raises:
        RuntimeError: if the script fails.
    """
    arguments = [*shlex.split(RECIPES[task].flags), "--seed", str(seed)]
    run = subprocess.Popen(
        [sys.executable, str(SCRIPT), *(["--resume", str(interrupted)] if interrupted else arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    children.append(run)
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith(("step ", "final ")):
            tqdm.write(f"[{task} {seed}] {line.rstrip()}")
    if run.wait() != 0:
        raise RuntimeError("".join(lines[-5:]))
    folder = ROOT / next(line.split("folder is ")[1].strip() for line in lines if "folder is " in line)
    result = json.loads((folder / "evaluation.json").read_text())
    training = load_checkpoint(folder / "checkpoints")["run"]  # its clock goes on over interruptions
    with open(folder / "evaluations.csv", newline="") as file:
        evaluations = list(csv.DictReader(file))
    curve = CURVES / f"{task}-{seed}"
    curve.mkdir(parents=True, exist_ok=True)
    for name in ("args.json", "evaluations.csv", "evaluation.json"):
        shutil.copy(folder / name, curve)
    return {
        "task": task,
        "seed": seed,
        "steps": evaluations[-1]["global_step"],
        "wall_seconds": round(training["elapsed"]),
        "mean": round(result["mean"], 2),
        "std": round(result["std"], 2),
        "returns": " ".join(f"{value:.1f}" for value in result["returns"]),
        "model_step": max(evaluations, key=lambda row: float(row["mean"]))["global_step"],
        "date": result["date"],
        "versions": " ".join(f"{name}={version}" for name, version in result["versions"].items()),
        "command": command(RECIPES[task]),
    }


def run_all(options: Options) -> int:
    """Run what is asked for and not finished yet; returns the number of failed runs."""
    tasks = list(RECIPES) if options.task == "all" else [options.task]
    finished = {(row["task"], int(row["seed"])) for row in read_results()}
    todo = [(task, seed) for task in tasks for seed in options.seeds if (task, seed) not in finished]
    failures, children = 0, []
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(todo), unit="run") as progress:
        runs = {pool.submit(run_seed, task, seed, find_interrupted(task, seed), children): (task, seed) for task, seed in todo}
        try:
            for run in as_completed(runs):
                task, seed = runs[run]
                try:
                    row = run.result()
                except Exception as error:
                    failures += 1
                    tqdm.write(f"[{task} {seed}] failed: {error}")
                    continue
                finally:
                    progress.update()
                with open(RESULTS, "a", newline="") as file:
                    table = csv.DictWriter(file, COLUMNS)
                    if file.tell() == 0:
                        table.writeheader()
                    table.writerow(row)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise
    return failures


def table() -> str:
    """The README's section: a row per task, and the command and the learning curve of each."""
    rows = ["| task | goal | seed | steps | minutes | greedy mean +- std |", "|---|---|---|---|---|---|"]
    commands = []
    for task, recipe in RECIPES.items():
        results = sorted((row for row in read_results() if row["task"] == task), key=lambda row: int(row["seed"]))
        for row in results:
            rows.append(
                f"| {recipe.title} | {recipe.goal or 'report'} | {row['seed']} | {int(row['steps']):,} "
                f"| {float(row['wall_seconds']) / 60:.1f} | {float(row['mean']):.1f} +- {float(row['std']):.1f} |"
            )
        install = f"{recipe.install}\n" if recipe.install else ""
        commands.append(f"### {recipe.title}\n\n```bash\n{install}{command(recipe)}\n```\n")
        if (ROOT / "benchmarks" / "results" / f"{task}.png").exists():
            commands.append(f"![learning curves](benchmarks/results/{task}.png)\n")
    return "\n".join(rows) + "\n\n" + "\n".join(commands)


def write_readme() -> None:
    """Replace what stands between the marks in the README by the table."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}{table()}{MARKS[1]}{after}")


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.readme:
        write_readme()
    else:
        sys.exit(1 if run_all(options) else 0)
