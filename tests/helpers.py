"""What the tests of the whole program share: a running server, sockets to it, and waiting for events."""

import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import psutil  # type: ignore[import-untyped]
import pytest

DEADLINE = 20.0  # seconds that an event may take on a busy machine; no test waits for it to pass

TAILSRV = (sys.executable, "-m", "tailsrv")
HURRIED = (sys.executable, str(Path(__file__).with_name("hurried.py")))  # the same with shorter waits

NOBODY = 65534
ACTIVATE = Path(__file__).with_name("activate.py")

AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")  # it execs: the pid stays


def activated(*kinds: str) -> tuple[str, ...]:
    """Return a wrapper that starts a program with these sockets as a service manager does; activate.py has the kinds."""
    return (sys.executable, str(ACTIVATE), ",".join(kinds))


Seen = TypeVar("Seen")


def eventually(check: Callable[[], Seen], deadline: float = DEADLINE) -> Seen:
    """Return what `check` returns as soon as that is true, asking less and less often."""
    end, pause = time.monotonic() + deadline, 0.005
    while not (seen := check()):
        assert time.monotonic() < end, f"still {seen!r} after {deadline:g} seconds"
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return seen


def random_bytes(count: int, seed: int = 1) -> bytes:
    """Return bytes in which no two places look alike: one that is lost, doubled or moved shows."""
    return random.Random(seed).randbytes(count)


def append(path: str | Path, data: bytes) -> None:
    """Append `data` in one write(2)."""
    with open(path, "ab", buffering=0) as file:
        assert file.write(data) == len(data)


def connect(port: int, header: bytes = b"", host: str = "127.0.0.1", receive_buffer: int = 0) -> socket.socket:
    """Return a connection on which `header` has been sent; a small `receive_buffer` makes a reader that soon stalls."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(DEADLINE)
        sock.connect((host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(header)
    except BaseException:
        sock.close()
        raise
    return sock


def recv_exactly(sock: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes; fewer mean that the stream has ended."""
    received = bytearray()
    while len(received) < count and (some := sock.recv(min(count - len(received), 1 << 20))):
        received += some
    return bytes(received)


def recv_all(sock: socket.socket) -> bytes:
    """Return everything up to the end of the stream, which must not be a reset."""
    received = bytearray()
    while some := sock.recv(1 << 20):
        received += some
    return bytes(received)


def expect(sock: socket.socket, data: bytes) -> None:
    """Assert that the next bytes are `data`, and say where they differ rather than show them all."""
    received = recv_exactly(sock, len(data))
    if received != data:
        place = next((i for i, (ours, theirs) in enumerate(zip(received, data, strict=False)) if ours != theirs), len(received))
        here = slice(place, place + 20)
        raise AssertionError(f"{len(received)} of {len(data)} bytes; from byte {place}: {received[here]!r}, not {data[here]!r}")


def expect_eof(sock: socket.socket) -> None:
    """Assert that the stream ends here, in good order."""
    assert sock.recv(100) == b""


def runs(*command: str) -> bool:
    """Tell whether `command` is there and succeeds."""
    try:
        return subprocess.run(command, capture_output=True, timeout=DEADLINE).returncode == 0
    except FileNotFoundError:
        return False


def wrapper_without_rights() -> tuple[str, ...]:
    """Return what starts a server that a file's mode can keep out."""
    if os.geteuid() != 0:
        return ()
    if not runs(*AS_NOBODY, *TAILSRV, "--version"):
        pytest.skip("root may read every file, and another user cannot be had")
    return AS_NOBODY


def run_tailsrv(*arguments: str | bytes | Path, wrapper: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    """Run a tailsrv that ends by itself, to its end."""
    command = [*wrapper, *TAILSRV, *arguments]
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="backslashreplace", timeout=DEADLINE)


