"""Tests of streams over TCP: each client gets the exact bytes, and delays no other client."""

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.files import append, opened
from support.sockets import readable, recv_all, reset, tcp_pair, wait_for
from tailsrv.linux.event_loop import EventLoop
from tailsrv.segments import Log, Segment
from tailsrv.worker.client import CLIENT_EVENTS, Client, ClientState, Departures
from tailsrv.worker.readahead import MAX_READERS, ReadAhead
from tailsrv.worker.streams import EMPTY_SEND_COST, SEND_CHUNK, TURN_BUDGET, Streams, next_chunk

# 3 MiB, in which chunks at the offsets used here differ.
BIG = os.urandom(1 << 16) * 48


class StreamsBench:
    """Streams of one file, with the remote ends of the clients."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        self.stack = stack
        self.path = path
        self.path.write_bytes(b"")
        self.file = stack.enter_context(opened(path))
        self.loop = EventLoop()
        stack.callback(self.loop.epoll.close)
        self.departures = Departures()
        self._dropped: list[tuple[Client, Exception | None]] = []
        self.streams = Streams(Log([Segment(0, self.file)]), 0, self.loop, self.departures)
        self.fars: dict[Client, socket.socket] = {}

    @property
    def dropped(self) -> list[tuple[Client, Exception | None]]:
        """The clients that have left. Drops them, as a worker does."""
        for client, error in self.departures.take():
            self.streams.remove(client)
            self._dropped.append((client, error))
        return self._dropped

    def client(
        self, offset: int, receive: int | None = None, send: int | None = None, line: bytes = b""
    ) -> Client:
        """Add a client at `offset` that is sent `line` before the file's bytes."""
        near, far = self.stack.enter_context(tcp_pair(receive, send))
        client = Client(0, near, far.getsockname())
        client.line = line
        self.fars[client] = far
        self.loop.epoll.register(client.fd, CLIENT_EVENTS)
        self.streams.add(client, offset)
        return client

    def grow(self, data: bytes) -> None:
        """Append `data`, and update the size of the streams."""
        append(self.path, data)
        self.update_size()

    def shrink(self, size: int) -> None:
        """Truncate the file, and update the size of the streams."""
        os.truncate(self.path, size)
        self.update_size()

    def update_size(self) -> None:
        """Set the size of the streams to that of the file."""
        self.streams.shrunk = False
        self.streams.set_end(os.fstat(self.file).st_size)

    def received(self, client: Client) -> bytes:
        """End the stream of `client`, and return the bytes that it has not read yet."""
        client.sock.shutdown(socket.SHUT_WR)
        return recv_all(self.fars[client])

    def serve(self, *clients: Client) -> dict[Client, bytes]:
        """Pump, and read at the remote ends, until these clients are caught up."""
        got = dict.fromkeys(clients, b"")
        while not all(client.fd in self.streams.caught_up for client in clients):
            self.streams.pump()
            ready, _, _ = select.select([self.fars[client] for client in clients], [], [], 0)
            for client in clients:
                if self.fars[client] in ready:
                    got[client] += self.fars[client].recv(1 << 20)
                if client.fd in self.streams.blocked and select.select([], [client.sock], [], 0)[1]:
                    self.streams.writable(client)
        for client in clients:
            got[client] += self.received(client)
        return got


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[StreamsBench]:
    """Give streams of an empty file."""
    with ExitStack() as stack:
        yield StreamsBench(stack, tmp_path / "log")


def test_fan_out(bench: StreamsBench) -> None:
    """Each caught-up client gets each append at once, exactly and without a turn."""
    clients = [bench.client(0) for _ in range(10)]
    for line in (b"one\n", b"two\n", b"three\n"):
        bench.grow(line)
    assert not bench.streams.behind
    assert [bench.received(client) for client in clients] == [b"one\ntwo\nthree\n"] * 10


@pytest.mark.parametrize("offset", [0, 1, 5, 9, 10])
def test_start_in_the_file(bench: StreamsBench, offset: int) -> None:
    """A client gets the file from its offset on, and then appends."""
    bench.grow(b"0123456789")
    client = bench.client(offset)
    bench.streams.pump()
    bench.grow(b"more")
    assert bench.streams.offset_of(client) == 14
    assert bench.received(client) == b"0123456789more"[offset:]


