"""Tests of waiting for a connection's bytes."""

import socket

import pytest

from tailsrv.client.connector import fetch, wait


def test_fetch_of_a_slow_drip() -> None:
    """A server that sends one byte at a time cannot delay the end of fetch() beyond the limit."""
    near, far = socket.socketpair()

    def drip(fd: int, events: int, seconds: float | None) -> bool:
        far.send(b"x")
        return wait(fd, events, seconds) and bool(seconds)

    with near, far:
        near.setblocking(False)
        with pytest.raises(TimeoutError):
            fetch(near, b"0\n", 1 << 30, drip, limit=0.01)


def test_fetch_of_a_short_answer() -> None:
    """The end of the connection ends the answer."""
    near, far = socket.socketpair()

    with near, far:
        near.setblocking(False)
        far.send(b"abc")
        far.shutdown(socket.SHUT_WR)
        assert fetch(near, b"0\n", 40, wait, limit=60) == b"abc"
        assert far.recv(9) == b"0\n"


def test_fetch_after_an_early_wait() -> None:
    """A wait that reports data too early costs one more turn."""
    near, far = socket.socketpair()
    turns: list[bytes] = []

    def early(_fd: int, _events: int, _seconds: float | None) -> bool:
        turns.append(b"x")
        if len(turns) > 1:
            far.send(b"x")
        return True

    with near, far:
        near.setblocking(False)
        assert fetch(near, b"0\n", 2, early, limit=60) == b"xx"
