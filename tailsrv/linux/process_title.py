"""Shows what a process is and how it does, in its title, which people, `ps` and psutil read, and to the service manager."""

import os
from collections.abc import Callable

from setproctitle import getproctitle, setproctitle

from tailsrv.linux.event_loop import Timers

# seconds; a title changes at most so often, and not at all while nothing does
TITLE_INTERVAL = 1.0

# The environment variable that makes the room which command line and environment lack.
ROOM = "TAILSRV_TITLE_ROOM"


def make_room(length: int, executable: str, arguments: list[str]) -> None:
    """Make room for titles of `length` bytes, in a process that was started with these arguments.

    A title is written over the command line and the environment, whose room is fixed by execve(2).
    Where it is too small, this process executes itself again, once, with a variable that is as long
    as the title. The pid, inheritable descriptors and blocked signals live through that. Call it
    before anything is opened that does not. Does nothing where execve(2) fails: titles stay cut.
    """
    if os.environ.pop(ROOM, None) is None and not _has_room(length):
        try:
            os.execve(executable, arguments, {**os.environ, ROOM: "x" * length})  # noqa: S606 our own command
        except OSError:
            # a server without a whole title is better than none
            pass


def _has_room(length: int) -> bool:
    """Tell whether a title of `length` bytes is kept whole, by setting one."""
    setproctitle("tailsrv: starting".ljust(length))
    return len(getproctitle()) == length


class ProcessTitle:
    """A text that follows `render()` at a bounded pace, by default this process's title: `changed` may be called at any time."""

    def __init__(
        self,
        timers: Timers,
        render: Callable[[], str],
        show: Callable[[str], object] = setproctitle,
        interval: float = TITLE_INTERVAL,
    ) -> None:
        self._timers, self._render, self._show, self._interval = timers, render, show, interval
        self._shown = ""
        # the title must not change before
        self._next = float("-inf")
        self._now = float("-inf")

    def changed(self, now: float) -> None:
        """Note at the time `now` that the title may be out of date: it is renewed at once, or when its interval is over."""
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
