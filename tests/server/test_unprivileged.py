"""The server as an unprivileged user.

It needs no privileges, and another unprivileged user gets nothing from it but the stream.
"""

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


def without_privileges(user: int) -> tuple[str, ...]:
    """Return a command that starts a program as `user`, without privileges.

    The command runs env, because setpriv would exec the program with some of root's capabilities.
    """
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    return (
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--clear-groups",
        "env",
        f"PYTHONPATH={path}",
    )


AS_NOBODY, AS_ANOTHER = without_privileges(NOBODY), without_privileges(NOBODY - 1)


@pytest.fixture(scope="module")
def python() -> str:
    """Return a Python that an unprivileged user may run.

    It is the running one, or the system's if it has the same version.
    """
    for candidate in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        if os.geteuid() == 0 and runs(*AS_NOBODY, candidate, "-m", "tailsrv", "--version"):
            return candidate
    pytest.skip("requires root, to become another user, and a Python that this user may run")


@pytest.fixture
def server(serve: Serve, open_folder: Path, python: str) -> Server:
    """Start a server without privileges."""
    (path := open_folder / "file.log").write_bytes(DATA)
    path.chmod(0o644)
    return serve(path, "-w", "2", wrapper=AS_NOBODY, program=(python, "-m", "tailsrv"))


def run(*command: str) -> str:
    """Run a command, and return its standard output."""
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE).stdout


def capabilities(pid: int) -> list[str]:
    """Return the lines of /proc/PID/status that show a capability of the process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [
        line
        for line in lines
        if line.startswith(("CapPrm:", "CapEff:", "CapAmb:")) and int(line.split()[1], 16)
    ]


@pytest.mark.thorough
def test_all_features_without_privileges(server: Server, open_folder: Path, python: str) -> None:
    """Streams, a killed worker, an upgrade, health and shutdown require no privileges."""
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
    # WARNING is possible because a worker was restarted.
    assert answer.startswith(("OK: ", "WARNING: ")), answer
    assert f"tailsrv *:{server.port}" in answer
    server.signal(signal.SIGTERM)
    for sock in socks:
        expect_eof(sock)


def test_another_user_gets_no_answer(server: Server, python: str) -> None:
    """A second unprivileged user gets neither status nor clients; the server's own user does."""
    server.workers(2)
    for which in ("", CLIENTS):
        ask = [python, program("ask_control"), f"*:{server.port}{which}"]
        assert run(*AS_ANOTHER, *ask) == ""
        assert run(*AS_NOBODY, *ask) != ""


def test_another_user_cannot_signal(server: Server) -> None:
    """A second unprivileged user can neither end nor upgrade the supervisor or a worker."""
    for pid in (server.pid, *server.workers(2)):
        assert runs(*AS_NOBODY, "kill", "-CONT", str(pid))
        for name in ("TERM", "HUP", "KILL"):
            assert not runs(*AS_ANOTHER, "kill", f"-{name}", str(pid))
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE) as sock:
        sock.sendall(b"0\n")
        expect(sock, DATA)
