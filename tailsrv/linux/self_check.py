"""Tries at start what a system that only resembles Linux may do differently."""

import socket
import time
from contextlib import ExitStack

from tailsrv.linux.sockets import bytes_streamed, unsent

# bytes to send
_COUNT = 1000
# seconds for the connection; on Linux it is there at once
_PATIENCE = 1.0
# looks for the acknowledgement, a millisecond apart; on Linux it is there at once, too
_TRIES = 1000


def counts_streams() -> bool:
    """Tell whether the kernel says how much has been sent on a connection, as a successor needs it.

    Sends some bytes over loopback and has them counted twice: when they are sent, and when they are
    acknowledged. Sandboxes like gVisor may have a TCP_INFO that is short or empty. Returns True
    also where there is no loopback to try it on.
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
    """Return the accepted end of a connection on loopback; `stack` closes all of it."""
    listener, far = (
        stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP))
        for _ in range(2)
    )
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    far.settimeout(_PATIENCE)
    far.connect(listener.getsockname())
    listener.settimeout(_PATIENCE)
    near, _ = listener.accept()
    return stack.enter_context(near)


def _acknowledged(sock: socket.socket) -> bool:
    """Wait until the peer has acknowledged everything, and tell whether it has."""
    for _ in range(_TRIES):
        if not unsent(sock):
            return True
        time.sleep(0.001)
    return False
