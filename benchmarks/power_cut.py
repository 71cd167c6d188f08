"""Cut the power of a machine that trains, again and again, and compare what its disk brings back with a run left alone.

    python benchmarks/power_cut.py --trials 30          # as root: it mounts file systems

A run trains in a file system of its own, ext4 in a file behind a loop device. At a random moment that file is copied. The
copy holds what had reached the disk, and nothing that the system had in memory only. (The file system is mounted so that it may
keep data there for five minutes.) The copy is mounted, as after the start of the machine, and the run in it is resumed to its
end. The parts of fingerprint.py are compared, TensorBoard's scalars among them. Prints a line for each trial and the figure.
The status is 1 if one differs. The trials go to benchmarks/results/power_cut.csv.
"""

import contextlib
import csv
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fingerprint import fingerprint  # noqa: E402
from kill_test import finish, start  # noqa: E402

from steadyrl.run_folder import list_checkpoints, step_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "power_cut.csv"
SCRIPT = "ddpg_continuous_action"
FLAGS = (
    "--env-id Pendulum-v1 --total-timesteps 1500 --learning-starts 300 --buffer-size 600 --batch-size 64 --hidden-sizes 64 64 "
    "--no-cuda --checkpoint-frequency 70 --eval-frequency 110 --eval-episodes 1"
).split()
SIZE = 48  # megabytes of the disk


@dataclass
class Options:
    """Cut the power."""

    trials: int = 30
    """power cuts"""
    seed: int = 0
    """of the moments"""


@contextlib.contextmanager
def mounted(disk: Path) -> Iterator[Path]:
    """A disk, mounted in a folder of its own."""
    place = disk.with_suffix(".mounted")
    place.mkdir()
    subprocess.run(["mount", "-o", "loop,commit=300", str(disk), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def trial(number: int, moment: float, expected: dict[str, str], work: Path) -> tuple[str, list[str]]:
    """Cut the power `moment` seconds after a run has begun.

    Returns:
        where it was, and the parts that differ.
    """
    disk, copy = work / f"{number}.disk", work / f"{number}.copy"
    with open(disk, "wb") as file:
        file.truncate(SIZE * 2**20)
    subprocess.run(["mkfs.ext4", "-q", str(disk)], check=True)
    with mounted(disk) as place:
        run = start(str(place), SCRIPT, *FLAGS)
        for line in run.stdout or ():
            if line.startswith("training on"):
                break
        time.sleep(moment)
        run.send_signal(signal.SIGSTOP)  # the copy takes a while
        shutil.copyfile(disk, copy)
        run.kill()
        run.communicate()
        written = newest(place)
    with mounted(copy) as place:
        folders = list((place / "runs").glob("*/args.json"))
        if not folders:
            return f"after checkpoint {written}, nothing was on the disk", [] if written == 0 else ["everything"]
        found = newest(place)
        finish(start(str(place), SCRIPT, "--resume", str(folders[0].parent)))
        parts = fingerprint(folders[0].parent)
    disk.unlink()
    copy.unlink()
    return f"after checkpoint {written}, {found} came back", [part for part in expected if parts[part] != expected[part]]


def newest(place: Path) -> int:
    """The step of the newest checkpoint on a disk."""
    return max(
        (step_of(path) for folder in (place / "runs").glob("*/checkpoints") for path in list_checkpoints(folder)), default=0
    )


def main(options: Options) -> int:
    """Run the trials; returns the number of runs that did not end as the one left alone."""
    choose, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = start(folder, SCRIPT, *FLAGS)
        for line in run.stdout or ():
            if line.startswith("training on"):
                break
        begin = time.perf_counter()
        finish(run)
        seconds = time.perf_counter() - begin
        expected = fingerprint(next((work / "runs").iterdir()))
        for number in range(1, options.trials + 1):
            where, differs = trial(number, choose.uniform(0, seconds), expected, work)
            rows.append({"trial": number, "cut": where, "differs": " ".join(differs)})
            print(f"{number:4} cut {where:60} {'differs: ' + ' '.join(differs) if differs else 'same'}", flush=True)
    with open(RESULTS, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    different = [row for row in rows if row["differs"]]
    print(f"{len(rows)} power cuts, {len(rows) - len(different)} ended bit-identical")
    return len(different)


if __name__ == "__main__":
    sys.exit(1 if main(tyro.cli(Options)) else 0)
