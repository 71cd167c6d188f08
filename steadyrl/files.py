"""Writing files: complete or not at all, and what happens when the disk is full."""

import csv
import io
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from steadyrl.errors import TrainingError

WRITE_ATTEMPTS = 3  # writes of one file that may fail in a row (a full disk) before the run stops


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a new file, then flush it to the disk."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a new file that replaces `path` when it is complete and on the disk; an error changes nothing."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        write_file(unfinished, write)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a file by these values."""
    replace_file(path, lambda file: file.write(json.dumps(values, indent=2).encode() + b"\n"))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a file by a table of these rows, under the names that they share."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    replace_file(path, lambda file: file.write(text.getvalue().encode()))


def remove_unfinished(folder: Path) -> None:
    """Remove what a process left in a run's folder that was killed while it wrote a file."""
    for path in (*folder.glob("*.*.tmp"), *folder.glob("checkpoints/*.*.tmp")):
        path.unlink()


def unused(path: Path) -> Path:
    """A path that does not exist: this one or, with a number before its suffix, <stem>-2, <stem>-3 and so on."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([path], numbered) if not path.exists())


def shown(path: Path) -> Path:
    """A path as the user would give it: from the working directory, if it is there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a rename in it survives a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriteOrWarn:
    """Calls functions that write files. If one fails, it prints a warning; the third time in a row for a file, it raises.

    Returns:
        whether it was written.

    Raises:
        TrainingError: at that third time.
    """

    def __init__(self) -> None:
        self.failures: dict[Path, int] = defaultdict(int)

    def __call__(self, path: Path, write: Callable, *values: Any) -> bool:
        try:
            write(*values)
            self.failures[path] = 0
            return True
        except OSError as error:
            self.failures[path] += 1
            tqdm.write(f"warning: {shown(path)} could not be written ({error.strerror or error})")
            if self.failures[path] == WRITE_ATTEMPTS:
                raise TrainingError(f"{shown(path)} could not be written {WRITE_ATTEMPTS} times in a row: {error}") from error
            return False
