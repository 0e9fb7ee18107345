"""How soon one rotation may follow another. Pure: the clock is its callers'."""

from tailsrv.config import Timing
from tailsrv.policy import Failures


class Pace:
    """The same backoff as for workers that die young: after a short life, a pause that doubles."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._last = float("-inf")  # when the last rotation began
        self._short = 0  # rotations in a row, each soon after the one before

    def pause(self, now: float) -> float:
        """Return the seconds until a rotation may begin, 0 if it may at once."""
        return max(0.0, self._due() - now)

    def note(self, now: float) -> None:
        """Note that one begins."""
        self._short = self._short + 1 if now - self._due() < self._timing.long_life else 0
        self._last = now

    def _due(self) -> float:
        return self._last + Failures(short=self._short).delay(self._timing)
