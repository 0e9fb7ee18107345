"""Opens the file that is served, and checks whether its path still names it.

The supervisor holds one `ServedFile`. All workers inherit its descriptor.
"""

import os
import stat

from tailsrv.error_hints import absolute, cannot_open
from tailsrv.file_identity import FileIdentity
from tailsrv.linux.files import close_file
from tailsrv.log import fields, logger


class ServedFile:
    """A path, and the open file of that name, which all workers share.

    `file` is its descriptor, or None while the server waits for a file of that name.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: int | None = None
        # Whether the path no longer names the open file.
        self.gone = False
        # The reason why the workers poll the file and do not use inotify, None if they do use it.
        self.polling: str | None = None
        # The reason why the next file of this name cannot be opened, empty if there is no error.
        self.open_error = ""
        self._identity: FileIdentity | None = None
        # Whether the log has said that another program has a lease on the file.
        self._lease_logged = False

    def open(self) -> bool:
        """Try to open the file, and return whether it is open now.

        Raises CannotServeError if there is a file of that name that cannot be served.
        """
        try:
            self.file = try_to_open(self.path)
        except LeasedError:
            self._note_lease()
        return self.file is not None

    def _note_lease(self) -> None:
        if not self._lease_logged:
            self._lease_logged = True
            logger.warning(
                "another program has a lease on the file, clients wait until it is released: %s",
                fields(path=self.path, hint="Samba: kernel oplocks = no; see /proc/locks"),
            )

    def has_gone(self, now: float) -> bool | None:
        """Return whether the path names another file or nothing; None if that is unknown yet.

        `now` is a time in seconds, of a clock that never goes back.
        """
        assert self.file is not None
        if self._identity is None:
            self._identity = FileIdentity(self.file, self.path)
        return self._identity.is_gone(now)

    def close(self) -> None:
        """Close the file, so that the next file of its name can be opened."""
        assert self.file is not None
        close_file(self.file)
        self.file, self.gone, self.polling, self._identity = None, False, None, None
        self._lease_logged = False

    def size(self) -> int | None:
        """Return the file's size in bytes; None if no file is open or its size is unknown."""
        return size_of(self.file) if self.file is not None else None

    def describe(self) -> dict[str, object]:
        """Return the status of the file, as the control socket reports it."""
        return {
            "path": absolute(self.path),
            "gone": self.gone,
            "error": self.open_error or None,
            "size": self.size(),
        }


class CannotServeError(Exception):
    """The file cannot be served; the message says why, in one line."""


class LeasedError(Exception):
    """Another program has a lease on the file (fcntl(2), F_SETLEASE).

    The kernel has asked that program to release it. Samba and nfsd take leases.
    """


def open_file(path: str) -> int | None:
    """Open the regular file `path`; return None if it does not exist or is leased.

    Raises CannotServeError.
    """
    try:
        return try_to_open(path)
    except LeasedError:
        return None


def try_to_open(path: str) -> int | None:
    """Open the regular file `path`; return its descriptor, or None if the file does not exist.

    Raises CannotServeError, or LeasedError if the file cannot be opened until another program
    releases its lease.
    """
    try:
        # Check before open(2), which would have a side effect on a FIFO or a device: it rewinds a
        # tape, for example.
        _check_regular(os.stat(path))
        file = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except BlockingIOError as error:
        raise LeasedError from error
    except OSError as error:
        raise CannotServeError(cannot_open(path, error)) from error
    try:
        _check_regular(os.fstat(file))
        _try_sendfile(file)
    except OSError as error:
        close_file(file)
        raise CannotServeError(cannot_open(path, error)) from error
    except CannotServeError:
        close_file(file)
        raise
    return file


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CannotServeError("not a regular file")


def _try_sendfile(file: int) -> None:
    """Test that the file supports sendfile(2) and lseek(2), before the first client needs them.

    Raises CannotServeError.
    """
    with open(os.devnull, "wb", buffering=0) as sink:
        try:
            os.sendfile(sink.fileno(), file, 0, 1)
            os.lseek(file, 0, os.SEEK_END)
        except OSError as error:
            raise CannotServeError(
                "its file system does not support sendfile(2) or lseek(2):"
                f" {os.strerror(error.errno or 0)}; serve a file on another one"
            ) from error


def size_of(file: int) -> int | None:
    """Return the size of the open `file` in bytes; None if its file server does not answer."""
    try:
        return os.fstat(file).st_size
    except OSError:
        return None
