"""Logs signals that have no meaning for tailsrv. By default they would end the process."""

import logging

from tailsrv.linux.signals import name_of
from tailsrv.log import RateLimited

HINT = "TERM drains, QUIT ends at once, HUP upgrades; a log rotation needs no signal"


class StraySignals:
    """Logs ignored signals. Each signal is logged at most once in ten seconds.

    The arguments are fields of every line.
    """

    def __init__(self, **where: object) -> None:
        self._where = where
        self._limits: dict[int, RateLimited] = {}

    def note(self, number: int) -> None:
        """Log that the signal `number` was ignored, and which signals have a meaning."""
        limited = self._limits.setdefault(number, RateLimited(logging.WARNING, burst=1))
        where = {"signal": name_of(number), **self._where}
        limited("ignored a signal that has no meaning for tailsrv", **where, hint=HINT)
