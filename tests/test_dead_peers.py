"""Clients whose machine vanishes while bytes are on their way, and others that only seem to."""

import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import Server, append, children, connect, eventually, expect, random_bytes
from netns import Host, Network, enter, in_thread, reason_to_skip
from unit import tcp_pair

from tailsrv.linux.event_loop import Loop
from tailsrv.linux.sockets import Unacknowledged, unacknowledged
from tailsrv.worker.client import Client, State
from tailsrv.worker.dead_peers import BATCH, DeadPeers, Limits, is_dead

# What they are by default, in seconds that a test can wait.
SHORT = "interval=0.1, silence=0.5, attempts=2"
PROGRAM = f"""
import sys
from functools import partial
from tailsrv import main as cli
from tailsrv.worker import dead_peers
dead_peers.Limits = partial(dead_peers.Limits, {SHORT})
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("retransmits", "probes", "silence", "dead"),
    [
        # Measured two minutes after it vanished: with bytes in flight, and with a closed window.
        (9, 0, 121.0, True),
        (0, 6, 122.5, True),
        (0, 0, 120.1, False),  # pauses: the kernel's probe has just been answered, or is due
        (0, 1, 121.0, False),  # pauses: the probe after two minutes is on its way
        (0, 3, 480.0, False),  # pauses behind a network that loses much: one more is sent
        (3, 0, 150.0, False),  # so slow a network that the kernel has not asked often
        (4, 0, 120.0, False),  # it has, but not for long enough
        (8, 0, 90.0, False),
        (4, 0, 120.1, True),
        (0, 4, 120.1, True),
        (0, 0, 0.0, False),
        (0, 0, 1e6, False),  # the machine that serves has slept itself
    ],
)
def test_is_dead(retransmits: int, probes: int, silence: float, dead: bool) -> None:
    """A peer is dead if it was silent for long and did not answer often, not for one alone."""
    assert is_dead(Unacknowledged(retransmits, probes, silence), Limits()) == dead


def test_unacknowledged() -> None:
    """The kernel has bytes for a peer that does not read, and for none that has got everything."""
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


def test_unacknowledged_where_that_cannot_be_asked() -> None:
    """A socket of a kind that acknowledges nothing is not a dead peer, and no error."""
    one, other = socket.socketpair()
    with one, other:
        assert unacknowledged(one) is None


def fill(sock: socket.socket) -> None:
    """Send until `sock` takes no more."""
    try:
        while True:
            sock.send(bytes(4096))
    except BlockingIOError:
        pass


def drain(near: socket.socket, far: socket.socket) -> None:
    """Read from `far` until `near` has room for all that it has taken."""
    while unacknowledged(near) is not None:
        far.recv(1 << 20)


class Bench:
    """Clients whose connections are real, and a loop with the clock in hand."""

    def __init__(self, stack: ExitStack, count: int) -> None:
        self.now = 1000.0
        self.loop = Loop(lambda: self.now)
        stack.callback(self.loop.epoll.close)
        self.fars: list[socket.socket] = []
        self.clients: dict[int, Client] = {}
        for number in range(count):
            near, far = stack.enter_context(tcp_pair(receive=4096, send=4096))
            self.fars.append(far)
            self.clients[near.fileno()] = Client(number, near, None)
        self.dropped: list[Client] = []

    def check(self, limits: Limits) -> DeadPeers:
        """Return what checks them, for limits that make every silence too long."""
        return DeadPeers(0, self.clients, self.loop, self.drop, limits)

    def drop(self, client: Client) -> None:
        """Do as a worker does."""
        client.state = State.CLOSED
        del self.clients[client.fd]
        self.dropped.append(client)

    def turn(self, seconds: float = 0.0) -> None:
        """Run one turn, so much later."""
        self.now += seconds
        self.loop.wait(0)
        self.loop.timers.run(self.loop.now)


AT_ONCE = Limits(silence=-1.0, attempts=0)  # whoever has not acknowledged everything is dead
NEVER = Limits(attempts=1000)


def test_nothing_is_planned_while_nothing_is_on_its_way() -> None:
    """A check comes half a minute after bytes were sent, and again until all are acknowledged."""
    with ExitStack() as stack:
        bench = Bench(stack, 2)
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


def test_only_who_owes_acknowledgements_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """A silent client that has everything stays, and one that has left since is passed over."""
    caplog.set_level("INFO", "tailsrv")
    with ExitStack() as stack:
        bench = Bench(stack, 3)
        owing, left, stays = bench.clients.values()
        for client in (owing, left):
            fill(client.sock)
        bench.check(AT_ONCE).expect_acks()
        bench.drop(left)
        bench.turn(30)
        assert bench.dropped == [left, owing]
        assert list(bench.clients.values()) == [stays]
        [message] = caplog.messages
        assert "stopped acknowledging" in message
        assert "its place is free" in message


def test_many_are_examined_in_several_turns() -> None:
    """One turn examines a batch, and the next one goes on without those who have left meanwhile."""
    with ExitStack() as stack:
        bench = Bench(stack, BATCH + 2)
        for client in bench.clients.values():
            fill(client.sock)
        bench.check(AT_ONCE).expect_acks()
        bench.turn(30)
        assert len(bench.dropped) == BATCH
        assert bench.loop.timeout() == 0
        leaves, stays = bench.clients.values()
        bench.drop(leaves)
        bench.turn()
        assert bench.dropped[-2:] == [leaves, stays]
        assert bench.loop.timeout() is None


# With machines that vanish


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Give a network to which the tests connect hosts."""
    if reason := reason_to_skip():
        pytest.skip(f"no hosts: {reason}")
    with Network() as network:
        yield network


