"""Whether a path still names the file that is open."""

import errno
import os
import stat

from tailsrv.linux.file_system import is_local
from tailsrv.linux.files import close_file

# What fstat(2) says of a file that will never answer again: its server has forgotten it (NFS), its
# daemon has ended (FUSE), its disk has been pulled out. EIO is not among these, since it may pass.
_DEAD = frozenset({errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN})

# bytes compared at the beginning of two files, and as many at the end
SAMPLE = 4096
# seconds; what the kernel remembers of a file on a server is out of date for less
CATCH_UP = 5.0


class FileIdentity:
    """The open `file`, to be compared with what `path` names.

    Device and inode number tell two files apart, on a local file system. Others may make inode
    numbers up as they go (CIFS with noserverino, some FUSE). There, a file of another number is the
    same one as long as it cannot be told from ours: same beginning, same end, and ours keeps up with
    it. Should it be a copy after all, nobody misses a byte by that until the copy grows and ours does
    not; then it is another file.
    """

    def __init__(self, file: int, path: str) -> None:
        self._file, self._path = file, path
        # our size, since when, while the path's is larger
        self._behind: tuple[int, float] | None = None

    def is_gone(self, now: float) -> bool | None:
        """Tell whether the path names another file, or nothing; None if that cannot be seen yet.

        A path that may not be looked at, or a file server that does not answer, is no sign of it.
        A held file that is dead for good counts as gone once the path can be looked at again.
        `now` is a time in seconds, of a clock that does not go back.
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
        if held.st_dev != named.st_dev or not stat.S_ISREG(named.st_mode) or is_local(self._file):
            return True
        return self._is_another(held.st_size, now)

    def _is_another(self, size: int, now: float) -> bool | None:
        """Tell whether the file of another number is another file; ours had `size` bytes before."""
        try:
            other = os.open(self._path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        except (FileNotFoundError, PermissionError):
            return True
        except OSError:
            return None
        try:
            theirs, ours = os.fstat(other).st_size, os.fstat(self._file).st_size
            if theirs < min(size, ours) or _sample(other, min(theirs, ours)) != _sample(
                self._file, min(theirs, ours)
            ):
                return True
            return self._lags(theirs, ours, now)
        except OSError:
            return None
        finally:
            close_file(other)

    def _lags(self, theirs: int, ours: int, now: float) -> bool | None:
        """Tell whether our file stays behind the other for good, None if it may yet catch up."""
        if theirs <= ours:
            self._behind = None
            return False
        if self._behind is None or self._behind[0] != ours:
            self._behind = ours, now
        return True if now - self._behind[1] >= CATCH_UP else None


def _sample(file: int, size: int) -> tuple[bytes, bytes]:
    """Return the beginning and the end of the first `size` bytes."""
    start = max(0, size - SAMPLE)
    return os.pread(file, min(size, SAMPLE), 0), os.pread(file, size - start, start)
