"""A roll while processes are killed, stopped or replaced: all clients get the same bytes.

With --follow-name, all workers must seal a segment at the same size.
"""

import json
import os
import random
import select
import signal
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.processes import children, gone, stop, title
from support.rotation import HOUR, MOVED, ROLLED, rotate, rotated, sealed_sizes
from support.server import HURRIED, Serve, Server, hurried
from support.sockets import expect, readable_within, recv_all
from support.status import ask, await_protected, ready_workers
from support.waiting import eventually
from tailsrv.control_socket import CLIENTS

pytestmark = pytest.mark.slow

OLD, LATE, NEW, MORE = (
    random_bytes(300_000, 1),
    random_bytes(5_000, 2),
    random_bytes(200_000, 3),
    random_bytes(7_000, 4),
)
BIG = random_bytes(20_000_000)
# Clients of each server.
COUNT = 24
# Seconds in which a worker that is not frozen delivers an append.
QUIET = 0.5


class Streams:
    """A log that is rotated, and clients that must receive all of it."""

    def __init__(self, server: Server, path: Path) -> None:
        self._server, self._path = server, path
        self.segments = [bytearray(path.read_bytes())]
        # The paths of the segments.
        self._paths = [path]
        self.socks = [server.connect(b"0\n") for _ in range(COUNT)]
        # The number of bytes that each client has received.
        self._received = dict.fromkeys(self.socks, 0)
        self.receive()
        await_protected(server, COUNT)

    def append(self, data: bytes, segment: int = -1) -> None:
        """Append to one of the segments, by default to the last one."""
        append(self._paths[segment], data)
        self.segments[segment] += data

    def rotate(self, data: bytes) -> None:
        """Move the file away, and create the next one with `data`."""
        self._paths[-1] = rotate(self._path, data)
        self._paths.append(self._path)
        self.segments.append(bytearray(data))

    def missing(self, segments: int | None = None) -> dict[socket.socket, bytes]:
        """Return what each client has not received of the log, or of its first `segments`."""
        log = b"".join(self.segments[:segments])
        return {sock: log[received:] for sock, received in self._received.items()}

    def receive(self) -> None:
        """Assert that each stream continues with what it has not received of the log."""
        for sock, data in self.missing().items():
            expect(sock, data)
            self._received[sock] += len(data)

    def check(self) -> None:
        """Assert that all streams have the whole log and go on, and that new ones have it too."""
        self.receive()
        self.append(MORE)
        self.receive()
        rotated(self._server, len(self.segments) - 1)
        assert sealed_sizes(self._server) == [len(segment) for segment in self.segments[:-1]]
        for _ in range(4):
            expect(self._server.connect(b"0\n"), b"".join(self.segments))

    def of_slot(self, slot: int) -> socket.socket:
        """Return a client that the worker of `slot` serves."""
        clients = json.loads(ask(f"*:{self._server.port}{CLIENTS}")[0])["clients"]
        peers = [client["peer"] for client in clients if client["slot"] == slot]
        return next(sock for sock in self.socks if "{}:{}".format(*sock.getsockname()) in peers)

    def await_frozen(self, sock: socket.socket) -> None:
        """Append to the segment before the last one until that does not reach `sock` any more."""
        self.append(b"x", -2)
        while readable_within(sock, QUIET):
            self._received[sock] += len(sock.recv(1 << 20))
            self.append(b"x", -2)


@pytest.fixture
def server(serve: Serve, path: Path, request: pytest.FixtureRequest) -> Server:
    """Start a server of OLD with --follow-name and two workers."""
    path.write_bytes(OLD)
    server = serve(
        path, "--follow-name", "-w", "2", "-v", program=getattr(request, "param", HURRIED)
    )
    server.workers(2)
    return server


@pytest.fixture
def streams(server: Server, path: Path) -> Streams:
    """Return clients of the server that have received OLD."""
    return Streams(server, path)


# A worker that does not acknowledge delays a roll until the test lets it go on.
patient = pytest.mark.parametrize(
    "server", [hurried(freeze_patience=HOUR)], indirect=True, ids=["patient"]
)


def freeze_one(server: Server, streams: Streams) -> tuple[int, int]:
    """Begin a roll in which one worker has acknowledged, and the other is stopped; return both."""
    acknowledged, stopped = server.workers(2)
    sock = streams.of_slot(0)
    stop(stopped)
    streams.rotate(NEW)
    streams.append(LATE, -2)
    streams.await_frozen(sock)
    assert not server.lines(ROLLED)
    return acknowledged, stopped


