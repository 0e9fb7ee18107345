"""Connections: making them, reading from them, and looking at their state."""

import select
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from support.waiting import DEADLINE

# The number of bytes of the `?` line.
LINE_LENGTH = 40


def connect(
    port: int, header: bytes = b"", host: str = "127.0.0.1", receive_buffer: int = 0
) -> socket.socket:
    """Return a connection on which `header` has been sent.

    With a small `receive_buffer` the client's socket is soon full.
    """
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


def outcome(sock: socket.socket) -> bytes | None:
    """Return all bytes up to the end of the stream; None if it is reset before the first byte."""
    received = b""
    try:
        while some := sock.recv(1 << 16):
            received += some
    except ConnectionResetError:
        return received or None
    return received


def expect(sock: socket.socket, data: bytes) -> None:
    """Assert that the next bytes are `data`; report only the first difference."""
    received = recv_exactly(sock, len(data))
    if received != data:
        offset = next(
            (
                i
                for i, (ours, theirs) in enumerate(zip(received, data, strict=False))
                if ours != theirs
            ),
            len(received),
        )
        here = slice(offset, offset + 20)
        raise AssertionError(
            f"{len(received)} of {len(data)} bytes; from byte {offset}: "
            f"{received[here]!r}, not {data[here]!r}"
        )


def expect_eof(sock: socket.socket) -> None:
    """Assert that the stream ends here, without a reset."""
    assert sock.recv(100) == b""


@contextmanager
def closing_all(sockets: Iterable[socket.socket]) -> Iterator[None]:
    """Close, at the end of the block, the sockets that `sockets` then contains."""
    try:
        yield
    finally:
        for sock in sockets:
            sock.close()


@contextmanager
def tcp_pair(
    receive: int | None = None, send: int | None = None
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield the server's end (non-blocking) and the client's end of a TCP connection on loopback.

    `receive` is the size of the client's receive buffer, and `send` that of the server's send
    buffer.
    """
    with socket.socket() as listener, socket.socket() as far:
        far.settimeout(DEADLINE)
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
    """Return once `what` is readable; fail if it does not become readable."""
    assert select.select([what], [], [], DEADLINE)[0], "nothing came"


def wait_for(what: socket.socket, events: int) -> int:
    """Return the poll(2) events of `what` once one of `events` occurs; fail if none occurs."""
    poll = select.poll()
    poll.register(what, events)
    seen = poll.poll(DEADLINE * 1000)
    assert seen, "nothing happened"
    return int(seen[0][1])


def readable(what: socket.socket | int) -> bool:
    """Tell whether `what` is readable now."""
    return readable_within(what, 0)


def readable_within(what: socket.socket | int, seconds: float) -> bool:
    """Tell whether `what` is readable within this time."""
    return bool(select.select([what], [], [], seconds)[0])


def reset(sock: socket.socket) -> None:
    """Close `sock` so that the peer sees a reset."""
    reset_at_close(sock)
    sock.close()


def reset_at_close(sock: socket.socket) -> None:
    """Make closing `sock` a reset: it takes effect at once, and leaves no port in TIME-WAIT."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def can_ipv6() -> bool:
    """Tell whether this machine has an IPv6 loopback address."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not can_ipv6(), reason="this machine has no IPv6")


def skip_without_mptcp() -> None:
    """Skip a test where the kernel has no MPTCP."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP).close()
    except OSError:
        pytest.skip("no MPTCP here")
