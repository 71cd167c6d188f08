"""Writing files: complete or not at all, and what happens when the disk is full."""

import contextlib
import itertools
import os
import threading
import time
import unittest.mock
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.errors import TrainingError

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


def unused(path: Path) -> Path:
    """A path that does not exist: this one or, with a number before its suffix, <stem>-2, <stem>-3 and so on."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([path], numbered) if not path.exists())


def remove_unfinished(folder: Path) -> None:
    """Remove what a process left in a run's folder that was killed while it wrote a file."""
    for path in (*folder.glob("*.*.tmp"), *folder.glob("checkpoints/*.*.tmp")):
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a rename in it survives a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriteOrWarn:
    """Calls functions that write files. If one fails, it prints a warning; the third time in a row for a file, it raises.

    Raises:
        TrainingError: at that third time.
    """

    def __init__(self) -> None:
        self.failures: dict[Path, int] = defaultdict(int)

    def __call__(self, path: Path, write: Callable, *values: Any) -> None:
        try:
            write(*values)
            self.failures[path] = 0
        except OSError as error:
            self.failures[path] += 1
            tqdm.write(f"warning: {path} could not be written ({error.strerror or error})")
            if self.failures[path] == WRITE_ATTEMPTS:
                raise TrainingError(f"{path} could not be written {WRITE_ATTEMPTS} times in a row: {error}") from error


class EventWriter(SummaryWriter):
    """TensorBoard's writer, except that it survives a full disk: it warns, and goes on with a new file.

    Args:
        folder: the run's folder.
        global_step: TensorBoard shall ignore events after this step: a process that was killed may have left some.
        write_or_warn: counts the failures.
    """

    def __init__(self, folder: Path, global_step: int, write_or_warn: WriteOrWarn):
        self.write_or_warn = write_or_warn
        # When TensorBoard's thread cannot write, it raises the error twice: as an exception of the thread, which would
        # print a traceback, and in the main thread, where we handle it.
        self.excepthook = threading.excepthook
        threading.excepthook = lambda failure: issubclass(failure.exc_type, OSError) or self.excepthook(failure)
        # TensorBoard respects the purge step of a later file only if the first file of the folder had one too.
        super().__init__(folder, purge_step=global_step + 1)

    def _get_file_writer(self):
        """Open a file if none is open. TensorBoard reads the files of a folder in the order of their names, which begin with
        the second of the clock: this one gets a later second than all others, whatever the clock says."""
        if self.file_writer is None:
            seconds = (path.name.split(".")[3] for path in Path(self.log_dir).glob("events.out.tfevents.*"))
            last = max((int(second) for second in seconds if second.isdigit()), default=0)
            times = itertools.chain([max(time.time(), last + 1)], iter(time.time, None))  # TensorBoard's first call names it
            with unittest.mock.patch.object(event_file_writer, "time", SimpleNamespace(time=lambda: next(times))):
                super()._get_file_writer()
        return self.file_writer

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        self.write_or_warn(Path(self.log_dir, "events.out.tfevents"), self._add_scalar, tag, value, global_step)

    def _add_scalar(self, *event) -> None:
        try:
            super().add_scalar(*event)
        except OSError:
            self.file_writer = self.all_writers = self.purge_step = None  # the next event opens a new file
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()
        threading.excepthook = self.excepthook
