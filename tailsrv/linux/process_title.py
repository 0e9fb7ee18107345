"""Sets the title of a process, which ps(1) shows, and makes room for long titles."""

import os
from collections.abc import Callable

from setproctitle import getproctitle, setproctitle

from tailsrv.linux.event_loop import Timers

# Shortest time between two changes of a title, in seconds.
TITLE_INTERVAL = 1.0

# An environment variable whose only purpose is its length. It makes room for a longer title.
ROOM = "TAILSRV_TITLE_ROOM"


def make_room(length: int, executable: str, arguments: list[str]) -> None:
    """Make room for titles of `length` bytes, by executing the program again if necessary.

    A title is written over the command line and the environment, whose size is fixed by execve(2).
    If they are too short, this process executes its program again, once, with an environment
    variable of `length` bytes. The process keeps its pid, inheritable descriptors and blocked
    signals. All other descriptors are lost, so call this before opening any. If execve(2) fails,
    longer titles are cut.

    Args:
        length: The length of the longest title, in bytes.
        executable: The path of the program to execute.
        arguments: The arguments that this process was started with, including the program's name.

    """
    if os.environ.pop(ROOM, None) is None and not _has_room(length):
        try:
            os.execve(executable, arguments, {**os.environ, ROOM: "x" * length})  # noqa: S606 this program
        except OSError:
            # It is better to continue with cut titles than not to start.
            pass


def _has_room(length: int) -> bool:
    """Return whether there is room for a title of `length` bytes, by setting one."""
    setproctitle("tailsrv: starting".ljust(length))
    return len(getproctitle()) == length


class ProcessTitle:
    """Shows a text whenever it has changed, but at most once in an interval.

    `render()` returns the current text. `show(text)` shows it, by default as the title of this
    process. `interval` is in seconds.
    """

    def __init__(
        self,
        timers: Timers,
        render: Callable[[], str],
        show: Callable[[str], object] = setproctitle,
        interval: float = TITLE_INTERVAL,
    ) -> None:
        self._timers, self._render, self._show, self._interval = timers, render, show, interval
        self._shown = ""
        # The earliest time at which the text may be shown again.
        self._next = float("-inf")
        self._now = float("-inf")

    def changed(self, now: float) -> None:
        """Note that the text may have changed. `now` is the current time in seconds.

        A new text is shown at once, or as soon as the interval since the last one is over. This
        may be called at any time.
        """
        self._now = now
        if now >= self._next:
            self._renew()
        elif self._renew not in self._timers and self._render() != self._shown:
            self._timers.set(self._renew, self._next)

    def _renew(self) -> None:
        if (title := self._render()) != self._shown:
            self._next = max(self._now, self._next) + self._interval
            self._shown = title
            self._show(title)
