"""Finds and opens the files that follow the active segment, because they got its name after it."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tailsrv.file_identity import FileIdentity
from tailsrv.linux.file_system_type import is_local
from tailsrv.linux.files import close_file
from tailsrv.log import fields, logger
from tailsrv.segments import NO_FILE
from tailsrv.served_file import CannotServeError, ServedFile, modified_at, size_of
from tailsrv.shared_counts import SharedCounts
from tailsrv.supervisor.late_appends import LateAppends
from tailsrv.supervisor.segment_chain import Identity
from tailsrv.supervisor.segment_finder import FilesRenamedError, Found, find_next, open_recent

# Nanoseconds. A writer may append to a file for so long after the next one was complete.
LATE_APPENDS = 10 * 1_000_000_000
# Seconds for which files may be renamed during each look at the folder before this is an error.
RENAMES = 5.0


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
        late: The files that are not in the log any more.
        opened_at: Holds `active_opened_at` for all processes.

    """

    def __init__(self, served_file: ServedFile, late: LateAppends, opened_at: SharedCounts) -> None:
        self._served_file, self._late, self._opened_at = served_file, late, opened_at
        self._files: list[NextFile] = []
        # Since when files have been renamed during each look at the folder, 0 if they have not.
        self._renamed_since = 0.0

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[NextFile]:
        return iter(self._files)

    @property
    def active_opened_at(self) -> int:
        """A modification time of the active segment in nanoseconds, from when it was opened.

        The files after it have later ones.
        """
        return self._opened_at[0]

    @active_opened_at.setter
    def active_opened_at(self, modified: int) -> None:
        self._opened_at[0] = modified

    @property
    def last(self) -> NextFile:
        """The file that the path names, or has named."""
        return self._files[-1]

    @property
    def first(self) -> int:
        """The descriptor of the first file after the active segment."""
        return self._files[0].file

    def begin(self, files: Sequence[int]) -> None:
        """Begin with the open `files`, which are known to follow the active segment."""
        assert self._served_file.file is not None
        self.active_opened_at = modified_at(self._served_file.file)
        self._files = [self._examine(file) for file in files]
        self.exclude_older()

    def exclude_older(self) -> None:
        """Exclude files that were rotated before the log began, and may still be appended to."""
        assert self._served_file.file is not None
        if not is_local(self._served_file.file):
            return
        since, known = time.time_ns() - LATE_APPENDS, self._known()
        for file in open_recent(self._served_file.path, since):
            if identity_of(file) in known:
                close_file(file)
            else:
                self._late.begin(file, size_of(file) or 0, owned=True)

    def load(self, files: Sequence[int], active_opened_at: int) -> None:
        """Continue with the open `files`, which an upgrade has passed on."""
        self.active_opened_at = active_opened_at
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
                self._find_all(file)
            elif file is not None:
                # Other files of the folder cannot be told apart: inode numbers may change.
                self._files.append(self._examine(file))
        except FilesRenamedError as error:
            # This is part of a rotation, unless it lasts.
            self._renamed_since = self._renamed_since or now
            if now - self._renamed_since >= RENAMES:
                self._note_error(str(error))
        except (CannotServeError, OSError) as error:
            self._note_error(str(error))
        else:
            self._served_file.open_error, self._renamed_since = "", 0.0

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

    def _find_all(self, named: int) -> None:
        """Look for the files among those in the folder, and open them. Raises OSError.

        `named` is the open file that the path named a moment ago. Others may come before it. It is
        closed, unless the folder has no name for it any more.
        """
        known = self._known()
        try:
            found = self._look(known)
        except OSError:
            close_file(named)
            raise
        for warning in found.warnings:
            logger.warning("%s", warning)
        files = [segment.file for segment in found.segments]
        if identity_of(named) in {*known, *map(identity_of, files)}:
            close_file(named)
        else:
            # It was replaced in the meantime, so at least the last file came later.
            later = [file for file in files[:-1] if modified_at(file) > modified_at(named)]
            files.insert(max(0, len(files) - 1 - len(later)), named)
        self._files += [self._examine(file) for file in files]

    def _known(self) -> list[Identity]:
        """Return the files that are not new, the last one before the new ones at the end."""
        log = self._served_file.log
        assert log is not None
        files = [segment.file for segment in log if segment.file != NO_FILE]
        files += [next_file.file for next_file in self._files]
        return [identity_of(file) for file in (*self._late.owned, *files)]

    def _look(self, known: list[Identity]) -> Found:
        """Find the files that are not `known` and have a name. Raises OSError."""
        log = self._served_file.log
        assert log is not None
        last = self._files[-1].file if self._files else log.active.file
        opened_at = self._files[-1].opened_at if self._files else self.active_opened_at
        # The later files have been changed after the last one, apart from late appends to that. So
        # a copy of an older file, made before that, is none of them.
        since = max(opened_at, modified_at(last) - LATE_APPENDS, self._late.since)
        end = self._served_file.end() or log.active.base
        unsealed = known[-1 - len(self._files) :]
        return find_next(self._served_file.path, known, unsealed, since, end)

    def _examine(self, file: int) -> NextFile:
        return NextFile(file, FileIdentity(file, self._served_file.path), modified_at(file))

    def first_byte(self, now: float) -> float | None:
        """Return when a next file was found to have a byte, None as long as all are empty."""
        for next_file in self._files:
            if next_file.first_byte is None and size_of(next_file.file):
                next_file.first_byte = now
        times = [file.first_byte for file in self._files if file.first_byte is not None]
        return min(times, default=None)


def identity_of(file: int) -> Identity:
    """Return the device and inode number of the open `file`, (-1, -1) if they are not known."""
    try:
        status = os.fstat(file)
    except OSError:
        # The file system of that file has died, so no other name leads to the file.
        return -1, -1
    return status.st_dev, status.st_ino
