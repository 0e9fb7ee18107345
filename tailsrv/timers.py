"""Keeps what is to be done at a later time. Pure: the clock is its callers'."""

from collections.abc import Callable

Action = Callable[[], object]

# Seconds that one wait may take, and whoever waits longer asks again: poll(2) and epoll_wait(2) count milliseconds in an int, 24 days.
LONGEST = 86400.0


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
            if self._due.pop(action, None) is not None:  # an earlier action may have cancelled it
                action()
