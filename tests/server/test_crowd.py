"""Very many clients at once."""

import json
import socket
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.server import Serve
from support.sockets import reset_at_close
from support.status import ask
from support.waiting import DEADLINE, eventually

CROWD = 20_000
# descriptors that this process, a worker or the supervisor has beside the clients'
SPARE = 200
# connections that wait at a time: fewer than a worker's backlog
WINDOW = 1000
# clients from one loopback address, whose ports end at some 28,000
PER_ADDRESS = 10_000


def join(port: int, number: int) -> socket.socket:
    """Return client `number`, who has asked for the whole file."""
    sock = socket.socket()
    sock.settimeout(DEADLINE)
    reset_at_close(sock)
    # IP_BIND_ADDRESS_NO_PORT, which socket does not name
    sock.setsockopt(socket.IPPROTO_IP, 24, 1)
    sock.bind((f"127.0.0.{2 + number // PER_ADDRESS}", 0))
    sock.connect(("127.0.0.1", port))
    sock.sendall(b"0\n")
    return sock


@pytest.mark.thorough
@pytest.mark.slow
def test_one_append_reaches_a_crowd(
    serve: Serve, path: Path, descriptors: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """20,000 clients, or as many as there are descriptors for, are all protected and all get what is appended."""
    count = min(CROWD, descriptors - SPARE)
    if count < CROWD:
        with capsys.disabled():
            print(
                f"\n{count:,} clients, not {CROWD:,}: a process may have {descriptors:,} descriptors"
            )
    before, after = random_bytes(100, 1), random_bytes(100, 2)
    append(path, before)
    server = serve(path, "-w", "2")
    clients, port = server.clients, server.port
    for first in range(0, count, WINDOW):
        joined = [join(port, number) for number in range(first, min(first + WINDOW, count))]
        clients += joined
        assert all(sock.recv(1000) == before for sock in joined)

    def known() -> bool:
        status = json.loads(ask(f"*:{port}")[0])
        assert status["unprotected"] == 0
        return bool(status["clients"] == count)

    eventually(known)
    append(path, after)
    assert all(sock.recv(1000) == after for sock in clients)
