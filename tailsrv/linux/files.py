"""System calls on files: sendfile(2), read-ahead and anonymous files.

Errors that are part of normal operation are returned as values, or ignored, not raised.
"""

import fcntl
import mmap
import os
from collections.abc import Iterable

from tailsrv.linux.libc_fallbacks import memory_file, preadv_nowait
from tailsrv.linux.sockets import Outcome, outcome_of

# Largest number of bytes that `send_to_all` reads once and then writes to every socket. For so few
# bytes, setting up a sendfile(2) costs more than copying them [measured: the copy saves 8 % of a
# delivery to one of 1000 sockets; at 16 KiB sendfile(2) is cheaper].
MAX_COPY = 4096

# The result of a send: the number of bytes that were sent, or why none were sent. It is an OSError,
# returned and not raised, if the error is unexpected.
Sent = int | Outcome | OSError

_BYTE = bytearray(1)


def send_chunk(out: int, file: int, offset: int, count: int) -> Sent:
    """Send up to `count` bytes of `file`, from `offset` on, to the socket `out`.

    The result is 0 if `file` has no bytes at `offset`.
    """
    try:
        return os.sendfile(out, file, offset, count)
    except OSError as error:
        return outcome_of(error)


def send_bytes(out: int, data: bytes) -> Sent:
    """Send `data`, which must not be empty, to the socket `out`."""
    try:
        return os.write(out, data)
    except OSError as error:
        return outcome_of(error)


def send_to_all(outs: Iterable[int], file: int, offset: int, count: int) -> dict[int, Sent]:
    """Send the same bytes of a file to many sockets.

    For a socket that accepts all bytes, this makes one system call and does nothing else, because
    every append is sent to every client in this way.

    Args:
        outs: The descriptors of the sockets.
        file: The descriptor of the file.
        offset: The position of the first byte in the file.
        count: The number of bytes.

    Returns:
        The result of the send for each socket that did not accept all `count` bytes.

    """
    short: dict[int, Sent] = {}
    out, remaining = -1, iter(outs)
    data = _read(file, offset, count) if count <= MAX_COPY else b""
    write, sendfile = os.write, os.sendfile
    while True:
        try:
            if data:
                for out in remaining:
                    if (sent := write(out, data)) != count:
                        short[out] = sent
            else:
                for out in remaining:
                    if (sent := sendfile(out, file, offset, count)) != count:
                        short[out] = sent
            return short
        except OSError as error:
            # The error concerns this socket only. The next pass continues with the next socket.
            short[out] = outcome_of(error)


def _read(file: int, offset: int, count: int) -> bytes:
    try:
        return os.pread(file, count, offset)
    except OSError:
        # Without data, `send_to_all` calls sendfile(2) for every socket, which reports the error.
        return b""


def is_cached(file: int, offset: int, count: int, stride: int) -> bool:
    """Return whether reading these bytes of a file will not wait for the disk.

    This probes one byte in every `stride`, and the last one (preadv2(2) with RWF_NOWAIT). It stops
    at the first byte that is not in the page cache: the kernel starts read-ahead there, and another
    probe could make it read later bytes before these.

    Args:
        file: The descriptor of the file.
        offset: The position of the first byte in the file.
        count: The number of bytes.
        stride: The distance between two probes, in bytes.

    Returns:
        False if a probed byte is not in the page cache. True if all are. Also True if the file has
        no bytes there, or if the probe fails (EOPNOTSUPP, ENOSYS, ...): sendfile(2) then shows what
        is the case.

    """
    try:
        for position in range(offset, offset + count, stride):
            preadv_nowait(file, _BYTE, position)
        if (last := offset + count - 1) // mmap.PAGESIZE != offset // mmap.PAGESIZE:
            preadv_nowait(file, _BYTE, last)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def read_ahead(file: int, offset: int, count: int) -> None:
    """Start reading `count` bytes of `file` into the page cache, and do not wait for them.

    This is POSIX_FADV_WILLNEED of posix_fadvise(2).
    """
    try:
        os.posix_fadvise(file, offset, count, os.POSIX_FADV_WILLNEED)
    except OSError:
        # The call is only a hint. Without it, the bytes are read when they are sent.
        pass


def has_writers(file: int) -> bool | None:
    """Return whether any process has `file` open for writing; None if the kernel does not tell.

    A lease tells (F_SETLEASE of fcntl(2)): a read lease is refused with EAGAIN while there is a
    writer. Only the owner of the file and a process with CAP_LEASE may take one. It is released at
    once: a process that opens the file for writing meanwhile waits for that long.
    """
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def is_deleted(file: int) -> bool:
    """Return whether no name is left of `file`, so that it is gone when it is closed."""
    try:
        return os.fstat(file).st_nlink == 0
    except OSError:
        # Its file server does not answer. It may later.
        return False


def memory_file_with(data: bytes = b"") -> int:
    """Return the descriptor of a new anonymous file that contains `data`, positioned at its start.

    Raises OSError if the file cannot be created or written.
    """
    fd = memory_file("tailsrv")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError:
        os.close(fd)
        raise
    return fd


def close_file(fd: int) -> None:
    """Close the descriptor of a file, and ignore any error.

    A network or FUSE file system may answer close(2) with any error (EIO, ENOTCONN, ...). For a
    file that was only read, the error has no meaning. Linux frees the descriptor in any case.
    """
    try:
        os.close(fd)
    except OSError:
        pass