def start(host: Host, path: Path, *options: str) -> Server:
    """Return a server on `host` that gives peers up in a second."""
    command: Sequence[str | Path] = [*host.wrapper, sys.executable, "-c", PROGRAM, "-v", "-p", "0", *options, path]
    return Server([*command], path.with_suffix(".err"), status=0)


def connect_from(host: Host, to: Host, server: Server, header: bytes, receive_buffer: int = 0) -> socket.socket:
    """Return a connection from `host` to the server, which has read the header if there is one."""

    def make() -> socket.socket:
        namespace = os.open(host.path, os.O_RDONLY)
        try:
            enter(namespace)
        finally:
            os.close(namespace)
        return connect(server.port, header, to.address, receive_buffer)

    sock = in_thread(make)
    server.clients.append(sock)
    if header:
        server.streaming(sock)
    return sock


def given_up(server: Server, sock: socket.socket) -> list[str]:
    """Return the log's line that says that the peer at `sock` is dead."""
    host, port = sock.getsockname()
    return server.lines("stopped acknowledging", f" peer={host}:{port} ")


@pytest.mark.hosts
@pytest.mark.slow
def test_machines_vanish(network: Network, tmp_path: Path) -> None:
    """Vanished clients are dropped, another gets their place, and all who live get every byte."""
    ours, theirs = network.host("ours", "10.0.1.1"), network.host("theirs", "10.0.1.2")
    lives, slow = network.host("lives", "10.0.1.3"), network.host("slow", "10.0.1.4", delay=0.1)
    path, data = tmp_path / "log", random_bytes(1 << 16)
    path.write_bytes(data)
    server = start(ours, path, "--max-clients", "5")
    try:
        growing, closed = connect_from(theirs, ours, server, b"-0\n"), connect_from(theirs, ours, server, b"0\n", 4096)
        pauses, far = connect_from(lives, ours, server, b"0\n", 4096), connect_from(slow, ours, server, b"0\n")
        quiet = connect_from(lives, ours, server, b"9999999\n")
        comes = connect_from(lives, ours, server, b"")
        comes.sendall(b"65536\n")
        server.logged("as many clients as --max-clients allows")
        theirs.cut()
        append(path, b"more")
        eventually(lambda: given_up(server, growing) and given_up(server, closed))
        for sock in (pauses, far):
            expect(sock, data + b"more")
        expect(comes, b"more")
        assert len(server.lines("stopped acknowledging")) == 2
        assert not server.lines("client left", f":{quiet.getsockname()[1]} ")
    finally:
        theirs.join()
        server.finish()


@pytest.mark.hosts
@pytest.mark.slow
def test_a_machine_vanishes_with_its_worker(network: Network, tmp_path: Path) -> None:
    """A successor finds a client that vanished with bytes of the killed worker in flight."""
    ours, theirs = network.host("ours2", "10.0.1.11"), network.host("theirs2", "10.0.1.12")
    path = tmp_path / "log"
    path.write_bytes(b"first")
    server = start(ours, path)
    try:
        sock = connect_from(theirs, ours, server, b"-0\n")
        theirs.cut()
        append(path, b"more")
        os.kill(children(server.pid)[0], signal.SIGKILL)
        eventually(lambda: given_up(server, sock))
        server.logged("worker ready: ", count=2)
    finally:
        theirs.join()
        server.finish()
