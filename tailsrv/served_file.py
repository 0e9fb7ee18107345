"""Opens the files that are served, and checks whether their path still names the active one.

The supervisor holds one `ServedFile`. All workers inherit its descriptors.
"""

import os
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from tailsrv.error_hints import absolute, cannot_open
from tailsrv.file_identity import FileIdentity
from tailsrv.linux.files import close_file
from tailsrv.log import fields, logger
from tailsrv.segments import NO_FILE, Log, Segment
from tailsrv.status_schema import FileStatus, LogStatus, SegmentStatus


class ServedFile:
    """A path, and the log: the open files that had that name, one after another.

    `log` is None while the server waits for the first file of that name. `base` is the log offset
    of that file's first byte.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.log: Log | None = None
        self.base = 0
        # Whether the path no longer names the file of the active segment.
        self.gone = False
        # The reason why the workers poll the file and do not use inotify, None if they do use it.
        self.polling: str | None = None
        # The reason why the next file of this name cannot be opened, empty if there is no error.
        self.open_error = ""
        self._identity: FileIdentity | None = None
        # Since when open_next() has found no file, in seconds of the monotonic clock. None if it
        # has found one, or was not called.
        self._missing_since: float | None = None
        # Whether the log has said that another program has a lease on the file.
        self._lease_logged = False

    def open(self) -> bool:
        """Try to open the first file, and return whether it is open now.

        Raises CannotServeError if there is a file of that name that cannot be served.
        """
        if (file := self.open_next()) is not None:
            self.log = Log([Segment(self.base, file)])
        return file is not None

    def open_next(self) -> int | None:
        """Open the file that has the name now; return None if it does not exist or is leased.

        Raises CannotServeError.
        """
        missing_since, self._missing_since = self._missing_since, None
        file = None
        try:
            file = try_to_open(self.path)
        except LeasedError:
            self._note_lease()
        if file is None:
            self._missing_since = time.monotonic() if missing_since is None else missing_since
        return file

    def roll(self, size: int, lost: bool, file: int) -> Segment:
        """Seal the active segment at `size` bytes, and continue the log with `file`.

        With `lost`, the bytes of the sealed segment no longer exist. Returns the sealed segment.
        """
        assert self.log is not None
        sealed = self.log.seal(size, lost)
        self.log.append(Segment(sealed.end, file))
        self.gone, self._identity = False, None
        self.open_error, self._lease_logged, self._missing_since = "", False, None
        # The next file may be one that can be watched.
        self.polling = None
        return sealed

    @property
    def file(self) -> int | None:
        """The descriptor of the active segment, None while there is no file."""
        return self.log.active.file if self.log is not None else None

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
        gone = self._identity.is_gone(now)
        if gone is False:
            self._missing_since = None
        return gone

    def size(self) -> int | None:
        """Return the active file's size in bytes; None if there is none or its size is unknown."""
        return size_of(self.file) if self.file is not None else None

    def end(self) -> int | None:
        """Return the end of the log as an offset; None if there is no file or it is unknown."""
        size = self.size()
        return None if self.log is None or size is None else self.log.active.base + size

    def describe(self, now: float, follow_name: bool) -> FileStatus:
        """Return the status of the active file at `now`, a time of the monotonic clock."""
        since = self._missing_since if self.gone else None
        return FileStatus(
            path=absolute(self.path),
            size=self.size(),
            gone=self.gone,
            error=self.open_error or None,
            follow_name=follow_name,
            missing=None if since is None else max(0.0, now - since),
        )

    def describe_log(self) -> LogStatus | None:
        """Return the status of the log, None while there is no file.

        This makes one system call, however many segments there are.
        """
        if (log := self.log) is None:
            return None
        end = self.end()
        sealed = [segment for segment in log.sealed_segments if segment.file != NO_FILE]
        retired = [segment for segment in sealed if segment.end <= log.start]
        return LogStatus(
            start=log.start,
            end=end,
            segments=len(sealed) + 1,
            size=None if end is None else end - log.active.base + _total_size(sealed),
            retired=len(retired),
            retired_size=_total_size(retired),
        )

    def describe_segments(self, positions: Iterable[int], most: int) -> Iterator[SegmentStatus]:
        """Yield the status of each segment, of the last `most` ones if there are more.

        This makes a few system calls for each segment. Nothing is looked up by its path if the file
        server may not answer.

        Args:
            positions: The log offset that each client has reached.
            most: The largest number of segments to describe.

        """
        if (log := self.log) is None:
            return
        # A client may be at an offset that this process does not know of yet, but not before the
        # first segment: the supervisor would still hold the one before.
        clients = Counter(log.find(max(position, log.first)).base for position in positions)
        for segment in list(log)[-most:]:
            yield _describe_segment(segment, clients, named=self.polling is None)


def _total_size(sealed: Iterable[Segment]) -> int:
    return sum(segment.end - segment.base for segment in sealed)


def _describe_segment(segment: Segment, clients: Counter[int], named: bool) -> SegmentStatus:
    path, deleted = None, segment.file == NO_FILE
    if named and not deleted:
        path, deleted = name_of(segment.file)
    return SegmentStatus(
        base=segment.base,
        size=segment.size if segment.sealed else size_of(segment.file),
        sealed=segment.sealed,
        clients=clients[segment.base],
        path=path,
        deleted=deleted,
    )


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


def modified_at(file: int) -> int:
    """Return when the open `file` was modified last, in nanoseconds; 0 if that is unknown."""
    try:
        return os.fstat(file).st_mtime_ns
    except OSError:
        return 0


def name_of(file: int) -> tuple[str | None, bool]:
    """Return the path of the open `file`, None if it is unknown, and whether it was deleted.

    A file counts as deleted if it has no name any more. It may also have a name that is not known:
    the kernel knows only the one by which it was opened, or to which that one was renamed.
    """
    path, deleted = None, False
    try:
        status = os.fstat(file)
        deleted = status.st_nlink == 0
        candidate = os.readlink(f"/proc/self/fd/{file}")
        # The kernel adds " (deleted)" to the text if that name is gone, and a file may have such a
        # name.
        if os.path.samestat(os.stat(candidate), status):
            path = candidate
    except OSError:
        # There is no file of that name, or no /proc, or the file server does not answer.
        pass
    return path, deleted
