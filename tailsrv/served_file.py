"""The file that is served, as the supervisor holds it: awaited, open, or gone from its path."""

import os
import stat

from tailsrv.diagnostics import absolute, cannot_open
from tailsrv.file_identity import FileIdentity
from tailsrv.linux.files import close_file
from tailsrv.log import fields, logger


class ServedFile:
    """One path, and the open file that all workers share: `file` is its descriptor, None while it is awaited."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: int | None = None
        # the path does not name it any more
        self.gone = False
        # why the workers look at it by the clock
        self.polling: str | None = None
        # why the next one of this name cannot be opened
        self.open_error = ""
        self._identity: FileIdentity | None = None
        # and the log says so
        self._leased = False

    def open(self) -> bool:
        """Open the file if there is one, and tell whether it is open. Raises CannotServeError."""
        try:
            self.file = try_to_open(self.path)
        except LeasedError:
            self._note_lease()
        return self.file is not None

    def _note_lease(self) -> None:
        if not self._leased:
            self._leased = True
            logger.warning(
                "another program has a lease on the file, clients wait until it is given up: %s",
                fields(path=self.path, hint="Samba: kernel oplocks = no; see /proc/locks"),
            )

    def has_gone(self, now: float) -> bool | None:
        """Tell whether the path names something else by now, or nothing; None if that cannot be seen yet."""
        assert self.file is not None
        if self._identity is None:
            self._identity = FileIdentity(self.file, self.path)
        return self._identity.is_gone(now)

    def close(self) -> None:
        """Close the file, for the next one of its name."""
        assert self.file is not None
        close_file(self.file)
        self.file, self.gone, self.polling, self._identity = None, False, None, None
        self._leased = False

    def size(self) -> int | None:
        """Return the file's size in bytes, None if there is none."""
        return size_of(self.file) if self.file is not None else None

    def describe(self) -> dict[str, object]:
        """Return what the status says of the file."""
        return {
            "path": absolute(self.path),
            "gone": self.gone,
            "error": self.open_error or None,
            "size": self.size(),
        }


class CannotServeError(Exception):
    """The file cannot be served; the message says why, in one line."""


class LeasedError(Exception):
    """Another program has a lease on the file, which the kernel has asked it to give up (fcntl(2), F_SETLEASE)."""


def open_file(path: str) -> int | None:
    """Return a descriptor of the regular file `path`, None if there is none yet. Raises CannotServeError."""
    try:
        return try_to_open(path)
    except LeasedError:
        return None


def try_to_open(path: str) -> int | None:
    """Return a descriptor of the regular file `path`, None if there is nothing of that name.

    Raises CannotServeError, and LeasedError where that will pass: Samba and nfsd take leases.
    """
    try:
        # before open(2), which would wait at a FIFO or rewind a tape
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
    """Find out now, not with the first client, whether this file's contents can be sent."""
    with open(os.devnull, "wb", buffering=0) as sink:
        try:
            os.sendfile(sink.fileno(), file, 0, 1)
            os.lseek(file, 0, os.SEEK_END)
        except OSError as error:
            raise CannotServeError(
                f"its file system cannot sendfile(2) or lseek(2): {os.strerror(error.errno or 0)}"
            ) from error


def size_of(file: int) -> int | None:
    """Return the size of the open `file` in bytes, None where a file server does not say."""
    try:
        return os.fstat(file).st_size
    except OSError:
        return None
