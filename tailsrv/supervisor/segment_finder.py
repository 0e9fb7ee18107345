"""Finds the files of the log beside the served file, and opens them.

find_segments() does so at start: it matches the saved segments with files, and finds the files of
rotations that happened while the server did not run. find_next() does so while the server runs:
several rotations may have happened since its last look at the path. segment_chain.py has the rules.

Both list the folder, decide, and open the files. If files were renamed meanwhile, they begin again.
Only the folder of the served file is searched, so logrotate's `olddir` is not.
"""

import errno
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tailsrv.linux.files import close_file
from tailsrv.supervisor.segment_chain import (
    Chain,
    File,
    Identity,
    dated,
    decide,
    following,
    rotated,
)
from tailsrv.supervisor.state_file import HEAD, SavedSegment, StateFileError

# Most segments of a log. Each needs a descriptor in every process: 1024 is the usual soft limit.
MAX_SEGMENTS = 1000
# How often the folder is examined if files are renamed meanwhile. At start, there is a pause in
# seconds before the next attempt.
_ATTEMPTS = 5
_START_ATTEMPTS, _START_PAUSE = 50, 0.02
# Most rotated files that are watched for late appends when the log begins.
_MAX_RECENT = 16
# O_NONBLOCK: open(2) must not wait for another program to release a lease on the file.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW
# Errors of open(2) that another attempt would not change. The segment is dropped with a warning.
_LASTING = frozenset({errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP})


@dataclass(frozen=True, slots=True)
class FoundSegment:
    """An open file of the log.

    Attributes:
        base: The log offset of its first byte.
        file: The descriptor. The caller closes it.
        size: The number of bytes that belong to the log, None if the segment is active.
        name: The absolute path that the file has now.

    """

    base: int
    file: int
    size: int | None
    name: str


@dataclass(frozen=True, slots=True)
class Found:
    """What was found.

    Attributes:
        segments: The segments in order, without gaps. The last one is active, except if it was
            sealed before and the path names no file.
        end: The offset at which the next file begins if there are no segments.
        warnings: One line each.
        later: How many of the segments come after the one that was active.

    """

    segments: list[FoundSegment]
    end: int
    warnings: list[str]
    later: int


class FilesRenamedError(OSError):
    """Files were renamed during each look at the folder, so that some could be missed."""


def find_segments(path: str, saved: Sequence[SavedSegment]) -> Found:
    """Find the segments of the log when the server starts.

    The sizes of new segments are those of their files at this moment. A caller that seals a segment
    later, because its file still grows, computes the base offsets after it anew.

    Args:
        path: The path of the served file.
        saved: The segments in the state file, at least one.

    Returns:
        The open segments, and warnings.

    Raises:
        StateFileError: A system call failed for a reason that may be temporary. A start without
            the file would change the meaning of offsets for ever.

    """
    try:
        return search(
            path,
            lambda files, present: decide(files, present, _heads(files, saved), saved),
            _START_ATTEMPTS,
            _START_PAUSE,
        )
    except OSError as error:
        raise StateFileError(
            f"cannot find the segments of the log {path!r}:"
            f" {error.filename or path!r}: {error.strerror};"
            " start again, or delete the state file to start at offset 0"
        ) from error


def find_next(
    path: str,
    known: Collection[Identity],
    unsealed: Collection[Identity],
    since: int,
    base: int,
) -> Found:
    """Find the files after the last known one, while the server runs.

    Args:
        path: The path of the served file.
        known: Device and inode number of each file that is not new.
        unsealed: Those of the active segment's file and of the known files after it.
        since: The latest modification time of the last known file, in nanoseconds, that was seen
            while the path named it; see files_between().
        base: The end of the active segment. As for find_segments(), a caller that seals the segment
            later computes the base offsets anew.

    Returns:
        The open files after the last known one, in order. There are none if the path names an
        unsealed file.

    Raises:
        OSError: A system call failed for a reason that may be temporary.
        FilesRenamedError: Files were renamed during each of several attempts.

    """
    return search(
        path, lambda files, present: following(files, present, known, unsealed, since, base)
    )


def open_recent(path: str, since: int) -> list[int]:
    """Open the rotated files that were changed lately, the last 16 of them at most.

    Args:
        path: The path of the served file, which is not opened.
        since: The earliest modification time, in nanoseconds.

    Returns:
        The descriptors. Files that cannot be opened are left out.

    """
    try:
        files, present, _ = _list(path)
    except OSError:
        return []
    recent = [each for each in files if each.modified >= since and each != present]
    recent.sort(key=lambda each: each.modified)
    opened: list[int] = []
    for file in recent[-_MAX_RECENT:]:
        # They are opened only to notice late appends.
        with suppress(OSError):
            if not file.compressed and isinstance(fd := _open(file), int):
                opened.append(fd)
    return opened


