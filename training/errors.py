"""The ways in which a run can end before its time."""


class UsageError(Exception):
    """The user can put this right (a flag, a file, a missing package): one line on stderr, exit status 2."""


class TrainingError(Exception):
    """Training cannot go on (a value is not finite, the disk is full): one line on stderr, exit status 1."""


class WorkerError(TrainingError):
    """A process of the asynchronous environments died or does not answer."""


class Stopped(Exception):
    """A signal asked the run to stop; the argument is the signal's number."""
