"""A server whose interpreter was built against an old C library has all features."""

import os
import signal
from pathlib import Path

import pytest

from support.commands import TSCAT, TSSYNC, Command, holds
from support.files import append, random_bytes
from support.old_libc import FUNCTIONS, hidden, take_away
from support.server import Serve, Server, activated
from support.sockets import expect

DATA, MORE = random_bytes(100_000), b"more"

libraries = pytest.mark.parametrize(
    "functions", [(), FUNCTIONS], ids=["old interpreter", "old library too"]
)


@pytest.mark.thorough
@pytest.mark.slow
@libraries
def test_server(
    serve: Serve,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    functions: tuple[str, ...],
) -> None:
    """A server without the newer C library functions streams, counts, adopts and upgrades."""
    assert sum(map(len, hidden().values())) > 20
    (folder := tmp_path / "hook").mkdir()
    take_away(folder, functions)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    path.write_bytes(DATA)
    servers = [
        serve(path, "-w", "2", "--max-clients", "10"),
        serve(path, "-p", "", "-w", "2", "--max-clients", "10", wrapper=activated("tcp4")),
    ]
    data = DATA
    for server in servers:
        data = check_server(server, path, data)
        check_clients(server, data, tmp_path)


def check_server(server: Server, path: Path, data: bytes) -> bytes:
    """Make the server use every missing function, and return what the file then contains."""
    clients = [server.connect(b"0\n") for _ in range(4)]
    for client in clients:
        expect(client, data)
    for worker in server.workers(2):
        os.kill(worker, signal.SIGKILL)
    server.logged("worker ready: ", count=4)
    append(path, MORE)
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ", "clients=4")
    append(path, MORE)
    for client in clients:
        expect(client, MORE + MORE)
    return data + MORE + MORE


def check_clients(server: Server, data: bytes, folder: Path) -> None:
    """Check that the client programs receive all data."""
    here, copy = f"127.0.0.1:{server.port}", folder / f"copy-{server.port}"
    with Command(folder, *TSCAT, here, "0", "--until-idle", "0.2") as tscat:
        assert tscat.end() == 0
        tscat.wrote(data)
    with Command(folder, *TSSYNC, here, copy, "--until-idle", "0.2") as tssync:
        assert tssync.end() == 0
        holds(copy, data)
