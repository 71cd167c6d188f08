"""Disturb a sweep on a real SLURM in every way that a cluster knows, and compare its runs with runs left alone.

    apt-get install slurm-wlm munge; pip install submitit
    python benchmarks/chaos.py --runs 20

Starts a SLURM of one node in a temporary folder, submits the sweep with a time limit of two minutes, and hits its runs at
random: preemption by another job, SIGUSR2, `scancel`, SIGKILL or SIGHUP to the script, SIGKILL to the node's slurmd (started
again at once, or after the node was given up), an evaluation of the unfinished run, a disk that is full for some seconds (if a
file system can be mounted, for which it takes root), and the time limit. After each the same command is given again. Compared
with undisturbed runs on this machine are the bytes of model.pt, best_model.pt and evaluations.csv and the returns of the final
evaluation. Prints a line for each run and the figure; the status is 1 if a run differs. The rows go to
benchmarks/results/chaos.csv.
"""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import submitit
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from one_node_slurm import missing, one_node_slurm, start_slurmd, stop_daemon  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "chaos.csv"
FLAGS = (
    "--learning-starts 300 --buffer-size 2000 --batch-size 64 --hidden-sizes 64 64 --no-cuda "
    "--eval-frequency 1000 --eval-episodes 1 --checkpoint-frequency 400"
)
SETTINGS = {"one": "--num-envs 1", "two": "--num-envs 2 --gradient-steps -1"}
FULL, DISK = 4, 256  # seconds of a full disk; megabytes of it
GIVEN_UP = 25  # seconds without its slurmd after which SLURM gives the node up (SlurmdTimeout is 20)


@dataclass
class Options:
    """Disturb runs and compare them."""

    runs: int = 20
    """runs in all"""
    hits: int = 3
    """times that each is hit at least, apart from the time limit"""
    steps: int = 5_000
    """environment steps of a run; too few and it ends before it is hit"""
    scripts: tuple[Path, ...] = (ROOT / "ddpg_continuous_action.py", ROOT / "sac_continuous_action.py")
    """the training scripts, which share the runs"""
    cpus: int = 4
    """jobs side by side"""
    seed: int = 0
    """of the choice of hits and moments"""


