"""Who is connected: the supervisor's duplicates of the clients' sockets, with real descriptors."""

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support.interpreter import run_program
from support.sockets import readable, recv_all, reset, tcp_pair, wait_readable
from tailsrv.channel import MAX_SOCKETS
from tailsrv.inheritance import Entry
from tailsrv.supervisor.client_table import Roster

ANY = 1 << 20  # higher than any descriptor


def is_open(fd: int) -> bool:
    """Tell whether `fd` is a descriptor."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Give three connections: the worker's end and the client's."""
    with ExitStack() as stack:
        yield [stack.enter_context(tcp_pair()) for _ in range(3)]


@pytest.fixture
def roster() -> Iterator[Roster]:
    """Give an empty roster, whose descriptors are closed at the end."""
    roster = Roster()
    yield roster
    roster.close()


def duplicates(pairs: list[tuple[socket.socket, socket.socket]]) -> list[int]:
    """Return descriptors of the worker's ends, such as the supervisor gets."""
    return [os.dup(near.fileno()) for near, _ in pairs]


Pairs = list[tuple[socket.socket, socket.socket]]


def test_join_start_leave(roster: Roster, pairs: Pairs) -> None:
    """A client joins without an offset, starts at one, and takes its descriptor with it when it leaves."""
    fds = duplicates(pairs)
    assert roster.join([4, 5, 6], fds, ANY) == 0
    assert roster.clients == {4: Entry(fds[0]), 5: Entry(fds[1]), 6: Entry(fds[2])}
    roster.start(5, 0)
    roster.start(6, 2**62)
    assert [entry.start for entry in roster.clients.values()] == [None, 0, 2**62]
    roster.leave([4, 6])
    assert roster.clients == {5: Entry(fds[1], 0)}
    assert [is_open(fd) for fd in fds] == [False, True, False]
    assert len(roster) == 1


def test_what_nobody_knows(roster: Roster, pairs: Pairs) -> None:
    """A client that is not in the roster starts and leaves without a trace."""
    fds = duplicates(pairs[:1])
    roster.join([1], fds, ANY)
    roster.start(2, 7)
    roster.leave([2, 3])
    assert roster.clients == {1: Entry(fds[0])}
    assert roster.unprotected == set()


def test_too_few_sockets(roster: Roster, pairs: Pairs) -> None:
    """Clients whose sockets the kernel left out, the last ones, are unprotected: they count, start and leave."""
    fds = duplicates(pairs[:1])
    assert roster.join([1, 2, 3], fds, ANY) == 2
    assert (set(roster.clients), roster.unprotected, len(roster)) == ({1}, {2, 3}, 3)
    roster.start(2, 7)
    roster.leave([2])
    assert (set(roster.clients), roster.unprotected) == ({1}, {3})
    assert roster.join([4], [], ANY) == 1
    assert roster.lose_unprotected() == 2
    assert (set(roster.clients), len(roster)) == ({1}, 1)


def test_too_many_sockets(roster: Roster, pairs: Pairs) -> None:
    """A socket that comes with no client is closed."""
    fds = duplicates(pairs[:2])
    assert roster.join([1], fds, ANY) == 0
    assert set(roster.clients) == {1}
    assert [is_open(fd) for fd in fds] == [True, False]


def test_descriptors_beyond_the_highest(roster: Roster, pairs: Pairs) -> None:
    """A socket with a number above the bound is closed at once, and its client unprotected."""
    fds = sorted(duplicates(pairs))
    assert roster.join([1, 2, 3], fds, highest=fds[1]) == 1
    assert (set(roster.clients), roster.unprotected) == ({1, 2}, {3})
    assert [is_open(fd) for fd in fds] == [True, True, False]


def test_the_kernel_leaves_out_what_does_not_fit() -> None:
    """Where descriptors run out in the middle of a message, the first clients are protected and the others are not."""
    done = run_program("more_sockets_than_fit")
    assert done.stdout == "6 [0, 1, 2, 3] [4, 5, 6, 7, 8, 9] True\n", done.stderr


def test_a_close_is_seen_once_both_have_closed(roster: Roster, pairs: Pairs) -> None:
    """The client sees the end of its stream when worker and roster have both let go, and not before."""
    (near, far), *_ = pairs
    roster.join([1], duplicates(pairs[:1]), ANY)
    near.close()
    assert not readable(far)
    roster.leave([1])
    wait_readable(far)
    assert recv_all(far) == b""


def test_a_shutdown_is_seen_at_once(roster: Roster, pairs: Pairs) -> None:
    """A worker that shuts down before it closes need not wait for the roster."""
    (near, far), *_ = pairs
    roster.join([1], duplicates(pairs[:1]), ANY)
    near.sendall(b"last words")
    near.shutdown(socket.SHUT_WR)
    near.close()
    assert recv_all(far) == b"last words"


def test_hang_up(pairs: Pairs) -> None:
    """Hanging up ends every connection for good, also where the worker's descriptor lives on or the peer has gone."""
    roster = Roster()
    fds = duplicates(pairs)
    roster.join([1, 2, 3], fds, ANY)
    reset(pairs[2][1])
    poll = select.poll()
    poll.register(pairs[2][0], 0)
    assert poll.poll(20_000)  # the reset has come
    assert roster.hang_up() == 3
    assert roster.clients == {}
    assert not any(map(is_open, fds))
    for _, far in pairs[:2]:
        assert recv_all(far) == b""


def test_hang_up_leaves_the_unprotected(pairs: Pairs) -> None:
    """Hanging up is about the connections that a worker can adopt; there is nothing to close of the others."""
    roster = Roster()
    roster.join([1, 2], duplicates(pairs[:1]), ANY)
    assert roster.hang_up() == 1
    assert roster.unprotected == {2}


def test_close(pairs: Pairs) -> None:
    """A forked child that closes another slot's sockets ends no connection."""
    (near, far), *_ = pairs
    ours, theirs = Roster(), Roster()
    ours.join([1], duplicates(pairs[:1]), ANY)
    theirs.join([1], duplicates(pairs[:1]), ANY)
    near.close()
    theirs.close()
    assert not readable(far)
    ours.close()
    assert recv_all(far) == b""


def test_save_and_load(pairs: Pairs) -> None:
    """A roster comes back as it was, descriptors by their numbers."""
    roster = Roster()
    fds = duplicates(pairs)
    roster.join([1, 5, 9, 10], fds, ANY)
    roster.start(5, 0)
    roster.start(9, 2**62)
    loaded = Roster.load(roster.save(), sorted(roster.unprotected))
    assert loaded == roster
    assert loaded.unprotected == {10}
    loaded.close()
    assert not any(map(is_open, fds))


def test_as_many_as_a_message_carries(roster: Roster) -> None:
    """All clients of the largest message are protected."""
    fds = [os.dup(0) for _ in range(MAX_SOCKETS)]
    assert roster.join(range(MAX_SOCKETS), fds, ANY) == 0
    assert len(roster.clients) == MAX_SOCKETS
