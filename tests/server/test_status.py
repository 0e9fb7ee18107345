"""The answers at the control sockets of a running server: its status and its clients."""

import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from support.files import append, random_bytes
from support.interpreter import run_program
from support.processes import as_root, runs, stop
from support.server import HURRIED, Serve, Server
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
    """Return the server's status."""
    answer, pid = ask(f"*:{server.port}")
    assert pid == server.pid
    found: dict[str, Any] = json.loads(answer)
    return found


def clients(server: Server) -> dict[str, dict[str, Any]]:
    """Return what the server tells about its clients, by their addresses."""
    answer = json.loads(ask(f"*:{server.port}{CLIENTS}")[0])
    assert answer["pid"] == server.pid
    return {client.pop("peer"): client for client in answer["clients"]}


def segments(server: Server) -> list[dict[str, Any]]:
    """Return what the server tells about the segments of its log."""
    found: list[dict[str, Any]] = json.loads(ask(f"*:{server.port}{CLIENTS}")[0])["segments"]
    return found


def peer(sock: socket.socket) -> str:
    """Return a client's address as the server writes it."""
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"


def test_status(server: Server, path: Path) -> None:
    """The status names processes by pid and start time, and has all figures for a health check."""
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
    assert found["file"] == {
        "path": str(path),
        "gone": False,
        "missing": None,
        "error": None,
        "size": 1000,
        "follow_name": False,
    }
    assert found["log"] == {
        "start": 0,
        "end": 1000,
        "segments": 1,
        "size": 1000,
        "retired": 0,
        "retired_size": 0,
    }
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


HEALTH_PAGE = Path(__file__).parents[2] / "docs" / "health.md"


def shape(data: Any) -> Any:
    """Return the names in `data` in their order, with the shape of the first item of each list."""
    if isinstance(data, dict):
        return [(name, shape(value)) for name, value in data.items()]
    return [shape(data[0])] if isinstance(data, list) else None


def test_documented_fields(server: Server) -> None:
    """The answers have the fields that the manual shows, in the same order, on one line each."""
    expect(server.connect(b"0\n"), DATA[:1000])
    eventually(lambda: len(clients(server)) == 1)
    documented = re.findall("```json\n(.*?)```", HEALTH_PAGE.read_text(), re.DOTALL)
    answers = [ask(f"*:{server.port}{name}")[0].decode() for name in ("", CLIENTS)]
    assert [shape(json.loads(answer)) for answer in answers] == [
        shape(json.loads(text)) for text in documented
    ]
    assert [answer.splitlines(keepends=True) for answer in answers] == [
        [json.dumps(json.loads(answer)) + "\n"] for answer in answers
    ]


def test_path_is_absolute(serve: Serve, path: Path) -> None:
    """The status gives an absolute path, even if the server was started with a relative one."""
    path.write_bytes(DATA[:1000])
    server = serve("file.log", wrapper=("env", "-C", str(path.parent)))
    server.workers(1)
    assert status(server)["file"]["path"] == str(path)


def test_restarts(server: Server) -> None:
    """The status shows how often a worker was replaced, and how long ago."""
    workers = server.workers(2)
    os.kill(workers[1], signal.SIGKILL)
    server.logged("worker ready: ", count=3)
    first, second = status(server)["workers"]
    assert (first["restarts"], first["restarted"]) == (0, None)
    assert second["restarts"] == 1
    assert 0 < second["restarted"] < DEADLINE


def test_silent_worker(server: Server) -> None:
    """Each status shows a growing silence of a stopped worker, and none of a running one."""
    workers = server.workers(2)
    stop(workers[0])
    eventually(lambda: status(server)["workers"][0]["silent"] > 0.2)
    eventually(lambda: status(server)["workers"][1]["silent"] == 0.0)
    os.kill(workers[0], signal.SIGCONT)
    eventually(lambda: [worker["silent"] for worker in status(server)["workers"]] == [0.0, 0.0])


