"""Tests of clients that wait for the disk without delaying others, with a simulated disk."""

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

# The number of the file's descriptor, which is only passed on.
FILE = 7


class Disk:
    """A disk that records the reads that are requested, and whose cache the test fills."""

    def __init__(self) -> None:
        self.ahead = ReadAhead(self.is_cached, self.read)
        self.cached_to = 0
        self.requested: list[tuple[int, int, int]] = []

    def is_cached(self, _file: int, position: int, count: int, _stride: int) -> bool:
        """Tell whether these bytes are cached."""
        return position + count <= self.cached_to

    def read(self, file: int, position: int, count: int) -> None:
        """Record that these bytes were requested."""
        self.requested.append((file, position, count))

    def admit(self, client: Client, wanted: int = 1000, position: int = 0) -> int:
        """Return how many bytes of the file may be sent."""
        return self.ahead.admit(client, FILE, position, wanted)


@pytest.fixture
def disk() -> Disk:
    """Give a disk of which nothing is cached yet."""
    return Disk()


@pytest.fixture
def clients() -> Iterator[list[Client]]:
    """Give two clients more than may read ahead at once, all at offset 0."""
    with ExitStack() as stack:
        ends = [stack.enter_context(tcp_pair()) for _ in range(MAX_READERS + 2)]
        yield [Client(number, near, far.getsockname()) for number, (near, far) in enumerate(ends)]


def test_cached_bytes(disk: Disk, clients: list[Client]) -> None:
    """A client whose next bytes are cached may send them at once, and nothing is read ahead."""
    disk.cached_to = SEND_CHUNK
    assert disk.admit(clients[0], SEND_CHUNK) == SEND_CHUNK
    assert not disk.ahead
    assert disk.requested == []


@pytest.mark.parametrize("position", [0, 5])
def test_bytes_on_the_disk(disk: Disk, clients: list[Client], position: int) -> None:
    """A client waits while its next bytes are read from disk, and then the bytes after them are."""
    disk.cached_to = position + READ_AHEAD - 1
    for _ in range(3):
        assert disk.admit(clients[0], SEND_CHUNK, position) == 0
        assert disk.ahead
        assert disk.ahead.take_due() == clients[:1]
        assert not disk.ahead
    first = (FILE, position, READ_AHEAD)
    assert disk.requested == [first]
    disk.cached_to = position + READ_AHEAD
    assert disk.admit(clients[0], SEND_CHUNK, position) == READ_AHEAD
    assert not disk.ahead
    assert disk.requested == [first, (FILE, position + READ_AHEAD, READ_AHEAD)]
    disk.cached_to = position + SEND_CHUNK
    # The bytes are cached, and the client is treated as if it had never waited.
    assert disk.admit(clients[0], SEND_CHUNK, position) == SEND_CHUNK
    assert len(disk.requested) == 2


def test_readers_are_limited(disk: Disk, clients: list[Client]) -> None:
    """MAX_READERS clients read ahead at once; others follow when one has its bytes or leaves."""
    readers, others = clients[:MAX_READERS], clients[MAX_READERS:]
    assert not any(disk.admit(client) for client in clients)
    assert disk.ahead.take_due() == readers
    assert len(disk.requested) == MAX_READERS
    assert not any(disk.admit(client) for client in readers[2:])
    disk.cached_to = 1000
    assert disk.admit(readers[0])
    disk.ahead.forget(readers[1])
    assert disk.ahead.take_due() == [*readers[2:], *others]
    assert not disk.ahead


def test_pauses(disk: Disk, clients: list[Client]) -> None:
    """The pause grows with the number of misses, and with the number of waiting clients."""
    assert not disk.admit(clients[0])
    pauses = [disk.ahead.pause()]
    for _ in range(20):
        assert not disk.admit(disk.ahead.take_due()[0])
        pauses.append(disk.ahead.pause())
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (DISK_PAUSE, MAX_PAUSES * DISK_PAUSE)
    assert not disk.admit(clients[1])
    assert disk.ahead.pause() == 2 * DISK_PAUSE


def test_a_disk_that_cannot_read(disk: Disk, clients: list[Client]) -> None:
    """After MAX_MISSES misses the client may send, so that sendfile(2) reports the disk's error."""
    for _ in range(MAX_MISSES):
        assert not disk.admit(clients[0])
        disk.ahead.take_due()
    assert disk.admit(clients[0])
    assert not disk.ahead
