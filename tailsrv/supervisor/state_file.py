"""The segments of the log in a file, so that offsets keep their meaning when the server restarts.

The file is written at each roll and when the server ends, never on an append. encode() and decode()
are pure. read(), write() and lock() make the system calls.
"""

import errno
import fcntl
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from tailsrv.error_hints import absolute
from tailsrv.linux.files import close_file
from tailsrv.segments import Segment

# The format of the file. Another number means that this version cannot read it.
FORMAT = 1
# The value of "program": it distinguishes a state file from other JSON.
_PROGRAM = "tailsrv"
# A fingerprint covers at most this many bytes. Files of one log usually differ in their first line,
# which contains a time.
HEAD = 4096
# Largest state file that is read, in bytes. 1000 segments with long paths need less. A larger file
# belongs to another program, and would only fill the memory.
_MAX_SIZE = 16 * 1024 * 1024
_DIGEST_SIZE = 16


class StateFileError(Exception):
    """The state file cannot be used. The message is one line: which file, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The first bytes of a file, as their number and a hash.

    An active file that was saved while it had fewer than HEAD bytes still matches after it has
    grown, because only `count` bytes are compared. The fingerprint of an empty file matches every
    file.
    """

    count: int
    digest: str

    @classmethod
    def of(cls, head: bytes) -> "Fingerprint":
        """Return the fingerprint of a file that begins with `head`; HEAD bytes of it count."""
        head = head[:HEAD]
        return cls(len(head), _digest(head, _DIGEST_SIZE))

    def matches(self, head: bytes) -> bool:
        """Return whether a file that begins with `head`, of at least HEAD bytes, can be the one."""
        return Fingerprint.of(head[: self.count]) == self


@dataclass(frozen=True, slots=True)
class SavedSegment:
    """One segment, and how to recognize its file.

    Attributes:
        base: The log offset of its first byte.
        size: The number of bytes if it is sealed. While it is active, the size when it was saved,
            which is the smallest size that it can have later.
        sealed: Whether the size is final.
        inode: The inode number of the file. Another file gets it when this one is deleted. The
            device's number is not saved: it may change when the machine starts again (NFS, btrfs).
        modified: The modification time of the file in nanoseconds. Files that come later have a
            later one.
        fingerprint: The first bytes of the file.
        name: The absolute path that the file had when it was saved.

    """

    base: int
    size: int
    sealed: bool
    inode: int
    modified: int
    fingerprint: Fingerprint
    name: str

    @property
    def end(self) -> int:
        """The log offset after its last known byte."""
        return self.base + self.size


def describe(segment: Segment, name: str) -> SavedSegment:
    """Return what to save about the open `segment`, whose file has the path `name`.

    Raises OSError if the file cannot be examined or read.
    """
    status = os.fstat(segment.file)
    size = status.st_size if segment.size is None else segment.size
    head = os.pread(segment.file, min(HEAD, size), 0)
    return SavedSegment(
        segment.base,
        # A file that shrinks meanwhile has fewer bytes than its size was.
        size if segment.sealed or len(head) == min(HEAD, size) else len(head),
        segment.sealed,
        status.st_ino,
        # decode() takes a negative number for damage. The time is negative before 1970.
        max(0, status.st_mtime_ns),
        Fingerprint.of(head),
        absolute(name),
    )


