"""Clients whose next bytes are on the disk wait for them, and hold nobody up. The disk is one whose pace is in hand."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support.sockets import tcp_pair
from tailsrv.worker.client import Client
from tailsrv.worker.readahead import (
    DISK_PAUSE,
    MAX_MISSES,
    MAX_PAUSES,
    MAX_READERS,
    READ_AHEAD,
    ReadAhead,
)
from tailsrv.worker.streams import SEND_CHUNK


class Disk:
    """What is in memory of a file, and what has been asked for."""

    def __init__(self) -> None:
        self.ahead = ReadAhead(self.is_cached, self.read)
        self.cached_to = 0
        self.asked: list[tuple[int, int]] = []

    def is_cached(self, offset: int, count: int, _stride: int) -> bool:
        """Tell whether these bytes are in memory."""
        return offset + count <= self.cached_to

    def read(self, offset: int, count: int) -> None:
        """Note that these bytes are wanted."""
        self.asked.append((offset, count))


@pytest.fixture
def disk() -> Disk:
    """Give a disk that has read nothing yet."""
    return Disk()


@pytest.fixture
def clients() -> Iterator[list[Client]]:
    """Give more clients, at offset 0, than the disk works for."""
    with ExitStack() as stack:
        ends = [stack.enter_context(tcp_pair()) for _ in range(MAX_READERS + 2)]
        yield [Client(number, near, far.getsockname()) for number, (near, far) in enumerate(ends)]


def test_what_is_in_memory(disk: Disk, clients: list[Client]) -> None:
    """A client whose next bytes are in memory gets them at once, and the disk is left alone."""
    disk.cached_to = SEND_CHUNK
    assert disk.ahead.admit(clients[0], SEND_CHUNK) == SEND_CHUNK
    assert not disk.ahead
    assert disk.asked == []


def test_what_is_on_the_disk(disk: Disk, clients: list[Client]) -> None:
    """A client whose next bytes are not has them read, and looks again until they are there; meanwhile what follows is read, too."""
    disk.cached_to = READ_AHEAD - 1
    for _ in range(3):
        assert disk.ahead.admit(clients[0], SEND_CHUNK) == 0
        assert disk.ahead
        assert disk.ahead.take_due() == clients[:1]
        assert not disk.ahead
    assert disk.asked == [(0, READ_AHEAD)]
    disk.cached_to = READ_AHEAD
    assert disk.ahead.admit(clients[0], SEND_CHUNK) == READ_AHEAD
    assert not disk.ahead
    assert disk.asked == [(0, READ_AHEAD), (READ_AHEAD, READ_AHEAD)]
    disk.cached_to = SEND_CHUNK
    # from memory, as if it had never been otherwise
    assert disk.ahead.admit(clients[0], SEND_CHUNK) == SEND_CHUNK
    assert len(disk.asked) == 2


def test_those_whom_the_disk_works_for_are_few(disk: Disk, clients: list[Client]) -> None:
    """READERS clients have bytes read for them at a time; when one has got its own, or leaves, another has its turn."""
    few, others = clients[:MAX_READERS], clients[MAX_READERS:]
    assert not any(disk.ahead.admit(client, 1000) for client in clients)
    assert disk.ahead.take_due() == few
    assert len(disk.asked) == MAX_READERS
    assert not any(disk.ahead.admit(client, 1000) for client in few[2:])
    disk.cached_to = 1000
    assert disk.ahead.admit(few[0], 1000)
    disk.ahead.forget(few[1])
    assert disk.ahead.take_due() == [*few[2:], *others]
    assert not disk.ahead


def test_pauses(disk: Disk, clients: list[Client]) -> None:
    """Who has looked in vain looks less and less often, and the more do so, the longer all of them wait."""
    assert not disk.ahead.admit(clients[0], 1000)
    pauses = [disk.ahead.pause()]
    for _ in range(20):
        assert not disk.ahead.admit(disk.ahead.take_due()[0], 1000)
        pauses.append(disk.ahead.pause())
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (DISK_PAUSE, MAX_PAUSES * DISK_PAUSE)
    assert not disk.ahead.admit(clients[1], 1000)
    assert disk.ahead.pause() == 2 * DISK_PAUSE


def test_a_disk_that_cannot_read(disk: Disk, clients: list[Client]) -> None:
    """Where bytes do not come for a long time, sendfile(2) is to find out why."""
    for _ in range(MAX_MISSES):
        assert not disk.ahead.admit(clients[0], 1000)
        disk.ahead.take_due()
    assert disk.ahead.admit(clients[0], 1000)
    assert not disk.ahead
