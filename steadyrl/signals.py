"""Signals ask a run to stop or to save; the run does so at the end of its step."""

import _signal  # type: ignore[import-not-found]  # its getsignal takes 0.04 microseconds, that of `signal` 7; each step asks
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# SIGHUP: the terminal was closed, or a connection lost. nohup has it ignored, and then it stays ignored.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
# Sent by a scheduler as a warning, or by a user. Without a handler, either would end the process.
SAVE_SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
# What these do is the same after an environment. SIGPIPE could end the process when nobody reads its output. If SIGCHLD is
# ignored, nobody learns that a worker has ended.
KEPT_SIGNALS = *STOP_SIGNALS, *SAVE_SIGNALS, signal.SIGPIPE, signal.SIGCHLD
PATIENCE = 10.0  # seconds for closing an environment after a signal to stop


class Signals:
    """SIGTERM, SIGINT and SIGHUP ask for a stop, SIGUSR1 and SIGUSR2 for a checkpoint.

    Schedulers and wrappers send SIGTERM twice, the second time while the run is saving: that changes nothing. A second
    SIGINT is an impatient person at the keyboard: the process exits at once.

    Attributes:
        stop, save: the number of the signal received, 0 if there was none.
        leaving: everything is saved, and an environment is being closed: a signal to stop ends the process at once.
    """

    def __init__(self) -> None:
        self.stop = self.save = 0
        self.interrupts = 0
        self.leaving = False
        self.timer = threading.Timer(PATIENCE, lambda: None)  # not started
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # before an environment is made; a sweep has one on purpose
        self.open: set[int] = set()
        self.handlers: dict[int, Any] = {}
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        at_fork(self.restore)  # an environment may want to end by a signal what it forked
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other thread
            numbers = [number for number in STOP_SIGNALS + SAVE_SIGNALS if not is_ignored_hangup(number)]
            self.handlers = dict.fromkeys(numbers, self.receive)
            pipe = signal.getsignal(signal.SIGPIPE)  # Python ignores it: a write without a reader raises an error instead
            if pipe is not None:  # which is a handler of C
                self.handlers[signal.SIGPIPE] = pipe
            self.previous = {number: signal.signal(number, handler) for number, handler in self.handlers.items()}
            self.open = set(numbers) - self.blocked
        return self

    def take(self) -> None:
        """Take the signals again, whatever an environment installed or blocked, also from C."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.open)

    def hold(self) -> None:
        """Take them again if Python has another handler, or if they are blocked. It is quick: every step calls it."""
        for number, handler in self.handlers.items():
            if _signal.getsignal(number) != handler:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.open)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts == 2 or (self.leaving and number in STOP_SIGNALS):
            end(128 + number)
        if number in SAVE_SIGNALS:
            self.save = number
            acknowledge(number, "a checkpoint follows")
        elif not self.stop:
            self.stop = number
            acknowledge(number, "the run stops as soon as it can" + " (a second SIGINT: at once)" * (number == signal.SIGINT))

    def leave(self) -> None:
        """From here on everything is saved, and an environment is being closed, which may hang. If a stop was asked for before,
        it has some seconds."""
        if self.stop and not self.leaving:
            self.timer = threading.Timer(PATIENCE, end, [128 + self.stop])
            self.timer.daemon = True
            self.timer.start()
        self.leaving = True

    def stay(self) -> None:
        """The environment is closed."""
        self.leaving = False
        self.timer.cancel()

    def __exit__(self, *error: object) -> None:
        self.stay()
        self.restore()
        self.handlers = self.previous = {}

    def restore(self) -> None:
        """Install the handlers that were there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def handlers_now() -> Callable[[], None]:
    """A function that restores these handlers, and which signals are blocked, as they are now."""
    handlers = {number: signal.getsignal(number) for number in KEPT_SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def restore() -> None:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in no other thread
            for number, handler in handlers.items():
                if handler is not None:  # which is one of C
                    signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    return restore


def end(status: int) -> None:
    """End the process and its workers at once."""
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(status)


def at_fork(restore: Callable[[], None]) -> None:
    """In each process that is forked from now on, call `restore` before a signal can arrive there."""
    masks: list[set[int]] = []

    def block() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS + SAVE_SIGNALS))

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())

    def restore_and_unblock() -> None:
        restore()
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=restore_and_unblock)


def is_ignored_hangup(number: int) -> bool:
    """Whether this is SIGHUP and it is ignored, as by nohup."""
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN


class Interrupt(KeyboardInterrupt):
    """Ctrl-C by a person. (An environment can raise a KeyboardInterrupt too.)"""


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """A handler of SIGINT for all that happens before and after training."""
    raise Interrupt


def acknowledge(number: int, what: str) -> None:
    """Say that a signal was received. (`print` must not be used here: the signal may have interrupted another one.)"""
    line = f"{signal.Signals(number).name} received: {what}\n"
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may listen
        output = sys.stdout.fileno()
        os.write(output, ("\n" * os.isatty(output) + line).encode())  # a terminal shows the progress bar in this line
