"""The folder of a run: made once, locked while a process trains, and put in order for a start without a checkpoint."""

import contextlib
import itertools
import re
import time
from pathlib import Path

import filelock

from steadyrl.arguments import RunArgs
from steadyrl.errors import UsageError
from steadyrl.files import shown


def make_run_folder(args: RunArgs, output: Path | None = None) -> Path:
    """A new folder <output>/runs/<env_id>__<exp_name>__<seed>__<time>, shared with no other run of the same second.

    Raises:
        UsageError: if it cannot be made.
    """
    env_name = re.sub(r"[^\w.+-]", "-", args.env_id)  # ids may hold a "/" or a ":"
    stem = f"{env_name}__{args.exp_name}__{args.seed}__{int(time.time())}"
    runs = (output or Path(args.output).absolute()) / "runs"
    names = (f"{stem}-{number}" if number else stem for number in itertools.count())
    try:
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            folder = runs / next(names)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UsageError(f"the run folder {shown(runs / stem)} cannot be made: {error.strerror}") from error


def start_again(folder: Path) -> None:
    """Move what a run without a checkpoint left, its models and evaluations, out of the way of a start at step 0."""
    left = [*folder.glob("*model.pt"), *folder.glob("evaluation*")]
    print(f"{shown(folder)} has no checkpoint: training starts again at step 0")
    if left:
        aside = next(path for n in range(1, 1_000_000) if not (path := folder / f"before-{n}").exists())
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
        print(f"what was there is kept in {shown(aside)}: {', '.join(sorted(path.name for path in left))}")


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Take the run's folder for this process: no other process can train the run while this one lives.

    Raises:
        UsageError: if another process has it.
    """
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"--resume {shown(folder)}: another process is training this run") from None
    return lock
