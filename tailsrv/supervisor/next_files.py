"""Finds and opens the files that follow the active segment, because they got its name after it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tailsrv.file_identity import FileIdentity
from tailsrv.linux.file_system_type import is_local
from tailsrv.linux.files import close_file
from tailsrv.log import fields, logger
from tailsrv.segments import NO_FILE
from tailsrv.served_file import CannotServeError, ServedFile, size_of
from tailsrv.supervisor.segment_finder import find_next

# Nanoseconds. A writer may append to a file for so long after the next one was complete.
LATE_APPENDS = 10 * 1_000_000_000


@dataclass(slots=True)
class NextFile:
    """A file that follows the active segment.

    `opened_at` is its modification time in nanoseconds when it was opened. `first_byte` is when it
    was found to have a byte, None as long as it is empty.
    """

    file: int
    identity: FileIdentity
    opened_at: int
    first_byte: float | None = None


class NextFiles:
    """The open files after the active segment, in order. The path names the last of them, or did.

    Args:
        served_file: The path and the log.

    Attributes:
        active_opened_at: A modification time of the active segment in nanoseconds, from when it was
            opened. The files after it have later ones.

    """

    def __init__(self, served_file: ServedFile) -> None:
        self._served_file = served_file
        self._files: list[NextFile] = []
        self.active_opened_at = 0

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[NextFile]:
        return iter(self._files)

    @property
    def last(self) -> NextFile:
        """The file that the path names, or has named."""
        return self._files[-1]

    def begin(self, files: Sequence[int]) -> None:
        """Begin with the open `files`, which are known to follow the active segment."""
        self._files = [self._examine(file) for file in files]

    def take(self) -> int:
        """Remove the first file, which becomes the active segment, and return its descriptor."""
        taken = self._files.pop(0)
        self.active_opened_at = taken.opened_at
        return taken.file

    def close(self) -> None:
        """Close and forget all files."""
        for next_file in self._files:
            close_file(next_file.file)
        self._files.clear()

    def find(self, now: float) -> None:
        """Open the files that came after the last one that is open, up to the present one."""
        self._forget_replaced(now)
        if self._files and self._files[-1].identity.is_gone(now) is not True:
            return
        try:
            file = self._served_file.open_next()
            if file is not None and is_local(file):
                # It was opened to find out whether it can be served. Others may come before it.
                close_file(file)
                self._find_all()
            elif file is not None:
                # Other files of the folder cannot be told apart: inode numbers may change.
                self._files.append(self._examine(file))
        except (CannotServeError, OSError) as error:
            self._note_error(str(error))
        else:
            self._served_file.open_error = ""

    def _forget_replaced(self, now: float) -> None:
        """Forget the empty files after one that has got the path's name again."""
        for index, next_file in enumerate(self._files[:-1]):
            later = self._files[index + 1 :]
            if next_file.identity.is_gone(now) is False and not any(
                size_of(each.file) for each in later
            ):
                for each in later:
                    close_file(each.file)
                del self._files[index + 1 :]
                return

    def _note_error(self, reason: str) -> None:
        if reason != self._served_file.open_error:
            logger.error(
                "cannot serve the next file yet, retrying: %s",
                fields(path=self._served_file.path, reason=reason),
            )
        self._served_file.open_error = reason

    def _find_all(self) -> None:
        """Look for the files among those in the folder, and open them. Raises OSError."""
        log = self._served_file.log
        assert log is not None
        files = [segment.file for segment in log if segment.file != NO_FILE]
        files += [next_file.file for next_file in self._files]
        opened_at = self._files[-1].opened_at if self._files else self.active_opened_at
        # The later files have been changed after the last one, apart from late appends to that. So
        # a copy of an older file, made before that, is none of them.
        since = max(opened_at, modified(files[-1]) - LATE_APPENDS)
        end = self._served_file.end() or log.active.base
        known = [_identity(file) for file in files]
        found = find_next(self._served_file.path, known[:-1], known[-1], since, end)
        for warning in found.warnings:
            logger.warning("%s", warning)
        self._files += [self._examine(segment.file) for segment in found.segments]

    def _examine(self, file: int) -> NextFile:
        return NextFile(file, FileIdentity(file, self._served_file.path), modified(file))

    def first_byte(self, now: float) -> float | None:
        """Return when a next file was found to have a byte, None as long as all are empty."""
        for next_file in self._files:
            if next_file.first_byte is None and size_of(next_file.file):
                next_file.first_byte = now
        times = [file.first_byte for file in self._files if file.first_byte is not None]
        return min(times, default=None)


def _identity(file: int) -> tuple[int, int]:
    """Return the device and inode number of the open `file`, (-1, -1) if they are not known."""
    try:
        status = os.fstat(file)
    except OSError:
        # The file system of that file has died, so no other name leads to the file.
        return -1, -1
    return status.st_dev, status.st_ino


def modified(file: int) -> int:
    """Return the modification time of the open `file` in nanoseconds, 0 if it is not known."""
    try:
        return os.fstat(file).st_mtime_ns
    except OSError:
        return 0
