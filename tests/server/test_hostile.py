"""Hostile peers: whatever strangers do to the port, honest clients get their bytes, and nothing of it remains or grows."""

import random
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import samples
from attacks import ATTACKS, SLOW, STEP
from content import Content
from growing import GrowingFile
from samples import Sample

from support.server import Serve, Server
from support.sockets import expect, reset
from support.status import await_clients, await_protected, ready_workers, status, worker_pids
from support.waiting import eventually
from tailsrv.protocol import HeaderError, Start, parse_header

# clients
HONEST = 5
# bytes in the file at the start
BEGIN = 4 << 20
RECORD = 3000
# bytes that the server may hold more after an attack than before: Python keeps some of what it had
MEMORY = 3 << 20
# bytes that it may hold more after the same once again, and more of it: that is reused
GROWTH = 1 << 20
# bytes that it may hold more for each connection while that lasts
FOR_EACH = 2 << 10
WORKERS = 2
# in the log, of a kind, from a worker, every 10 seconds: of what strangers do there are two kinds
LINES = 10


class Honest:
    """Clients that are caught up, and the writer that they wait for."""

    def __init__(self, server: Server, path: Path) -> None:
        self.file = GrowingFile(path, Content(1))
        self.server = server
        self.file.append(BEGIN)
        self.socks = [server.connect(b"%d\n" % self.file.size) for _ in range(HONEST)]
        self.turn()

    def turn(self) -> bool:
        """Append, and have each of them get that and nothing else."""
        start = self.file.size
        self.file.append(RECORD)
        for sock in self.socks:
            expect(sock, self.file.content.read(0, start, RECORD))
        return True

    def alone(self) -> bool:
        """Tell whether nobody else is left; some are found to have left by what is sent to them."""
        return self.turn() and status(self.server)["clients"] == HONEST

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()


def look(server: Server) -> Sample:
    """Return what the server holds now."""
    return samples.take([server.pid, *worker_pids(server)])


def settled(honest: Honest, descriptors: int) -> Sample:
    """Wait until nobody but the honest is left, and return what the server holds then: of descriptors what it held before."""
    eventually(honest.alone)
    eventually(lambda: look(honest.server).descriptors == descriptors)
    return look(honest.server)


@contextmanager
def unharmed(serve: Serve, path: Path, kept: int = 0) -> Iterator[Honest]:
    """Give honest clients of a server that is to be attacked; in the end all is as it was, but for `kept` bytes."""
    path.touch()
    server, start = serve(path, "-w", str(WORKERS)), time.monotonic()
    with closing(Honest(server, path)) as honest:
        for _ in range(20):
            honest.turn()
        ready_workers(server)
        await_protected(server, HONEST)
        before = look(server)
        yield honest
        after = settled(honest, before.descriptors)
        assert after.threads == before.threads
        assert after.pss <= before.pss + MEMORY + kept, (
            f"{before.pss:,} before, {after.pss:,} after"
        )
        lines = server.log.splitlines()
        # the first and the last are no whole ones
        periods = (time.monotonic() - start) // 10 + 2
        assert len(lines) <= 10 + periods * WORKERS * 2 * LINES, server.log
        assert all(line.isprintable() for line in lines)
        assert not server.lines("worker died")


# of most others 40 do
STEPS = {"deaf": 4, "junk": 16}


SAMPLE = ("deaf", "http", "junk", "reset")


def attacks() -> Iterator[object]:
    """Yield the names of the attacks, most of them for thorough runs only."""
    for name in ATTACKS:
        if name != "slowloris":
            yield name if name in SAMPLE else pytest.param(name, marks=pytest.mark.thorough)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("name", list(attacks()))
def test_attack(serve: Serve, path: Path, name: str) -> None:
    """Floods, scans and other people's protocols: every honest client gets each append in between, and no more memory is kept for more."""
    with unharmed(serve, path) as honest:
        before, held = look(honest.server), []
        for times in (1, 3):
            with closing(ATTACKS[name](honest.server.port, random.Random(1))) as attack:
                for _ in range(times * STEPS.get(name, 40)):
                    next(attack)
                    honest.turn()
            held.append(settled(honest, before.descriptors).pss)
        assert held[1] <= held[0] + GROWTH


