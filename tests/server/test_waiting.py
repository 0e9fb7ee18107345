"""A server whose file does not exist yet.

Its workers accept, refuse and monitor clients as usual, and serve them when the file appears.
"""

import os
import signal
import socket
from pathlib import Path

import pytest

from support.files import append
from support.processes import gone
from support.server import Serve, Server
from support.sockets import LINE_LENGTH, expect, expect_eof, recv_all, recv_exactly, reset
from support.status import await_clients, ready_workers, status
from support.waiting import eventually

pytestmark = pytest.mark.slow

OLD, NEW = b"the first file\n", b"the file that was awaited\n"


@pytest.fixture(params=[(), ("--follow-name",)], ids=["", "with --follow-name"])
def waiting(request: pytest.FixtureRequest, serve: Serve, path: Path) -> Server:
    """Start a server that waits for its file."""
    server = serve(path, "-w", "2", *request.param)
    server.logged("waiting for file")
    return server


def queued(server: Server) -> int:
    """Return the number of connections in the accept queues."""
    return sum(listener["queued"] for listener in status(server)["listeners"])


def test_probes_do_not_fill_accept_queues(waiting: Server) -> None:
    """Connections that are closed at once, as by readiness probes, do not fill accept queues."""
    port = waiting.port
    for number in range(100):
        probe = socket.create_connection(("127.0.0.1", port))
        reset(probe) if number % 2 else probe.close()
    eventually(lambda: queued(waiting) == 0)
    await_clients(waiting, 0)


def test_offsets_after_an_upgrade(serve: Serve, path: Path) -> None:
    """If all files of a saved log are gone, it continues at its end, also after an upgrade."""
    options = ("--follow-name", "--state-file", str(path.with_name("state")))
    path.write_bytes(OLD)
    first = serve(path, *options)
    expect(first.connect(b"0\n"), OLD)
    first.signal(signal.SIGTERM)
    first.wait()
    path.unlink()
    server = serve(path, *options)
    server.logged("waiting for file")
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    path.write_bytes(NEW)
    client = server.connect(b"?0\n")
    assert int(recv_exactly(client, LINE_LENGTH).split()[0]) == len(OLD)
    expect(client, NEW)


def test_served_when_the_file_appears(waiting: Server, path: Path) -> None:
    """Clients are served when the file appears, whatever part of their header they have sent."""
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


def test_worker_killed_without_a_file(waiting: Server, path: Path) -> None:
    """No client is lost if a worker is killed before the file exists."""
    clients = [waiting.connect(b"0\n") for _ in range(20)]
    await_clients(waiting, len(clients))
    pids = ready_workers(waiting)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: all(map(gone, pids)))
    path.write_bytes(NEW)
    for client in clients:
        expect(client, NEW)


def test_sigterm_without_a_file(waiting: Server) -> None:
    """On SIGTERM, every client that waits for the file gets a clean end of its stream."""
    clients = [
        waiting.connect(header) for header in (b"0\n", b"-0\n", b"", b"12") for _ in range(3)
    ]
    waiting.signal(signal.SIGTERM)
    for client in clients:
        expect_eof(client)
    waiting.wait()


def test_refusals_without_a_file(serve: Serve, path: Path) -> None:
    """Bad headers, --header-timeout and --allow are enforced before the file exists."""
    server = serve(path, "--header-timeout", "0.3", "--allow", "127.0.0.1")
    client = server.connect(b"0\n")
    assert recv_all(server.connect(b"no number\n")) == b""
    server.logged("client refused: ", "not a number")
    assert recv_all(server.connect(b"12")) == b""
    server.logged("client refused: ", "no header in 0.3 s")
    with socket.socket() as refused:
        refused.bind(("127.0.0.2", 0))
        refused.connect(("127.0.0.1", server.port))
        assert recv_all(refused) == b""
    server.logged("client is not in an allowed network")
    path.write_bytes(NEW)
    expect(client, NEW)