def test_accept_queue(server: Server) -> None:
    """The status counts the connections in each accept queue."""
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
    """The answer has each client's start and position, also if it has no header or is blocked."""
    silent, caught_up = server.connect(), server.connect(b"100\n")
    ahead = server.connect(b"5000000000\n")
    for sock in (caught_up, ahead):
        server.streaming(sock)
    expect(caught_up, DATA[100:1000])
    eventually(lambda: len(clients(server)) == 3)
    found = clients(server)
    assert (found[peer(silent)]["start"], found[peer(silent)]["position"]) == (None, None)
    assert (found[peer(caught_up)]["start"], found[peer(caught_up)]["position"]) == (100, 1000)
    assert (found[peer(ahead)]["start"], found[peer(ahead)]["position"]) == (
        5_000_000_000,
        5_000_000_000,
    )
    assert {found[peer(sock)]["slot"] for sock in (silent, caught_up, ahead)} <= {0, 1}
    blocked = server.connect(b"0\n", receive_buffer=4096)
    server.streaming(blocked)
    append(path, DATA[1000:])
    expect(caught_up, DATA[1000:])
    position = eventually(lambda: clients(server)[peer(blocked)]["position"])
    assert 1000 <= position < len(DATA)
    expect(blocked, DATA)
    eventually(lambda: clients(server)[peer(blocked)]["position"] == len(DATA))


def test_clients_of_a_hung_worker(server: Server) -> None:
    """The answer includes the clients of stopped workers, because it requires no worker."""
    client = server.connect(b"7\n")
    expect(client, DATA[7:1000])
    eventually(lambda: peer(client) in clients(server))
    for worker in server.workers(2):
        stop(worker)
    assert clients(server)[peer(client)]["position"] == 1000
    for worker in server.workers(2):
        os.kill(worker, signal.SIGCONT)


def test_clients_without_a_file(serve: Serve, path: Path) -> None:
    """Without a file, there is no log, and the answer has no clients, no segments and no end."""
    server = serve(path)
    server.logged("waiting for file")
    assert status(server)["log"] is None
    assert json.loads(ask(f"*:{server.port}{CLIENTS}")[0]) == {
        "pid": server.pid,
        "end": None,
        "segments": [],
        "clients": [],
    }


@pytest.fixture
def following(serve: Serve, path: Path) -> Server:
    """Start a server of a large file with --follow-name."""
    path.write_bytes(DATA)
    server = serve(path, "--follow-name", "-w", "2", "-v", program=HURRIED)
    server.workers(2)
    return server


def test_log_of_several_files(following: Server, path: Path) -> None:
    """Each file is a segment; a deleted one counts as retired until the last client has read it."""
    server, old, size = following, path.with_suffix(".1"), len(DATA)
    slow, fast = server.connect(b"0\n", receive_buffer=4096), server.connect(b"-10\n")
    server.streaming(slow)
    expect(fast, DATA[-10:])
    path.rename(old)
    path.write_bytes(DATA[:500])
    expect(fast, DATA[:500])
    append(path, DATA[500:800])
    expect(fast, DATA[500:800])
    assert status(server)["log"] == {
        "start": 0,
        "end": size + 800,
        "segments": 2,
        "size": size + 800,
        "retired": 0,
        "retired_size": 0,
    }
    assert status(server)["file"]["size"] == 800
    eventually(lambda: clients(server)[peer(fast)]["position"] == size + 800)
    first: dict[str, object] = {"base": 0, "size": size, "sealed": True, "clients": 1}
    second: dict[str, object] = {"base": size, "size": 800, "sealed": False, "clients": 1}
    second |= {"path": str(path), "deleted": False}
    assert segments(server) == [first | {"path": str(old), "deleted": False}, second]
    old.unlink()
    eventually(lambda: status(server)["log"]["retired"])
    assert status(server)["log"] == {
        "start": size,
        "end": size + 800,
        "segments": 2,
        "size": size + 800,
        "retired": 1,
        "retired_size": size,
    }
    assert segments(server) == [first | {"path": None, "deleted": True}, second]
    expect(slow, DATA + DATA[:800])
    eventually(lambda: status(server)["log"]["segments"] == 1)
    assert status(server)["log"] == {
        "start": size,
        "end": size + 800,
        "segments": 1,
        "size": 800,
        "retired": 0,
        "retired_size": 0,
    }
    eventually(lambda: segments(server) == [second | {"clients": 2}])