class Server:
    """A running tailsrv, its log, and the clients that are connected to it."""

    def __init__(self, command: Sequence[str | bytes | Path], log: Path, status: int) -> None:
        self.expected_status = status
        self.traceback_expected = False
        self.clients: list[socket.socket] = []
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
        self.pid = self.process.pid  # also of its session

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        return self._log.read_text(errors="backslashreplace")

    def lines(self, *parts: str) -> list[str]:
        """Return the log's lines that hold all of `parts`."""
        return [line for line in self.log.splitlines() if all(part in line for part in parts)]

    def logged(self, *parts: str, count: int = 1) -> str:
        """Wait for `count` log lines that hold all of `parts`, and return the last."""

        def look() -> list[str]:
            found = self.lines(*parts)
            assert len(found) >= count or self.process.poll() is None, f"ended without {parts}:\n{self.log}"
            return found if len(found) >= count else []

        return eventually(look)[-1]

    @cached_property
    def port(self) -> int:
        """The port it listens on, as it says in its log."""
        return int(self.logged("listening: ", " port=").partition(" port=")[2].split()[0])

    def connect(self, header: bytes = b"", host: str = "127.0.0.1", receive_buffer: int = 0) -> socket.socket:
        """Return a connection that is closed in the end, `header` sent."""
        sock = connect(self.port, header, host, receive_buffer)
        self.clients.append(sock)
        return sock

    def streaming(self, sock: socket.socket) -> None:
        """Wait until the header of `sock` has been read; takes a server with -v."""
        host, port = sock.getsockname()[:2]
        self.logged("client streams: ", f" peer=[{host}]:{port} " if ":" in host else f" peer={host}:{port} ")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor."""
        self.process.send_signal(number)

    def title(self, pid: int | None = None) -> str:
        """Return the title of a process, the supervisor's by default."""
        return title(pid or self.pid)

    def workers(self, count: int | None = None) -> list[int]:
        """Return the pids of the workers by slot, once there are `count` and all are ready."""

        def look() -> list[int]:
            found = [pid for pid in children(self.pid) if title(pid).startswith("tailsrv: worker ")]
            ready = {f"pid={pid}" for pid in found} <= {word for line in self.lines("worker ready: ") for word in line.split()}
            return found if ready and len(found) == (count or 1) else []

        return sorted(eventually(look), key=lambda pid: int(title(pid).split()[2]))

    def wait(self) -> None:
        """Wait for its end and assert that it is the expected one, clean and complete."""
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
        """Close the clients, end the server if the test has not, and assert that it ended well."""
        for sock in self.clients:
            sock.close()
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        self.wait()


class Serve(Protocol):
    """Starts `tailsrv -p 0 OPTIONS PATH`, by way of `wrapper`; it must end with `status`."""

    def __call__(
        self, path: str | bytes | Path, *options: str, status: int = 0, wrapper: Sequence[str] = (), program: Sequence[str] = TAILSRV
    ) -> Server: ...


def session(sid: int) -> list[int]:
    """Return the pids of the living processes of the session `sid`."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == sid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except (OSError, psutil.Error):
            pass  # it ended while we looked
    return found


def children(pid: int) -> list[int]:
    """Return the pids of the living children of `pid`; psutil would look at every process of the machine for them."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in found if not gone(int(child))]


def title(pid: int) -> str:
    """Return the title of the process `pid`, empty if it has gone."""
    try:
        return " ".join(psutil.Process(pid).cmdline()).rstrip()  # behind the title the old arguments' room is empty
    except psutil.Error:
        return ""


def stop(pid: int) -> None:
    """Stop the process `pid`, and wait until it is."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def gone(pid: int) -> bool:
    """Tell whether the process `pid` has ended."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def cpu_seconds(pid: int) -> float:
    """Return the processor time that the process `pid` has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def switches(pid: int) -> int:
    """Return how often the process `pid` has gone to sleep: one that is woken must do so again."""
    return int(psutil.Process(pid).num_ctx_switches().voluntary)


def ask(endpoint: str) -> tuple[bytes, int]:
    """Return what the control socket of `endpoint` says, and the pid of who holds it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(f"\0tailsrv:{endpoint}")
        pid, _, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return recv_all(sock), pid
