"""Checks whether the kernel counts the bytes of a TCP stream. Some sandboxes do not."""

import socket
import time
from contextlib import ExitStack

from tailsrv.linux.sockets import bytes_streamed, unsent

# Number of bytes to send in the check.
_COUNT = 1000
# Seconds to wait for the connection. Linux makes it at once.
_CONNECT_TIMEOUT = 1.0
# Number of checks for the acknowledgement, a millisecond apart. On Linux, it is there at once.
_ACK_CHECKS = 1000


def counts_streams() -> bool:
    """Return whether the kernel counts the bytes that have been sent on a TCP connection.

    A process that inherits a connection needs this number in order to continue the stream.
    Sandboxes such as gVisor may return a TCP_INFO that is short or empty.

    This sends some bytes over loopback and checks the count twice: after sending, and after the
    bytes have been acknowledged. If no loopback connection can be made, the result is True.
    """
    with ExitStack() as stack:
        try:
            near = _connect(stack)
            near.send(bytes(_COUNT))
        except OSError:
            return True
        try:
            return (
                bytes_streamed(near) == _COUNT
                and _acknowledged(near)
                and bytes_streamed(near) == _COUNT
            )
        except OSError:
            return False


def _connect(stack: ExitStack) -> socket.socket:
    """Return the accepted end of a new loopback connection. `stack` closes all its sockets."""
    listener, far = (
        stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP))
        for _ in range(2)
    )
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    far.settimeout(_CONNECT_TIMEOUT)
    far.connect(listener.getsockname())
    listener.settimeout(_CONNECT_TIMEOUT)
    near, _ = listener.accept()
    return stack.enter_context(near)


def _acknowledged(sock: socket.socket) -> bool:
    """Wait until the peer has acknowledged all bytes, and return whether it has done so in time."""
    for _ in range(_ACK_CHECKS):
        if not unsent(sock):
            return True
        time.sleep(0.001)
    return False
