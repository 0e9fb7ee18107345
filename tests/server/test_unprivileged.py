"""The server as a user with no rights: it needs none, and no other such user gets anything from it but the stream."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support.checkout import ROOT
from support.files import append, random_bytes
from support.interpreter import program
from support.processes import NOBODY, runs
from support.server import Serve, Server
from support.sockets import expect, expect_eof
from support.status import ready_workers
from support.waiting import DEADLINE
from tailsrv.control_socket import CLIENTS

DATA = random_bytes(100_000)

pytestmark = pytest.mark.slow


def without_rights(user: int) -> tuple[str, ...]:
    """Return what starts a program as that user; it is env that execs it, for setpriv would do so with rights of root's that are left."""
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    return (
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--clear-groups",
        "env",
        f"PYTHONPATH={path}",
    )


AS_NOBODY, AS_ANOTHER = without_rights(NOBODY), without_rights(NOBODY - 1)


@pytest.fixture(scope="module")
def python() -> str:
    """Return a Python that a user without rights may run: ours, or the system's if it is of the same version."""
    for candidate in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        if os.geteuid() == 0 and runs(*AS_NOBODY, candidate, "-m", "tailsrv", "--version"):
            return candidate
    pytest.skip("takes root, who can become another user, and a Python that this user may run")


@pytest.fixture
def server(serve: Serve, open_folder: Path, python: str) -> Server:
    """Start a server without rights."""
    (path := open_folder / "file.log").write_bytes(DATA)
    path.chmod(0o644)
    return serve(path, "-w", "2", wrapper=AS_NOBODY, program=(python, "-m", "tailsrv"))


def run(*command: str) -> str:
    """Run a command, and return what it says on standard output."""
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE).stdout


def capabilities(pid: int) -> list[str]:
    """Return the lines about capabilities that a process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [
        line
        for line in lines
        if line.startswith(("CapPrm:", "CapEff:", "CapAmb:")) and int(line.split()[1], 16)
    ]


@pytest.mark.thorough
def test_everything_without_rights(server: Server, open_folder: Path, python: str) -> None:
    """Streams, a killed worker, an upgrade, health and the end: all of it goes without any right but to read the file."""
    socks = [server.connect(b"0\n") for _ in range(6)]
    for sock in socks:
        expect(sock, DATA)
    before = ready_workers(server)
    os.kill(before[0], signal.SIGKILL)
    killed = ready_workers(server, besides=before[:1])
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    upgraded = ready_workers(server, besides=killed)
    assert [capabilities(pid) for pid in (server.pid, *upgraded)] == [[], [], []]
    append(open_folder / "file.log", b"more")
    for sock in socks:
        expect(sock, b"more")
    answer = run(*AS_NOBODY, python, "-m", "tailsrv.health", "-p", str(server.port))
    # the latter because a worker was restarted
    assert answer.startswith(("OK: ", "WARNING: ")), answer
    assert f"tailsrv *:{server.port}" in answer
    server.signal(signal.SIGTERM)
    for sock in socks:
        expect_eof(sock)


def test_another_user_gets_no_answer(server: Server, python: str) -> None:
    """Neither status nor clients are told to a second user without rights; the first one gets both."""
    server.workers(2)
    for which in ("", CLIENTS):
        ask = [python, program("ask_control"), f"*:{server.port}{which}"]
        assert run(*AS_ANOTHER, *ask) == ""
        assert run(*AS_NOBODY, *ask) != ""


def test_another_user_cannot_signal(server: Server) -> None:
    """A second user without rights can end neither the supervisor nor a worker, nor make it upgrade."""
    for pid in (server.pid, *server.workers(2)):
        assert runs(*AS_NOBODY, "kill", "-CONT", str(pid))
        for name in ("TERM", "HUP", "KILL"):
            assert not runs(*AS_ANOTHER, "kill", f"-{name}", str(pid))
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE) as sock:
        sock.sendall(b"0\n")
        expect(sock, DATA)
