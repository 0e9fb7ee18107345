"""Logs the signals that mean nothing to the server, instead of dying of them."""

import logging

from tailsrv.linux.signals import name_of
from tailsrv.log import RateLimited

HINT = "TERM drains, QUIT ends at once, HUP upgrades; a log rotation needs no signal"


class StraySignals:
    """Writes one log line for a signal that was ignored, at most one per signal and ten seconds.

    `where` are fields of every line.
    """

    def __init__(self, **where: object) -> None:
        self._where = where
        self._limits: dict[int, RateLimited] = {}

    def note(self, number: int) -> None:
        """Say that signal `number` was ignored, and which signals are not."""
        limited = self._limits.setdefault(number, RateLimited(logging.WARNING, burst=1))
        where = {"signal": name_of(number), **self._where}
        limited("ignored a signal that means nothing to tailsrv", **where, hint=HINT)