def test_path_between_two_files(following: Server, path: Path) -> None:
    """The file is gone from the move to the next file's first byte, and missing until that exists.

    The log stays as it is.
    """
    before = status(following)["log"]
    path.rename(path.with_suffix(".1"))
    missing = eventually(lambda: status(following)["file"]["missing"])
    eventually(lambda: status(following)["file"]["missing"] > missing)
    assert status(following)["file"]["gone"]
    path.touch()
    eventually(lambda: status(following)["file"]["missing"] is None)
    found = status(following)
    assert (found["file"]["gone"], found["state"], found["log"]) == (True, "serving", before)
    append(path, b"x")
    eventually(lambda: not status(following)["file"]["gone"])
    assert status(following)["log"]["end"] == before["end"] + 1


def test_many_requests(server: Server) -> None:
    """Every concurrent request gets a whole answer."""
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


def test_answer_that_is_not_read(server: Server, path: Path) -> None:
    """A requester that never reads its answer delays neither the streams nor the server's end."""
    with socket.socket(socket.AF_UNIX) as requester:
        requester.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        requester.connect(f"\0tailsrv:*:{server.port}{CLIENTS}")
        client = server.connect(b"0\n")
        expect(client, DATA[:1000])
        append(path, DATA[1000:2000])
        expect(client, DATA[1000:2000])
        assert status(server)["clients"] == 1
        server.signal(signal.SIGTERM)
        server.process.wait(DEADLINE)


def test_long_answer(server: Server, path: Path) -> None:
    """An answer that is larger than any buffer is sent in pieces, and streams go on meanwhile."""
    for _ in range(4000):
        last = server.connect(b"-0\n")
    eventually(lambda: status(server)["clients"] == 4000)
    with socket.socket(socket.AF_UNIX) as requester:
        requester.settimeout(DEADLINE)
        requester.connect(f"\0tailsrv:*:{server.port}{CLIENTS}")
        append(path, b"x" * 10)
        expect(last, b"x" * 10)
        assert status(server)["clients"] == 4000
        answer = requester.makefile().read()
    assert len(answer) > 1 << 18
    assert len(json.loads(answer)["clients"]) == 4000


@pytest.mark.skipif(not as_root, reason="only root can become another user")
@pytest.mark.parametrize("which", ["", CLIENTS])
def test_another_user_gets_no_answer(server: Server, which: str) -> None:
    """Another user gets neither the status nor the clients."""
    assert run_program("ask_control", f"*:{server.port}{which}", "12345").stdout == ""
    assert ask(f"*:{server.port}{which}")[0]


@pytest.mark.skipif(
    not as_root or not runs("unshare", "--user", "--map-user=1000", "true"),
    reason="no user namespaces here",
)
@pytest.mark.parametrize("mapped", [1000, 65534])
def test_users_outside_the_user_namespace(serve: Serve, path: Path, mapped: int) -> None:
    """A user outside the server's user namespace gets no answer, whatever uid is shown for it."""
    path.write_bytes(DATA[:1000])
    server = serve(path, wrapper=("unshare", "--user", f"--map-user={mapped}"))
    server.workers(1)
    for which in ("", CLIENTS):
        address = f"*:{server.port}{which}"
        assert run_program("ask_control", address, "12345").stdout == ""
        assert bool(ask(address)[0]) is (mapped == 1000)
