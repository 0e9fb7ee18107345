"""A running server, and how tests start one."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from signal import SIGKILL
from typing import Protocol

import pytest

from support.checkout import PROGRAMS
from support.processes import AS_NOBODY, children, runs, session, title
from support.sockets import connect
from support.waiting import DEADLINE, eventually

TAILSRV = (sys.executable, "-m", "tailsrv")

# The same program with breakpoints at which a test can hold it.
HELD = (sys.executable, str(PROGRAMS / "breakpoints.py"))
# The same program with shorter waits.
HURRIED = (sys.executable, str(PROGRAMS / "hurried.py"))


def timed(**timing: float) -> tuple[str, ...]:
    """Return a wrapper that gives HURRIED these fields of `Timing`, also after an upgrade."""
    return ("env", f"TAILSRV_TEST_TIMING={json.dumps(timing)}")


def hurried(**timing: float) -> tuple[str, ...]:
    """Return HURRIED with these fields of `Timing`."""
    return (*timed(**timing), *HURRIED)


ACTIVATE = PROGRAMS / "activate.py"


def activated(*kinds: str) -> tuple[str, ...]:
    """Return a wrapper that passes sockets of these kinds as a service manager does.

    The program activate.py lists the kinds.
    """
    return (sys.executable, str(ACTIVATE), ",".join(kinds))


def wrapper_without_rights() -> tuple[str, ...]:
    """Return a wrapper for a server that is subject to the mode of files, also under root."""
    if os.geteuid() != 0:
        return ()
    if not runs(*AS_NOBODY, *TAILSRV, "--version"):
        pytest.skip("root may read every file, and no other user is available")
    return AS_NOBODY


def run_tailsrv(
    *arguments: str | bytes | Path, wrapper: Sequence[str] = ()
) -> "subprocess.CompletedProcess[str]":
    """Run a tailsrv that ends by itself, and return its result."""
    command = [*wrapper, *TAILSRV, *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="backslashreplace",
        timeout=DEADLINE,
    )


class Server:
    """A running tailsrv, its log, and the clients that are connected to it."""

    def __init__(self, command: Sequence[str | bytes | Path], log: Path, status: int) -> None:
        self.expected_status = status
        self.traceback_expected = False
        self.clients: list[socket.socket] = []
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )
        # The pid is also the session id.
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        """Everything that the server has written to standard error."""
        return self._log.read_text(errors="backslashreplace")

    def lines(self, *parts: str) -> list[str]:
        """Return the lines of the log that contain all of `parts`."""
        # The kernel may show a part of a line that is being written.
        complete = self.log.rpartition("\n")[0]
        return [line for line in complete.splitlines() if all(part in line for part in parts)]

    def logged(self, *parts: str, count: int = 1) -> str:
        """Wait for `count` log lines that contain all of `parts`, and return the last one."""

        def look() -> list[str]:
            found = self.lines(*parts)
            assert len(found) >= count or self.process.poll() is None, (
                f"ended without {parts}:\n{self.log}"
            )
            return found if len(found) >= count else []

        return eventually(look)[-1]

    @cached_property
    def port(self) -> int:
        """The port that the server listens on, according to its log."""
        return int(self.logged("listening: ", " port=").partition(" port=")[2].split()[0])

    def connect(
        self, header: bytes = b"", host: str = "127.0.0.1", receive_buffer: int = 0
    ) -> socket.socket:
        """Return a connection on which `header` has been sent; `finish` closes it."""
        sock = connect(self.port, header, host, receive_buffer)
        self.clients.append(sock)
        return sock

    def streaming(self, sock: socket.socket) -> None:
        """Wait until the header of `sock` has been read; the server must run with -v."""
        host, port = sock.getsockname()[:2]
        self.logged(
            "client streams: ",
            f" peer=[{host}]:{port} " if ":" in host else f" peer={host}:{port} ",
        )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor."""
        self.process.send_signal(number)

    def kill_supervisor(self, number: int = SIGKILL) -> None:
        """Kill the supervisor, and wait until it is gone. Its workers are orphaned."""
        # The log of a server that has died cannot be waited for.
        assert self.port
        self.kill_early(number)

    def kill_early(self, number: int = SIGKILL) -> None:
        """Do the same with a supervisor that may have only just been started, or has ended."""
        if self.process.poll() is None:
            self.expected_status = -number
            self.process.send_signal(number)
            # A stopped process does not die of another signal than SIGKILL.
            self.process.send_signal(signal.SIGCONT)
        self.process.wait(DEADLINE)

    def kill_all(self) -> None:
        """Kill all processes of the server, as the end of a machine does."""
        self.kill_early()
        for pid in session(self.pid):
            os.kill(pid, signal.SIGKILL)

    def take_clients(self, other: "Server") -> None:
        """Close the clients of `other`, which this server has taken over, when this server ends."""
        self.clients += other.clients
        other.clients = []

    def title(self, pid: int | None = None) -> str:
        """Return the title of a process, by default of the supervisor."""
        return title(pid or self.pid)

    def workers(self, count: int | None = None) -> list[int]:
        """Return the pids of the workers by slot, once there are `count` and all are ready."""

        def look() -> list[int]:
            found = [pid for pid in children(self.pid) if title(pid).startswith("tailsrv: worker ")]
            ready = {f"pid={pid}" for pid in found} <= {
                word for line in self.lines("worker ready: ") for word in line.split()
            }
            return found if ready and len(found) == (count or 1) else []

        return sorted(eventually(look), key=lambda pid: int(title(pid).split()[2]))

    def wait(self) -> None:
        """Wait for the end of the server; assert its exit status, and that no process is left."""
        try:
            status = self.process.wait(DEADLINE)
            assert status == self.expected_status, self.log
            assert self.traceback_expected or "Traceback" not in self.log, self.log
            eventually(lambda: not session(self.pid))
        finally:
            for pid in session(self.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait(DEADLINE)

    def finish(self) -> None:
        """Close the clients, end the server if it runs, and assert that it ended as expected."""
        for sock in self.clients:
            sock.close()
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        self.wait()


class Serve(Protocol):
    """Starts `tailsrv -p 0 OPTIONS PATH`, through `wrapper`; it must end with `status`."""

    def __call__(
        self,
        path: str | bytes | Path,
        *options: str,
        status: int = 0,
        wrapper: Sequence[str] = (),
        program: Sequence[str] = TAILSRV,
    ) -> Server: ...
