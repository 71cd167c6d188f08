"""Writing files: complete or not at all, under names that only this writer has, and what happens when the disk is full."""

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from steadyrl.output import say

WARNING_INTERVAL = 60.0  # seconds between two warnings about one file
UNFINISHED = re.compile(r".+\.[0-9a-f]{16}\.tmp")  # a file that is being written, or whose writer was killed


class Writer(io.FileIO):
    """A new file, which remembers why it could not be written: torch raises a RuntimeError of its own in that case."""

    error: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]  # IO's promises less
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def new_file(path: Path, write: Callable[[BinaryIO], Any]) -> Iterator[Path]:
    """Let `write` fill a new file next to `path` and flush it to the disk. Inside, it can be renamed; otherwise it is removed.

    Raises:
        OSError: if it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        raw = Writer(unfinished, "xb")  # a new name, and never through a link
        try:
            with io.BufferedWriter(raw) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:
            if raw.error is not None:
                raise raw.error from error
            raise
        yield unfinished
    finally:
        unfinished.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a new file that replaces `path` when it is complete and on the disk; an error changes nothing.

    Raises:
        OSError: if it cannot be written.
    """
    with new_file(path, write) as unfinished:
        unfinished.replace(path)
        sync_folder(path.parent)


def take_name(path: Path) -> Path:
    """Make an empty file under an unused name: this one or <stem>-2, <stem>-3 and so on. No other process gets it too."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            place = path.with_stem(f"{path.stem}-{number}") if number > 1 else path
            place.open("xb").close()
            break
    return place


def write_new(path: Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Let `write` fill a file with the name that `take_name` gives it.

    Raises:
        OSError: if it cannot be written.
    """
    place = take_name(path)
    try:
        replace_file(place, write)
    except BaseException:
        place.unlink()
        raise
    return place


def json_of(values: dict[str, Any]) -> bytes:
    """These values as a JSON file."""
    return json.dumps(values, indent=2).encode() + b"\n"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a file by these values."""
    replace_file(path, lambda file: file.write(json_of(values)))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a file by a table of these rows, with a column for each of their names."""
    text = io.StringIO()
    table = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
    table.writeheader()
    table.writerows(rows)
    replace_file(path, lambda file: file.write(text.getvalue().encode()))


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a new name in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing; they survive a power cut.

    Raises:
        OSError: if it cannot be made.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def shown(path: Path) -> Path:
    """A path as the user would give it: relative to the working directory, if it is inside it."""
    with contextlib.suppress(OSError, ValueError):  # the working directory was removed, or the path is elsewhere
        return path.relative_to(Path.cwd())
    return path


class WriteOrWarn:
    """Calls functions that write files. If one fails, it prints a warning, once a minute for each file.

    Returns:
        whether it was written.
    """

    def __init__(self) -> None:
        self.warned: dict[Path, float] = {}
        self.reason = ""  # of the last failure

    def __call__(self, path: Path, write: Callable, *values: Any) -> bool:
        try:
            write(*values)
            return True
        except OSError as error:
            now, self.reason = time.monotonic(), error.strerror or str(error)
            if now >= self.warned.get(path, -WARNING_INTERVAL) + WARNING_INTERVAL:
                self.warned[path] = now
                say(f"warning: {shown(path)} could not be written ({self.reason})")
            return False
