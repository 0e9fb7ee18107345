"""Connections that accept(2) fails for stay in the queue and delay no other client."""

import signal
from pathlib import Path

import pytest

from support.files import append
from support.server import Serve
from support.sockets import expect
from support.strace import can_inject, strace

DATA = b"0123456789"


@pytest.mark.slow
def test_accept_that_always_fails(serve: Serve, path: Path) -> None:
    """While accept(2) fails, streams continue; once it works, waiting connections are served."""
    if reason := can_inject():
        pytest.skip(reason)
    path.write_bytes(DATA)
    server = serve(path)
    [worker] = server.workers(1)
    streaming = server.connect(b"0\n")
    expect(streaming, DATA)
    with strace(worker, "accept,accept4:error=EPERM"):
        waiting = [server.connect(b"0\n") for _ in range(3)]
        server.logged("warning: accept(2) fails for every connection", "Operation not permitted")
        append(path, b"more")
        expect(streaming, b"more")
    for sock in waiting:
        expect(sock, DATA + b"more")


@pytest.mark.slow
def test_drain_while_accept_fails(serve: Serve, path: Path) -> None:
    """A drain ends with its last stream, even if accept(2) never empties the accept queue."""
    if reason := can_inject():
        pytest.skip(reason)
    path.write_bytes(DATA)
    server = serve(path, "--grace", "1000")
    [worker] = server.workers(1)
    streaming = server.connect(b"0\n")
    expect(streaming, DATA)
    with strace(worker, "accept,accept4:error=EPERM"):
        server.connect(b"0\n")
        server.signal(signal.SIGTERM)
        assert streaming.recv(1) == b""
        streaming.close()
        server.wait()
