"""Tests of the check for a system whose TCP_INFO does not count the bytes of a stream."""

import os
import socket
import sys
from pathlib import Path

import pytest

from support.checkout import ROOT
from support.files import random_bytes
from support.hooks import install_hook
from support.interpreter import run_python
from support.processes import runs
from support.sockets import tcp_pair
from tailsrv.linux.sockets import accept_queue, bytes_streamed
from tailsrv.linux.tcp_info_check import counts_streams

DATA = random_bytes(100_000)

NO_LOOPBACK = ("unshare", "--net", "--map-root-user")


class Short(socket.socket):
    """A socket whose TCP_INFO is only one byte long."""

    def getsockopt(self, *arguments: int) -> bytes | int:  # type: ignore[override]
        found: bytes | int = super().getsockopt(*arguments)
        return found[:1] if isinstance(found, bytes) else found


def test_this_system() -> None:
    """Linux counts the bytes of a stream, and the check leaves no descriptor open."""
    before = os.listdir("/proc/self/fd")
    assert counts_streams()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("system", ["none", "empty", "short", "not counted", "counted otherwise"])
def test_another_system(tmp_path: Path, system: str) -> None:
    """A system that does not count, or that cannot be queried, is detected."""
    install_hook(tmp_path, "other_system")
    code = "from tailsrv.linux.tcp_info_check import counts_streams; print(counts_streams())"
    done = run_python(code, env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "TAILSRV_TEST_SYSTEM": system})
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_no_loopback() -> None:
    """Without a loopback interface for the check, the system is assumed to count."""
    if not runs(*NO_LOOPBACK, "true"):
        pytest.skip("a network namespace cannot be created")
    code = (
        "from tailsrv.linux.tcp_info_check import counts_streams; import sys; "
        "sys.exit(counts_streams() is not True)"
    )
    assert runs(*NO_LOOPBACK, "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code)


def test_short_answer() -> None:
    """With a short TCP_INFO the position is unknown, and the accept queue is reported as 0 of 0."""
    with tcp_pair() as (near, _), Short(fileno=os.dup(near.fileno())) as short:
        near.send(b"data")
        assert bytes_streamed(near) == 4
        assert bytes_streamed(short) is None
        assert accept_queue(short) == (0, 0)