@pytest.mark.parametrize("offset", [0, 3, 10, 14])
def test_line_before_the_bytes(bench: StreamsBench, offset: int) -> None:
    """A line comes once and before the file's bytes, wherever the stream starts."""
    bench.grow(b"0123456789")
    client = bench.client(offset, line=b"line\n")
    assert not readable(bench.fars[client])
    bench.streams.pump()
    assert bench.fars[client].recv(5) == b"line\n"
    bench.grow(b"abcdefgh")
    bench.streams.pump()
    assert bench.streams.offset_of(client) == 18
    assert bench.received(client) == b"0123456789abcdefgh"[offset:]


def test_append_before_the_line(bench: StreamsBench) -> None:
    """An append does not overtake a line that has not been sent yet."""
    bench.grow(b"01")
    client = bench.client(2, line=b"line\n")
    bench.grow(b"23")
    bench.streams.pump()
    assert bench.received(client) == b"line\n23"


def test_line_for_a_full_socket(bench: StreamsBench) -> None:
    """The rest of a line waits until the socket has room, and the file's bytes follow it."""
    bench.grow(b"0123456789")
    line = os.urandom(1 << 22)
    client = bench.client(4, send=4096, line=line)
    bench.streams.pump()
    assert list(bench.streams.blocked.values()) == [client]
    assert 0 < len(client.line) < len(line)
    assert bench.serve(client)[client] == line + b"456789"


def test_line_for_a_client_that_is_gone(bench: StreamsBench) -> None:
    """A client that has hung up before its line was sent is dropped."""
    bench.grow(b"01")
    client = bench.client(0, line=b"line\n")
    client.sock.shutdown(socket.SHUT_WR)
    bench.streams.pump()
    assert bench.dropped == [(client, None)]


def test_append_while_behind(bench: StreamsBench) -> None:
    """Bytes appended before a client's turn are sent once, in that turn."""
    bench.grow(b"old")
    client = bench.client(0)
    bench.grow(b"new")
    assert bench.streams.offset_of(client) == 0
    bench.streams.pump()
    assert bench.received(client) == b"oldnew"


def test_ahead_of_the_file(bench: StreamsBench) -> None:
    """A client ahead of the file gets nothing until the file grows beyond its offset."""
    bench.grow(b"01234")
    client = bench.client(8)
    for data in (b"5", b"67"):
        bench.grow(data)
        bench.streams.pump()
        assert bench.streams.offset_of(client) == 8
    bench.grow(b"89")
    bench.streams.pump()
    bench.grow(b"more")
    assert bench.received(client) == b"89more"


def test_many_ahead(bench: StreamsBench) -> None:
    """Clients ahead of the file start in the order of their offsets."""
    clients = {offset: bench.client(offset) for offset in (7, 3, 5, 3000, 3)}
    last = bench.client(3)
    bench.grow(b"01234")
    bench.streams.pump()
    bench.grow(b"5678")
    bench.streams.pump()
    assert {offset: bench.received(client) for offset, client in clients.items()} == {
        3: b"345678",
        5: b"5678",
        7: b"78",
        3000: b"",
    }
    assert bench.received(last) == b"345678"


def test_client_that_leaves_while_ahead(bench: StreamsBench) -> None:
    """A client that left while ahead of the file is not served later."""
    client, other = bench.client(1), bench.client(1)
    client.state = ClientState.CLOSED
    bench.streams.remove(client)
    assert bench.streams.without_work() == [other]
    bench.grow(b"0123")
    bench.streams.pump()
    assert bench.received(client) == b""
    assert bench.received(other) == b"123"


def test_full_socket(bench: StreamsBench) -> None:
    """A client with a full socket is skipped by turns and appends, and loses no byte."""
    slow, fast = bench.client(0, receive=4096, send=4096), bench.client(0)
    bench.grow(BIG[: 1 << 20])
    while slow.fd not in bench.streams.blocked:
        bench.streams.pump()
    at = slow.offset
    bench.streams.pump()
    bench.grow(b"more")
    assert bench.streams.offset_of(slow) == at < 1 << 20
    assert slow.fd in bench.streams.blocked
    assert bench.serve(slow, fast) == {
        slow: BIG[: 1 << 20] + b"more",
        fast: BIG[: 1 << 20] + b"more",
    }


