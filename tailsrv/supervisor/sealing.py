"""Tells when a segment is complete, so that it can be sealed."""

import os
import time

from tailsrv.config import Timing
from tailsrv.linux.file_system_type import is_local


class QuietTime:
    """Tells since when a file has not been changed.

    The file's modification time is used, where its clock is that of this machine: it tells about
    the time before the first look. Later changes are noticed even if the modification time is not.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        # Whether only this machine can change the file.
        self.local = is_local(file)
        self._seen: tuple[int, int] | None = None
        self._looked = float("-inf")
        self._since = 0.0

    def since(self, now: float) -> float:
        """Return the time of the last change, at the time `now` of a clock that never goes back."""
        try:
            status = os.fstat(self._file)
        except OSError:
            # Its file server does not answer, or the kernel has no memory. This counts as a change,
            # but only once: nothing is appended that could be served.
            if self._seen is not None:
                self._seen, self._since = None, now
            return self._since
        seen = status.st_size, status.st_mtime_ns
        if seen != self._seen:
            age = max(0.0, time.time() - status.st_mtime) if self.local else 0.0
            self._since = max(self._looked, now - age)
            self._seen = seen
        self._looked = now
        return self._since


def quiet_at(quiet_since: float, gone_since: float, writers: bool | None, timing: Timing) -> float:
    """Return when the active segment counts as complete, if it does not change before.

    Args:
        quiet_since: When it was changed last.
        gone_since: When its path was found to name another file or nothing.
        writers: Whether a process has it open for writing; None if unknown.
        timing: The settings for how long to wait.

    Returns:
        A time of the same clock.

    """
    if writers is False:
        return gone_since
    # A process that still has the file open gets a moment to reopen its log.
    return (max(quiet_since, gone_since) if writers else quiet_since) + timing.settle


def seal_time(first_byte: float, quiet: float, timing: Timing) -> float:
    """Return when to seal the active segment.

    `first_byte` is when the next file was found to have a byte, and `quiet` when the active segment
    counts as complete.
    """
    return max(first_byte, min(first_byte + timing.seal_limit, quiet))
