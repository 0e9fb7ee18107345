"""Names and calls of the kernel that the interpreter may lack, with substitutes for them.

An interpreter has only what the C library had that it was built against: glibc 2.17 for those of uv,
conda and mise, a musl without preadv2(2) for those of Alpine up to 3.19. The numbers are those of the
kernel's headers (linux/*.h) on all architectures that such interpreters are built for. Any other name
that may be missing belongs here, too: tests/old_libc.py lists them.
"""

import ctypes
import errno
import os
import select
import socket
from collections.abc import Callable
from functools import cache
from typing import Any

EPOLLEXCLUSIVE: int = getattr(select, "EPOLLEXCLUSIVE", 1 << 28)
IPPROTO_MPTCP: int = getattr(socket, "IPPROTO_MPTCP", 262)
RWF_NOWAIT: int = getattr(os, "RWF_NOWAIT", 8)
SO_PROTOCOL: int = getattr(socket, "SO_PROTOCOL", 38)
TCP_FASTOPEN: int = getattr(socket, "TCP_FASTOPEN", 23)
TCP_NOTSENT_LOWAT: int = getattr(socket, "TCP_NOTSENT_LOWAT", 25)

_MFD_CLOEXEC = 1


def preadv_nowait(file: int, buffer: bytearray, offset: int) -> int:
    """Read bytes that are in the page cache into `buffer`, and return how many (preadv2(2)).

    Raises BlockingIOError where the disk would have to be waited for, and OSError with ENOSYS where
    neither the interpreter nor the C library has the call.
    """
    try:
        return os.preadv(file, [buffer], offset, RWF_NOWAIT)
    except NotImplementedError:
        # The C library that the interpreter runs with is often newer than the one it was built with.
        return _preadv2(file, buffer, offset)


def memory_file(name: str) -> int:
    """Return the descriptor of a new anonymous file: memfd_create(2), else an unlinked file on disk.

    Raises OSError.
    """
    try:
        return os.memfd_create(name) if hasattr(os, "memfd_create") else _memfd_create(name)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    return _temporary_file()


class _Vector(ctypes.Structure):
    """struct iovec of readv(2)."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _preadv2(file: int, buffer: bytearray, offset: int) -> int:
    vector = _Vector(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), len(buffer))
    return _call("preadv64v2", file, ctypes.byref(vector), 1, ctypes.c_int64(offset), RWF_NOWAIT)


def _memfd_create(name: str) -> int:
    return _call("memfd_create", os.fsencode(name), _MFD_CLOEXEC)


def _call(name: str, *arguments: Any) -> int:
    """Call a function of the C library. Raises OSError, with ENOSYS where there is none of that name."""
    function = _find(name)
    result = -1 if function is None else int(function(*arguments))
    if result < 0:
        number = errno.ENOSYS if function is None else ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@cache
def _find(name: str) -> Callable[..., Any] | None:
    try:
        function: Callable[..., Any] = ctypes.CDLL(None, use_errno=True)[name]
    except (OSError, AttributeError):
        # OSError: the interpreter is linked statically.
        return None
    return function


def _temporary_file() -> int:
    # Imported here, since it imports much that only these few interpreters would need.
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
