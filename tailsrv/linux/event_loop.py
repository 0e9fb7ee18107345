"""Waits for descriptors and for times that have come: what the loops of supervisor and worker share."""

import select
import time
from collections.abc import Callable

Action = Callable[[], object]

# Seconds that one wait may take, and whoever waits longer asks again: poll(2) and epoll_wait(2) count milliseconds in an int, 24 days.
MAX_WAIT = 86400.0


# taken from epoll in one turn; more wait for the next, behind the news of the file
EVENTS_PER_TURN = 64

# seconds without accepting after running out of room: no spin, and soon back
STALL_PAUSE = 0.2

# seconds until those are tried again whose bytes the kernel had no memory for
MEMORY_RETRY = 0.05


class EventLoop:
    """An epoll object, who is to be called for which descriptor, and what is to be done when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        # read once a turn
        self.now = clock()
        self.timers = Timers()
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self._stalled: set[int] = set()

    def register(
        self, fd: int, handler: Callable[[], None], flags: int = 0, events: int = select.EPOLLIN
    ) -> None:
        """Call `handler` whenever `fd` is readable, or has other `events`; `flags` are more of epoll_ctl(2)'s."""
        self.epoll.register(fd, events | flags)
        self.handlers[fd] = handler

    def unregister(self, fd: int) -> None:
        """Forget `fd` if it is known; before it is closed, since the kernel goes on reporting what a duplicate keeps open."""
        if self.handlers.pop(fd, None) is not None:
            self._stalled.discard(fd)
            self.epoll.unregister(fd)

    def pause(self, fd: int) -> None:
        """Leave `fd` alone until `resume`, which cannot be refused: registering it anew might be, for lack of room or memory."""
        self.epoll.modify(fd, 0)

    def resume(self, fd: int) -> None:
        """Heed `fd`, which was registered without flags, again."""
        self.epoll.modify(fd, select.EPOLLIN)

    def stall(self, fd: int, seconds: float) -> None:
        """Leave `fd`, which was registered without flags, alone for a while.

        A descriptor that stays readable while the kernel has no memory for what is there would keep the loop spinning.
        """
        self.pause(fd)
        self._stalled.add(fd)
        self.timers.set(self._end_stalls, self.now + seconds)

    def _end_stalls(self) -> None:
        for fd in self._stalled:
            self.resume(fd)
        self._stalled.clear()

    def timeout(self) -> float | None:
        """Return the seconds until the next thing is due, None if nothing is planned."""
        return self.timers.timeout(self.clock())

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        """Return the descriptors that are ready, each with its events, after `timeout` seconds at the latest."""
        events = self.epoll.poll(
            timeout if timeout is None else min(timeout, MAX_WAIT), EVENTS_PER_TURN
        )
        self.now = self.clock()
        return events

    def turn(self) -> None:
        """Wait, then call everyone whose descriptor is ready and do what is due."""
        for fd, _ in self.wait(self.timeout()):
            # else: it went earlier in this turn
            if (handler := self.handlers.get(fd)) is not None:
                handler()
        self.timers.run(self.now)


class Timers:
    """Actions and when they are due, each at most once; empty while nothing is planned, so that a loop can sleep."""

    def __init__(self) -> None:
        self._due: dict[Action, float] = {}

    def set(self, action: Action, when: float) -> None:
        """Plan `action` for `when`, in place of an earlier plan for the same action."""
        self._due[action] = when

    def cancel(self, action: Action) -> None:
        """Forget `action` if it is planned."""
        self._due.pop(action, None)

    def __contains__(self, action: Action) -> bool:
        return action in self._due

    def timeout(self, now: float) -> float | None:
        """Return the seconds until the next action is due, 0 if one is overdue, None if nothing is planned."""
        return max(0.0, min(self._due.values()) - now) if self._due else None

    def run(self, now: float) -> None:
        """Do what is due, each action once; what an action plans anew waits for the next call."""
        for action in [action for action, when in self._due.items() if when <= now]:
            # an earlier action may have cancelled it
            if self._due.pop(action, None) is not None:
                action()
