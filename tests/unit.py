"""What several of the unit tests share: real sockets and files, and programs of a few lines in a fresh interpreter."""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0  # seconds until a wait counts as failed; never how long a test takes

as_root = os.geteuid() == 0


def run_python(
    code: str, *args: str, env: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run `code` in an interpreter of its own, in which warnings are errors, with our packages and `unit` to import.

    A fork of the test process would not do: it is the child of a process with threads (faulthandler's).
    """
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=PATIENCE,
    )  # fmt: skip


def append(path: Path, data: bytes) -> None:
    """Append `data` to the file `path`."""
    with path.open("ab") as file:
        file.write(data)


@contextmanager
def opened(path: Path | str) -> Iterator[int]:
    """Give a descriptor of `path` to read from."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def evict(file: int) -> None:
    """Have the kernel forget what it has in memory of `file`; one that is in memory alone stays there."""
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def closing_all(sockets: Iterable[socket.socket]) -> Iterator[None]:
    """Close the sockets that are in `sockets` at the end."""
    try:
        yield
    finally:
        for sock in sockets:
            sock.close()


@contextmanager
def tcp_pair(receive: int | None = None, send: int | None = None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give the server's end (non-blocking) and the client's end of a TCP connection on loopback.

    `receive` is the size of the client's receive buffer and `send` of the server's send buffer, where it matters.
    """
    with socket.socket() as listener, socket.socket() as far:
        far.settimeout(PATIENCE)
        if receive:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        far.connect(listener.getsockname())
        near, _ = listener.accept()
        with near:
            near.setblocking(False)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if send:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send)
            yield near, far


def wait_readable(what: socket.socket | int) -> None:
    """Return once there is something to read; fail if nothing comes."""
    assert select.select([what], [], [], PATIENCE)[0], "nothing came"


def wait_for(what: socket.socket, events: int) -> int:
    """Return the poll(2) events of `what` once one of `events` is among them; fail if none comes."""
    poll = select.poll()
    poll.register(what, events)
    seen = poll.poll(PATIENCE * 1000)
    assert seen, "nothing happened"
    return int(seen[0][1])


def readable(what: socket.socket | int) -> bool:
    """Tell whether there is something to read right now."""
    return bool(select.select([what], [], [], 0)[0])


def recv_exactly(sock: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes, or fewer if the stream ends before."""
    parts = []
    while count > 0 and (part := sock.recv(min(count, 1 << 20))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def recv_all(sock: socket.socket) -> bytes:
    """Return what comes until the stream ends."""
    return recv_exactly(sock, 1 << 40)


def reset(sock: socket.socket) -> None:
    """Close `sock` so that the peer sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def can_ipv6() -> bool:
    """Tell whether this machine has an IPv6 loopback address."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not can_ipv6(), reason="this machine has no IPv6")
