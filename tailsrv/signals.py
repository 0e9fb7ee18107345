"""Turns signals into readable bytes: a handler that does nothing, and a descriptor that wakes the loop."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Wakeup:
    """The pipe that the interpreter writes each caught signal's number to (`signal.set_wakeup_fd`)."""

    def __init__(self, caught: Iterable[signal.Signals]) -> None:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in caught:
            signal.signal(number, _note)

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._reader

    def read(self) -> list[int]:
        """Return the signals that have come since the last call."""
        try:
            return list(os.read(self._reader, 4096))
        except BlockingIOError:
            return []

    def close(self) -> None:
        """Stop being woken. In a forked child this must come first: its signals would wake the parent."""
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)


def _note(*_: object) -> None:
    """Do nothing: the byte in the pipe is what counts."""


def hold() -> None:
    """Block all signals; those that come wait until somebody unblocks them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())


def release() -> None:
    """Let all signals through, also those that were held back by the program that exec'd this one."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


@contextmanager
def blocked() -> Iterator[None]:
    """Hold all signals back, so that none falls between fork(2) and the child's own handlers."""
    before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