def kill(*pids: int) -> None:
    """Kill workers, and wait until they are gone."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: all(map(gone, pids)))


# Workers are killed


@patient
def test_a_worker_is_stopped_for_a_while(server: Server, streams: Streams) -> None:
    """A roll waits for a worker that does not acknowledge."""
    _, stopped = freeze_one(server, streams)
    os.kill(stopped, signal.SIGCONT)
    streams.check()


@patient
def test_the_worker_that_has_acknowledged_is_killed(server: Server, streams: Streams) -> None:
    """The successor of a worker that has acknowledged is frozen as well before the roll."""
    acknowledged, stopped = freeze_one(server, streams)
    kill(acknowledged)
    server.logged("worker ready: ", count=3)
    # It may deliver what was appended before it was ordered to freeze.
    streams.await_frozen(streams.socks[0])
    os.kill(stopped, signal.SIGCONT)
    streams.check()


@patient
def test_the_worker_that_has_not_acknowledged_is_killed(server: Server, streams: Streams) -> None:
    """A roll ends without the worker that it has waited for."""
    _, stopped = freeze_one(server, streams)
    kill(stopped)
    streams.check()


@patient
def test_all_workers_are_killed_during_a_roll(server: Server, streams: Streams) -> None:
    """A roll ends although all workers are killed."""
    kill(*freeze_one(server, streams))
    streams.check()


def test_all_workers_are_killed_before_a_roll(server: Server, streams: Streams) -> None:
    """A roll needs no worker that has seen the rotation."""
    stop(server.pid)
    workers = server.workers(2)
    streams.rotate(NEW)
    kill(*workers)
    streams.append(LATE, 0)
    server.signal(signal.SIGCONT)
    streams.check()


def test_all_workers_are_killed_after_a_roll(server: Server, streams: Streams) -> None:
    """The successors know the segments."""
    workers = server.workers(2)
    streams.rotate(NEW)
    rotated(server, 1)
    kill(*workers)
    ready_workers(server, besides=workers)
    streams.check()


@pytest.mark.parametrize("server", [hurried(freeze_patience=0.5)], indirect=True, ids=["impatient"])
def test_a_hung_worker_is_killed(server: Server, streams: Streams) -> None:
    """A worker that does not acknowledge is killed after a time, and its clients are adopted."""
    _, hung = server.workers(2)
    stop(hung)
    streams.rotate(NEW)
    server.logged("error: worker does not take part in a roll, killing it: ", f"pid={hung}")
    server.logged("worker was killed: ", f"pid={hung} ")
    streams.check()
    assert len(server.lines("does not take part in a roll")) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random(serve: Serve, path: Path, seed: int) -> None:
    """Workers are killed again and again during rolls, and the server is upgraded."""
    choose = random.Random(seed)
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", "-w", "3", "-v", program=hurried(long_life=0))
    server.workers(3)
    streams = Streams(server, path)
    upgrades = 0
    for number in range(1, 13):
        streams.append(random_bytes(1000, number))
        streams.rotate(random_bytes(2000, number))
        if choose.random() < 0.2:
            upgrades += 1
            server.signal(signal.SIGHUP)
        while len(server.lines(ROLLED)) < number:
            workers = [pid for pid in children(server.pid) if " worker " in title(pid)]
            for pid in choose.sample(workers, choose.randrange(min(2, len(workers)) + 1)):
                # An upgrade may have replaced it.
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            # This is the interval of the kills.
            select.select([], [], [], choose.uniform(0, 0.1))
        streams.receive()
        if upgrades:
            server.logged("upgraded: ", count=upgrades)
    streams.check()


# The server is upgraded


def upgrade(server: Server, count: int = 1) -> None:
    """Upgrade the server, and wait until that is done `count` times in all."""
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ", count=count)


@patient
def test_upgrade_during_a_roll(server: Server, streams: Streams) -> None:
    """The next version of the program completes a roll that has begun."""
    freeze_one(server, streams)
    upgrade(server)
    streams.check()
    streams.rotate(MORE)
    streams.check()


@pytest.mark.parametrize("to_worker", [signal.SIGCONT, signal.SIGKILL])
@patient
def test_the_supervisor_is_stopped_during_a_roll(
    server: Server, streams: Streams, to_worker: signal.Signals
) -> None:
    """A roll goes on after the supervisor was stopped while a worker acknowledged, or died."""
    _, stopped = freeze_one(server, streams)
    stop(server.pid)
    os.kill(stopped, to_worker)
    streams.append(LATE, -2)
    server.signal(signal.SIGCONT)
    streams.check()


def test_upgrade_before_the_first_byte(server: Server, streams: Streams) -> None:
    """An upgrade keeps the next file, which is still empty, and the old one goes on meanwhile."""
    streams.rotate(b"")
    server.logged(MOVED)
    upgrade(server)
    streams.append(LATE, 0)
    streams.receive()
    assert not server.lines(ROLLED)
    streams.append(NEW)
    streams.check()


def test_upgrade_without_a_next_file(server: Server, streams: Streams, path: Path) -> None:
    """An upgrade keeps a file that has no name any more, and the next file is found later."""
    path.unlink()
    server.logged(MOVED)
    upgrade(server)
    early = server.connect()
    await_protected(server, COUNT + 1)
    assert not server.lines(ROLLED)
    path.write_bytes(NEW)
    for sock in streams.socks:
        expect(sock, NEW)
    early.sendall(b"0\n")
    # Its first segment was deleted.
    expect(early, NEW)


def test_upgrade_after_a_roll(server: Server, streams: Streams) -> None:
    """An upgrade keeps the segments."""
    streams.rotate(NEW)
    streams.receive()
    upgrade(server)
    streams.check()
    streams.rotate(MORE)
    upgrade(server, 2)
    streams.check()


@pytest.mark.sample(2)
@pytest.mark.parametrize("awaited", ["", "upgrade: checking", "upgrade: old=", "upgraded: "])
def test_rotation_during_an_upgrade(server: Server, streams: Streams, awaited: str) -> None:
    """A rotation in the middle of an upgrade rolls as usual."""
    server.signal(signal.SIGHUP)
    if awaited:
        server.logged(awaited)
    streams.rotate(NEW)
    streams.receive()
    server.logged("upgraded: ")
    streams.check()


# The supervisor is stopped


def test_the_supervisor_is_stopped_during_a_rotation(server: Server, streams: Streams) -> None:
    """A rotation while the supervisor is stopped rolls afterwards, with what came meanwhile."""
    stop(server.pid)
    streams.append(LATE)
    streams.rotate(NEW)
    streams.append(MORE, 0)
    streams.append(LATE)
    server.signal(signal.SIGCONT)
    streams.check()


def test_several_rotations_while_the_supervisor_is_stopped(
    server: Server, streams: Streams
) -> None:
    """Files that were rotated while the supervisor was stopped are found in the folder."""
    stop(server.pid)
    for number in range(3):
        streams.rotate(random_bytes(1000, number))
    server.signal(signal.SIGCONT)
    streams.check()


# Slow clients


def test_slow_client(serve: Serve, path: Path) -> None:
    """A client that stalls for three rotations, killed workers and an upgrade gets every byte."""
    path.write_bytes(BIG)
    server = serve(path, "--follow-name", "-w", "2", "-v", program=HURRIED)
    server.workers(2)
    slow = [server.connect(b"0\n", receive_buffer=4096) for _ in range(4)]
    expect(quick := server.connect(b"0\n"), BIG)
    await_protected(server, 5)
    expected = BIG
    for number in range(1, 4):
        rotate(path, data := random_bytes(3_000_000, number))
        expect(quick, data)
        expected += data
        if number == 2:
            kill(*server.workers(2))
            ready_workers(server)
    upgrade(server)
    for client in slow:
        expect(client, expected)
    append(path, MORE)
    for client in (*slow, quick):
        expect(client, MORE)


# The end


@patient
def test_drain_during_a_roll(server: Server, streams: Streams) -> None:
    """SIGTERM during a roll: each stream gets the old file, and then ends."""
    _, stopped = freeze_one(server, streams)
    server.signal(signal.SIGTERM)
    server.logged("draining: ")
    os.kill(stopped, signal.SIGCONT)
    for sock, rest in streams.missing(1).items():
        assert recv_all(sock) == rest
    server.wait()
    assert not server.lines(ROLLED)


@patient
def test_quit_during_a_roll(server: Server, streams: Streams) -> None:
    """SIGQUIT during a roll ends the server at once, with status 0."""
    freeze_one(server, streams)
    server.signal(signal.SIGQUIT)
    server.wait()
    assert not server.lines(ROLLED)
