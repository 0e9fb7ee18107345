"""Limits how soon one rotation may follow another.

Pure: the callers pass the time, in seconds of any clock that never goes back.
"""

from tailsrv.config import Timing
from tailsrv.supervisor.restart_policy import Failures

# Seconds. A remaining time up to this counts as 0: a timer that was set for it may run early by the
# rounding error of a float.
_ROUNDING = 0.001


class RotationPace:
    """The pauses between rotations, with the same backoff as for workers that die young.

    It counts rotations in a row, each soon after the one before. The first of them causes no pause.
    From the second on, the next rotation has to wait, and the pause doubles each time.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        # When the last rotation ended, or began if it is still under way.
        self._last = float("-inf")
        # Rotations in a row, each soon after the one before.
        self._short = 0

    def pause(self, now: float) -> float:
        """Return the seconds until a rotation may begin, 0 if it may begin at once."""
        left = self._due() - now
        return left if left > _ROUNDING else 0.0

    def begin(self, now: float) -> None:
        """Record that a rotation begins."""
        self._short = self._short + 1 if now - self._due() < self._timing.long_life else 0
        self._last = now

    def end(self, now: float) -> None:
        """Record that the rotation is over.

        The time counts from here because draining the old streams may have taken seconds. They say
        nothing about how soon the next file is replaced.
        """
        self._last = now

    def _due(self) -> float:
        return self._last + Failures(short=self._short).delay(self._timing)
