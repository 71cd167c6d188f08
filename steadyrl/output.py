"""What this package prints. Nothing here raises an error: training goes on, even if nobody reads the output any more."""

import contextlib
import io
import os
import sys

from tqdm import tqdm


class Outlet(io.TextIOWrapper):
    """A standard stream with its own file descriptor. It raises no error (for a closed pipe or a full disk), it takes any text,
    and an environment cannot close it."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().flush()

    def close(self) -> None:
        pass


def guard() -> None:
    """Make the standard streams of this process outlets. Those of a notebook or a test stay as they are."""
    open_standard_files()
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)  # None, if it was closed when Python started
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if stream is None or (stream.fileno() == number and not isinstance(stream, Outlet)):
                file, encoding = io.FileIO(os.dup(number), "w"), getattr(stream, "encoding", "utf-8")
                setattr(sys, name, Outlet(file, encoding, errors="backslashreplace", line_buffering=True))


def open_standard_files() -> None:
    """Open /dev/null where a standard file is closed. Otherwise the next file opened, maybe a checkpoint, would get its number,
    and what a C library prints would go into that file."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def printable(text: str) -> str:
    """A text without control characters, which could forge another line or command a terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def say(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    show(line.replace("\n", r"\n"))


def show(text: str) -> None:
    """Print a text of several lines."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        tqdm.write("\n".join(map(printable, text.split("\n"))))


def report(error: object) -> None:
    """Print an error, as one line on stderr."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print("error:", printable(" ".join(str(error).split())), file=sys.stderr)