def test_full_socket_at_an_append(bench: StreamsBench) -> None:
    """A client that accepts part of an append gets the rest later, and delays no other."""
    slow, fast = bench.client(0, receive=4096, send=4096), bench.client(0)
    total = BIG[:10]
    bench.grow(total[:5])
    bench.grow(total[5:])
    while slow.fd in bench.streams.caught_up:
        total += BIG[len(total) : len(total) + 65536]
        bench.grow(BIG[len(total) - 65536 : len(total)])
        assert bench.streams.offset_of(fast) <= len(total)
    assert slow.offset < len(total)
    assert bench.serve(slow, fast) == {slow: total, fast: total}


def test_writable_client_that_is_not_blocked(bench: StreamsBench) -> None:
    """A writable event for a client that was not blocked changes nothing."""
    bench.grow(b"x")
    caught_up, behind = bench.client(1), bench.client(0)
    bench.streams.writable(caught_up)
    bench.streams.writable(behind)
    assert list(bench.streams.behind) == [behind]
    bench.streams.pump()
    assert [bench.received(caught_up), bench.received(behind)] == [b"", b"x"]


@pytest.mark.parametrize("size", [SEND_CHUNK - 1, SEND_CHUNK, SEND_CHUNK + 1, 3 * SEND_CHUNK])
def test_growth_about_a_chunk(bench: StreamsBench, size: int) -> None:
    """An append of about a chunk or more arrives complete at each client."""
    clients = [bench.client(0) for _ in range(3)]
    bench.grow(BIG[:size])
    got = bench.serve(*clients)
    assert [got[client] == BIG[:size] for client in clients] == [True] * 3


def test_growth_by_more_than_a_chunk_is_taken_in_turns(bench: StreamsBench) -> None:
    """After an append longer than a chunk all clients are behind, and are served in turns."""
    clients = [bench.client(0) for _ in range(3)]
    bench.grow(BIG[: SEND_CHUNK + 1])
    assert list(bench.streams.behind) == clients
    assert [client.offset for client in clients] == [0, 0, 0]


def test_round_robin(bench: StreamsBench) -> None:
    """Each turn serves the next client, and no client twice while another waits."""
    bench.grow(BIG)
    clients = [bench.client(0, receive=1 << 16) for _ in range(3)]
    served = []
    for _ in range(3):
        before = [client.offset for client in clients]
        bench.streams.pump(budget=1)
        served.append(
            [client.offset > offset for client, offset in zip(clients, before, strict=True)]
        )
    assert served == [[True, False, False], [False, True, False], [False, False, True]]


def test_budget(bench: StreamsBench) -> None:
    """A turn ends when its budget is spent, and without a budget no client is served."""
    bench.grow(b"0123456789")
    clients = [bench.client(0) for _ in range(5)]
    bench.streams.pump(budget=0)
    assert [client.offset for client in clients] == [0] * 5
    bench.streams.pump(budget=20)
    assert [bench.streams.offset_of(client) for client in clients] == [10, 10, 0, 0, 0]
    bench.streams.pump(budget=1000)
    assert [bench.received(client) for client in clients] == [b"0123456789"] * 5


