"""Terminals and pipes that nobody reads."""

import os
import pty
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Give both ends of a terminal, the reader's first."""
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(slave)
        os.close(master)


def fill(slave: int, room: int) -> None:
    """Fill a terminal so that it takes `room` more bytes, by way of a description of our own."""

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
    """Fill a pipe: it has no room for a byte then."""
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
