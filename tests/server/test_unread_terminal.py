"""A server that logs to a terminal that is not read."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from support.files import append
from support.processes import children, session
from support.server import TAILSRV
from support.sockets import connect, expect
from support.terminals import fill, terminal
from support.waiting import DEADLINE


@pytest.mark.slow
def test_server_in_a_terminal_that_is_not_read(path: Path) -> None:
    """Streams continue, a killed worker is replaced, and the server ends on SIGTERM."""
    path.write_bytes(b"old")
    with terminal() as (master, slave):
        command: list[str | Path] = [*TAILSRV, "-v", "-p", "0", path]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=slave, start_new_session=True
        ) as process:
            try:
                output = b""
                while not (found := re.search(rb" port=(\d+) .*worker ready: ", output, re.DOTALL)):
                    output += os.read(master, 4096)
                fill(slave, 100)
                check_stream_survives_a_kill(int(found[1]), process.pid, path)
                process.terminate()
                assert process.wait(DEADLINE) == 0
            finally:
                for pid in session(process.pid):
                    os.kill(pid, signal.SIGKILL)


def check_stream_survives_a_kill(port: int, supervisor: int, path: Path) -> None:
    """Check that a stream survives its worker's death and many logged connections."""
    with connect(port, b"0\n") as sock:
        expect(sock, b"old")
        for _ in range(20):
            with connect(port, b"0\n") as other:
                expect(other, b"old")
        [worker] = children(supervisor)
        os.kill(worker, signal.SIGKILL)
        append(path, b"new")
        expect(sock, b"new")
