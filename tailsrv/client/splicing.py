"""Moves a socket's bytes into a pipe within the kernel, with splice(2), and in another way where that does not go."""

import errno
import os
import socket

# bytes; an empty pipe has room for them, even the smallest
PAGE = 4096

# What splice(2) says where a stream goes on all the same: EAGAIN at TCP's urgent mark. The others say that it cannot be had, be it
# for this kind of file or socket, or because a sandbox forbids it.
UNABLE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
_ASK_RECV = UNABLE | {errno.EAGAIN}


def splice(source: int, target: int, count: int, offset: int | None = None) -> int:
    """Move up to `count` bytes to the `offset` of `target`, as the system call does; return how many. Raises OSError.

    An interpreter without os.splice is like a kernel without splice(2).
    """
    if not hasattr(os, "splice"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.splice(source, target, count, offset_dst=offset)


def move(sock: socket.socket, pipe: int, count: int) -> int | None:
    """Move up to `count` bytes from `sock` into the empty `pipe`; return how many, 0 at the end of the stream, None if none are there.

    The socket does not block. Raises OSError if the connection is lost.
    """
    try:
        if moved := splice(sock.fileno(), pipe, count):
            return moved
    except OSError as error:
        if error.errno not in _ASK_RECV:
            raise
    # Neither EAGAIN nor 0 is the last word. In front of a byte that is marked as urgent, splice(2) says the one, and once the server
    # has ended the stream the other, while poll(2) says "readable": whoever only asks again does so for ever. recv(2) passes the mark.
    try:
        data = sock.recv(min(count, PAGE))
    except BlockingIOError:
        return None
    return os.write(pipe, data)
