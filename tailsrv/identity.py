"""Whether a path still names the file that is open."""

import errno
import os

# What fstat(2) says of a file that will never answer again: its server has forgotten it (NFS), its
# daemon has ended (FUSE), its disk has been pulled out. EIO is not among these, since it may pass.
_DEAD = frozenset({errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN})


class Identity:
    """The open `file`, to be compared with what `path` names."""

    def __init__(self, file: int, path: str) -> None:
        self._file, self._path = file, path

    def is_gone(self) -> bool | None:
        """Tell whether the path names another file, or nothing; None if that cannot be seen now.

        A path that may not be looked at, or a file server that does not answer, is no sign of it.
        A held file that is dead for good counts as gone once the path can be looked at again.
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
        return (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino)
