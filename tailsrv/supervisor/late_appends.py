"""Counts the bytes that are appended to a segment after it has been sealed.

A writer that reopens its log too late appends them. No client gets them, and the log says so.
"""

from dataclasses import dataclass

from tailsrv.config import Timing
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.files import close_file, is_deleted
from tailsrv.log import fields, logger
from tailsrv.segments import Segment
from tailsrv.served_file import size_of


@dataclass(slots=True)
class _Recent:
    """A segment that was sealed a short time ago, and how many late bytes it had at the last look.

    `until` is when to stop counting. `owned` says that nothing else closes its file.
    """

    segment: Segment
    until: float
    owned: bool
    late: int = 0


class LateAppends:
    """The segments that were sealed within the last minute. Their sizes are polled.

    Each of them causes one warning at most: when its late bytes have not become more from one poll
    to the next, or when polling ends.
    """

    def __init__(self, loop: EventLoop, path: str, timing: Timing) -> None:
        self._loop, self._path, self._timing = loop, path, timing
        self._recent: list[_Recent] = []

    def begin(self, segment: Segment) -> None:
        """Start to poll the size of the sealed `segment`.

        The file of an empty segment, which is not part of the log any more, is closed at the end.
        """
        until = self._loop.now + self._timing.late_patience
        self._recent.append(_Recent(segment, until, owned=segment.size == 0))
        # Do not postpone the next poll: the log may roll more often than segments are polled.
        if self._poll not in self._loop.timers:
            self._loop.timers.set(self._poll, self._loop.now + self._timing.late_interval)

    def end(self, segment: Segment) -> None:
        """Log the late bytes of `segment`, whose file is about to be closed."""
        for recent in self._recent:
            if recent.segment is segment:
                self._warn(_late_bytes(segment))
        self._recent = [recent for recent in self._recent if recent.segment is not segment]

    def close_in_child(self) -> None:
        """In a forked child, close the files that only the supervisor uses."""
        for recent in self._recent:
            if recent.owned:
                close_file(recent.segment.file)

    def _poll(self) -> None:
        waiting = []
        for recent in self._recent:
            late = _late_bytes(recent.segment)
            # A deleted file is not kept open only to count: that would hold its disk space.
            unneeded = recent.owned and is_deleted(recent.segment.file)
            if late == recent.late > 0 or self._loop.now >= recent.until or unneeded:
                self._warn(late)
                if recent.owned:
                    close_file(recent.segment.file)
            else:
                recent.late = late
                waiting.append(recent)
        self._recent = waiting
        if waiting:
            self._loop.timers.set(self._poll, self._loop.now + self._timing.late_interval)

    def _warn(self, late: int) -> None:
        if late > 0:
            hint = "make the writer reopen its log within a second of the rotation"
            logger.warning(
                "bytes were appended to the old file after the roll, no client gets them: %s",
                fields(path=self._path, bytes=late, hint=hint),
            )


def _late_bytes(segment: Segment) -> int:
    assert segment.size is not None
    return (size_of(segment.file) or 0) - segment.size
