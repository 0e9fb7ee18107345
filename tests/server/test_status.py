"""What the control sockets of a running server say: how it does, and where each client's stream stands."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from support.files import append, random_bytes
from support.interpreter import run_program
from support.processes import as_root, runs, stop, title
from support.server import Serve, Server
from support.sockets import expect
from support.status import ask
from support.waiting import DEADLINE, eventually
from tailsrv.control_socket import CLIENTS
from tailsrv.linux.process import start_ticks

DATA = random_bytes(20_000_000)


@pytest.fixture
def server(serve: Serve, path: Path) -> Server:
    """Start a server with two workers."""
    path.write_bytes(DATA[:1000])
    server = serve(path, "-w", "2", "-v")
    server.workers(2)
    return server


def status(server: Server) -> dict[str, Any]:
    """Return what the server says of itself."""
    answer, pid = ask(f"*:{server.port}")
    assert pid == server.pid
    found: dict[str, Any] = json.loads(answer)
    return found


def clients(server: Server) -> dict[str, dict[str, Any]]:
    """Return what the server says of its clients, by their addresses."""
    answer = json.loads(ask(f"*:{server.port}{CLIENTS}")[0])
    assert answer["pid"] == server.pid
    return {client.pop("peer"): client for client in answer["clients"]}


def name(sock: socket.socket) -> str:
    """Return how the server writes a client's address."""
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"


def test_status(server: Server, path: Path) -> None:
    """The status names processes by pid and start time, and has every figure that a health check needs."""
    workers = server.workers(2)
    found = status(server)
    assert (found["pid"], found["ticks"]) == (server.pid, start_ticks(server.pid))
    assert [(worker["pid"], worker["ticks"]) for worker in found["workers"]] == [
        (pid, start_ticks(pid)) for pid in workers
    ]
    assert all(
        worker["ready"] and worker["restarts"] == 0 and worker["restarted"] is None
        for worker in found["workers"]
    )
    assert found["file"] == {"path": str(path), "gone": False, "error": None, "size": 1000}
    assert (found["state"], found["clients"], found["unprotected"], found["max_clients"]) == (
        "serving",
        0,
        0,
        0,
    )
    assert {listener["slot"] for listener in found["listeners"]} == {0, 1}
    assert all(
        listener["queued"] == 0 and listener["backlog"] == 4096 for listener in found["listeners"]
    )


def test_path_is_absolute(serve: Serve, path: Path) -> None:
    """The file's path can be used in any folder, also where the server was given a relative one."""
    path.write_bytes(DATA[:1000])
    server = serve("file.log", wrapper=("env", "-C", str(path.parent)))
    server.workers(1)
    assert status(server)["file"]["path"] == str(path)


def test_restarts(server: Server) -> None:
    """A worker that was replaced shows, with how long ago."""
    workers = server.workers(2)
    os.kill(workers[1], signal.SIGKILL)
    server.logged("worker ready: ", count=3)
    first, second = status(server)["workers"]
    assert (first["restarts"], first["restarted"]) == (0, None)
    assert second["restarts"] == 1
    assert 0 < second["restarted"] < DEADLINE


def test_silent(server: Server) -> None:
    """A worker that does not answer is silent for longer each time one asks; one that does is not."""
    workers = server.workers(2)
    stop(workers[0])
    eventually(lambda: status(server)["workers"][0]["silent"] > 0.2)
    eventually(lambda: status(server)["workers"][1]["silent"] == 0.0)
    os.kill(workers[0], signal.SIGCONT)
    eventually(lambda: [worker["silent"] for worker in status(server)["workers"]] == [0.0, 0.0])


def test_queue(server: Server) -> None:
    """Who waits in an accept queue is counted."""
    for worker in server.workers(2):
        stop(worker)
    waiting = [server.connect(b"0\n") for _ in range(10)]
    eventually(lambda: sum(listener["queued"] for listener in status(server)["listeners"]) == 10)
    for worker in server.workers(2):
        os.kill(worker, signal.SIGCONT)
    for sock in waiting:
        expect(sock, DATA[:1000])
    assert sum(listener["queued"] for listener in status(server)["listeners"]) == 0


