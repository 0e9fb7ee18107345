"""Tests of dead peers: clients whose machine has vanished, and clients that are only silent."""

import socket
from contextlib import ExitStack

import pytest

from support.sockets import tcp_pair
from support.waiting import eventually
from tailsrv.config import DeadPeerLimits
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.sockets import Unacknowledged, unacknowledged
from tailsrv.worker.client import Client, Departures
from tailsrv.worker.dead_peers import BATCH, DeadPeers, is_dead


@pytest.mark.parametrize(
    ("retransmits", "probes", "silence", "dead"),
    [
        # Measured two minutes after the machine vanished: with bytes in flight, and with a closed
        # window.
        (9, 0, 121.0, True),
        (0, 6, 122.5, True),
        # The client pauses, and the kernel's probe has just been answered, or is due.
        (0, 0, 120.1, False),
        # The client pauses, and the probe after two minutes is on its way.
        (0, 1, 121.0, False),
        # The client pauses on a network that loses many packets: one more probe is sent.
        (0, 3, 480.0, False),
        # The network is so slow that the kernel has made few attempts.
        (3, 0, 150.0, False),
        # There were enough attempts, but the silence is too short.
        (4, 0, 120.0, False),
        (8, 0, 90.0, False),
        (4, 0, 120.1, True),
        (0, 4, 120.1, True),
        (0, 0, 0.0, False),
        # The serving machine itself was suspended.
        (0, 0, 1e6, False),
    ],
)
def test_is_dead(retransmits: int, probes: int, silence: float, dead: bool) -> None:
    """A peer is dead only if it was silent for long enough and left enough attempts unanswered."""
    assert is_dead(Unacknowledged(retransmits, probes, silence), DeadPeerLimits()) == dead


def test_unacknowledged() -> None:
    """Bytes for a peer that does not read are unacknowledged, until the peer has them all."""
    with tcp_pair(receive=4096, send=4096) as (near, far):
        assert unacknowledged(near) is None
        near.send(b"a")
        eventually(lambda: unacknowledged(near) is None)
        fill(near)
        peer = unacknowledged(near)
        assert peer is not None
        assert (peer.retransmits, peer.probes) == (0, 0)
        assert 0 <= peer.silence < 10
        drain(near, far)
        eventually(lambda: unacknowledged(near) is None)


def test_unacknowledged_of_a_unix_socket() -> None:
    """For a socket without acknowledgements unacknowledged() returns None."""
    one, other = socket.socketpair()
    with one, other:
        assert unacknowledged(one) is None


def fill(sock: socket.socket) -> None:
    """Send until `sock` is full."""
    try:
        while True:
            sock.send(bytes(4096))
    except BlockingIOError:
        pass


def drain(near: socket.socket, far: socket.socket) -> None:
    """Read from `far` until all bytes of `near` are acknowledged."""
    while unacknowledged(near) is not None:
        far.recv(1 << 20)


class DeadPeersBench:
    """Clients with real connections, and a loop with a clock that the test sets."""

    def __init__(self, stack: ExitStack, count: int) -> None:
        self.now = 1000.0
        self.loop = EventLoop(lambda: self.now)
        stack.callback(self.loop.epoll.close)
        self.fars: list[socket.socket] = []
        self.clients: dict[int, Client] = {}
        for number in range(count):
            near, far = stack.enter_context(tcp_pair(receive=4096, send=4096))
            self.fars.append(far)
            self.clients[near.fileno()] = Client(number, near, None)
        self.departures = Departures()
        self.dropped: list[Client] = []

    def check(self, limits: DeadPeerLimits) -> DeadPeers:
        """Return a DeadPeers for these clients and limits."""
        return DeadPeers(0, self.clients, self.loop, self.departures, limits)

    def turn(self, seconds: float = 0.0) -> None:
        """Advance the clock by `seconds`, and run one turn."""
        self.now += seconds
        self.loop.wait(0)
        self.loop.timers.run(self.loop.now)
        for client, _ in self.departures.take():
            del self.clients[client.fd]
            self.dropped.append(client)


# Any client with unacknowledged bytes is dead.
AT_ONCE = DeadPeerLimits(silence=-1.0, attempts=0)
NEVER = DeadPeerLimits(attempts=1000)


def test_no_check_without_bytes_in_flight() -> None:
    """A check runs 30 s after bytes were sent, and again until all are acknowledged."""
    with ExitStack() as stack:
        bench = DeadPeersBench(stack, 2)
        peers = bench.check(NEVER)
        assert bench.loop.timeout() is None
        peers.expect_acks()
        bench.turn(10)
        peers.expect_acks()
        assert bench.loop.timeout() == pytest.approx(20)
        near = next(iter(bench.clients.values())).sock
        fill(near)
        bench.turn(20)
        assert bench.loop.timeout() == pytest.approx(30)
        drain(near, bench.fars[0])
        bench.turn(30)
        assert bench.loop.timeout() is None
        assert not bench.dropped


def test_only_unacknowledged_clients_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Only a client with unacknowledged bytes is dropped, and one that has left is skipped."""
    caplog.set_level("INFO", "tailsrv")
    with ExitStack() as stack:
        bench = DeadPeersBench(stack, 3)
        unacked, left, stays = bench.clients.values()
        for client in (unacked, left):
            fill(client.sock)
        bench.check(AT_ONCE).expect_acks()
        bench.departures.add(left)
        bench.turn(30)
        assert bench.dropped == [left, unacked]
        assert list(bench.clients.values()) == [stays]
        [message] = caplog.messages
        assert "stopped acknowledging" in message
        assert "which makes room for another" in message


def test_many_clients_are_checked_in_several_turns() -> None:
    """A turn examines one batch, and the next turn continues without clients that have left."""
    with ExitStack() as stack:
        bench = DeadPeersBench(stack, BATCH + 2)
        for client in bench.clients.values():
            fill(client.sock)
        bench.check(AT_ONCE).expect_acks()
        bench.turn(30)
        assert len(bench.dropped) == BATCH
        assert bench.loop.timeout() == 0
        leaves, stays = bench.clients.values()
        bench.departures.add(leaves)
        bench.turn()
        assert bench.dropped[-2:] == [leaves, stays]
        assert bench.loop.timeout() is None
