"""Waiting for a connection's bytes."""

import select
import socket

import pytest

from tailsrv.dial import milliseconds, wait


@pytest.mark.parametrize(("seconds", "expected"), [(None, None), (-1.0, 0.0), (0.5, 500.0), (3e6, 86_400_000.0)])
def test_milliseconds(seconds: float | None, expected: float | None) -> None:
    """A wait is as long as poll(2) can count, and no shorter than none."""
    assert milliseconds(seconds) == expected


def test_wait() -> None:
    """A wait of a year ends with the first byte, and one of no time without any."""
    near, far = socket.socketpair()
    with near, far:
        assert not wait(near.fileno(), select.POLLIN, 0)
        far.send(b"x")
        assert wait(near.fileno(), select.POLLIN, 365 * 86400.0)
