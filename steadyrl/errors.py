"""The ways in which a run can end early."""

import traceback


class UsageError(Exception):
    """The user can correct this (a flag, a file, a missing package): one line on stderr, exit status 2."""


class TrainingError(Exception):
    """Training cannot go on (a value is not finite, the disk is full): one line on stderr, exit status 1."""


class EnvError(TrainingError):
    """An environment raised an error, or the process of an asynchronous one died or does not answer. The rest of the run
    is intact and can be saved."""


class UploadError(Exception):
    """A finished run could not be uploaded: one line on stderr, exit status 1."""


class Stopped(Exception):
    """A signal asked the run to stop; the argument is the signal's number."""


def in_one_line(error: BaseException) -> str:
    """The type and the message of an error, and the file and line that raised it. An EnvError is one line already."""
    if isinstance(error, EnvError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({where[-1].filename}, line {where[-1].lineno})" if where else ""
    try:
        what = str(error)
    except Exception:  # of a message that cannot be written
        what = "(its message cannot be shown)"
    return " ".join(f"{type(error).__name__}: {what}{place}".split())
