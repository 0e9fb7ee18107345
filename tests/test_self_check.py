"""A system that resembles Linux, but does not tell how much of a stream has been sent: its clients are not continued wrongly."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from helpers import Serve, append, eventually, expect, expect_eof, random_bytes, runs
from survival import status
from unit import ROOT, run_python, tcp_pair

from tailsrv.linux.self_check import counts_streams
from tailsrv.linux.sockets import accept_queue, streamed

DATA = random_bytes(100_000)

# As a sandbox may have TCP_INFO: not at all, short, with a field that is always 0, or one that counts something else.
SYSTEMS = {
    "none": "raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))",
    "empty": "return b''",
    "short": "return info[:104]",
    "not counted": "return info[:120] + bytes(8)",
    "counted otherwise": "return info[:120] + (10**6).to_bytes(8, sys.byteorder)",
}

HOOK = """
import errno, os, socket, sys
getsockopt = socket.socket.getsockopt
def other(self, level, option, *size):
    info = getsockopt(self, level, option, *size)
    if (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO):
        {}
    return info
socket.socket.getsockopt = other
"""

NO_LOOPBACK = ("unshare", "--net", "--map-root-user")


class Short(socket.socket):
    """A socket whose TCP_INFO has only its first byte."""

    def getsockopt(self, *arguments: int) -> bytes | int:  # type: ignore[override]
        found: bytes | int = super().getsockopt(*arguments)
        return found[:1] if isinstance(found, bytes) else found


def test_this_system() -> None:
    """Linux counts what is sent, and finding that out leaves nothing open."""
    before = os.listdir("/proc/self/fd")
    assert counts_streams()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_another_system(tmp_path: Path, system: str) -> None:
    """One that does not count, or cannot be asked, is found out."""
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(SYSTEMS[system]))
    code = "from tailsrv.linux.self_check import counts_streams; print(counts_streams())"
    done = run_python(code, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_no_loopback() -> None:
    """Where it cannot be tried, nothing speaks against it."""
    if not runs(*NO_LOOPBACK, "true"):
        pytest.skip("a network namespace cannot be had")
    code = "from tailsrv.linux.self_check import counts_streams; import sys; sys.exit(counts_streams() is not True)"
    assert runs(*NO_LOOPBACK, "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code)


def test_short_answer() -> None:
    """A position that is not known is none, and so is the length of a queue."""
    with tcp_pair() as (near, _), Short(fileno=os.dup(near.fileno())) as short:
        near.send(b"data")
        assert streamed(near) == 4
        assert streamed(short) is None
        assert accept_queue(short) == (0, 0)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("system", ["short", "not counted"])
def test_server(serve: Serve, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """Its clients are served, are counted as unprotected, and are disconnected, not continued, where their worker dies."""
    (folder := tmp_path / "hook").mkdir()
    (folder / "sitecustomize.py").write_text(HOOK.format(SYSTEMS[system]))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    path.write_bytes(DATA)
    server = serve(path)
    [worker] = server.workers(1)
    clients = [server.connect(b"0\n") for _ in range(3)]
    for client in clients:
        expect(client, DATA)
    eventually(lambda: (status(server)["clients"], status(server)["unprotected"]) == (3, 3))
    os.kill(worker, signal.SIGKILL)
    for client in clients:
        expect_eof(client)
    server.logged("worker ready: ", count=2)
    expect(server.connect(b"0\n"), DATA)
    append(path, b"more")
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    assert len(server.lines("does not tell how much of a stream has been sent")) == 2  # once by each version
    assert not server.lines("no descriptor left")
    expect(server.connect(b"0\n"), DATA + b"more")


@pytest.mark.slow
def test_waiting_for_the_file(serve: Serve, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that come before the file wait in the accept queue, as they would be lost with the worker that waits with them."""
    (folder := tmp_path / "hook").mkdir()
    (folder / "sitecustomize.py").write_text(HOOK.format(SYSTEMS["empty"]))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    server = serve(path)
    server.logged("waiting for file")
    clients = [server.connect(b"0\n") for _ in range(3)]
    path.write_bytes(DATA)
    for client in clients:
        expect(client, DATA)