def encode(path: str, segments: Sequence[SavedSegment]) -> bytes:
    """Return the content of a state file: the served file's absolute `path`, and `segments`."""
    content = {
        "program": _PROGRAM,
        "format": FORMAT,
        "path": path,
        "segments": [asdict(segment) for segment in segments],
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def decode(data: bytes, path: str) -> list[SavedSegment]:
    """Return the segments in a state file.

    Args:
        data: The content of the state file.
        path: The absolute path of the served file.

    Returns:
        The segments in order, at least one. Only the last one is active.

    Raises:
        StateFileError: This is not a state file of this format for that served file. The message
            lacks the name of the state file, which read() adds.

    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateFileError(f"it is damaged or not a state file ({_first_line(error)})") from error
    if not isinstance(content, dict) or content.get("program") != _PROGRAM:
        raise StateFileError("it is not a state file of tailsrv")
    if content.get("format") != FORMAT:
        raise StateFileError(
            f"it has format {content.get('format')!r}, and this version reads format {FORMAT}"
        )
    if content.get("path") != path:
        raise StateFileError(
            f"it belongs to the served file {content.get('path')!r}, not to {path!r}"
        )
    try:
        segments = [_segment(values) for values in content["segments"]]
        _check(segments)
    except (KeyError, TypeError, ValueError) as error:
        raise StateFileError(f"its list of segments is damaged ({_first_line(error)})") from error
    return segments


def _segment(values: dict[str, Any]) -> SavedSegment:
    """Return the segment with these values; raise an error if one is missing, unknown or wrong."""
    segment = SavedSegment(**{**values, "fingerprint": Fingerprint(**values["fingerprint"])})
    numbers = segment.base, segment.size, segment.inode, segment.modified, segment.fingerprint.count
    # bool is a subclass of int.
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"a number is wrong: {numbers}")
    if type(segment.sealed) is not bool or not isinstance(segment.name, str):
        raise TypeError("a value has the wrong type")
    return segment


def _check(segments: list[SavedSegment]) -> None:
    """Raise ValueError unless the segments follow each other and only the last one is active."""
    if not segments:
        raise ValueError("there is none")
    if [segment.sealed for segment in segments] != [True] * (len(segments) - 1) + [False]:
        raise ValueError("not exactly the last one is active")
    for before, after in pairwise(segments):
        if before.end != after.base:
            raise ValueError(f"no segment begins at {before.end}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def read(state_file: str, path: str) -> list[SavedSegment] | None:
    """Return the segments in `state_file`, None if it does not exist: this is the first start.

    Args:
        state_file: The path of the state file.
        path: The path of the served file.

    Returns:
        The segments in order, at least one. Only the last one is active.

    Raises:
        StateFileError: The file cannot be read, or has another content. Starting without it would
            give old offsets a new meaning, so this is never ignored.

    """
    try:
        data = _content(state_file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(state_file, "cannot be read", error) from error
    try:
        return decode(data, absolute(path))
    except StateFileError as error:
        raise StateFileError(
            f"state file {state_file!r}: {error};"
            " give another --state-file, or delete this one to start at offset 0"
        ) from error


def _content(state_file: str) -> bytes:
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    fd = os.open(state_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with open(fd, "rb", closefd=False) as file:
            return file.read(_MAX_SIZE)
    finally:
        close_file(fd)


def write(state_file: str, path: str, segments: Sequence[SavedSegment]) -> None:
    """Replace the content of `state_file` in one step.

    After a crash at any moment, the file has its old or its new content. The temporary file has a
    fixed name, so at most one is left over; the next write replaces it. Only one server may write a
    state file, see lock(). The file has mode 0600, because it reveals paths.

    Args:
        state_file: The path of the state file.
        path: The path of the served file.
        segments: The segments in order. Only the last one is active.

    Raises:
        StateFileError: A system call failed. The old content is still there, except if only opening
            or syncing the folder failed: then the new content may be lost in a power failure.

    """
    # If the path is a symbolic link, the file that it names is replaced, not the link.
    target = os.path.realpath(state_file)
    temporary = target + ".new"
    try:
        try:
            _write_new(temporary, encode(absolute(path), segments))
            os.rename(temporary, target)
        except OSError:
            _remove(temporary)
            raise
        _sync_folder(os.path.dirname(target))
    except OSError as error:
        raise _unusable(state_file, "cannot be written", error) from error


def _write_new(path: str, data: bytes) -> None:
    """Write a new file and wait until it is on the disk. Replaces one that a crash has left."""
    _remove(path)
    # O_EXCL: if anything has this name in spite of that, it is not followed and not overwritten.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        # Without it, the rename may reach the disk before the data, and leave an empty file.
        os.fsync(fd)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        # The file does not exist, or another call on it has failed and its error is reported.
        pass


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        close_file(fd)


def lock(state_file: str) -> int:
    """Take the lock against a second server with the same `state_file`.

    The lock is on a file of its own beside it, `state_file` with `.lock` at the end, which is never
    renamed or deleted. A lock on the state file itself would be worthless after the first write,
    which puts another inode in its place. A lock on the folder would be shared by all instances.

    It is a record lock of fcntl(2), not of flock(2): it belongs to this process and not to the open
    file, so that workers that outlive the supervisor do not hold it, and a new supervisor can take
    over from them. It survives exec(2) if the descriptor is inherited. This process must not open
    the lock file a second time: closing any descriptor of it releases the lock.

    Returns:
        The descriptor. Closing it releases the lock; the kernel releases it when the process dies.

    Raises:
        StateFileError: Another server has the lock, or a system call failed.

    """
    # Two paths of one state file must name the same lock.
    path = os.path.realpath(state_file) + ".lock"
    try:
        # Not O_TRUNC, not O_EXCL: the file stays for ever. It is empty.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _unusable(
            state_file, f"is not usable, its lock {path!r} cannot be opened", error
        ) from error
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        close_file(fd)
        # fcntl(2): EACCES or EAGAIN.
        if isinstance(error, (PermissionError, BlockingIOError)):
            raise StateFileError(
                f"state file {state_file!r}: another tailsrv uses it;"
                " give each server a --state-file of its own"
            ) from error
        raise _unusable(
            state_file, f"is not usable, its lock {path!r} cannot be taken", error
        ) from error
    return fd


def _unusable(state_file: str, what: str, error: OSError) -> StateFileError:
    return StateFileError(
        f"state file {state_file!r} {what}: {error.strerror};"
        " it must be a regular file in a folder that the server may write to (--state-file)"
    )


def default_path(environ: Mapping[str, str], path: str) -> str | None:
    """Return the state file in the folder that the service manager provides; None if it has none.

    The file is named for the served file, not for the port: the offsets belong to the log, and stay
    valid when the port changes. Two servers of one file cannot share it, which lock() detects.

    Args:
        environ: The environment. STATE_DIRECTORY may contain several folders, separated by colons;
            the first one is used (systemd.exec(5)).
        path: The path of the served file.

    """
    folder = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if not folder:
        return None
    whole = os.fsencode(absolute(path))
    # The hash distinguishes files of the same name in different folders. The kernel allows at most
    # 255 bytes for a file name.
    name = os.fsdecode(os.path.basename(whole)[:100])
    return os.path.join(folder, f"{name}-{_digest(whole, 8)}.json")


def _digest(data: bytes, size: int) -> str:
    # Imported here, because hashlib loads OpenSSL, which a server without a state file does not
    # need [measured: 0.7 MiB, and 8 ms of its start].
    from hashlib import blake2b

    return blake2b(data, digest_size=size).hexdigest()
