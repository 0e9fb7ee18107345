"""Prints whether standard input counts as hung up: a file of kind argv[1], its other end closed."""

import os
import pty
import socket
import sys

from tailsrv.linux.terminal import is_hung_up


def opened(what: str) -> int:
    """Return a descriptor of the kind `what`."""
    match what:
        case "pipe":
            return os.pipe()[0]
        case "socket":
            near, far = socket.socketpair()
            far.close()
            return near.detach()
        case "terminal":
            return pty.openpty()[1]
    return os.open(os.devnull, os.O_RDONLY)


os.dup2(opened(sys.argv[1]), 0)
os.closerange(3, 20)
print(is_hung_up())
