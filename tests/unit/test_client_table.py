"""Tests of the client table with real descriptors and connections."""

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support.interpreter import run_program
from support.sockets import readable, recv_all, reset, tcp_pair, wait_readable
from tailsrv.supervisor.client_table import ClientTable
from tailsrv.worker_channel import MAX_REPORTED_SOCKETS
from tailsrv.worker_context import Entry

# A bound above every descriptor number.
ANY = 1 << 20


def is_open(fd: int) -> bool:
    """Tell whether `fd` is an open descriptor."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Give three connections: the worker's end and the client's end of each."""
    with ExitStack() as stack:
        yield [stack.enter_context(tcp_pair()) for _ in range(3)]


@pytest.fixture
def client_table() -> Iterator[ClientTable]:
    """Give an empty client table, and close its descriptors after the test."""
    client_table = ClientTable()
    yield client_table
    client_table.close_in_child()


def duplicates(pairs: list[tuple[socket.socket, socket.socket]]) -> list[int]:
    """Return duplicates of the worker's ends, such as the supervisor receives."""
    return [os.dup(near.fileno()) for near, _ in pairs]


Pairs = list[tuple[socket.socket, socket.socket]]


def test_join_start_leave(client_table: ClientTable, pairs: Pairs) -> None:
    """A client joins without a start, gets one later, and leaves with its descriptor closed."""
    fds = duplicates(pairs)
    assert client_table.add([4, 5, 6], fds, ANY) == 0
    assert client_table.clients == {4: Entry(fds[0]), 5: Entry(fds[1]), 6: Entry(fds[2])}
    client_table.set_start(5, 0, None)
    client_table.set_start(6, 2**62, 7)
    assert [(entry.start, entry.end) for entry in client_table.clients.values()] == [
        (None, None),
        (0, None),
        (2**62, 7),
    ]
    client_table.remove([4, 6])
    assert client_table.clients == {5: Entry(fds[1], 0)}
    assert [is_open(fd) for fd in fds] == [False, True, False]
    assert len(client_table) == 1


def test_unknown_client(client_table: ClientTable, pairs: Pairs) -> None:
    """A start or a departure of a client that is not in the table changes nothing."""
    fds = duplicates(pairs[:1])
    client_table.add([1], fds, ANY)
    client_table.set_start(2, 7, None)
    client_table.remove([2, 3])
    assert client_table.clients == {1: Entry(fds[0])}
    assert client_table.unprotected == set()


def test_too_few_sockets(client_table: ClientTable, pairs: Pairs) -> None:
    """The last clients, whose sockets the kernel left out, are unprotected, but are counted."""
    fds = duplicates(pairs[:1])
    assert client_table.add([1, 2, 3], fds, ANY) == 2
    assert (set(client_table.clients), client_table.unprotected, len(client_table)) == (
        {1},
        {2, 3},
        3,
    )
    client_table.set_start(2, 7, None)
    client_table.remove([2])
    assert (set(client_table.clients), client_table.unprotected) == ({1}, {3})
    assert client_table.add([4], [], ANY) == 1
    assert client_table.forget_unprotected() == 2
    assert (set(client_table.clients), len(client_table)) == ({1}, 1)


def test_too_many_sockets(client_table: ClientTable, pairs: Pairs) -> None:
    """A socket that belongs to no client is closed."""
    fds = duplicates(pairs[:2])
    assert client_table.add([1], fds, ANY) == 0
    assert set(client_table.clients) == {1}
    assert [is_open(fd) for fd in fds] == [True, False]


def test_descriptors_beyond_the_highest(client_table: ClientTable, pairs: Pairs) -> None:
    """A socket with a number above the bound is closed at once, and its client is unprotected."""
    fds = sorted(duplicates(pairs))
    assert client_table.add([1, 2, 3], fds, highest=fds[1]) == 1
    assert (set(client_table.clients), client_table.unprotected) == ({1, 2}, {3})
    assert [is_open(fd) for fd in fds] == [True, True, False]


def test_the_kernel_leaves_out_what_does_not_fit() -> None:
    """If descriptors run out within a message, the first clients are protected, the rest not."""
    done = run_program("more_sockets_than_fit")
    assert done.stdout == "6 [0, 1, 2, 3] [4, 5, 6, 7, 8, 9] True\n", done.stderr


def test_a_close_is_seen_once_both_have_closed(client_table: ClientTable, pairs: Pairs) -> None:
    """A client sees the end of its stream only after worker and client table have closed."""
    (near, far), *_ = pairs
    client_table.add([1], duplicates(pairs[:1]), ANY)
    near.close()
    assert not readable(far)
    client_table.remove([1])
    wait_readable(far)
    assert recv_all(far) == b""


def test_a_shutdown_is_seen_at_once(client_table: ClientTable, pairs: Pairs) -> None:
    """If the worker shuts the socket down, the client sees the end before the table closes."""
    (near, far), *_ = pairs
    client_table.add([1], duplicates(pairs[:1]), ANY)
    near.sendall(b"last words")
    near.shutdown(socket.SHUT_WR)
    near.close()
    assert recv_all(far) == b"last words"


def test_close_connections(pairs: Pairs) -> None:
    """close_connections() ends all connections, even if a worker holds them or a peer has gone."""
    client_table = ClientTable()
    fds = duplicates(pairs)
    client_table.add([1, 2, 3], fds, ANY)
    reset(pairs[2][1])
    poll = select.poll()
    poll.register(pairs[2][0], 0)
    # Wait until the reset has arrived.
    assert poll.poll(20_000)
    assert client_table.close_connections() == 3
    assert client_table.clients == {}
    assert not any(map(is_open, fds))
    for _, far in pairs[:2]:
        assert recv_all(far) == b""


def test_close_connections_keeps_the_unprotected(pairs: Pairs) -> None:
    """close_connections() closes only protected clients, and keeps the list of unprotected ones."""
    client_table = ClientTable()
    client_table.add([1, 2], duplicates(pairs[:1]), ANY)
    assert client_table.close_connections() == 1
    assert client_table.unprotected == {2}


def test_close(pairs: Pairs) -> None:
    """A forked child that closes another slot's sockets ends no connection."""
    (near, far), *_ = pairs
    this_slot, other_slot = ClientTable(), ClientTable()
    this_slot.add([1], duplicates(pairs[:1]), ANY)
    other_slot.add([1], duplicates(pairs[:1]), ANY)
    near.close()
    other_slot.close_in_child()
    assert not readable(far)
    this_slot.close_in_child()
    assert recv_all(far) == b""


def test_save_and_load(pairs: Pairs) -> None:
    """load() restores the client table that save() returned, with the same descriptors."""
    client_table = ClientTable()
    fds = duplicates(pairs)
    client_table.add([1, 5, 9, 10], fds, ANY)
    client_table.set_start(5, 0, None)
    client_table.set_start(9, 2**62, 0)
    loaded = ClientTable.load(client_table.save(), sorted(client_table.unprotected))
    assert loaded == client_table
    assert loaded.unprotected == {10}
    loaded.close_in_child()
    assert not any(map(is_open, fds))


def test_as_many_as_a_message_carries(client_table: ClientTable) -> None:
    """All clients of the largest message are protected."""
    fds = [os.dup(0) for _ in range(MAX_REPORTED_SOCKETS)]
    assert client_table.add(range(MAX_REPORTED_SOCKETS), fds, ANY) == 0
    assert len(client_table.clients) == MAX_REPORTED_SOCKETS