@pytest.mark.thorough
@pytest.mark.slow
def test_slowloris(serve: Serve, path: Path, descriptors: int) -> None:
    """Ten thousand who connect and do not send their line cost a bounded memory, of which the next ten thousand take no more."""
    # the supervisor has one for each of them, and so do we
    count = min(SLOW, descriptors - 500) // STEP * STEP
    with unharmed(serve, path, kept=count * FOR_EACH) as honest:
        before = look(honest.server)
        held = []
        for _ in range(2):
            with closing(ATTACKS["slowloris"](honest.server.port, random.Random(1))) as attack:
                for _ in range(count // STEP):
                    next(attack)
                    honest.turn()
                await_clients(honest.server, count + HONEST)
                held.append(look(honest.server).pss)
            settled(honest, before.descriptors)
        assert held[0] <= before.pss + MEMORY + count * FOR_EACH
        assert held[1] <= held[0] + MEMORY


# Any bytes for a header

LETTERS = [b"%c" % byte for byte in b"0123456789"] * 3 + [
    b"+",
    b"-",
    b" ",
    b"\t",
    b"\r",
    b"\n",
    b"_",
    b"e",
    b"x",
    b"\0",
    b"\xff",
    b"\xc2\xb2",
]
BATCH = 100


def a_header(dice: random.Random) -> bytes:
    """Return what may be a header, or begins like one, or does not."""
    body = b"".join(dice.choices(LETTERS, k=dice.choice([0, 1, 3, 8, 31, 32, 33, 34, 200])))
    number = b"%s%d" % (
        dice.choice([b"", b"-", b"+", b" "]),
        dice.getrandbits(dice.choice([4, 20, 62, 63, 64, 65])),
    )
    return dice.choice([body, number]) + dice.choice(
        [b"", b"\n", b"\n", b"\r\n", b"\njunk", b"\n5\n"]
    )


def expectation(header: bytes) -> Start | None:
    """Return where the stream is to start if nothing follows, None if there is to be no stream."""
    try:
        return parse_header(header, ended=True)
    except HeaderError:
        return None


def send_in_pieces(socks: list[socket.socket], headers: list[bytes], dice: random.Random) -> None:
    """Send each its header in a few pieces, those of all mixed, and then end the input."""
    rests = dict(zip(socks, headers, strict=True))
    while rests:
        sock = dice.choice(list(rests))
        count = dice.choice([1, 2, 16, 300])
        # it was refused already
        with suppress(OSError):
            sock.send(rests[sock][:count])
        rests[sock] = rests[sock][count:]
        if not rests[sock]:
            del rests[sock]
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)


@contextmanager
def reset_all(socks: list[socket.socket]) -> Iterator[None]:
    """Reset them at the end: a mere close of one that waits for a longer file is found by keepalive only."""
    try:
        yield
    finally:
        for sock in socks:
            reset(sock)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [10, pytest.param(60, marks=pytest.mark.thorough)])
def test_any_header_in_any_pieces(serve: Serve, path: Path, batches: int) -> None:
    """Whatever is sent for a header, and however it is cut: a stream from the right byte, or nothing but an end."""
    dice, streams, refused = random.Random(1), 0, 0
    with unharmed(serve, path) as honest:
        size = honest.file.size
        for _ in range(batches):
            headers = [a_header(dice) for _ in range(BATCH)]
            socks = [honest.server.connect() for _ in headers]
            with reset_all(socks):
                send_in_pieces(socks, headers, dice)
                for sock, header in zip(socks, headers, strict=True):
                    start = expectation(header)
                    if start is None:
                        refused += 1
                        with suppress(ConnectionResetError):
                            assert sock.recv(100) == b"", header
                    elif not start.from_end and start.count < size:
                        streams += 1
                        expect(
                            sock,
                            honest.file.content.read(0, start.count, min(100, size - start.count)),
                        )
            honest.turn()
        assert min(streams, refused) > 15 * batches
