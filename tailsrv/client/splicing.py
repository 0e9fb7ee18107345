"""Moves bytes from a socket to a pipe, and from a pipe to a file, inside the kernel: splice(2).

Where splice(2) is not available, `move` copies the bytes through this process instead.
"""

import errno
import os
import socket

# Bytes that fit into any empty pipe, even the smallest one.
PAGE = 4096

# Errors of splice(2) that mean that it cannot be used: it does not support this kind of file or
# socket, or a sandbox forbids it.
UNABLE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
# Errors of splice(2) after which `move` tries recv(2). EAGAIN is one of them because of urgent
# bytes, see `move`.
_TRY_RECV = UNABLE | {errno.EAGAIN}


def splice(source: int, target: int, count: int, offset: int | None = None) -> int:
    """Move up to `count` bytes between descriptors inside the kernel; return how many.

    One of `source` and `target` is a pipe. With `offset`, `target` is a file, and the bytes are
    written there. Raises OSError; with ENOSYS also if the interpreter was built without os.splice.
    """
    if not hasattr(os, "splice"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.splice(source, target, count, offset_dst=offset)


def move(sock: socket.socket, pipe: int, count: int) -> int | None:
    """Move up to `count` bytes from `sock`, which is non-blocking, into `pipe`, which is empty.

    Returns the number of bytes, 0 at the end of the stream, None if no bytes are available now.
    Raises OSError if the connection is lost.
    """
    try:
        if moved := splice(sock.fileno(), pipe, count):
            return moved
    except OSError as error:
        if error.errno not in _TRY_RECV:
            raise
    # EAGAIN does not prove that there are no bytes, nor 0 that the stream has ended. Before a byte
    # that is marked as urgent (TCP), splice(2) fails with EAGAIN, or returns 0 if the server has
    # ended the stream after that byte. But poll(2) reports the socket as readable, so a caller that
    # only retried would loop forever. recv(2) reads past the mark.
    try:
        data = sock.recv(min(count, PAGE))
    except BlockingIOError:
        return None
    return os.write(pipe, data)
