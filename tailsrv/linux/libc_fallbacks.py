"""Supplies constants and system calls that the Python interpreter may lack.

An interpreter has only the names of the C library that it was built against: glibc 2.17 for the
interpreters of uv, conda and mise, a musl without preadv2(2) for those of Alpine up to 3.19. The
numbers below are those of the kernel's headers (linux/*.h), and the same on all architectures that
such interpreters are built for. Any other name that may be missing belongs in this module.
tests/support/old_libc.py lists such names.
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
    """Read into `buffer` if no wait for the disk is needed (preadv2(2), RWF_NOWAIT).

    Args:
        file: The descriptor of the file.
        buffer: Where to put the bytes. Its length is the number of bytes to read.
        offset: The position of the first byte in the file.

    Returns:
        The number of bytes that were read from the page cache.

    Raises:
        BlockingIOError: The bytes are not in the page cache.
        OSError: The read failed, or the file system does not support such reads (EOPNOTSUPP), or
            neither the interpreter nor the C library has the call (ENOSYS).

    """
    try:
        return os.preadv(file, [buffer], offset, RWF_NOWAIT)
    except NotImplementedError:
        # The interpreter often runs with a newer C library than the one that it was built against.
        return _preadv2(file, buffer, offset)


def memory_file(name: str) -> int:
    """Return the descriptor of a new anonymous file.

    The file is in memory (memfd_create(2)). If that call is missing, it is an unlinked temporary
    file. `name` is only what /proc shows. Raises OSError if the file cannot be created.
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
    """Call the function `name` of the C library.

    Raises OSError if the call fails, with ENOSYS if the library does not have the function.
    """
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
        # OSError means that the interpreter is linked statically.
        return None
    return function


def _temporary_file() -> int:
    # Imported here because only few interpreters need it, and it imports many other modules.
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
