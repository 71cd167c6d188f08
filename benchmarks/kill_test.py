"""Kill runs with SIGKILL at random moments, resume them, and compare them with the runs that were left alone.

    python benchmarks/kill_test.py --trials 100
    python benchmarks/kill_test.py --script dqn --trials 50

It compares SHA-256 sums of the weights, the optimisers, the replay buffer, the generators, the environments, the logged
scalars, the evaluations and the final result. Prints a line per trial, then trials, survivors and the first difference;
the status is 1 if there is one. The trials go to benchmarks/results/kill_test.csv, in the place of those of the same script
on the same device (with --tasks, only of the same tasks).
"""

import csv
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fingerprint import fingerprint  # noqa: E402

from steadyrl.run_folder import list_checkpoints, step_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "kill_test.csv"
FLAGS = (
    "--total-timesteps 1200 --learning-starts 300 --buffer-size 600 --batch-size 64 --hidden-sizes 64 64 --no-cuda "
    "--max-episode-steps 100 --checkpoint-frequency 60 --eval-frequency 400 --eval-episodes 1"
)
CONTINUOUS = [
    f"--env-id {env_id} --num-envs {environments}"
    for env_id in ("Pendulum-v1", "InvertedPendulum-v5", "Hopper-v4", "Ant-v5")
    for environments in ("1", "3", "1 --vectorization async", "3 --vectorization async")
]
# Those that are harder to bring back. (`cut` ones, which resume elsewhere by their nature, are no part of this.)
CONTINUOUS += [
    f"--env-id {env_id} --num-envs {environments}"
    for env_id in ("BipedalWalker-v3", "BipedalWalkerHardcore-v3", "toys:CarriesState-v0", "toys:LegacyGenerator-v0")
    for environments in ("1", "3 --vectorization async")
]
# Environments with bad habits, each of which must not hurt: `--tasks border_toys` tries them alone.
BORDER = [
    f"--env-id border_toys:{name}-v0 {flags}"
    for name, flags in (
        *(("ReusesItsArray", f"""--env-kwargs '{{"ends": "{ends}"}}'""") for ends in ("truncated", "terminated")),
        ("ReusesItsArray", "--num-envs 3"),
        ("ReusesItsArray", "--num-envs 3 --vectorization async --n-steps 3"),
        ("WritesIntoActions", ""),
        ("WritesIntoActions", "--num-envs 3 --vectorization async"),
        *(("Seeds", f"""--env-kwargs '{{"where": "{where}"}}'""") for where in ("init", "reset", "step")),
        ("SharesItsWorld", ""),
        ("SharesItsWorld", "--num-envs 3 --vectorization async"),
        ("DoesNotClose", ""),
        ("Strict", ""),
        *(("GoesElsewhere", f"""--env-kwargs '{{"where": "{where}"}}'""") for where in ("reset", "step")),
        *(("Odd", f"""--env-kwargs '{{"kind": "{kind}"}}'""") for kind in ("locked", "wide")),
    )
]
SOURCE = "another-run"  # in a task, stands for the folder of a run that ended before
# What draws from the replay buffer in another way, sees observations in another way, or begins elsewhere.
REPLAY = [
    f"--env-id {task}"
    for task in (
        "Pendulum-v1 --replay prioritized",
        "Hopper-v4 --num-envs 3 --replay prioritized --normalize-observations",
        "toys:Reach-v0 --replay hindsight",
        "toys:ReachEnding-v0 --num-envs 3 --replay hindsight --normalize-observations",
        "toys:ReachSlow-v0 --num-envs 3 --vectorization async --replay hindsight",
        f"Pendulum-v1 --num-envs 3 --vectorization async --replay uniform --normalize-observations --init-from {SOURCE}",
    )
]
TASKS = {
    "ddpg_continuous_action": CONTINUOUS + BORDER + REPLAY,
    "td3_continuous_action": [
        f"--env-id {env_id} --num-envs {environments}"
        for env_id in ("Hopper-v4", "Pendulum-v1", "Ant-v5")
        for environments in ("1", "3", "3 --vectorization async")
    ]
    + REPLAY,
    "sac_continuous_action": [
        f"--env-id {env_id} --num-envs {environments}"
        for env_id in (
            "Pendulum-v1 --num-critics 1 --alpha 0 --no-autotune",
            "Hopper-v4",
            "Ant-v5 --policy-frequency 3 --target-network-frequency 2",
            "BipedalWalker-v3",
        )
        for environments in ("1", "3", "3 --vectorization async")
    ]
    + REPLAY,
    "dqn": [  # target updates every 50 steps, so that there are some
        f"--env-id {env_id} --train-frequency 2 --target-network-frequency 50 --num-envs {environments}"
        for env_id in ("CartPole-v1", "LunarLander-v3 --double-q", "InvertedPendulum-v5 --bins 2", "BipedalWalker-v3 --bins 2")
        for environments in ("1", "3", "3 --vectorization async")
    ]
    + [f"{task} --bins 2 --train-frequency 2 --target-network-frequency 50" for task in REPLAY],
}


