"""System calls on files: sendfile(2), read-ahead and anonymous files, with expected errors as values."""

import mmap
import os
from collections.abc import Iterable

from tailsrv.linux.kernel import memory_file, preadv_nowait
from tailsrv.linux.sockets import Outcome, outcome_of

# An append up to this size is read once and written to every caught-up client: for so little, setting up a sendfile(2)
# costs more than a copy does [measured: 8 % of a delivery to one of 1000 clients; at 16 KiB it is the other way round].
MAX_COPY = 4096

# how many bytes went, or why none did; an error itself where it is none to be expected
Sent = int | Outcome | OSError

_BYTE = bytearray(1)


def send_chunk(out: int, file: int, offset: int, count: int) -> Sent:
    """Send up to `count` bytes of `file` from `offset` to the socket `out`; 0 means that they are not there."""
    try:
        return os.sendfile(out, file, offset, count)
    except OSError as error:
        return outcome_of(error)


def send_to_all(outs: Iterable[int], file: int, offset: int, count: int) -> dict[int, Sent]:
    """Send the same `count` bytes of `file` from `offset` to each of the sockets `outs`; return those that did not take them all.

    Nothing else happens for one that does: this is what an append costs each client.
    """
    short: dict[int, Sent] = {}
    out, left = -1, iter(outs)
    data = _read(file, offset, count) if count <= MAX_COPY else b""
    write, sendfile = os.write, os.sendfile
    while True:
        try:
            if data:
                for out in left:
                    if (sent := write(out, data)) != count:
                        short[out] = sent
            else:
                for out in left:
                    if (sent := sendfile(out, file, offset, count)) != count:
                        short[out] = sent
            return short
        except OSError as error:
            # of one; the others are still to come
            short[out] = outcome_of(error)


def _read(file: int, offset: int, count: int) -> bytes:
    try:
        return os.pread(file, count, offset)
    except OSError:
        # sendfile(2) will say so to each
        return b""


def is_cached(file: int, offset: int, count: int, stride: int) -> bool:
    """Tell whether `count` bytes of `file` can be had without waiting for the disk, as a look at every `stride` and at the last tells.

    preadv2(2), RWF_NOWAIT. The first look in vain is the last: the kernel answers it with read-ahead from that place on, and what
    is behind it should not come before it. Where it is not known (EOPNOTSUPP, ENOSYS), or nothing is there, the answer is yes: sendfile(2)
    has the last word.
    """
    try:
        for place in range(offset, offset + count, stride):
            preadv_nowait(file, _BYTE, place)
        if (last := offset + count - 1) // mmap.PAGESIZE != offset // mmap.PAGESIZE:
            preadv_nowait(file, _BYTE, last)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def read_ahead(file: int, offset: int, count: int) -> None:
    """Have `count` bytes of `file` read into the page cache, and do not wait for them (posix_fadvise(2))."""
    try:
        os.posix_fadvise(file, offset, count, os.POSIX_FADV_WILLNEED)
    except OSError:
        # a hint; without it they come when they are sent
        pass


def memory_file_with(data: bytes = b"") -> int:
    """Return the descriptor of a new anonymous file that holds `data`, at its start."""
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
    """Close the descriptor of a file, and pass over what its file system says to that.

    A network or FUSE file system may answer with any error (close(2): EIO, ENOTCONN, ...). Of a file that was only read
    that means nothing, and on Linux the descriptor is free whatever the answer is.
    """
    try:
        os.close(fd)
    except OSError:
        pass
