"""Attacks by untrusted clients: honest clients get every byte, and no resource leaks."""

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

# Number of honest clients.
HONEST = 5
# Bytes in the file at the start.
BEGIN = 4 << 20
RECORD = 3000
# Bytes by which an attack may increase the server's memory: Python keeps some freed memory.
MEMORY = 3 << 20
# Bytes by which a longer attack of the same kind may increase it again: freed memory is reused.
GROWTH = 1 << 20
# Bytes that each open connection may cost.
FOR_EACH = 2 << 10
WORKERS = 2
# Log lines of one kind per worker in 10 seconds. Untrusted clients can cause two kinds.
LINES = 10


class Honest:
    """Clients that are caught up, and the writer of their file."""

    def __init__(self, server: Server, path: Path) -> None:
        self.file = GrowingFile(path, Content(1))
        self.server = server
        self.file.append(BEGIN)
        self.socks = [server.connect(b"%d\n" % self.file.size) for _ in range(HONEST)]
        self.turn()

    def turn(self) -> bool:
        """Append, and assert that each client gets exactly that."""
        start = self.file.size
        self.file.append(RECORD)
        for sock in self.socks:
            expect(sock, self.file.content.read(start, RECORD))
        return True

    def alone(self) -> bool:
        """Append, so that the server notices closed connections; return whether none remain."""
        return self.turn() and status(self.server)["clients"] == HONEST

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def take_sample(server: Server) -> Sample:
    """Return the resources that the server uses now."""
    return samples.take([server.pid, *worker_pids(server)])


def settled(honest: Honest, descriptors: int) -> Sample:
    """Wait until only honest clients and `descriptors` are left; return the resources then."""
    eventually(honest.alone)
    eventually(lambda: take_sample(honest.server).descriptors == descriptors)
    return take_sample(honest.server)


@contextmanager
def unharmed(serve: Serve, path: Path, kept: int = 0) -> Iterator[Honest]:
    """Give honest clients of a server; afterwards assert that it leaks at most `kept` bytes."""
    path.touch()
    server, start = serve(path, "-w", str(WORKERS)), time.monotonic()
    with closing(Honest(server, path)) as honest:
        for _ in range(20):
            honest.turn()
        ready_workers(server)
        await_protected(server, HONEST)
        before = take_sample(server)
        yield honest
        after = settled(honest, before.descriptors)
        assert after.threads == before.threads
        assert after.pss <= before.pss + MEMORY + kept, (
            f"{before.pss:,} before, {after.pss:,} after"
        )
        lines = server.log.splitlines()
        # The first and the last period are incomplete.
        periods = (time.monotonic() - start) // 10 + 2
        assert len(lines) <= 10 + periods * WORKERS * 2 * LINES, server.log
        assert all(line.isprintable() for line in lines)
        assert not server.lines("worker died")


# Number of steps of these attacks. The other attacks do 40 steps.
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
    """During an attack honest clients get each append; a longer one does not use more memory."""
    with unharmed(serve, path) as honest:
        before, held = take_sample(honest.server), []
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
    """10,000 clients that send no complete header use bounded memory, and 10,000 more reuse it."""
    # The supervisor needs one descriptor per connection, and so does this process.
    count = min(SLOW, descriptors - 500) // STEP * STEP
    with unharmed(serve, path, kept=count * FOR_EACH) as honest:
        before = take_sample(honest.server)
        held = []
        for _ in range(2):
            with closing(ATTACKS["slowloris"](honest.server.port, random.Random(1))) as attack:
                for _ in range(count // STEP):
                    next(attack)
                    honest.turn()
                await_clients(honest.server, count + HONEST)
                held.append(take_sample(honest.server).pss)
            settled(honest, before.descriptors)
        assert held[0] <= before.pss + MEMORY + count * FOR_EACH
        assert held[1] <= held[0] + MEMORY


# Random bytes as a header

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


def random_header(dice: random.Random) -> bytes:
    """Return random bytes: a header, a part of one, or junk."""
    body = b"".join(dice.choices(LETTERS, k=dice.choice([0, 1, 3, 8, 31, 32, 33, 34, 200])))
    number = b"%s%d" % (
        dice.choice([b"", b"-", b"+", b" "]),
        dice.getrandbits(dice.choice([4, 20, 62, 63, 64, 65])),
    )
    return dice.choice([body, number]) + dice.choice(
        [b"", b"\n", b"\n", b"\r\n", b"\njunk", b"\n5\n"]
    )


def expectation(header: bytes) -> Start | None:
    """Return where a stream with this header starts, or None if the header is invalid."""
    try:
        return parse_header(header, ended=True)
    except HeaderError:
        return None


def send_in_pieces(socks: list[socket.socket], headers: list[bytes], dice: random.Random) -> None:
    """Send each socket its header in a few pieces, in random order; then half-close it."""
    rests = dict(zip(socks, headers, strict=True))
    while rests:
        sock = dice.choice(list(rests))
        count = dice.choice([1, 2, 16, 300])
        # The server may have refused the beginning of the header already.
        with suppress(OSError):
            sock.send(rests[sock][:count])
        rests[sock] = rests[sock][count:]
        if not rests[sock]:
            del rests[sock]
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)


@contextmanager
def reset_all(socks: list[socket.socket]) -> Iterator[None]:
    """Reset `socks` at the end: the server would notice a mere close only by keepalive."""
    try:
        yield
    finally:
        for sock in socks:
            reset(sock)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [10, pytest.param(60, marks=pytest.mark.thorough)])
def test_any_header_in_any_pieces(serve: Serve, path: Path, batches: int) -> None:
    """Any bytes as a header, in any pieces, cause a stream from the right byte, or only EOF."""
    dice, streams, refused = random.Random(1), 0, 0
    with unharmed(serve, path) as honest:
        size = honest.file.size
        for _ in range(batches):
            headers = [random_header(dice) for _ in range(BATCH)]
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
                            honest.file.content.read(start.count, min(100, size - start.count)),
                        )
            honest.turn()
        assert min(streams, refused) > 15 * batches
