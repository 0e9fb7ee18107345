"""Logs signals that have no meaning for tailsrv, which would end the process by default."""

import logging

from tailsrv.linux.signals import name_of
from tailsrv.log import RateLimited

HINT = "TERM drains, QUIT ends at once, HUP upgrades; a log rotation needs no signal"


class StraySignals:
    """Logs ignored signals, at most one line per signal and ten seconds.

    The arguments are fields that every line shows.
    """

    def __init__(self, **where: object) -> None:
        self._where = where
        self._limits: dict[int, RateLimited] = {}

    def note(self, number: int) -> None:
        """Log that the signal `number` was ignored, and which signals have a meaning."""
        limited = self._limits.setdefault(number, RateLimited(logging.WARNING, burst=1))
        where = {"signal": name_of(number), **self._where}
        limited("ignored a signal that has no meaning for tailsrv", **where, hint=HINT)
