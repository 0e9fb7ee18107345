"""Terminals and pipes whose reading end does not read."""

import os
import pty
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Yield both ends of a terminal, the reader's first."""
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(slave)
        os.close(master)


def fill(slave: int, room: int) -> None:
    """Fill a terminal until it has space for `room` more bytes.

    This uses a file description of its own, because it makes the description non-blocking.
    """

    def pour(fd: int, count: int) -> int:
        poured = 0
        with suppress(BlockingIOError):
            while poured < count:
                poured += os.write(fd, b"x" * min(64, count - poured))
        return poured

    with terminal() as (_, other):
        os.set_blocking(other, False)
        size = pour(other, 1 << 20)
    ours = os.open(os.ttyname(slave), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    pour(ours, size - room)
    os.close(ours)


def fill_pipe(writer: int) -> None:
    """Fill a pipe, so that it has no space for another byte."""
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
