"""Writes the log to standard error: one line an event, fields at its end."""

import logging
import os
import sys
import time
import traceback
from types import TracebackType

from tailsrv.linux.standard_error import open_output

logger = logging.getLogger("tailsrv")

# the folder of all our modules, also of those in folders of their own
_PACKAGE = os.path.join(os.path.dirname(__file__), "")

# sd-daemon(3): the journal takes a line's priority from its first characters.
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


def fields(**values: object) -> str:
    """Return `key=value ...`; a value that would break the line or the fields is quoted."""
    return " ".join(
        f"{key}={printable(str(value))}" for key, value in values.items() if value is not None
    )


def printable(text: str) -> str:
    """Return `text` on one line and without undecodable bytes, quoted if it holds more than plain characters."""
    return text if text and text.isprintable() and not set(text) & set(" \"'=") else ascii(text)


def describe_error(error: Exception) -> str:
    """Return the fields that say what the kernel has refused us, and where in our code; a traceback is for our own mistakes."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(_PACKAGE)
    ]
    place = f"{ours[-1].filename.removeprefix(_PACKAGE)}:{ours[-1].lineno}" if ours else None
    return fields(reason=str(error) or "out of memory", at=place)


class Formatter(logging.Formatter):
    """One line a record: with a priority for the journal, which adds time and name itself, or with these."""

    def __init__(self, journal: bool) -> None:
        super().__init__(
            "%(message)s"
            if journal
            else "%(asctime)s tailsrv[%(process)d] %(levelname)s: %(message)s"
        )
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line; only our own faults bring a traceback, its lines joined to one for the journal."""
        line = super().format(record)
        if not self._journal:
            return line
        return f"<{_PRIORITIES.get(record.levelno, 6)}>" + line.replace("\n", " | ")


class Handler(logging.Handler):
    """Writes to standard error, and drops a line rather than wait: a stalled reader of the log must not stall clients."""

    def __init__(self, mode: int) -> None:
        super().__init__()
        self._write = open_output(mode)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, in one write(2) unless it is very long, so that the lines of several processes do not mix."""
        try:
            self._write((self.format(record) + "\n").encode(errors="backslashreplace"))
        except OSError:
            # nobody is left to tell
            pass


def set_up(verbosity: int) -> None:
    """Send the log to standard error: 0 for what an operator acts on, 1 also each connection, -1 warnings only."""
    try:
        status: os.stat_result | None = os.fstat(2)
    except OSError:
        status = None
    handler = Handler(status.st_mode if status else 0)
    handler.setFormatter(Formatter(_is_journal(status)))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG))
    logging.raiseExceptions = False
    # The interpreter's own way of telling these may wait for standard error.
    sys.excepthook = _log_uncaught
    sys.unraisablehook = _log_unraisable
    for level in _PRIORITIES:
        logging.addLevelName(level, logging.getLevelName(level).lower())


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logger.critical("cannot go on: %s", fields(reason=repr(error)), exc_info=(kind, error, trace))


def _log_unraisable(fault: "sys.UnraisableHookArgs") -> None:
    logger.error(
        "fault while an object was destroyed: %s",
        fields(reason=repr(fault.exc_value), object=repr(fault.object)),
    )


def _is_journal(status: os.stat_result | None) -> bool:
    """Tell whether standard error is the journal's socket, as systemd.exec(5) says how to ($JOURNAL_STREAM)."""
    return (
        status is not None
        and os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    )


class RateLimited:
    """Logs what a stranger can cause: at most so many lines an interval, and with the next one how many were left out."""

    def __init__(self, level: int, burst: int = 10, interval: float = 10.0) -> None:
        self._level = level
        self._allowance = RateLimit(burst, interval)

    def __call__(self, message: str, **values: object) -> None:
        """Log `message` and the fields, if this line is within the limit."""
        if not logger.isEnabledFor(self._level):
            return
        held_back = self._allowance.ask(time.monotonic())
        if held_back is not None:
            logger.log(
                self._level, "%s: %s", message, fields(**values, suppressed=held_back or None)
            )


class RateLimit:
    """Lets through so many per interval and counts the rest: what a stranger can cause must have a bound."""

    def __init__(self, burst: int, interval: float) -> None:
        self._burst, self._interval = burst, interval
        self._since, self._used, self._held_back = float("-inf"), 0, 0

    def ask(self, now: float) -> int | None:
        """Return None if this one must be held back, else how many were since the last that was not."""
        if now - self._since >= self._interval:
            self._since, self._used = now, 0
        if self._used >= self._burst:
            self._held_back += 1
            return None
        self._used += 1
        held_back, self._held_back = self._held_back, 0
        return held_back
