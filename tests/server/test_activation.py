"""Listening sockets passed by a service manager: see sd_listen_fds(3)."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.files import append, random_bytes
from support.interpreter import program
from support.processes import title
from support.server import TAILSRV, Serve, Server, activated, run_tailsrv
from support.sockets import connect, expect, expect_eof
from support.status import ask
from support.waiting import DEADLINE

DATA, MORE = random_bytes(1000), b"more"

NO_PORT = "tailsrv: error: the following arguments are required: -p/--port"


@pytest.fixture(autouse=True)
def file(path: Path) -> None:
    """Write the data to the served file."""
    path.write_bytes(DATA)


def test_one_socket_is_shared(serve: Serve, path: Path) -> None:
    """All workers share a single socket, and each of them gets a share of the clients."""
    server = serve(path, "-p", "", "-w", "3", wrapper=activated("tcp4"))
    server.workers(3)
    for _ in range(60):
        expect(server.connect(b"0\n"), DATA)
    counts = [worker["clients"] for worker in status_of(server)["workers"]]
    assert sum(counts) == 60
    assert min(counts) >= 10
    (listener,) = status_of(server)["listeners"]
    assert (listener["slot"], listener["endpoint"]) == (None, f"127.0.0.1:{server.port}")


def status_of(server: Server) -> dict[str, Any]:
    """Return the status of a server that listens on 127.0.0.1 only."""
    answer: dict[str, Any] = json.loads(ask(f"127.0.0.1:{server.port}")[0])
    return answer


def test_one_socket_for_each_worker(serve: Serve, path: Path) -> None:
    """If there are as many sockets as workers, each worker gets one."""
    server = serve(path, "-p", "", "-w", "2", "-v", wrapper=activated("tcp4", "again"))
    server.workers(2)
    assert [listener["slot"] for listener in status_of(server)["listeners"]] == [0, 1]
    for _ in range(40):
        expect(server.connect(b"0\n"), DATA)
    slots = Counter(
        line.partition(" slot=")[2].split()[0] for line in server.lines("client streams: ")
    )
    assert min(slots["0"], slots["1"]) > 0


def test_several_for_one_worker(serve: Serve, path: Path) -> None:
    """A single worker serves all sockets, and a wildcard address is logged as `*`."""
    server = serve(path, "-p", "", wrapper=activated("tcp6", "tcp4"))
    server.workers(1)
    names = server.logged("listening: ").partition(" endpoints=")[2].split()[0].split(",")
    assert names[0] == f"*:{server.port}"
    for name in names:
        expect(server.connect(b"0\n") if name == names[0] else connect_to(server, name), DATA)
    assert title(server.pid).startswith(f"tailsrv: supervisor {','.join(names)} {path} [")


def connect_to(server: Server, name: str) -> socket.socket:
    """Return a connection to an endpoint."""
    host, _, port = name.rpartition(":")
    sock = connect(int(port), b"0\n", host)
    server.clients.append(sock)
    return sock


def test_different_addresses_are_shared(serve: Serve, path: Path) -> None:
    """Sockets of different addresses are shared, so that no address depends on one worker."""
    server = serve(path, "-p", "", "-w", "2", wrapper=activated("tcp4", "tcp4"))
    server.workers(2)
    assert [listener["slot"] for listener in status_of(server)["listeners"]] == [None, None]


def test_sockets_are_shared_if_their_number_differs(serve: Serve, path: Path) -> None:
    """If there are not as many sockets as workers, every worker serves all sockets."""
    server = serve(path, "-p", "", "-w", "3", wrapper=activated("tcp4", "again"))
    server.workers(3)
    for _ in range(30):
        expect(server.connect(b"0\n"), DATA)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kinds", [["tcp4"], ["tcp4", "again"]])
def test_survives(serve: Serve, path: Path, kinds: list[str]) -> None:
    """With passed sockets, clients survive killed workers and an upgrade, and a drain ends."""
    server = serve(path, "-p", "", "-w", "2", wrapper=activated(*kinds))
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, DATA)
    for worker in server.workers(2):
        os.kill(worker, signal.SIGKILL)
    server.logged("worker ready: ", count=4)
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    clients += [server.connect(b"%d\n" % len(DATA)) for _ in range(10)]
    append(path, MORE)
    for client in clients:
        expect(client, MORE)
    server.signal(signal.SIGTERM)
    server.wait()


def test_title_is_set(serve: Serve, path: Path) -> None:
    """Process titles are set although activation removes variables from the environment."""
    server = serve(path, "-p", "", wrapper=activated("tcp4"))
    (worker,) = server.workers(1)
    assert title(server.pid).startswith(f"tailsrv: supervisor 127.0.0.1:{server.port} {path} [")
    assert title(worker).startswith(f"tailsrv: worker 0 127.0.0.1:{server.port} [")


# Usage errors and unusable descriptors


@pytest.mark.parametrize(
    "option", [("-p", "0"), ("--bind", "127.0.0.1"), ("-p", "0", "--bind", "127.0.0.1")]
)
def test_port_with_passed_sockets(path: Path, option: tuple[str, ...]) -> None:
    """A port or an address together with passed sockets is a usage error."""
    ended = run_tailsrv(*option, path, wrapper=activated("tcp4"))
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(
        "tailsrv: error: -p/--port and --bind cannot be combined with sockets"
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "file",
            "descriptor 3, passed by the service manager, is not a socket: "
            "Socket operation on non-socket",
        ),
        (
            "none",
            "descriptor 3, passed by the service manager, is not a socket: Bad file descriptor",
        ),
        ("udp", "descriptor 3, passed by the service manager, is not a listening TCP socket"),
        ("unix", "descriptor 3, passed by the service manager, is not a listening TCP socket"),
        ("bound", "descriptor 3, passed by the service manager, is not a listening TCP socket"),
        ("tcp4,udp", "descriptor 4, passed by the service manager, is not a listening TCP socket"),
    ],
)
def test_not_a_listening_socket(path: Path, kind: str, reason: str) -> None:
    """A passed descriptor that is no listening TCP socket is named in one line: status 1."""
    ended = run_tailsrv(path, wrapper=activated(kind))
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert reason in line


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "variables",
    [
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "abc"},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "abc", "LISTEN_PID": "$$"},
        {"LISTEN_FDS": "-1", "LISTEN_PID": "$$"},
        {"LISTEN_FDS": "0", "LISTEN_PID": "$$"},
        {"LISTEN_FDS": "", "LISTEN_PID": "$$"},
        {"LISTEN_FDS": "100000000", "LISTEN_PID": "$$"},
        {"LISTEN_FDS": "9" * 5000, "LISTEN_PID": "$$"},
        {"TAILSRV_UPGRADE": "abc"},
        {"TAILSRV_UPGRADE": ""},
    ],
)
def test_variables_for_another_process(path: Path, variables: dict[str, str]) -> None:
    """Variables that name another process, or are invalid, are ignored: a port is required."""
    exports = " ".join(f"{name}={value}" for name, value in variables.items())
    ended = run_tailsrv(path, wrapper=("sh", "-c", f'export {exports}; exec "$@"', "sh"))
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(NO_PORT)


@pytest.mark.parametrize(("started", "hint"), [("", False), ("1", False), ("$$", True)])
def test_hint_for_the_service_file(path: Path, started: str, hint: bool) -> None:
    """A service that systemd started without a socket gets a hint where to set the port."""
    ended = run_tailsrv(
        path,
        wrapper=(
            "sh",
            "-c",
            f'export LISTEN_FDS=1 LISTEN_PID=1 SYSTEMD_EXEC_PID={started}; exec "$@"',
            "sh",
        ),
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(NO_PORT)
    assert ("/etc/tailsrv/" in ended.stderr) is hint


@pytest.mark.slow
def test_passed_sockets_keep_listening(path: Path) -> None:
    """A drain leaves the passed sockets listening, so that later connections wait in them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [
            sys.executable,
            program("pass_socket"),
            str(listener.fileno()),
            *TAILSRV,
            str(path),
        ]
        with subprocess.Popen(
            command,
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as server:
            with connect(listener.getsockname()[1], b"0\n") as client:
                expect(client, DATA)
                server.send_signal(signal.SIGTERM)
                expect_eof(client)
            assert server.wait(DEADLINE) == 0
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        connect(listener.getsockname()[1]).close()
