"""The local copy of a remote file: its lock, its last bytes, and what is appended to it."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from itertools import count
from typing import Self

from tailsrv.client_run import RunError
from tailsrv.place import CONTEXT

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class Mirror:
    """A file that nobody else may change: it grows by what comes, and is `length` bytes long."""

    def __init__(self, path: str) -> None:
        """Open and lock `path`, made if it is not there. Raises RunError, OSError."""
        self.path = path
        self.fd = _open_locked(path)
        self.length = os.fstat(self.fd).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def recall(self, offset: int) -> bytes:
        """Return the bytes before `offset`, which is the file's length. Raises RunError if it is not."""
        assert offset == self.length
        self._check()
        start = max(0, offset - CONTEXT)
        return os.pread(self.fd, offset - start, start)

    def append(self, pipe: int, pending: int, wait_for_room: Callable[[str], object]) -> None:
        """Append the `pending` bytes in `pipe`; as often as there is no room, it calls `wait_for_room` with the reason.

        Raises RunError if that fails otherwise, or if somebody else has changed the file, or taken it away.
        """
        while pending:
            self._check()
            try:
                moved = os.splice(pipe, self.fd, pending, offset_dst=self.length)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise RunError(f"cannot append to {self.path}: {error.strerror}") from error
                wait_for_room(os.strerror(error.errno))
            else:
                self.length += moved
                pending -= moved

    def sync(self) -> None:
        """Have what there is written to the disk. Raises RunError."""
        try:
            os.fdatasync(self.fd)
        except OSError as error:  # the kernel says so once; what has failed is not tried again
            raise RunError(f"cannot sync {self.path}: {error.strerror}") from error

    def _check(self) -> None:
        if (size := os.fstat(self.fd).st_size) != self.length:
            raise RunError(f"{self.path} was changed by somebody else: it has {size} bytes, not {self.length}")
        if not _is_at(self.fd, self.path):
            raise RunError(f"{self.path} was moved or deleted by somebody else")

    def set_aside(self) -> str:
        """Give the file another name, one that was free, and begin with an empty one; return the other name. Raises OSError."""
        for number in count(1):  # pragma: no branch: it counts for ever
            aside = f"{self.path}.{number}"
            try:
                os.link(self.path, aside)  # unlike rename(2), never over another file
                break
            except FileExistsError:
                pass
        os.unlink(self.path)
        fd = _open_locked(self.path)
        os.close(self.fd)
        self.fd = fd
        self.length = os.fstat(self.fd).st_size
        return aside


def _open_locked(path: str) -> int:
    """Return a descriptor of the file that `path` names, locked until it is closed. Raises RunError, OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a FIFO must not hold us up
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise RunError(f"{path} is not a regular file")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, path):
                return fd
            os.close(fd)  # somebody has moved it aside meanwhile
        except BlockingIOError:
            os.close(fd)
            raise RunError(f"another program has locked {path}") from None
        except BaseException:
            os.close(fd)
            raise


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
