"""Signals ask a run to stop or to save; the run does so at the end of its step."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Sent by a scheduler as a warning, or by a user. Without a handler, either would end the process.
SAVE_SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Signals:
    """SIGTERM and SIGINT ask for a stop, SIGUSR1 and SIGUSR2 for a checkpoint.

    Schedulers and wrappers send SIGTERM twice, the second time while the run is saving: that changes nothing. A second
    SIGINT is an impatient person at the keyboard: the process exits at once.

    Attributes:
        stop, save: the number of the signal received, 0 if there was none.
    """

    def __init__(self) -> None:
        self.stop = self.save = 0
        self.interrupts = 0

    def __enter__(self) -> "Signals":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other thread
            self.previous = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS + SAVE_SIGNALS}
        return self

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts == 2:
            for process in multiprocessing.active_children():
                process.kill()
            os._exit(128 + number)
        if number in SAVE_SIGNALS:
            self.save = number
            acknowledge(number, "a checkpoint follows")
        elif not self.stop:
            self.stop = number
            acknowledge(number, "the run stops as soon as it can" + " (once more: at once)" * (number == signal.SIGINT))

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def acknowledge(number: int, what: str) -> None:
    """Say that a signal was received. (`print` must not be used here: the signal may have interrupted another one.)"""
    line = f"{signal.Signals(number).name} received: {what}\n"
    with contextlib.suppress(OSError):
        output = sys.stdout.fileno()
        os.write(output, ("\n" * os.isatty(output) + line).encode())  # a terminal shows the progress bar in this line
