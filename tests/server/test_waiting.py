"""A server whose file is not there: its workers accept, refuse and watch clients as ever, and serve them when the file comes."""

import os
import signal
import socket
from pathlib import Path

import pytest

from support.files import append
from support.processes import gone
from support.server import Serve, Server
from support.sockets import expect, expect_eof, recv_all, reset
from support.status import await_clients, ready_workers, status
from support.waiting import eventually

pytestmark = pytest.mark.slow

OLD, NEW = b"the first file\n", b"the file that was awaited\n"


@pytest.fixture(params=["at the start", "between two files"])
def waiting(request: pytest.FixtureRequest, serve: Serve, path: Path) -> Server:
    """Give a server that waits for its file, from the start or after a rotation."""
    if request.param == "at the start":
        server = serve(path, "-w", "2", "--follow-name")
    else:
        path.write_bytes(OLD)
        server = serve(path, "-w", "2", "--follow-name")
        expect(server.connect(b"0\n"), OLD)
        path.unlink()
    server.logged("waiting for file")
    return server


def queued(server: Server) -> int:
    """Return how many connections nobody has accepted."""
    return sum(listener["queued"] for listener in status(server)["listeners"])


def test_probes_leave_nothing_behind(waiting: Server) -> None:
    """Connections that are made and closed at once, as readiness probes do, do not fill the accept queues."""
    port = waiting.port
    for number in range(100):
        probe = socket.create_connection(("127.0.0.1", port))
        reset(probe) if number % 2 else probe.close()
    eventually(lambda: queued(waiting) == 0)
    await_clients(waiting, 0)


def test_served_when_the_file_comes(waiting: Server, path: Path) -> None:
    """Whatever part of its header a client has sent while it waited, it is served as the header says when the file is there."""
    headers = {
        b"0\n": NEW,
        b"4\n": NEW[4:],
        b"-5\n": NEW[-5:],
        b"-0\n": b"",
        b"7\nand more": NEW[7:],
        b"1": NEW[12:],
        b"": NEW,
    }
    clients = {header: waiting.connect(header) for header in headers}
    await_clients(waiting, len(clients))
    path.with_name("ready").write_bytes(NEW)
    path.with_name("ready").rename(path)
    waiting.logged("serving: ")
    clients[b"1"].sendall(b"2\n")
    clients[b""].sendall(b"0\n")
    for header, expected in headers.items():
        expect(clients[header], expected)
    await_clients(waiting, len(clients))
    append(path, OLD)
    for client in clients.values():
        expect(client, OLD)


def test_a_worker_dies_while_it_waits(waiting: Server, path: Path) -> None:
    """A worker that is killed before there is a file costs nobody anything."""
    clients = [waiting.connect(b"0\n") for _ in range(20)]
    await_clients(waiting, len(clients))
    pids = ready_workers(waiting)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: all(map(gone, pids)))
    path.write_bytes(NEW)
    for client in clients:
        expect(client, NEW)


def test_the_end(waiting: Server) -> None:
    """Told to end, it gives every client that waits a clean end of its stream, whatever it had asked for."""
    clients = [
        waiting.connect(header) for header in (b"0\n", b"-0\n", b"", b"12") for _ in range(3)
    ]
    waiting.signal(signal.SIGTERM)
    for client in clients:
        expect_eof(client)
    waiting.wait()


def test_rules_hold(serve: Serve, path: Path) -> None:
    """What is no header is refused, silence ends after --header-timeout and strangers are turned away: the file need not be there."""
    server = serve(path, "--header-timeout", "0.3", "--allow", "127.0.0.1")
    patient = server.connect(b"0\n")
    assert recv_all(server.connect(b"no number\n")) == b""
    server.logged("client refused: ", "not a number")
    assert recv_all(server.connect(b"12")) == b""
    server.logged("client refused: ", "no header in 0.3 s")
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.2", 0))
        stranger.connect(("127.0.0.1", server.port))
        assert recv_all(stranger) == b""
    server.logged("client is not in an allowed network")
    path.write_bytes(NEW)
    expect(patient, NEW)