def test_clients(server: Server, path: Path) -> None:
    """Each client's start and position are told: of one without a header, caught up, ahead, and one that does not read."""
    silent, caught_up = server.connect(), server.connect(b"100\n")
    ahead = server.connect(b"5000000000\n")
    for sock in (caught_up, ahead):
        server.streaming(sock)
    expect(caught_up, DATA[100:1000])
    eventually(lambda: len(clients(server)) == 3)
    found = clients(server)
    assert (found[name(silent)]["start"], found[name(silent)]["position"]) == (None, None)
    assert (found[name(caught_up)]["start"], found[name(caught_up)]["position"]) == (100, 1000)
    assert (found[name(ahead)]["start"], found[name(ahead)]["position"]) == (
        5_000_000_000,
        5_000_000_000,
    )
    assert {found[name(sock)]["slot"] for sock in (silent, caught_up, ahead)} <= {0, 1}
    stalled = server.connect(b"0\n", receive_buffer=4096)
    server.streaming(stalled)
    append(path, DATA[1000:])
    expect(caught_up, DATA[1000:])
    position = eventually(lambda: clients(server)[name(stalled)]["position"])
    assert 1000 <= position < len(DATA)
    expect(stalled, DATA)
    eventually(lambda: clients(server)[name(stalled)]["position"] == len(DATA))


def test_clients_of_a_hung_worker(server: Server) -> None:
    """No worker is asked: the clients of one that is stopped are told as well."""
    client = server.connect(b"7\n")
    expect(client, DATA[7:1000])
    eventually(lambda: name(client) in clients(server))
    for worker in server.workers(2):
        stop(worker)
    assert clients(server)[name(client)]["position"] == 1000
    for worker in server.workers(2):
        os.kill(worker, signal.SIGCONT)


def test_clients_before_the_file(serve: Serve, path: Path) -> None:
    """Without a file there is nobody to tell of, and no size."""
    server = serve(path)
    server.logged("waiting for file")
    assert json.loads(ask(f"*:{server.port}{CLIENTS}")[0]) == {
        "pid": server.pid,
        "size": None,
        "clients": [],
    }


def test_many_who_ask(server: Server) -> None:
    """Everyone who asks gets a whole answer, also those who come while a child is busy with others; no child is left."""
    for _ in range(50):
        expect(server.connect(b"0\n"), DATA[:1000])
    eventually(lambda: len(clients(server)) == 50)
    address = f"\0tailsrv:*:{server.port}{CLIENTS}"
    for _ in range(3):
        socks = [socket.socket(socket.AF_UNIX) for _ in range(40)]
        for sock in socks:
            sock.settimeout(DEADLINE)
            sock.connect(address)
        for sock in socks:
            with sock:
                assert len(json.loads(sock.makefile().read())["clients"]) == 50
    eventually(lambda: set(kin(server.pid)) == set(server.workers(2)))


def kin(pid: int) -> list[int]:
    """Return the pids of all children of `pid`, dead ones too."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def test_one_who_asks_and_does_not_read(server: Server, path: Path) -> None:
    """Somebody who never takes the answer keeps neither the server from its work nor its end."""
    with socket.socket(socket.AF_UNIX) as asker:
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        asker.connect(f"\0tailsrv:*:{server.port}{CLIENTS}")
        client = server.connect(b"0\n")
        expect(client, DATA[:1000])
        append(path, DATA[1000:2000])
        expect(client, DATA[1000:2000])
        assert status(server)["clients"] == 1
        server.signal(signal.SIGTERM)
        server.process.wait(DEADLINE)


def test_long_answer(server: Server) -> None:
    """An answer that no buffer holds is given by a child as fast as it is read; the child's title says what it is."""
    for _ in range(4000):
        server.connect(b"0\n")
    eventually(lambda: status(server)["clients"] == 4000)
    with socket.socket(socket.AF_UNIX) as asker:
        asker.settimeout(DEADLINE)
        asker.connect(f"\0tailsrv:*:{server.port}{CLIENTS}")
        eventually(
            lambda: any(title(pid) == f"tailsrv: status *:{server.port}" for pid in kin(server.pid))
        )
        answer = asker.makefile().read()
    assert len(answer) > 1 << 18
    assert len(json.loads(answer)["clients"]) == 4000


@pytest.mark.skipif(not as_root, reason="only root can be somebody else")
@pytest.mark.parametrize("which", ["", CLIENTS])
def test_strangers_learn_nothing(server: Server, which: str) -> None:
    """Another user is told neither the status nor the clients."""
    assert run_program("ask_control", f"*:{server.port}{which}", "12345").stdout == ""
    assert ask(f"*:{server.port}{which}")[0]


@pytest.mark.skipif(
    not as_root or not runs("unshare", "--user", "--map-user=1000", "true"),
    reason="no user namespaces here",
)
@pytest.mark.parametrize("mapped", [1000, 65534])
def test_strangers_of_a_user_namespace(serve: Serve, path: Path, mapped: int) -> None:
    """A user who is none in the server's user namespace is not taken for it, by whatever number it is known there."""
    path.write_bytes(DATA[:1000])
    server = serve(path, wrapper=("unshare", "--user", f"--map-user={mapped}"))
    server.workers(1)
    for which in ("", CLIENTS):
        name = f"*:{server.port}{which}"
        assert run_program("ask_control", name, "12345").stdout == ""
        assert bool(ask(name)[0]) is (mapped == 1000)
