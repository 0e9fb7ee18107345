"""Makes a child send a status that may not fit a socket's buffer.

argv contains the case, the name of the control socket, and the suffix of the name to ask.
"""

import os
import resource
import socket
import sys

from support.sockets import recv_all
from tailsrv.control_socket import Control
from tailsrv.linux.event_loop import EventLoop
from tailsrv.supervisor.status_server import StatusServer

what, name, which = sys.argv[1:]
long = b"x" * 1_000_000
control, loop = Control.lock([name]), EventLoop()
status_server = StatusServer(loop, control, lambda: long, lambda: b"", lambda: None)


def ask() -> socket.socket:
    """Return a connection to the control socket."""
    asker = socket.socket(socket.AF_UNIX)
    asker.settimeout(20)
    asker.connect(f"\0tailsrv:{name}{which}")
    return asker


def one_after_another() -> None:
    """Answer twice, although another connection has been closed before its answer."""
    for _ in range(2):
        with ask() as asker:
            ask().close()
            loop.turn()
            assert recv_all(asker) == long
        pid, status = os.wait()
        assert status == 0
        assert status_server.handle_exit(pid)
        assert not status_server.handle_exit(pid)


def no_child() -> None:
    """Ask while no child can be forked, and again when one can."""
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, before[1]))
    os.setuid(3_000_000_000 + os.getpid())
    with ask() as asker:
        loop.turn()
        assert recv_all(asker) == b""
    resource.setrlimit(resource.RLIMIT_NPROC, before)
    with ask() as asker:
        loop.turn()
        assert recv_all(asker) == long


def no_descriptor() -> None:
    """Ask while no descriptor is available, and again when one is."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ask() as asker:
        ask().close()
        lowest = os.dup(asker.fileno())
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
        for _ in range(2):
            loop.turn()
            assert loop.wait(0) == [], "the loop spins"
            loop.turn()
            assert loop.wait(0) != [], "accept was not retried"
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        loop.turn()
        assert recv_all(asker) == (b"" if which else long)
        pid, _ = os.wait()
        assert status_server.handle_exit(pid)


{"one after another": one_after_another, "no child": no_child, "no descriptor": no_descriptor}[
    what
]()
control.close()
