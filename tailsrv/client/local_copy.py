"""The local copy of a remote file: its lock, its last bytes, and what is appended to it."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Self

from tailsrv.client.command import RunError
from tailsrv.client.resume import CONTEXT
from tailsrv.client.splicing import UNABLE, splice

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
# attempts to open and lock the file before somebody takes it away; one is enough, but for chance
OPEN_TRIES = 10

# called with the reason why there is none
WaitForRoom = Callable[[str], object]


class LocalCopy:
    """A file that nobody else may change: it grows by what comes, and is `length` bytes long."""

    def __init__(self, path: str) -> None:
        """Open and lock `path`, made if it is not there. Raises RunError, OSError."""
        # A symbolic link is followed once. Otherwise it is the link that would get another name in `set_aside`, and the next copy
        # would be where the link was, perhaps on another disk.
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
        # so many of the first bytes the disk surely has
        self._synced = None if self.length else 0

    def recall(self, offset: int) -> bytes:
        """Return the bytes before `offset`, which is the file's length. Raises RunError if it is not."""
        assert offset == self.length
        self._check()
        start = max(0, offset - CONTEXT)
        return os.pread(self.fd, offset - start, start)

    def append(self, pipe: int, pending: int, wait_for_room: WaitForRoom) -> None:
        """Append the `pending` bytes in `pipe`; as often as there is no room, it calls `wait_for_room` with the reason.

        Raises RunError if that fails otherwise, or if somebody else has changed the file, or taken it away.
        """
        while pending:
            if self._can_splice:
                pending -= self._grow(partial(self._splice, pipe, pending), wait_for_room)
            else:
                data = os.read(pipe, pending)
                self._write(data, wait_for_room)
                pending -= len(data)

    def _splice(self, pipe: int, count: int) -> int:
        """Move up to `count` bytes from `pipe` to the end of the file. Returns 0 from where on that is known not to work here."""
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
        """Have `write` append to the file; return the number of bytes, 0 after a wait for room. Raises RunError."""
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
        """Have what there is written to the disk. Raises RunError, after which the file ends with what the disk surely has."""
        length = self.length
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            # The kernel says so once, and takes what it could not write for written (fsync(2)): to ask again would succeed.
            raise RunError(
                f"cannot sync {self.path}: {error.strerror}; {self._cut_back()}"
            ) from error
        self._synced = length

    def _cut_back(self) -> str:
        """Take away the bytes that the disk may not have, so that the next run gets them anew; return what to say of that."""
        if self._synced is None:
            return (
                "some of its bytes may be lost on the disk: move it away, so that it is copied anew"
            )
        found = os.fstat(self.fd)
        # the next block was being written, too
        kept = self._synced - self._synced % found.st_blksize
        try:
            # never longer: that would be a hole
            if found.st_size > kept:
                os.ftruncate(self.fd, kept)
                self.length = kept
            os.fdatasync(self.fd)
        except OSError as error:
            return f"it cannot be cut to {kept} bytes, which the disk has ({error.strerror}): move it away, so that it is copied anew"
        return f"it was cut to {kept} bytes, which the disk has, and the next run goes on there"

    def _check(self) -> None:
        if (size := os.fstat(self.fd).st_size) != self.length:
            raise RunError(
                f"{self.path} was changed by somebody else: it has {size} bytes, not {self.length}"
            )
        if not _is_at(self.fd, self.path):
            raise RunError(f"{self.path} was moved or deleted by somebody else")

    def set_aside(self) -> str:
        """Give the file another name, one that was free, and begin with an empty one; return the other name. Raises OSError."""
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
    """Make an empty file with the first free name of `path`.1, `path`.2, ... and return that name. Raises OSError.

    Then a rename(2) onto that name is over no other file, on any file system: not all have hard links, or RENAME_NOREPLACE.
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
    """Return a descriptor of the file that `path` names, locked until it is closed. Raises RunError, OSError."""
    for _ in range(OPEN_TRIES):
        if (fd := _try_open_locked(path)) is not None:
            return fd
    raise RunError(f"cannot open {path}: each time, {path} was another file a moment later")


def _try_open_locked(path: str) -> int | None:
    """Do the same once; None if somebody has moved the file aside meanwhile."""
    # a FIFO must not hold us up
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    locked = False
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RunError(f"{path} is not a regular file")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = _is_at(fd, path)
    except BlockingIOError:
        raise RunError(f"another program has locked {path}") from None
    finally:
        if not locked:
            os.close(fd)
    return fd if locked else None


def _is_at(fd: int, path: str) -> bool:
    """Tell whether `path` names the open file."""
    ours = os.fstat(fd)
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(ours, named) or _look_alike(ours, named)


def _look_alike(ours: os.stat_result, named: os.stat_result) -> bool:
    """Tell whether these are of one file on a file system that makes up inode numbers (CIFS with noserverino, some FUSE ones).

    There, a file has another number each time that it is looked up. Elsewhere a file that replaces ours is of a later time.
    """
    return ours.st_nlink > 0 and _marks(ours) == _marks(named)


def _marks(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_size, found.st_mtime_ns, found.st_ctime_ns
