"""Makes name lookups wait until the test closes the named pipe $TAILSRV_TEST_GATE."""

import os
import socket
from typing import Any

original = socket.getaddrinfo


def getaddrinfo(*arguments: Any, **more: Any) -> Any:
    """Wait for the test, then look the name up."""
    with open(os.environ["TAILSRV_TEST_GATE"]) as gate:
        gate.read()
    return original(*arguments, **more)


socket.getaddrinfo = getaddrinfo
