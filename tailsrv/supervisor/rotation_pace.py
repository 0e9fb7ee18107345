"""How soon one rotation may follow another. Pure: the clock is its callers'."""

from tailsrv.config import Timing
from tailsrv.supervisor.restart_policy import Failures

# seconds; a timer for the time that is left may run early by the last digit of a float
_ROUNDING = 0.001


class RotationPace:
    """The same backoff as for workers that die young: after a short life, a pause that doubles."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        # when the last rotation was over
        self._last = float("-inf")
        # rotations in a row, each soon after the one before
        self._short = 0

    def pause(self, now: float) -> float:
        """Return the seconds until a rotation may begin, 0 if it may at once."""
        left = self._due() - now
        return left if left > _ROUNDING else 0.0

    def begin(self, now: float) -> None:
        """Note that one begins."""
        self._short = self._short + 1 if now - self._due() < self._timing.long_life else 0
        self._last = now

    def end(self, now: float) -> None:
        """Note that it is over: bringing streams to their end may have taken seconds, which say nothing of the next file."""
        self._last = now

    def _due(self) -> float:
        return self._last + Failures(short=self._short).delay(self._timing)
