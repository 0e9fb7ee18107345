"""Saves the segments of the log at each roll, and restores the log when the server starts."""

import os
from dataclasses import dataclass, replace
from importlib import import_module

from tailsrv.log import fields, logger
from tailsrv.segments import NO_FILE, Log, Segment
from tailsrv.supervisor.segment_finder import find_segments
from tailsrv.supervisor.state_file import SavedSegment, StateFileError, describe, lock, read, write


@dataclass(frozen=True, slots=True)
class Restored:
    """What the state file and the folder of the served file show at the start.

    Attributes:
        log: The segments up to the one that was active. None if none of their files is left.
        next_files: The descriptors of the files that came later, in order.
        end: The offset at which the log continues if `log` is None.

    """

    log: Log | None
    next_files: list[int]
    end: int


class LogStore:
    """The state file of one server, locked against other servers.

    Args:
        state_file: The path of the state file.
        path: The path of the served file.
        lock_file: The descriptor of the lock, passed on by an upgrade. None takes the lock.

    Raises:
        StateFileError: Another server has the lock, or the lock cannot be taken.

    """

    def __init__(self, state_file: str, path: str, lock_file: int | None = None) -> None:
        self._state_file, self._path = state_file, path
        self.lock_file = lock(state_file) if lock_file is None else lock_file
        # What state_file.py imports when it is needed: later, there may be no descriptor for that.
        import_module("hashlib")
        # The sealed segments do not change any more, so they are examined once.
        self._sealed: dict[Segment, SavedSegment] = {}
        # Whether the last attempt to save has failed.
        self.failed = False

    def check(self) -> None:
        """Check that the state file can be overwritten.

        Raises StateFileError if it cannot be read, or belongs to something else.
        """
        read(self._state_file, self._path)

    def restore(self) -> Restored:
        """Find the segments that were saved, and the files that came later.

        Raises StateFileError if the state file cannot be read, or belongs to something else.
        """
        if (saved := read(self._state_file, self._path)) is None:
            return Restored(None, [], 0)
        found = find_segments(self._path, saved)
        for warning in found.warnings:
            logger.warning("%s", warning)
        # The file that was active stays active at first, because its writer may not have opened the
        # next one yet. If it was empty, its place is taken by the next one.
        if not found.segments:
            return Restored(None, [], found.end)
        known = len(found.segments) - found.later
        segments = [Segment(each.base, each.file, each.size) for each in found.segments[:known]]
        segments[-1] = replace(segments[-1], size=None)
        next_files = [segment.file for segment in found.segments[known:]]
        return Restored(Log(segments), next_files, found.end)

    def save(self, log: Log, agreed: int | None = None, next_file: int = NO_FILE) -> None:
        """Write the segments of `log` to the state file, or log once why that is not possible.

        With `agreed`, save what the log will be if it rolls at that size to `next_file`, which is
        empty. If it is empty at the next start as well, the log has not rolled.
        """
        segments = [segment for segment in log if segment.base >= log.start]
        if agreed is not None:
            segments[-1] = replace(log.active, size=agreed)
            segments.append(Segment(segments[-1].end, next_file))
        try:
            saved = [self._describe(segment) for segment in segments]
            write(self._state_file, self._path, saved)
        except (OSError, StateFileError) as error:
            if not self.failed:
                logger.error(
                    "cannot save the log's state, offsets may change with the next start: %s",
                    fields(reason=error),
                )
            self.failed = True
            return
        self.failed = False
        self._sealed = {each: self._sealed[each] for each in log if each in self._sealed}

    def _describe(self, segment: Segment) -> SavedSegment:
        if (saved := self._sealed.get(segment)) is None:
            saved = describe(segment, _path_of(segment.file))
            if segment.sealed:
                self._sealed[segment] = saved
        return saved


def _path_of(file: int) -> str:
    """Return the path that the open `file` has now."""
    return os.readlink(f"/proc/self/fd/{file}")
