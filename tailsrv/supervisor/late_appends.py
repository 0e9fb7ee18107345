"""Counts the bytes that are appended to a file after the log has gone on to the next one.

A writer that reopens its log too late appends them. No client gets them, and the log says so.

Such a file must not be mistaken for a new one at the next rotation, although it was changed after
that one. So files that are not in the log are kept open meanwhile: then no new file gets one of
their inode numbers. They are those that were empty when they were sealed, and those that were
rotated just before the log began.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from tailsrv.config import Timing
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.files import close_file, is_deleted
from tailsrv.log import fields, logger
from tailsrv.served_file import ServedFile, modified_at, size_of


@dataclass(slots=True)
class Old:
    """A file that the log has left a short time ago.

    Attributes:
        file: The descriptor.
        size: How many bytes it had then.
        until: When to stop counting, in seconds of the monotonic clock.
        owned: Whether it is not in the log, so that nothing else closes it.
        late: How many late bytes it had at the last look.
        logged: Whether the log has told their number.

    """

    file: int
    size: int
    until: float
    owned: bool
    late: int = 0
    logged: bool = False


class LateAppends:
    """The files that the log has left within the last minute. Their sizes are polled.

    Each of them causes one warning at most: when its late bytes have not become more from one poll
    to the next, or when polling ends.

    Args:
        loop: The supervisor's event loop.
        served_file: The path and the log.
        timing: The intervals.

    Attributes:
        since: No file that follows the active segment has an earlier modification time, in
            nanoseconds. This excludes the files that were closed meanwhile.

    """

    def __init__(self, loop: EventLoop, served_file: ServedFile, timing: Timing) -> None:
        self._loop, self._served_file, self._timing = loop, served_file, timing
        self._old: list[Old] = []
        self.since = 0

    def begin(self, file: int, size: int, owned: bool) -> None:
        """Start to poll the open `file`, which the log has left when it had `size` bytes.

        With `owned`, it is not in the log. Then it is closed at the end.
        """
        until = self._loop.now + self._timing.late_patience
        self._old.append(Old(file, size, until, owned))
        self._poll_soon()

    def end(self, file: int) -> None:
        """Log the late bytes of `file`, a segment that is about to be closed."""
        for old in self._old:
            if old.file == file:
                old.late = _late_bytes(old)
                self._warn(old)
        self._old = [old for old in self._old if old.file != file]

    @property
    def owned(self) -> list[int]:
        """The open files that are not in the log."""
        return [old.file for old in self._old if old.owned]

    def save(self) -> list[list[int | float]]:
        """Return the state for the next version of the program: the fields of each `Old`."""
        return [list(astuple(old)) for old in self._old]

    def load(self, saved: Iterable[Iterable[int | float]]) -> None:
        """Continue with what save() has returned."""
        self._old = [Old(*each) for each in saved]  # type: ignore[arg-type]
        self._poll_soon()

    def close_in_child(self) -> None:
        """In a forked child, close the files that only the supervisor uses."""
        for file in self.owned:
            close_file(file)

    def _poll_soon(self) -> None:
        # Do not postpone the next poll: the log may roll more often than files are polled.
        if self._old and self._poll not in self._loop.timers:
            self._loop.timers.set(self._poll, self._loop.now + self._timing.late_interval)

    def _poll(self) -> None:
        self._old = [old for old in self._old if not self._is_done(old)]
        self._poll_soon()

    def _is_done(self, old: Old) -> bool:
        """Look at the size of a file, and return whether that was the last look."""
        before, old.late = old.late, _late_bytes(old)
        # A deleted file is not kept open only to count: that would hold its disk space.
        deleted = old.owned and is_deleted(old.file)
        over = deleted or self._loop.now >= old.until
        if over or old.late == before > 0:
            self._warn(old)
        if not old.owned:
            return over or old.logged
        if not deleted and not (over and self._exclude(old)):
            return False
        close_file(old.file)
        return True

    def _exclude(self, old: Old) -> bool:
        """Exclude a file that will be closed from those that follow the active segment.

        Return whether it is possible now: no other file must follow the active segment yet.
        """
        possible = self._served_file.has_gone(self._loop.now) is False
        if possible:
            self.since = max(self.since, modified_at(old.file) + 1)
        return possible

    def _warn(self, old: Old) -> None:
        if old.late > 0 and not old.logged:
            old.logged = True
            hint = "make the writer reopen its log within a second of the rotation"
            logger.warning(
                "bytes were appended to the old file after the roll, no client gets them: %s",
                fields(path=self._served_file.path, bytes=old.late, hint=hint),
            )


def _late_bytes(old: Old) -> int:
    return (size_of(old.file) or 0) - old.size
