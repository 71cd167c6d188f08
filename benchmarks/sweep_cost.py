"""What a sweep costs apart from its runs: its own time for a run, time for a table of all, files and bytes that a run leaves.

    python benchmarks/sweep_cost.py

The first figures are from runs of a script that ends at once, one after the other by a sweep and by a plain loop; the next are
the processor time of the whole command with --status, over copies of the folder of a run of the default task: with the plan
of the sweep in a file, as after its start, and without one, when the script must be imported. The last ones are that run's.
Prints the figures and writes them to benchmarks/results/sweep_cost.csv.
"""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from steadyrl import sweep  # noqa: E402

SCRIPT, QUICK = ROOT / "ddpg_continuous_action.py", ROOT / "tests" / "quick_script.py"
RESULTS = ROOT / "benchmarks" / "results" / "sweep_cost.csv"
STEPS, BETWEEN = 12_000, 4_000  # of the run, and between two of its checkpoints; the last two are from after its first update
RUN = f"--total-timesteps {STEPS} --learning-starts 7500 --checkpoint-frequency {BETWEEN} --eval-frequency {BETWEEN} --no-cuda"


@dataclass
class Options:
    """Measure what a sweep costs."""

    runs: int = 200
    """runs of the sweep, and rows of the table"""


def time_of(work) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def processor_time(command: list[str]) -> float:
    """Seconds of processor time that a command takes: of an idle machine, the time until it ends."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def own_time(runs: int) -> tuple[float, float]:
    """Seconds for a run that a sweep takes longer than a plain loop over the same commands, and of its own processor time."""
    Path("started").unlink(missing_ok=True)
    kinds = {
        name: [
            {"env_id": "Env-v0", "exp_name": name, "seed": seed, "total_timesteps": 1, "does": "finish"} for seed in range(runs)
        ]
        for name in ("sweep", "loop")
    }
    jobs = [sweep.Job(QUICK, [json.dumps(args)], args) for args in kinds["sweep"]]
    commands = [[sys.executable, str(QUICK), json.dumps(args)] for args in kinds["loop"]]
    sweep.LOGS.mkdir(parents=True)
    before = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        by_sweep = time_of(lambda: sweep.run_here(jobs, jobs, workers=1))
    processor = time.process_time() - before
    by_loop = time_of(lambda: [subprocess.run(words, check=True, stdout=subprocess.DEVNULL) for words in commands])
    return (by_sweep - by_loop) / runs, processor / runs


def sizes(folder: Path) -> dict[str, list[int]]:
    """The sizes of the files in a run folder, by what they are."""
    found: dict[str, list[int]] = {"checkpoints": [], "models": [], "TensorBoard": [], "others": []}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        kind = "checkpoints" if path.parent.name == "checkpoints" else "models" if path.name.endswith("model.pt") else "others"
        found["TensorBoard" if "tfevents" in path.name else kind].append(path.stat().st_size)
    return found


def main(options: Options) -> None:
    """Measure, print and write the figures."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # where a sweep in another folder finds the package
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        own, processor = own_time(options.runs)
        rows = [("own time of a sweep for a run", 1000 * own, "ms"), ("its processor time", 1000 * processor, "ms")]
        shutil.rmtree("runs")
        words = [sys.executable, "-m", "steadyrl.sweep", "--script", str(SCRIPT), "--engine", "local", "--settings", f"={RUN}"]
        subprocess.run([*words, "--num-seeds", "1"], check=True, stdout=subprocess.DEVNULL)
        (folder,) = (path.parent for path in Path("runs").glob("*/evaluation.json"))
        settings = json.loads((folder / "args.json").read_text())
        for seed in range(2, options.runs + 1):
            copy = shutil.copytree(folder, str(folder).replace("__1__", f"__{seed}__"), copy_function=os.link)
            (Path(copy) / "args.json").unlink()
            (Path(copy) / "args.json").write_text(json.dumps(settings | {"args": settings["args"] | {"seed": seed}}))
        command = [*words, "--num-seeds", str(options.runs), "--status"]
        unplanned = processor_time(command)
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert f"{options.runs} runs: {options.runs} finished" in table, table
        rows += [
            (f"--status of {options.runs} runs", processor_time(command), "s"),
            ("the same, with no plan of this sweep", unplanned, "s"),
        ]
        found = sizes(folder)
        rows.append(("files of a run, its log among them", 1 + sum(map(len, found.values())), "files"))
        rows += [(f"{name} of a run of {STEPS:,} steps", sum(found[name]) / 1e6, "MB") for name in found]
        first, last = sorted((folder / "checkpoints").glob("*.pt"))
        growth = (last.stat().st_size - first.stat().st_size) / BETWEEN
        rows.append(("a transition in a checkpoint", growth, "bytes"))
        rows.append(("a checkpoint of 1,000,000 transitions", (last.stat().st_size + (1_000_000 - STEPS) * growth) / 1e6, "MB"))
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        csv.writer(file).writerows([("what", "value", "unit"), *((name, f"{value:.3g}", unit) for name, value, unit in rows)])
    for name, value, unit in rows:
        print(f"{name:48} {value:8.3g} {unit}")


if __name__ == "__main__":
    main(tyro.cli(Options))
