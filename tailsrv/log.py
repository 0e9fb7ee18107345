"""The program's own log: writes one line per event to standard error, with `key=value` fields.

A process never waits for standard error, because a stalled reader of the log must not stall
clients: a line for which there is no room is dropped. Events that untrusted clients can cause are
limited by `RateLimited`.
"""

import logging
import os
import sys
import time
import traceback
from types import TracebackType

from tailsrv.linux.stderr_writer import open_output

logger = logging.getLogger("tailsrv")

# The folder of the package, which contains all modules of tailsrv.
_PACKAGE = os.path.join(os.path.dirname(__file__), "")

# The journal reads the priority of a line from its first characters, as in `<6>` (sd-daemon(3)).
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


def fields(**values: object) -> str:
    """Format `values` as `key=value ...`, leaving out those that are None.

    A value is quoted if it contains characters that would end the line or the field.
    """
    return " ".join(
        f"{key}={printable(str(value))}" for key, value in values.items() if value is not None
    )


def printable(text: str) -> str:
    """Return `text` on one line and without undecodable bytes.

    It is quoted and escaped if it is empty or contains unprintable characters, spaces, quotes or
    `=`.
    """
    return text if text and text.isprintable() and not set(text) & set(" \"'=") else ascii(text)


def describe_error(error: Exception) -> str:
    """Return the fields `reason=` and `at=` for an error of the operating system.

    `at` is the last line of tailsrv's code in the traceback, as in `worker/streams.py:90`. The log
    shows whole tracebacks only for programming errors.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(_PACKAGE)
    ]
    at = f"{frames[-1].filename.removeprefix(_PACKAGE)}:{frames[-1].lineno}" if frames else None
    return fields(reason=str(error) or "out of memory", at=at)


class Formatter(logging.Formatter):
    """Formats a record as one line.

    For the journal, which adds time and program name itself, the line begins with a priority.
    Otherwise it begins with time, program name and pid.
    """

    def __init__(self, journal: bool) -> None:
        super().__init__(
            "%(message)s"
            if journal
            else "%(asctime)s tailsrv[%(process)d] %(levelname)s: %(message)s"
        )
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line, and a traceback below it if the record has one.

        Only programming errors have one. For the journal all lines are joined to one.
        """
        line = super().format(record)
        if not self._journal:
            return line
        return f"<{_PRIORITIES.get(record.levelno, 6)}>" + line.replace("\n", " | ")


class Handler(logging.Handler):
    """Writes records to standard error. It drops a record if writing it would have to wait.

    `mode` is the st_mode of standard error, 0 if there is none.
    """

    def __init__(self, mode: int) -> None:
        super().__init__()
        self._write = open_output(mode)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record.

        Unless the record is very long, a single write(2) writes it, so that the lines of several
        processes do not mix.
        """
        try:
            self._write((self.format(record) + "\n").encode(errors="backslashreplace"))
        except OSError:
            # The error cannot be reported: standard error is the only place for it.
            pass


def set_up(verbosity: int) -> None:
    """Send the log of this process to standard error.

    `verbosity` is 0 for events that an operator may act on, 1 to log each connection as well, and
    -1 to log only warnings and errors.
    """
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
    # The interpreter's default hooks may block on standard error.
    sys.excepthook = _log_uncaught
    sys.unraisablehook = _log_unraisable
    for level in _PRIORITIES:
        logging.addLevelName(level, logging.getLevelName(level).lower())


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logger.critical(
        "internal error, the process exits: %s",
        fields(reason=repr(error), hint="please report this with the traceback"),
        exc_info=(kind, error, trace),
    )


def _log_unraisable(fault: "sys.UnraisableHookArgs") -> None:
    logger.error(
        "internal error while an object was destroyed: %s",
        fields(
            reason=repr(fault.exc_value),
            object=repr(fault.object),
            hint="please report this",
        ),
    )


def _is_journal(status: os.stat_result | None) -> bool:
    """Return whether standard error is the journal's socket ($JOURNAL_STREAM, systemd.exec(5))."""
    return (
        status is not None
        and os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    )


class RateLimited:
    """Logs an event that untrusted clients can cause, with a limit on the number of lines.

    At most `burst` lines are written in `interval` seconds. The next line after that has a field
    `suppressed=` with the number of lines that were left out.
    """

    def __init__(self, level: int, burst: int = 10, interval: float = 10.0) -> None:
        self._level = level
        self._limit = RateLimit(burst, interval)

    def __call__(self, message: str, **values: object) -> None:
        """Log `message` with `values` as its fields, unless the limit is reached."""
        if not logger.isEnabledFor(self._level):
            return
        suppressed = self._limit.ask(time.monotonic())
        if suppressed is not None:
            logger.log(
                self._level, "%s: %s", message, fields(**values, suppressed=suppressed or None)
            )


class RateLimit:
    """Allows `burst` events in `interval` seconds, and counts the events that it suppresses."""

    def __init__(self, burst: int, interval: float) -> None:
        self._burst, self._interval = burst, interval
        self._since, self._used, self._suppressed = float("-inf"), 0, 0

    def ask(self, now: float) -> int | None:
        """Return None if this event must be suppressed.

        Otherwise return the number of events suppressed since the last one that was allowed. `now`
        is a time in seconds, of a clock that never goes back.
        """
        if now - self._since >= self._interval:
            self._since, self._used = now, 0
        if self._used >= self._burst:
            self._suppressed += 1
            return None
        self._used += 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed
