"""Thousands of clients at the same time."""

import json
import socket
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.server import Serve
from support.sockets import reset_at_close
from support.status import ask
from support.waiting import DEADLINE, eventually

CLIENTS = 20_000
# Descriptors that this process, a worker or the supervisor needs besides those of clients.
SPARE = 200
# Connections that wait for accept(2) at a time: fewer than a worker's backlog.
WINDOW = 1000
# Clients per loopback address, which has about 28,000 ephemeral ports.
PER_ADDRESS = 10_000


def connect_client(port: int, number: int) -> socket.socket:
    """Return the socket of client `number`, which has requested the whole file."""
    sock = socket.socket()
    sock.settimeout(DEADLINE)
    reset_at_close(sock)
    # 24 is IP_BIND_ADDRESS_NO_PORT: the socket module of Python 3.11 has no name for it.
    sock.setsockopt(socket.IPPROTO_IP, 24, 1)
    sock.bind((f"127.0.0.{2 + number // PER_ADDRESS}", 0))
    sock.connect(("127.0.0.1", port))
    sock.sendall(b"0\n")
    return sock


@pytest.mark.thorough
@pytest.mark.slow
def test_one_append_reaches_thousands_of_clients(
    serve: Serve, path: Path, descriptors: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """20,000 clients, or as many as descriptors allow, are protected and get each append."""
    count = min(CLIENTS, descriptors - SPARE)
    if count < CLIENTS:
        with capsys.disabled():
            print(
                f"\ntesting with {count:,} clients, not {CLIENTS:,}: "
                f"a process may open only {descriptors:,} descriptors"
            )
    before, after = random_bytes(100, 1), random_bytes(100, 2)
    append(path, before)
    server = serve(path, "-w", "2")
    clients, port = server.clients, server.port
    for first in range(0, count, WINDOW):
        added = [connect_client(port, i) for i in range(first, min(first + WINDOW, count))]
        clients += added
        assert all(sock.recv(1000) == before for sock in added)

    def all_are_known() -> bool:
        status = json.loads(ask(f"*:{port}")[0])
        assert status["unprotected"] == 0
        return bool(status["clients"] == count)

    eventually(all_are_known)
    append(path, after)
    assert all(sock.recv(1000) == after for sock in clients)