@dataclass
class Options:
    """Kill and resume."""

    script: Literal["ddpg_continuous_action", "td3_continuous_action", "sac_continuous_action", "dqn"] = (
        "ddpg_continuous_action"
    )
    """whose runs"""
    trials: int = 20
    """runs to kill"""
    tasks: str = ""
    """only the tasks with this in them"""
    cuda: bool = False
    """train on the CUDA device"""
    jobs: int = 2
    """runs side by side"""
    seed: int = 0
    """seed of the random choice of tasks and moments"""


def start(cwd: str, script: str, *arguments: str) -> subprocess.Popen:
    """Start the script."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
    places = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))  # the toys are in tests/
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def with_source(script: str, task: str, folder: Path) -> str:
    """A task with the folder of a finished run where it stands for one; made here, if there is none yet."""
    if SOURCE not in task:
        return task
    if not folder.exists():
        folder.mkdir()
        own = task.partition(" --init-from")[0]
        finish(start(str(folder), script, *FLAGS.split(), *shlex.split(own), "--seed", "2", "--total-timesteps", "400"))
    (run_dir,) = (folder / "runs").iterdir()
    return task.replace(SOURCE, str(run_dir))


def finish(run: subprocess.Popen) -> None:
    """Wait for the script's success."""
    output, _ = run.communicate()
    if run.returncode != 0:
        raise RuntimeError(output)


def reference(script: str, task: str) -> tuple[dict[str, str], float]:
    """The fingerprint of a run left alone, and the seconds from its first line to its end."""
    with tempfile.TemporaryDirectory() as cwd:
        run = start(cwd, script, *FLAGS.split(), *shlex.split(task))
        for line in run.stdout or ():
            if line.startswith("training on"):
                break
        begin = time.perf_counter()
        finish(run)
        return fingerprint(next(Path(cwd, "runs").iterdir())), time.perf_counter() - begin


def trial(script: str, task: str, expected: dict[str, str], after: int, delay: float) -> tuple[str, list[str]]:
    """Kill a run `delay` seconds after it began its `after`-th checkpoint, and resume it.

    Returns:
        where it was killed, and the parts that differ.
    """
    with tempfile.TemporaryDirectory() as cwd:
        run = start(cwd, script, *FLAGS.split(), *shlex.split(task))
        for line in run.stdout or ():
            if line.startswith("training on"):
                break
        run_dir = next(Path(cwd, "runs").iterdir())
        while after > 0 and run.poll() is None and not list((run_dir / "checkpoints").glob(f"{60 * after:012d}*")):
            time.sleep(0.002)
        time.sleep(delay)
        run.kill()
        run.communicate()
        finished = max(map(step_of, list_checkpoints(run_dir / "checkpoints")), default=0)
        writing = list((run_dir / "checkpoints").glob("*.tmp"))
        where = f"after checkpoint {finished}" + (", while writing one" if writing else "")
        finish(start(cwd, script, "--resume", str(run_dir)))
        found = fingerprint(run_dir)
        return where, [part for part in expected if found[part] != expected[part]]


def main(options: Options) -> int:
    """Run the trials; returns the number of runs that did not end as the one left alone."""
    choose = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as sources, ThreadPoolExecutor(options.jobs) as pool:
        chosen = [task + " --cuda" * options.cuda for task in TASKS[options.script] if options.tasks in task]
        tasks = [choose.choice(chosen) for _ in range(options.trials)]
        known = sorted(set(tasks))
        whole = {task: with_source(options.script, task, Path(sources, str(number))) for number, task in enumerate(known)}
        references = dict(zip(known, pool.map(partial(reference, options.script), whole.values()), strict=True))
        after = [choose.randrange(1200 // 60) for _ in tasks]
        delays = [choose.uniform(0, references[task][1] / 20) for task in tasks]
        rows = []
        starts = [whole[task] for task in tasks]
        runs = pool.map(partial(trial, options.script), starts, [references[task][0] for task in tasks], after, delays)
        for number, (task, (where, differences)) in enumerate(zip(tasks, runs, strict=True), 1):
            row = {"script": options.script, "trial": number, "task": task, "killed": where}
            rows.append(row | {"differs": " ".join(differences)})
            print(
                f"{number:4} {task:60} killed {where:40} {'differs: ' + ' '.join(differences) if differences else 'same'}",
                flush=True,
            )
    with open(RESULTS, newline="") as file:
        replaced = options.script, options.cuda, True
        others = [
            row
            for row in csv.DictReader(file)
            if (row["script"], "--cuda" in row["task"], options.tasks in row["task"]) != replaced
        ]
    with open(RESULTS, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(sorted(others + rows, key=lambda row: row["script"]))
    different = [row for row in rows if row["differs"]]
    print(f"{len(rows)} trials, {len(rows) - len(different)} ended bit-identical", end="; ")
    print(f"first difference: trial {different[0]['trial']}, {different[0]['differs']}" if different else "no difference")
    return len(different)


if __name__ == "__main__":
    sys.exit(1 if main(tyro.cli(Options)) else 0)
