"""Limits how soon one rotation may follow another.

Pure: the callers pass the time, in seconds of any clock that never goes back.
"""

from tailsrv.config import Timing
from tailsrv.supervisor.restart_policy import Failures

# Seconds. A remaining pause up to this counts as 0, because the timer for the end of the pause may
# run early by the rounding error of a float.
_ROUNDING = 0.001


class RotationPace:
    """The pauses between rotations, with the same backoff as for workers that die young.

    It counts the rotations in a row that each began soon after the one before. The first of them
    causes no pause. The second delays the next rotation, and each further one doubles the delay.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        # When the last rotation ended, or began if it is still under way.
        self._last = float("-inf")
        # Number of rotations in a row that each began soon after the one before.
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

        The pause counts from the end, because draining the old streams may take seconds. That time
        says nothing about how soon the next file is replaced.
        """
        self._last = now

    def _due(self) -> float:
        return self._last + Failures(short=self._short).delay(self._timing)