def search(
    path: str,
    decision: Callable[[list[File], File | None], Chain],
    attempts: int = _ATTEMPTS,
    pause: float = 0.0,
) -> Found:
    """List the files, decide, and open them; again if files were renamed meanwhile.

    Args:
        path: The path of the served file.
        decision: Returns the chain, from the listed files and the one that the path names.
        attempts: How often to look. If files are renamed each time, some could be missed.
        pause: Seconds between two attempts.

    Returns:
        What was found.

    Raises:
        OSError: A system call failed for a reason that may be temporary.
        FilesRenamedError: Files were renamed during each attempt.

    """
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause)
        files, present, warnings = _list(path)
        found = _open_all(decision(files, present), warnings)
        try:
            again, still, _ = _list(path)
        except OSError:
            _close(found)
            raise
        if _names(again) == _names(files) and _same(present, still):
            return found
        _close(found)
    raise FilesRenamedError(errno.EAGAIN, "files beside it are renamed all the time", path)


def _same(before: File | None, after: File | None) -> bool:
    """Return whether the path still names the same file: a symbolic link is changed in one step."""
    return (before and before.identity) == (after and after.identity)


def _names(files: Iterable[File]) -> set[tuple[str, Identity]]:
    return {(file.name, file.identity) for file in files}


def _list(path: str) -> tuple[list[File], File | None, list[str]]:
    """Return the rotated files with the present one, the present one, and warnings.

    Raises OSError if the folder cannot be listed or a file cannot be examined. It is only a warning
    if listing the folder is not permitted.
    """
    target = os.path.realpath(path)
    folder, base = os.path.split(target)
    names, warnings = set[str](), list[str]()
    try:
        names = {name for name in os.listdir(folder) if rotated(name, base)}
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError as error:
        warnings.append(f"rotated files cannot be found: {folder!r}: {error.strerror}")
    present = _examine(folder, base, base)
    files = {present.identity: present} if present else {}
    # Sorted, so that the result is the same each time if a file has two names. It counts once.
    for name in sorted(names):
        file = _examine(folder, name, base)
        # logrotate deletes a file after it has compressed it.
        if file and not (file.compressed and os.path.splitext(name)[0] in names):
            files.setdefault(file.identity, file)
    return list(files.values()), present, warnings


def _examine(folder: str, name: str, base: str) -> File | None:
    path = os.path.join(folder, name)
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    kind = rotated(name, base) or (dated(name) if name == base else (), False)
    identity = status.st_dev, status.st_ino
    return File(path, identity, status.st_size, status.st_mtime_ns, *kind)


def _heads(files: Iterable[File], saved: Sequence[SavedSegment]) -> dict[Identity, bytes | None]:
    """Return the first bytes of each file that can be a segment, None if it cannot be opened.

    The folder may have thousands of older files. Raises OSError.
    """
    inodes = {segment.inode for segment in saved}
    since = min(segment.modified for segment in saved)
    return {
        file.identity: _head(file)
        for file in files
        if not file.compressed and (file.identity[1] in inodes or file.modified >= since)
    }


def _head(file: File) -> bytes | None:
    fd = _open(file)
    if isinstance(fd, str):
        return None
    try:
        return os.pread(fd, HEAD, 0)
    finally:
        close_file(fd)


def _open(file: File) -> int | str:
    """Return a descriptor, or the reason why there is none. Raises OSError."""
    try:
        fd = os.open(file.name, OPEN_FLAGS)
    except OSError as error:
        if error.errno in _LASTING:
            return os.strerror(error.errno)
        raise
    try:
        status = os.fstat(fd)
    except OSError:
        close_file(fd)
        raise
    if (status.st_dev, status.st_ino) == file.identity:
        return fd
    close_file(fd)
    return "another file has got this name"


def _open_all(chain: Chain, warnings: list[str]) -> Found:
    """Open the files, the newest first, so that the oldest are dropped if one cannot be opened."""
    opened: list[FoundSegment] = []
    found = Found(opened, chain.end, warnings + chain.warnings, chain.later)
    for link in reversed(chain.links):
        try:
            fd = _open(link.file) if len(opened) < MAX_SEGMENTS else "the log has too many files"
        except OSError:
            _close(found)
            raise
        if isinstance(fd, str):
            end = link.base + (link.size or 0)
            warning = f"offsets before {end} are gone: {link.file.name!r} is not opened: {fd}"
            return Found(opened, end, [*found.warnings, warning], min(chain.later, len(opened)))
        opened.insert(0, FoundSegment(link.base, fd, link.size, link.file.name))
    return found


def _close(found: Found) -> None:
    for segment in found.segments:
        close_file(segment.file)
