"""Counts the bytes that a writer appends to the old file too late after a rotation.

The streams of the old file have ended by then, so no client gets these bytes, and the log says so.
This is for --follow-name only, as long as streams do not continue from one file to the next.
"""

import os

from tailsrv.config import Timing
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.files import close_file
from tailsrv.log import fields, logger
from tailsrv.served_file import size_of

# Seconds between reads of the file's size until the workers consider the file complete.
SAMPLE_INTERVAL = 0.25
# Seconds added to the time without appends after which the supervisor considers the file complete:
# a busy worker may notice later than the supervisor that this time has passed.
MARGIN = 0.5


class LateAppends:
    """The last file that was rotated away, held open for a minute while its size is polled.

    The supervisor does not know at which size the workers ended the streams. It applies the rule of
    the workers instead: a file is complete once its size has not changed for some time. What is
    appended after that is late.
    """

    def __init__(self, loop: EventLoop, path: str, timing: Timing) -> None:
        self._loop, self._path, self._timing = loop, path, timing
        self._file: int | None = None
        # The size up to which the workers have sent the file, as far as the supervisor can know.
        self._size: int | None = None
        # Number of late bytes in the last log message.
        self._reported = 0
        # When to stop counting.
        self._until = 0.0

    def begin(self, file: int, polling: bool) -> None:
        """Start with `file`, whose streams end once its size has not changed for some time.

        That time is longer if the workers poll the file (`polling`). If the bytes of another file
        are still being counted, that count ends.
        """
        self.end()
        try:
            self._file = os.dup(file)
        except OSError:
            # Out of descriptors: late bytes of this file are not counted.
            return
        self._size, self._reported = size_of(file), 0
        self._until = self._loop.now + self._timing.late_patience
        self._pause = self._timing.settle + (self._timing.poll_interval if polling else 0) + MARGIN
        self._changed = self._loop.now
        self._loop.timers.set(self._settle, self._loop.now + SAMPLE_INTERVAL)

    def seal(self) -> None:
        """Record that all streams have ended, so that every byte from now on is late."""
        if self._settle in self._loop.timers:
            assert self._file is not None
            self._loop.timers.cancel(self._settle)
            self._size = size_of(self._file)
            self._await_late()

    def close(self) -> None:
        """Close the file. A forked child calls this to close its copy."""
        if self._file is not None:
            close_file(self._file)
            self._file = None

    def end(self) -> None:
        """Log the late bytes that have not been logged yet, and close the file."""
        self._loop.timers.cancel(self._settle)
        if self._check in self._loop.timers:
            self._loop.timers.cancel(self._check)
            self._report()
        self.close()

    def _settle(self) -> None:
        """Poll the size until the workers consider the file complete."""
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
        """Log the first late bytes at once, and the total number at the end."""
        if self._reported == 0 or self._loop.now >= self._until:
            self._report()
        if self._loop.now < self._until:
            self._loop.timers.set(self._check, self._loop.now + self._timing.late_interval)
        else:
            self.close()

    def _report(self) -> None:
        """Log the number of late bytes, if it has grown since the last message."""
        assert self._file is not None
        size = size_of(self._file)
        if size is None or self._size is None or (late := size - self._size) <= self._reported:
            return
        self._reported = late
        hint = "make the writer reopen its log within a second of the rotation"
        logger.warning(
            "bytes were appended to the old file after the rotation, no client gets them: %s",
            fields(path=self._path, bytes=late, hint=hint),
        )
