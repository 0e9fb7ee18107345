"""The local file to which `tssync` copies: opens, locks, checks, extends and syncs it."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Self

from tailsrv.client.command_runner import RunError
from tailsrv.client.resume import CONTEXT
from tailsrv.client.splicing import UNABLE, splice

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
# Attempts to open and lock the file. More than one is needed only if another program moves or
# deletes the file between the two steps.
OPEN_TRIES = 10

# A function that waits for free space on the disk. It is called with the reason, as text.
WaitForRoom = Callable[[str], object]


class LocalCopy:
    """The local file, `length` bytes long. Only this process may change it, and only by appending.

    It is locked with flock(2). If another program changes it nevertheless, the next append or
    connection detects that.
    """

    def __init__(self, path: str) -> None:
        """Open and lock `path`, and create it if it does not exist. Raises RunError, OSError."""
        # A symbolic link is followed once, here. Otherwise `move_aside` would rename the link
        # instead of the file, and the next copy would be where the link was, perhaps on another
        # disk.
        self.path = os.path.realpath(path) if os.path.islink(path) else path
        self._can_splice = True
        self._synced: int | None
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def _open(self) -> None:
        self.fd = _open_locked(self.path)
        self.length = os.fstat(self.fd).st_size
        # How many bytes at the start of the file are known to be on the disk. None: unknown,
        # because an earlier process has written them.
        self._synced = None if self.length else 0

    def recall(self, offset: int) -> bytes:
        """Return the last bytes of the file, up to CONTEXT; `offset` must be the file's length.

        Raises RunError if another program has changed, moved or deleted the file.
        """
        assert offset == self.length
        self._check()
        start = max(0, offset - CONTEXT)
        return os.pread(self.fd, offset - start, start)

    def append(self, pipe: int, pending: int, wait_for_room: WaitForRoom) -> None:
        """Append the `pending` bytes that are in `pipe`.

        While the disk is full, calls `wait_for_room` before each further attempt. Raises RunError
        if the file cannot be written for another reason, or if another program has changed, moved
        or deleted the file.
        """
        while pending:
            if self._can_splice:
                pending -= self._grow(partial(self._splice, pipe, pending), wait_for_room)
            else:
                data = os.read(pipe, pending)
                self._write(data, wait_for_room)
                pending -= len(data)

    def _splice(self, pipe: int, count: int) -> int:
        """Move up to `count` bytes from `pipe` to the end of the file; return how many.

        Returns 0 if splice(2) cannot be used for this file. From then on, `append` does not use it.
        """
        try:
            return splice(pipe, self.fd, count, self.length)
        except OSError as error:
            if error.errno not in UNABLE:
                raise
            self._can_splice = False
            return 0

    def _write(self, data: bytes, wait_for_room: WaitForRoom) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._grow(partial(os.pwrite, self.fd, rest, self.length), wait_for_room) :]

    def _grow(self, write: Callable[[], int], wait_for_room: WaitForRoom) -> int:
        """Call `write`, which appends to the file, and return the number of bytes it has written.

        If the disk is full, calls `wait_for_room` and returns 0. Raises RunError for other errors.
        """
        self._check()
        try:
            count = write()
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise RunError(f"cannot append to {self.path}: {error.strerror}") from error
            wait_for_room(os.strerror(error.errno))
            return 0
        self.length += count
        return count

    def sync(self) -> None:
        """Write the file's data to the disk with fdatasync(2).

        If that fails, cuts the file to the part that is known to be on the disk, if there is one,
        and raises RunError.
        """
        length = self.length
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            # Do not retry: the kernel reports the error only once, and then treats the bytes that
            # it could not write as written, so another call would succeed (fsync(2)).
            raise RunError(
                f"cannot sync {self.path}: {error.strerror}; {self._cut_back()}"
            ) from error
        self._synced = length

    def _cut_back(self) -> str:
        """Cut off the bytes that may not be on the disk, so that the next run fetches them again.

        Returns the end of the error message: whether this has worked, and what to do.
        """
        if self._synced is None:
            return (
                "some of its bytes may not be on the disk:"
                " move it away, then start tssync again to make a new copy"
            )
        found = os.fstat(self.fd)
        # Whole blocks only: the block after them was being written when the disk failed, so the
        # part of it that had been synced may be damaged.
        kept = self._synced - self._synced % found.st_blksize
        try:
            # ftruncate(2) must not make the file longer: that would add a hole.
            if found.st_size > kept:
                os.ftruncate(self.fd, kept)
                self.length = kept
            os.fdatasync(self.fd)
        except OSError as error:
            return (
                f"it cannot be cut to the {kept} bytes that are on the disk ({error.strerror}):"
                " move it away, then start tssync again to make a new copy"
            )
        return (
            f"it was cut to the {kept} bytes that are on the disk:"
            " start tssync again to fetch the rest"
        )

    def _check(self) -> None:
        if (size := os.fstat(self.fd).st_size) != self.length:
            raise RunError(
                f"{self.path} was changed by another program: it has {size} bytes instead of"
                f" {self.length}; stop that program, then start tssync again"
            )
        if not _is_at(self.fd, self.path):
            raise RunError(
                f"{self.path} was moved or deleted by another program;"
                " start tssync again to make a new copy"
            )

    def move_aside(self) -> str:
        """Rename the file to a free name, and start a new, empty copy under the old name.

        Returns the new name of the old file. Raises OSError.
        """
        aside = _take_free_name(self.path)
        try:
            os.rename(self.path, aside)
        except OSError:
            os.unlink(aside)
            raise
        before = self.fd
        self._open()
        os.close(before)
        return aside


def _take_free_name(path: str) -> str:
    """Create an empty file with the first free name of `path`.1, `path`.2, ...; return that name.

    A later rename(2) to this name replaces only that empty file, so no other file can be
    overwritten. A hard link or RENAME_NOREPLACE would need no empty file, but not all file systems
    have them. Raises OSError.
    """
    number = 1
    while True:
        name = f"{path}.{number}"
        try:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            return name
        except FileExistsError:
            number += 1


def _open_locked(path: str) -> int:
    """Open and lock the file at `path`, and return its descriptor. Raises RunError, OSError.

    The lock is held until the descriptor is closed.
    """
    for _ in range(OPEN_TRIES):
        if (fd := _try_open_locked(path)) is not None:
            return fd
    raise RunError(
        f"cannot open {path}: another program replaced it during each of {OPEN_TRIES} attempts;"
        " stop that program, then start tssync again"
    )


def _try_open_locked(path: str) -> int | None:
    """Open and lock the file. Return None if another program moves or deletes it meanwhile."""
    # O_NONBLOCK: opening a FIFO must not block.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    locked = False
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RunError(f"{path} is not a regular file; choose another FILE")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = _is_at(fd, path)
    except BlockingIOError:
        raise RunError(
            f"another program has locked {path}, perhaps another tssync;"
            " stop it, or choose another FILE"
        ) from None
    finally:
        if not locked:
            os.close(fd)
    return fd if locked else None


def _is_at(fd: int, path: str) -> bool:
    """Return whether `path` names the open file."""
    opened = os.fstat(fd)
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(opened, named) or _look_alike(opened, named)


def _look_alike(opened: os.stat_result, named: os.stat_result) -> bool:
    """Return whether these are probably the same file, although the inode numbers differ.

    Some file systems invent inode numbers (CIFS with noserverino, some FUSE file systems): there, a
    file has a different number each time it is looked up. On other file systems this comparison
    cannot be wrong, because a file that replaces the open one has a later change time.
    """
    return opened.st_nlink > 0 and _fingerprint(opened) == _fingerprint(named)


def _fingerprint(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_size, found.st_mtime_ns, found.st_ctime_ns
