"""Decides whether a path still names the file that is open, also on network file systems."""

import errno
import os
import stat

from tailsrv.linux.file_system_type import is_local
from tailsrv.linux.files import close_file

# The errors of fstat(2) for a file that is lost for good: its server has forgotten it (NFS), its
# daemon has exited (FUSE), or its disk has been removed. EIO may be temporary, so it is not listed.
_DEAD = frozenset({errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN})

# How many bytes are compared at the beginning of two files, and again at their end.
SAMPLE = 4096
# Seconds for which the open file may be shorter than the named file before they count as different
# files. The kernel caches a file server's attributes of a file for less time than this.
CATCH_UP = 5.0


class FileIdentity:
    """Compares the open `file` with the file that `path` names.

    On a local file system, device and inode number identify a file. Other file systems may invent
    inode numbers (CIFS with noserverino, some FUSE file systems). There, a file with another number
    counts as the same file as long as both have the same beginning and the same end, and the open
    file grows with the named one. If the named file is in fact a copy, clients miss no byte while
    the copy does not grow. When it grows and the open file does not, it counts as another file.
    """

    def __init__(self, file: int, path: str) -> None:
        self._file, self._path = file, path
        # Whether the open file is on a local file system, None until that is known.
        self._local: bool | None = None
        # While the named file is larger: the open file's size, and since when it has had that size.
        self._shorter: tuple[int, float] | None = None

    def is_gone(self, now: float) -> bool | None:
        """Return whether the path names another file or nothing; None if that is unknown yet.

        It is unknown while stat(2) of the path is not permitted or a file server does not answer.
        An open file that is lost for good counts as gone as soon as stat(2) of the path succeeds.
        `now` is a time in seconds, of a clock that never goes back.
        """
        try:
            named = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError as error:
            return True if error.errno == errno.ELOOP else None
        try:
            held = os.fstat(self._file)
        except OSError as error:
            return True if error.errno in _DEAD else None
        if (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
            return False
        if held.st_dev != named.st_dev or not stat.S_ISREG(named.st_mode) or self._is_local():
            return True
        return self._is_another(held.st_size, now)

    def _is_local(self) -> bool:
        if self._local is None:
            self._local = is_local(self._file)
        return self._local

    def _is_another(self, size: int, now: float) -> bool | None:
        """Return whether the named file, which has another number, is another file.

        `size` is the size that the open file had a moment ago. None means that it is unknown yet.
        """
        try:
            other = os.open(self._path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        except (FileNotFoundError, PermissionError):
            return True
        except OSError:
            return None
        try:
            named_size, open_size = os.fstat(other).st_size, os.fstat(self._file).st_size
            if named_size < min(size, open_size):
                return True
            common = min(named_size, open_size)
            if _sample(other, common) != _sample(self._file, common):
                return True
            return self._stays_shorter(named_size, open_size, now)
        except OSError:
            return None
        finally:
            close_file(other)

    def _stays_shorter(self, named_size: int, open_size: int, now: float) -> bool | None:
        """Return whether the open file stays shorter than the named one; None if it may catch up.

        Sizes are in bytes.
        """
        if named_size <= open_size:
            self._shorter = None
            return False
        if self._shorter is None or self._shorter[0] != open_size:
            self._shorter = open_size, now
        return True if now - self._shorter[1] >= CATCH_UP else None


def _sample(file: int, size: int) -> tuple[bytes, bytes]:
    """Return the first and the last SAMPLE bytes of the first `size` bytes of `file`."""
    start = max(0, size - SAMPLE)
    return os.pread(file, min(size, SAMPLE), 0), os.pread(file, size - start, start)
