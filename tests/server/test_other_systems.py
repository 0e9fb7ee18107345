"""A server on a kernel that does not tell how much of a stream has been sent.

Its clients must not be continued at a wrong offset.
"""

import os
import signal
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.hooks import install_hook
from support.server import Serve
from support.sockets import expect, expect_eof
from support.status import status
from support.waiting import eventually

DATA = random_bytes(100_000)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("system", ["short", "not counted"])
def test_server(
    serve: Serve, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """Clients are served and counted as unprotected; they are disconnected if their worker dies."""
    (folder := tmp_path / "hook").mkdir()
    install_hook(folder, "other_system")
    monkeypatch.setenv("TAILSRV_TEST_SYSTEM", system)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    path.write_bytes(DATA)
    server = serve(path)
    [worker] = server.workers(1)
    clients = [server.connect(b"0\n") for _ in range(3)]
    for client in clients:
        expect(client, DATA)
    eventually(lambda: (status(server)["clients"], status(server)["unprotected"]) == (3, 3))
    os.kill(worker, signal.SIGKILL)
    for client in clients:
        expect_eof(client)
    server.logged("worker ready: ", count=2)
    expect(server.connect(b"0\n"), DATA)
    append(path, b"more")
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    # The old and the new program log it once each.
    assert len(server.lines("does not tell how much of a stream has been sent")) == 2
    assert not server.lines("out of file descriptors")
    expect(server.connect(b"0\n"), DATA + b"more")


@pytest.mark.slow
def test_waiting_for_the_file(
    serve: Serve, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that connect before the file exists wait in the accept queue.

    A worker that accepted them would lose them if it died.
    """
    (folder := tmp_path / "hook").mkdir()
    install_hook(folder, "other_system")
    monkeypatch.setenv("TAILSRV_TEST_SYSTEM", "empty")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    server = serve(path)
    server.logged("waiting for file")
    clients = [server.connect(b"0\n") for _ in range(3)]
    path.write_bytes(DATA)
    for client in clients:
        expect(client, DATA)
