"""Accepts connections while no descriptor is available for them, and again when one is."""

import os
import resource
import socket

from tailsrv.linux.sockets import Outcome
from tailsrv.worker.acceptor import accept

with (
    socket.create_server(("127.0.0.1", 0)) as listener,
    socket.create_connection(listener.getsockname()),
):
    listener.setblocking(False)
    spare = os.open("/", os.O_RDONLY)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))
    assert accept(listener) is Outcome.NO_DESCRIPTOR
    assert accept(listener) is Outcome.NO_DESCRIPTOR
    os.close(spare)
    accepted = accept(listener)
    assert isinstance(accepted, tuple)
    accepted[0].close()
    assert accept(listener) is Outcome.WOULD_BLOCK
    spare = os.open("/", os.O_RDONLY)
    assert accept(listener) is Outcome.WOULD_BLOCK
    # The measurement of coverage needs descriptors at exit.
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