class Chaos:
    """The disturber of the sweeps in the working directory; `hits[name]` counts what each run has suffered."""

    def __init__(self, options: Options, commands: list[list[str]], slurm: Path):
        self.options, self.commands, self.slurm = options, commands, slurm
        self.choose = random.Random(options.seed)
        self.hits: dict[str, Counter[str]] = defaultdict(Counter)

    def submit(self) -> None:
        """Give the commands of the sweeps (again)."""
        for command in self.commands:
            subprocess.run([*command, "--engine", "slurm", "--time", "2"], check=False, stdout=subprocess.DEVNULL)

    def jobs_of_slurm(self) -> int:
        """How many jobs are queued or running."""
        listed = subprocess.run(["squeue", "-h", "--array", "-p", "low"], check=True, capture_output=True, text=True)
        return len(listed.stdout.splitlines())

    def running(self) -> dict[str, str]:
        """The jobs whose scripts are being run: name of the run by SLURM's number."""
        listed = subprocess.run(
            ["squeue", "-h", "--array", "-t", "RUNNING", "-p", "low", "-o", "%i"], check=True, capture_output=True, text=True
        )
        jobs: dict[str, Any] = {number: submitit.SlurmJob("runs/.sweep/slurm", number) for number in listed.stdout.split()}
        return {number: job.submission().function.name for number, job in jobs.items()}

    def hit(self) -> None:
        """Disturb, in one way, the run that was hit least, or all that are running."""
        running = self.running()
        if not running:
            return
        fewest = min(self.hits[name].total() for name in running.values())
        number, name = self.choose.choice([pair for pair in running.items() if self.hits[pair[1]].total() == fewest])
        kinds = {"SIGUSR2": 6, "scancel": 6, "script killed": 6, "SIGHUP": 3, "evaluated": 4, "preempted": 3}
        kinds |= {"slurmd killed": 2, "node given up": 1, "disk full": 3 * os.path.ismount(".")}
        (kind,) = self.choose.choices(list(kinds), list(kinds.values()))
        if kind == "SIGUSR2":
            subprocess.run(["scancel", "--signal=USR2", number], check=False)
        elif kind == "scancel":
            subprocess.run(["scancel", number], check=False)
        elif kind in ("script killed", "SIGHUP"):
            if not self.signal_script(name, signal.SIGHUP if kind == "SIGHUP" else signal.SIGKILL):
                return
        elif kind == "evaluated":
            if not self.evaluate(name):
                return
        elif kind == "disk full":
            fill(Path("filler"))
            time.sleep(FULL)
            Path("filler").unlink()
        elif kind == "preempted":
            job = ["sbatch", "-p", "high", "-c", str(self.options.cpus), "-o", "/dev/null", "--wrap", "sleep 1"]
            subprocess.run(job, check=True, stdout=subprocess.DEVNULL)
        else:
            stop_daemon(self.slurm / "slurmd.pid", signal.SIGKILL)
            time.sleep(0 if kind == "slurmd killed" else GIVEN_UP)
            start_slurmd(self.slurm)
        everyone = kind in ("preempted", "slurmd killed", "node given up", "disk full")
        for hit in running.values() if everyone else [name]:
            self.hits[hit][kind] += 1
        print(f"{time.strftime('%H:%M:%S')} {kind}: {', '.join(running.values()) if everyone else name}", flush=True)

    def evaluate(self, name: str) -> bool:
        """Evaluate what a run has so far; whether there was anything."""
        models = sorted(Path("runs").glob(f"{name}__*/model.pt"))
        if not models or (models[-1].parent / "evaluation.json").exists():
            return False
        script = next(path for path in self.options.scripts if path.stem == name.split("__")[1].rpartition("-")[0])
        command = [sys.executable, str(script), "--evaluate", str(models[-1].parent), "--final-episodes", "1"]
        return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0

    def signal_script(self, name: str, number: int) -> bool:
        """Send a signal to the script of a run; whether there was one."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or [""]
            with contextlib.suppress(psutil.Error):
                env_id, exp_name, seed = name.split("__")
                flags = {"--env-id": env_id, "--exp-name": exp_name, "--seed": seed}
                first = all(
                    flag in words and words[len(words) - words[::-1].index(flag)] == value for flag, value in flags.items()
                )
                resumed = any(word.startswith(f"runs/{name}__") for word in words)
                if (first or resumed) and process.cwd() == os.getcwd():
                    process.send_signal(number)
                    return True
        return False

    def unfinished(self) -> int:
        """How many runs have no final result."""
        return self.options.runs - len(list(Path("runs").glob("*/evaluation.json")))

    def run(self) -> None:
        """Disturb, and give the command again and again, until every run is finished."""
        self.submit()
        with ThreadPoolExecutor(1) as beside:
            submitted = beside.submit(self.submit)
            while self.unfinished():
                time.sleep(self.choose.uniform(1, 4))
                with contextlib.suppress(subprocess.CalledProcessError, AssertionError):  # a job that ended just now
                    if any(self.hits[name].total() < self.options.hits for name in self.running().values()):
                        self.hit()
                if submitted.done() and self.jobs_of_slurm() < self.unfinished():
                    submitted.result()
                    submitted = beside.submit(self.submit)


def fill(filler: Path) -> None:
    """Leave no room on the disk where this file is."""
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass


def fingerprint(folder: Path) -> dict[str, bytes | list[float]]:
    """What must be equal of a run."""
    files = {name: (folder / name).read_bytes() for name in ("model.pt", "best_model.pt", "evaluations.csv")}
    return files | {"returns": json.loads((folder / "evaluation.json").read_text())["returns"]}


def folders() -> dict[str, Path]:
    """The finished runs of the working directory by name, without the time."""
    return {path.parent.name.rpartition("__")[0]: path.parent.resolve() for path in Path("runs").glob("*/evaluation.json")}


def main(options: Options) -> int:
    """Run the sweeps undisturbed and disturbed; returns the exit status."""
    seeds = options.runs // (len(options.scripts) * len(SETTINGS))
    options.runs = seeds * len(options.scripts) * len(SETTINGS)
    settings = [f"{name}={FLAGS} --total-timesteps {options.steps} {flags}" for name, flags in SETTINGS.items()]
    common = ["--env-ids", "Pendulum-v1", "--settings", *settings, "--num-seeds", str(seeds)]
    sweep = [sys.executable, "-m", "steadyrl.sweep"]
    commands = [[*sweep, "--script", str(path.resolve()), *common] for path in options.scripts]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # where the sweeps and the jobs of SLURM find the package
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.chdir(work))
        for name in ("alone", "disturbed"):
            (work / name).mkdir()
        os.chdir(work / "alone")
        for command in commands:
            subprocess.run([*command, "--engine", "local"], check=True)
        expected = folders()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(work / "disturbed")]
        if subprocess.run(mount, check=False).returncode == 0:
            stack.callback(subprocess.run, ["umount", "-l", str(work / "disturbed")], check=True)
        os.chdir(work / "disturbed")
        stack.enter_context(one_node_slurm(work / "slurm", options.cpus))
        chaos = Chaos(options, commands, work / "slurm")
        chaos.run()
        found = folders()
        requeued = sum(path.read_text().count("Caught signal SIGUSR2") for path in Path("runs/.sweep/slurm").glob("*.out"))
        time_limits = requeued - sum(hits["SIGUSR2"] for hits in chaos.hits.values())
        rows = []
        for name in sorted(expected):
            one, other = fingerprint(expected[name]), fingerprint(found[name])
            differs = [part for part in one if one[part] != other[part]]
            hits = chaos.hits[name]
            rows.append({"run": name, "hits": hits.total()} | {"kinds": dict(hits), "differs": " ".join(differs)})
            print(f"{name:45} {hits.total():3} hits  {'differs: ' + ' '.join(differs) if differs else 'same'}")
        shutil.rmtree(work / "alone")
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    same = sum(not row["differs"] for row in rows)
    kinds: Counter[str] = sum(chaos.hits.values(), Counter())
    print(f"{same} of {len(rows)} disturbed runs ended bit-identical to undisturbed ones")
    print(f"hits: {', '.join(f'{kind} {number}' for kind, number in kinds.items())}; saved at the time limit {time_limits}")
    totals = [chaos.hits[name].total() for name in expected]
    print(f"hits of a run: {min(totals)} to {max(totals)}")
    return same < len(rows)


if __name__ == "__main__":
    if missing():
        print(f"skipped: {', '.join(missing())} not found, install slurm-wlm and munge")
    else:
        sys.exit(main(tyro.cli(Options)))
