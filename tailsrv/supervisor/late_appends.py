"""Counts what is appended to a file after a rotation, too late for its streams.

For --follow-name only, until streams go on from one file to the next.
"""

import os

from tailsrv.config import Timing
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.files import close_file
from tailsrv.log import fields, logger
from tailsrv.served_file import size_of

# seconds between looks at the size until the workers take the file for complete
SAMPLE_INTERVAL = 0.25
# seconds; added because a busy worker notices later that the file has been quiet for long enough
MARGIN = 0.5


class LateAppends:
    """The last file that was rotated away: held open for a minute, and looked at now and then."""

    def __init__(self, loop: EventLoop, path: str, timing: Timing) -> None:
        self._loop, self._path, self._timing = loop, path, timing
        self._file: int | None = None
        # what the workers have sent, as far as the supervisor can tell
        self._size: int | None = None
        # bytes
        self._reported = 0
        self._until = 0.0

    def begin(self, file: int, polling: bool) -> None:
        """Hold `file`, whose streams end once it has been quiet for long enough; longer if it is polled."""
        self.end()
        try:
            self._file = os.dup(file)
        except OSError:
            # no descriptor left for it
            return
        self._size, self._reported = size_of(file), 0
        self._until = self._loop.now + self._timing.late_patience
        self._pause = self._timing.settle + (self._timing.poll_interval if polling else 0) + MARGIN
        self._changed = self._loop.now
        self._loop.timers.set(self._settle, self._loop.now + SAMPLE_INTERVAL)

    def seal(self) -> None:
        """Note that all streams have ended: whatever comes now is late."""
        if self._settle in self._loop.timers:
            assert self._file is not None
            self._loop.timers.cancel(self._settle)
            self._size = size_of(self._file)
            self._await_late()

    def close(self) -> None:
        """Close the file, in a forked child too."""
        if self._file is not None:
            close_file(self._file)
            self._file = None

    def end(self) -> None:
        """Report what has not been reported yet, and let go of the file."""
        self._loop.timers.cancel(self._settle)
        if self._check in self._loop.timers:
            self._loop.timers.cancel(self._check)
            self._report()
        self.close()

    def _settle(self) -> None:
        """Follow the size for as long as the workers do."""
        assert self._file is not None
        now = self._loop.now
        if (size := size_of(self._file)) != self._size:
            self._size, self._changed = size, now
        if now - self._changed < self._pause:
            self._loop.timers.set(self._settle, now + SAMPLE_INTERVAL)
        else:
            self._await_late()

    def _await_late(self) -> None:
        self._loop.timers.set(self._check, self._loop.now + self._timing.late_interval)

    def _check(self) -> None:
        """Report the first bytes that are late at once, and all there were at the end."""
        if self._reported == 0 or self._loop.now >= self._until:
            self._report()
        if self._loop.now < self._until:
            self._loop.timers.set(self._check, self._loop.now + self._timing.late_interval)
        else:
            self.close()

    def _report(self) -> None:
        """Say how many bytes are late, if there are more than was said."""
        assert self._file is not None
        size = size_of(self._file)
        if size is None or self._size is None or (late := size - self._size) <= self._reported:
            return
        self._reported = late
        hint = "have its writer reopen the log sooner, within a second of the rotation"
        logger.warning(
            "bytes were appended to the old file after the rotation, no client gets them: %s",
            fields(path=self._path, bytes=late, hint=hint),
        )
