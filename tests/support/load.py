"""A load on a server: clients of all kinds, each byte of whose streams is compared."""

import random
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.files import append, random_bytes
from support.server import Server
from support.sockets import LINE_LENGTH
from support.status import await_clients
from support.waiting import DEADLINE


@dataclass
class LoadClient:
    """A client of the load, and the position of its stream."""

    kind: str
    sock: socket.socket
    # The offset in the file of the next byte. None: the stream starts at an end that is not known.
    position: int | None = None
    # The lowest offset at which the stream may start if the position is None.
    earliest: int = 0
    # The rest of the header.
    unsent: bytes = b""
    # What is still missing of the `?` line, and what was received of it.
    line_left: int = 0
    line: bytes = b""


KINDS = (
    "fast",
    "slow",
    "stalled",
    "half-closed",
    "junk",
    "late",
    "from end",
    "offsets",
    "ahead",
    "slow half-closed junk",
    "appends only",
)


class Load:
    """Clients of all kinds, a growing file, and a comparison of every received byte."""

    def __init__(self, server: Server, path: Path, seed: int, count: int = 50) -> None:
        self.server, self.path = server, path
        self.dice = random.Random(seed)
        self.data = bytearray(path.read_bytes())
        self.selector = selectors.DefaultSelector()
        self.streams = [self.join(KINDS[number % len(KINDS)]) for number in range(count)]
        await_clients(server, count)

    def join(self, kind: str) -> LoadClient:
        """Return a new client of the kind `kind`."""
        size, junk, dice = len(self.data), bytes(100) if "junk" in kind else b"", self.dice
        sock = self.server.connect(receive_buffer=4096 if kind == "stalled" else 0)
        match kind:
            case "from end" | "appends only":
                count = dice.randrange(1, size) if kind == "from end" else 0
                stream = LoadClient(kind, sock, None, size - count, b"-%d\n" % count)
            case "offsets":
                header = b"?-%d\n" % dice.randrange(1, size)
                stream = LoadClient(kind, sock, None, 0, header, line_left=LINE_LENGTH)
            case "ahead":
                start = size + dice.randrange(1, 50_000)
                stream = LoadClient(kind, sock, start, 0, b"%d\n" % start)
            case _:
                start = dice.randrange(size // 4)
                stream = LoadClient(kind, sock, start, 0, b"%d\n" % start + junk)
        if kind != "late":
            sock.sendall(stream.unsent)
            stream.unsent = b""
        if "half-closed" in kind:
            sock.shutdown(socket.SHUT_WR)
        sock.setblocking(False)
        self.selector.register(sock, selectors.EVENT_READ, stream)
        return stream

    def turn(self, timeout: float = 0.002) -> None:
        """Let each client act once, at its own speed."""
        dice = self.dice
        if dice.random() < 0.3:
            record = dice.randbytes(dice.randrange(1, 3000))
            self.data += record
            append(self.path, record)
        for stream in self.streams:
            if stream.unsent and dice.random() < 0.01:
                stream.unsent = stream.unsent[stream.sock.send(stream.unsent[:1]) :]
            elif stream.kind == "junk" and dice.random() < 0.01:
                stream.sock.send(b"7\njunk")
        for key, _ in self.selector.select(timeout):
            stream = key.data
            if stream.kind == "stalled" or ("slow" in stream.kind and dice.random() < 0.9):
                continue
            self.read(stream, 4096 if "slow" in stream.kind else dice.choice([100, 4096, 1 << 17]))

    def run(self, seconds: float) -> None:
        """Run turns for `seconds` seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.turn()

    def run_until(self, check: Callable[[], object]) -> None:
        """Run turns until `check` is true."""
        end = time.monotonic() + DEADLINE
        while not check():
            assert time.monotonic() < end, self.server.log
            self.turn()

    def read(self, stream: LoadClient, count: int) -> int:
        """Read and compare up to `count` bytes; return their number."""
        try:
            some = stream.sock.recv(min(count, stream.line_left or count))
        except BlockingIOError:
            return 0
        except OSError as error:
            raise AssertionError(f"{stream}: {error}\n{self.server.log}") from error
        assert some, f"{stream} ended\n{self.server.log}"
        if stream.line_left:
            return self.read_line(stream, some)
        if stream.position is None:
            stream.position = self.data.find(some, stream.earliest)
            assert stream.position >= 0, (
                f"{stream}: {some[:20]!r} is nowhere in the file\n{self.server.log}"
            )
        ours = self.data[stream.position : stream.position + len(some)]
        assert ours == some, f"{stream} differs\n{self.server.log}"
        stream.position += len(some)
        return len(some)

    def read_line(self, stream: LoadClient, some: bytes) -> int:
        """Take the position from the `?` line, of which the next bytes are `some`."""
        stream.line += some
        stream.line_left -= len(some)
        if not stream.line_left:
            stream.position, _ = map(int, stream.line.split())
        return len(some)

    def catch_up(self) -> None:
        """Make every client read all bytes of the file, at the same time, and no more."""
        for stream in self.streams:
            stream.sock.settimeout(DEADLINE)
            if stream.unsent:
                stream.sock.sendall(stream.unsent)
                stream.unsent = b""
        # Clients that have read everything get new bytes too, and so do all others.
        last = random_bytes(60_000, seed=len(self.data))
        await_reading(self)
        self.data += last
        append(self.path, last)
        for stream in self.streams:
            while stream.position is None or stream.position < len(self.data):
                assert self.read(stream, 1 << 20)

    def close(self) -> None:
        """Forget the clients; the server's fixture closes their sockets."""
        self.selector.close()


def await_reading(load: Load) -> None:
    """Wait until clients with a late header are streaming, so that later bytes are new to all."""
    for stream in load.streams:
        if stream.kind == "late" and (stream.position or 0) < len(load.data):
            assert load.read(stream, 1)


@contextmanager
def loaded(server: Server, path: Path, seed: int, count: int = 50) -> Iterator[Load]:
    """Yield a load on `server`; at the end each of its streams is read to the end of the file."""
    load = Load(server, path, seed, count)
    try:
        yield load
        load.catch_up()
        await_clients(load.server, count)
    finally:
        load.close()
