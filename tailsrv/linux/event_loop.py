"""Runs an event loop: epoll(7) for descriptors, and timers for actions that are due later."""

import select
import time
from collections.abc import Callable

Action = Callable[[], object]

# Longest single wait, in seconds. For a longer one, a caller waits again. poll(2) and epoll_wait(2)
# would not accept more than 24 days: their timeout is an int of milliseconds.
MAX_WAIT = 86400.0

# Largest number of events that one turn handles. The kernel keeps the others for the next turn. A
# larger limit would make a burst of events delay what a caller does between two turns.
EVENTS_PER_TURN = 64

# Seconds until accept(2) is called again after descriptors or memory have run out. Without a pause
# the loop would spin. It is short because connections wait in the queue meanwhile.
STALL_PAUSE = 0.2

# Seconds until a call is retried that has failed because the kernel had no memory.
MEMORY_RETRY = 0.05


class EventLoop:
    """An epoll object, a handler for each registered descriptor, and timers.

    `clock` returns the time in seconds. `now` is the time at which the last wait returned: handlers
    read it instead of the clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.now = clock()
        self.timers = Timers()
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self._stalled: set[int] = set()

    def register(
        self, fd: int, handler: Callable[[], None], flags: int = 0, events: int = select.EPOLLIN
    ) -> None:
        """Call `handler` in every turn in which `fd` is ready.

        Args:
            fd: A descriptor that is not registered.
            handler: The function to call.
            flags: Further flags of epoll_ctl(2), such as EPOLLEXCLUSIVE.
            events: The events to wait for, by default that `fd` is readable.

        Raises:
            OSError: The limit on epoll watches is reached, or memory is short (epoll_ctl(2)).

        """
        self.epoll.register(fd, events | flags)
        self.handlers[fd] = handler

    def unregister(self, fd: int) -> None:
        """Stop waiting for `fd`. Do nothing if it is not registered.

        Call this before closing `fd`: as long as a duplicate of `fd` is open, epoll reports its
        events even after close(2).
        """
        if self.handlers.pop(fd, None) is not None:
            self._stalled.discard(fd)
            self.epoll.unregister(fd)

    def pause(self, fd: int) -> None:
        """Stop waiting for input on `fd` until `resume`.

        `fd` stays registered, so `resume` cannot fail. Registering it again could fail, for lack of
        epoll watches or memory.
        """
        self.epoll.modify(fd, 0)

    def resume(self, fd: int) -> None:
        """Wait for input on `fd` again. It must have been registered without flags."""
        self.epoll.modify(fd, select.EPOLLIN)

    def stall(self, fd: int, seconds: float) -> None:
        """Stop waiting for input on `fd` for `seconds`. It must have been registered without flags.

        Use this when `fd` stays readable but cannot be read, because the kernel has no memory. The
        loop would spin otherwise. All stalls end together, at the time that the latest call sets.
        """
        self.pause(fd)
        self._stalled.add(fd)
        self.timers.set(self._end_stalls, self.now + seconds)

    def _end_stalls(self) -> None:
        for fd in self._stalled:
            self.resume(fd)
        self._stalled.clear()

    def timeout(self) -> float | None:
        """Return the seconds until the next timer is due, or None if no timer is set."""
        return self.timers.timeout(self.clock())

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        """Wait until a descriptor is ready, and return those that are, each with its events.

        The wait ends after `timeout` seconds, or after MAX_WAIT if that is less. It has no limit if
        `timeout` is None. At most EVENTS_PER_TURN events are returned.
        """
        events = self.epoll.poll(
            None if timeout is None else min(timeout, MAX_WAIT), EVENTS_PER_TURN
        )
        self.now = self.clock()
        return events

    def turn(self) -> None:
        """Wait once, call the handler of each descriptor that is ready, then run the due timers."""
        for fd, _ in self.wait(self.timeout()):
            # There is no handler if an earlier one has unregistered the descriptor in this turn.
            if (handler := self.handlers.get(fd)) is not None:
                handler()
        self.timers.run(self.now)


class Timers:
    """Actions that are to run later, each with the time at which it is due.

    An action is a function or a bound method, and is planned for one time at most. Times are in
    seconds, all of the same clock. While no action is planned, the loop can sleep without a limit.
    """

    def __init__(self) -> None:
        self._due: dict[Action, float] = {}

    def set(self, action: Action, when: float) -> None:
        """Plan `action` for the time `when`. This replaces an earlier time of the same action."""
        self._due[action] = when

    def cancel(self, action: Action) -> None:
        """Remove `action` from the plan. Do nothing if it is not planned."""
        self._due.pop(action, None)

    def __contains__(self, action: Action) -> bool:
        return action in self._due

    def timeout(self, now: float) -> float | None:
        """Return the seconds from `now` until the next action is due.

        The result is 0 if an action is overdue, and None if no action is planned.
        """
        return max(0.0, min(self._due.values()) - now) if self._due else None

    def run(self, now: float) -> None:
        """Run every action that is due at the time `now`, each once.

        An action that is planned during this call runs in a later one, even if it is due already.
        """
        for action in [action for action, when in self._due.items() if when <= now]:
            # An earlier action of this call may have cancelled this one.
            if self._due.pop(action, None) is not None:
                action()
