"""The folder of a run: which of its files are ours, how it is made, locked while a process trains, and cleaned up.

Users may keep their own files in it. Only files whose names are exactly ours are read, moved or removed. Imports no PyTorch.
"""

import contextlib
import csv
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import filelock

from steadyrl.arguments import RunArgs, is_text
from steadyrl.errors import TrainingError, UsageError
from steadyrl.files import UNFINISHED, make_folder, shown, sync_folder
from steadyrl.output import say

LONGEST_NAME = 240  # bytes: file systems take 255, and a number may follow
CHECKPOINT = re.compile(r"\d{12}\.[0-9a-f]{64}\.pt")  # <global_step>.<SHA-256 of the file>.pt
MODEL = re.compile(r"(best_)?model\.pt")
INITIAL_MODEL = re.compile(r"initial_model\.pt")  # of the run that --init-from names
RESULT = re.compile(r"evaluation(-\d+)*\.json")  # evaluation.json is the newest; older ones have their step in the name
RESULTS = re.compile(rf"{RESULT.pattern}|evaluations\.csv")
# What training alone writes, under one lock: what a killed process left of it can be removed.
TRAINING = re.compile(
    rf"args\.json|{MODEL.pattern}|{INITIAL_MODEL.pattern}|{RESULTS.pattern}|{CHECKPOINT.pattern}|\d{{12}}\.pt"
)


def ours(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """The files in a folder, or links to files, whose full names match a pattern, sorted; none if there is no such folder.

    A link that leads nowhere counts: what it leads to may be on a disk that is not there now.

    Raises:
        OSError: if the folder cannot be read.
    """
    try:
        paths = [path for path in folder.iterdir() if names.fullmatch(path.name)]
        return sorted(path for path in paths if path.is_file() or not path.exists())
    except FileNotFoundError:
        if folder.is_symlink():
            raise
        return []


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was saved."""
    return int(checkpoint.name.partition(".")[0])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return ours(folder, CHECKPOINT)[::-1]


def read_evaluations(folder: Path | None) -> list[tuple[int, float]]:
    """Step and mean return of each evaluation in a run folder, if there is one with a readable table."""
    if folder is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, csv.Error), open(folder / "evaluations.csv") as file:
            return [(int(row["global_step"]), float(row["mean"])) for row in csv.DictReader(file)]
    return []


def results_of(folder: Path) -> list[dict[str, Any]]:
    """The results in a run folder of the final evaluations at the end of a training, the newest last."""
    results = []
    for path in ours(folder, RESULT):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # a file that a user edited
            result = json.loads(path.read_text())
            step, mean = result["global_step"], result["mean"]  # --evaluate, once, had no step
            if isinstance(step, int) and isinstance(mean, int | float) and math.isfinite(mean):
                results.append(((step, str(result["date"])), result))
    return [result for _, result in sorted(results, key=lambda item: item[0])]


def final_result(folder: Path, args: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run, None for any other. Finished: the training ended, at its last step or its target.

    Args:
        args: the run's arguments.
    """
    for result in results_of(folder)[-1:]:
        step, target = result["global_step"], args.get("target_return")
        reached = target is not None and any(at == step and mean >= target for at, mean in read_evaluations(folder))
        if step >= args["total_timesteps"] or reached:
            return result
    return None


def make_run_folder(args: RunArgs, output: Path | None = None) -> Path:
    """A new folder <output>/runs/<env_id>__<exp_name>__<seed>__<time>, shared with no other run of the same second.

    Raises:
        UsageError: if it cannot be made.
    """
    runs = (output or Path(args.output).absolute()) / "runs"
    if not is_text(runs):
        raise UsageError(f"--output {args.output}: must be a path in UTF-8, because TensorBoard needs that")
    env_name = re.sub(r"[^\w.+-]", "-", args.env_id)  # ids may hold a "/" or a ":"
    stem = f"{env_name}__{args.exp_name}__{args.seed}__{int(time.time())}"
    names = (f"{stem}-{number}" if number else stem for number in count())
    for flag, part in [("--exp-name", stem), *(("--output", part) for part in runs.parts)]:
        if len(part.encode()) > LONGEST_NAME:
            raise UsageError(f"{flag}: the folder {part[:60]}... must have a name of at most {LONGEST_NAME} bytes")
    try:
        make_folder(runs)
        while True:
            folder = runs / next(names)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                sync_folder(runs)
                return folder
    except OSError as error:
        raise UsageError(f"the run folder {shown(runs / stem)} cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def lock_folder(folder: Path, new: bool) -> Iterator[Callable[[], None]]:
    """Lock the run's folder for this process: no other process can train the run while this one exists.

    Args:
        new: it is the folder of a new run, and is removed if it cannot be locked.

    Returns:
        a function that raises a TrainingError if the folder is not there any more, or if another process has locked it.

    Raises:
        UsageError: if another process has it, if it is read-only, or if its file system has no locks.
    """
    lock = filelock.FileLock(folder / ".lock", fallback_to_soft=False)  # a soft one outlives a killed process
    try:
        lock.acquire(timeout=0.5)  # not at once: a sweep that looks whether a run is locked has the lock for a moment
    except filelock.Timeout:
        raise UsageError(f"--resume {shown(folder)}: another process is training this run") from None
    except OSError as error:  # ENOSYS where a file system has no locks
        what = f"--output: {shown(folder)}" if new else f"--resume {shown(folder)}"
        if new:
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()
        raise UsageError(f"{what}: must be a folder where files can be written and locked ({error.strerror})") from error
    locked = os.stat(folder / ".lock")

    def check() -> None:
        nonlocal locked
        with contextlib.suppress(OSError):
            if os.path.samestat(locked, os.stat(folder / ".lock")):
                return
        if not folder.is_dir():
            raise TrainingError(
                f"{shown(folder)} was moved or removed while its run trained, so nothing more can be saved. If it was moved, "
                "its checkpoints moved with it: resume it in its new place"
            )
        lock.release()  # the file alone was removed, by somebody who cleaned up
        try:
            lock.acquire(timeout=0.5)
            locked = os.stat(folder / ".lock")
        except filelock.Timeout:
            raise TrainingError(f"{shown(folder)}: its .lock was removed, and another process trains this run now") from None
        except OSError:  # a full disk: it is tried again at the next check
            pass

    try:
        yield check
    finally:
        lock.release()


def remove_unfinished(folder: Path) -> None:
    """Remove unfinished files. A training that was killed while it wrote a file leaves one in its folder."""
    for path in ours(folder, UNFINISHED) + ours(folder / "checkpoints", UNFINISHED):
        if TRAINING.fullmatch(path.name[: -len(".0123456789abcdef.tmp")]):
            with contextlib.suppress(OSError):  # whatever writes here next says more
                path.unlink()


def start_again(folder: Path) -> None:
    """Before a start at step 0, move the models and evaluations of a run without a checkpoint to a new folder."""
    left = ours(folder, MODEL) + ours(folder, RESULTS)
    say(f"{shown(folder)} has no checkpoint: training starts again at step 0")
    if left:
        aside = next(path for n in count(1) if not os.path.lexists(path := folder / f"before-{n}"))
        try:
            aside.mkdir()
            for path in left:
                path.rename(aside / path.name)
            sync_folder(folder)
        except OSError as error:
            raise TrainingError(f"{shown(aside)}: what was left could not be moved there ({error.strerror})") from error
        say(f"what was there is kept in {shown(aside)}: {', '.join(sorted(path.name for path in left))}")