def test_failed_sends_cost_budget(bench: StreamsBench) -> None:
    """A send to a client that has gone also costs budget, so that many of them end a turn."""
    bench.grow(BIG)
    clients = [bench.client(0) for _ in range(TURN_BUDGET // EMPTY_SEND_COST + 3)]
    for client in clients:
        reset(bench.fars[client])
        wait_for(client.sock, select.POLLHUP)
    bench.streams.pump()
    assert len(bench.dropped) == TURN_BUDGET // EMPTY_SEND_COST
    bench.streams.pump()
    assert [client for client, _ in bench.dropped] == clients


def test_new_client_does_not_wait_for_a_long_replay(bench: StreamsBench) -> None:
    """A client with few bytes to get does not wait for one that replays the whole file."""
    bench.grow(BIG)
    bench.client(0)
    follower = bench.client(len(BIG) - 5)
    bench.streams.pump(budget=1)
    bench.streams.pump(budget=1)
    assert bench.received(follower) == BIG[-5:]


def test_shrink(bench: StreamsBench) -> None:
    """After a truncation, clients beyond the end wait for their offset, and the others continue."""
    bench.grow(b"0123456789")
    caught_up, behind = bench.client(10), bench.client(2)
    bench.shrink(4)
    bench.streams.pump()
    bench.grow(b"abcdef")
    bench.streams.pump()
    assert bench.streams.offset_of(caught_up) == 10
    bench.grow(b"new")
    bench.streams.pump()
    assert bench.received(caught_up) == b"new"
    assert bench.received(behind) == b"23abcdefnew"


def test_shrink_below_a_client_that_is_behind(bench: StreamsBench) -> None:
    """A client that was behind is ahead after a truncation, and the loop does not spin."""
    bench.grow(b"0123456789")
    client = bench.client(8)
    bench.shrink(4)
    bench.streams.pump()
    assert not bench.streams.behind
    assert not bench.streams.shrunk
    bench.grow(b"abcdefgh")
    bench.streams.pump()
    assert bench.received(client) == b"efgh"


def test_shrink_to_nothing_and_back_to_the_same_size(bench: StreamsBench) -> None:
    """A client at the end is there again when the file has its old size, and gets what follows."""
    bench.grow(b"0123")
    client = bench.client(4)
    bench.shrink(0)
    bench.grow(b"abcd")
    assert bench.streams.without_work() == [client]
    bench.grow(b"e")
    bench.streams.pump()
    assert bench.received(client) == b"e"


def test_shrink_under_a_send(bench: StreamsBench) -> None:
    """A send that finds the file too short ends the turn, and sends no wrong bytes."""
    bench.grow(b"0123456789")
    first, second = bench.client(5), bench.client(2)
    os.truncate(bench.path, 4)
    bench.streams.pump()
    assert bench.streams.shrunk
    assert second.offset == 2
    bench.update_size()
    bench.streams.pump()
    assert not bench.streams.shrunk
    assert not bench.streams.behind
    bench.grow(b"abcd")
    bench.streams.pump()
    assert [bench.received(first), bench.received(second)] == [b"bcd", b"23abcd"]


def test_shrink_under_the_fan_out(bench: StreamsBench) -> None:
    """An append that is truncated before it is sent is sent only when it is written again."""
    clients = [bench.client(0) for _ in range(3)]
    # Simulate a file that was four bytes long when its size was read.
    bench.streams.set_end(4)
    bench.streams.pump()
    assert bench.streams.shrunk
    bench.update_size()
    bench.grow(b"real")
    bench.streams.pump()
    assert [bench.received(client) for client in clients] == [b"real"] * 3


def test_shrink_under_clients_that_wait_for_the_disk(bench: StreamsBench) -> None:
    """After a truncation, clients that waited for the disk free their read-ahead slots."""
    bench.grow(BIG)
    in_memory = False
    bench.streams.read_ahead = ReadAhead(lambda *_: in_memory, lambda *_: None)
    waiting = [bench.client(SEND_CHUNK) for _ in range(MAX_READERS)]
    bench.streams.pump(budget=2 * len(BIG) * MAX_READERS)
    bench.shrink(SEND_CHUNK // 2)
    bench.streams.retry_disk()
    bench.streams.pump()
    late = bench.client(SEND_CHUNK // 2 - 10)
    bench.streams.pump()
    bench.streams.retry_disk()
    in_memory = True
    bench.streams.pump()
    assert late.fd in bench.streams.caught_up
    assert not bench.streams.read_ahead
    assert not any(client.fd in bench.streams.caught_up for client in waiting)


def test_hang_up_at_an_append(bench: StreamsBench) -> None:
    """A hung-up client is dropped at an append, and the other clients get the append."""
    clients = [bench.client(0) for _ in range(3)]
    reset(bench.fars[clients[1]])
    wait_for(clients[1].sock, select.POLLERR)
    bench.grow(b"data")
    assert bench.dropped == [(clients[1], None)]
    assert [bench.received(client) for client in (clients[0], clients[2])] == [b"data"] * 2
    bench.streams.pump()
    assert len(bench.dropped) == 1


def test_hang_up_in_a_turn(bench: StreamsBench) -> None:
    """A client that hung up while behind is dropped in its turn, and the next client is served."""
    bench.grow(b"data")
    clients = [bench.client(0) for _ in range(2)]
    reset(bench.fars[clients[0]])
    wait_for(clients[0].sock, select.POLLERR)
    bench.streams.pump()
    assert bench.dropped == [(clients[0], None)]
    assert bench.received(clients[1]) == b"data"


@pytest.mark.parametrize("offset", [0, 4])
def test_error_of_one_client(bench: StreamsBench, offset: int) -> None:
    """A send error of another kind drops that client with the error, and no other client."""
    bench.grow(b"data")
    broken, healthy = bench.client(offset), bench.client(offset)
    # Replace the client's descriptor by a folder, to which nothing can be sent.
    was = broken.sock.detach()
    folder = os.open(bench.path.parent, os.O_RDONLY)
    os.dup2(folder, was)
    os.close(folder)
    try:
        bench.grow(b"more")
        bench.streams.pump()
        assert [client for client, _ in bench.dropped] == [broken]
        assert isinstance(bench.dropped[0][1], OSError)
        assert bench.received(healthy) == b"datamore"[offset:]
    finally:
        os.close(was)


@pytest.mark.parametrize("behind", [True, False])
def test_exception_with_one_client(bench: StreamsBench, behind: bool) -> None:
    """Any exception while one client is served drops that client and no other."""
    bench.grow(BIG if behind else b"")
    stalled, healthy = (
        bench.client(0, receive=4096, send=4096),
        bench.client(len(BIG) if behind else 0),
    )
    # So that the worker cannot wait until there is room.
    bench.loop.epoll.unregister(stalled.fd)
    count = 0
    while not bench.dropped:
        if behind:
            bench.streams.pump()
        else:
            bench.grow(b"x")
            count += 1
            assert not bench.streams.behind
    [(client, error)] = bench.dropped
    assert client is stalled
    assert isinstance(error, FileNotFoundError)
    bench.grow(b"more")
    assert bench.received(healthy) == b"x" * count + b"more"


def test_remove(bench: StreamsBench) -> None:
    """A removed client gets nothing more from any queue, and keeps its offset."""
    caught_up = bench.client(0)
    bench.grow(b"data")
    behind, blocked = bench.client(1), bench.client(2)
    bench.streams.behind.remove(blocked)
    bench.streams.blocked[blocked.fd] = blocked
    for client in (caught_up, behind, blocked):
        client.state = ClientState.CLOSED
        bench.streams.remove(client)
    assert not bench.streams.blocked
    for client in (caught_up, behind, blocked):
        bench.streams.writable(client)
    bench.grow(b"more")
    bench.streams.pump()
    assert [bench.received(client) for client in (caught_up, behind, blocked)] == [
        b"data",
        b"",
        b"",
    ]
    assert [caught_up.offset, behind.offset, blocked.offset] == [4, 1, 2]
    assert bench.streams.without_work() == []
    assert not bench.streams.behind


def test_without_work(bench: StreamsBench) -> None:
    """Only caught-up clients and clients ahead of the file are without work."""
    bench.grow(b"data")
    caught_up, behind, ahead = bench.client(4), bench.client(0), bench.client(9)
    assert set(bench.streams.without_work()) == {caught_up, ahead}
    bench.streams.pump()
    assert set(bench.streams.without_work()) == {caught_up, ahead, behind}
    assert bench.received(behind) == b"data"


def test_memory_of_clients_that_were_ahead(bench: StreamsBench) -> None:
    """Clients that leave while ahead of the file free their memory, and others are served."""
    bench.grow(b"x")
    stays = bench.client(2)
    near, far = bench.stack.enter_context(tcp_pair())
    for number in range(1000):
        client = Client(number, near, far.getsockname())
        bench.streams.add(client, 2**62 + number)
        client.state = ClientState.CLOSED
        bench.streams.remove(client)
    assert len(bench.streams._ahead) < 100
    bench.grow(b"yz")
    bench.streams.pump()
    assert bench.received(stays) == b"z"


@pytest.mark.parametrize(
    ("offset", "size", "count"),
    [
        (0, 0, 0),
        (0, 1, 1),
        (7, 10, 3),
        (10, 10, 0),
        (11, 10, 0),
        (2**63 - 1, 10, 0),
        (0, SEND_CHUNK, SEND_CHUNK),
        (0, SEND_CHUNK + 1, SEND_CHUNK),
        (1, SEND_CHUNK + 1, SEND_CHUNK),
        (5, 2**62, SEND_CHUNK),
    ],
)
def test_next_chunk(offset: int, size: int, count: int) -> None:
    """A chunk has at most SEND_CHUNK bytes, ends with the file, and is empty beyond its end."""
    assert count == next_chunk(offset, size)
