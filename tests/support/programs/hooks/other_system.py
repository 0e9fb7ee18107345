"""Imitates a system similar to Linux that does not report how much of a stream has been sent.

$TAILSRV_TEST_SYSTEM says what TCP_INFO contains there.
"""

import errno
import os
import socket
import sys
from typing import Any

getsockopt = socket.socket.getsockopt


def tell(info: bytes) -> bytes:
    """Return what the system reports for `info`, the TCP_INFO of Linux.

    It is an error, nothing, a short structure, a field that is always 0, or one that counts
    something else.
    """
    match os.environ["TAILSRV_TEST_SYSTEM"]:
        case "none":
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        case "empty":
            return b""
        case "short":
            return info[:104]
        case "not counted":
            return info[:120] + bytes(8)
    return info[:120] + (10**6).to_bytes(8, sys.byteorder)


def other(self: socket.socket, level: int, option: int, *size: int) -> Any:
    """Call the original method, and replace its answer for TCP_INFO."""
    found = getsockopt(self, level, option, *size)
    return (
        tell(found)
        if (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO) and isinstance(found, bytes)
        else found
    )


socket.socket.getsockopt = other  # type: ignore[method-assign,assignment]
