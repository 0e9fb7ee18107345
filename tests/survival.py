"""A load whose every byte is compared, and looks into a running server: for the tests of who survives what."""

import json
import os
import random
import selectors
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import DEADLINE, Server, append, ask, eventually, random_bytes, runs
from tools import missing

from tailsrv.control import CLIENTS

NO_CORE = ("prlimit", "--core=0:0")  # workers that die of SIGSEGV leave no files behind

no_strace = missing("strace") or ("" if runs("strace", "-o", os.devnull, "true") else "strace may not trace a process")
needs_strace = pytest.mark.skipif(bool(no_strace), reason=no_strace)


def status(server: Server) -> dict[str, Any]:
    """Return what the control socket says, but for what changes by asking."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(f"\0tailsrv:*:{server.port}")
        received = b""
        while some := sock.recv(1 << 16):
            received += some
    found: dict[str, Any] = json.loads(received)
    for worker in found["workers"]:
        del worker["silent"]
    return found


def await_clients(server: Server, count: int) -> None:
    """Wait until the supervisor knows of `count` clients."""
    eventually(lambda: status(server)["clients"] == count)


def await_protected(server: Server, count: int) -> None:
    """Wait until the supervisor holds `count` clients, without its asking any worker anything."""
    eventually(lambda: len(json.loads(ask(f"*:{server.port}{CLIENTS}")[0])["clients"]) == count)


def workers(server: Server) -> list[int]:
    """Return the pids of the workers that are there, by slot, as the supervisor sees it."""
    return [worker["pid"] for worker in status(server)["workers"] if worker["pid"] is not None]


def ready_workers(server: Server, besides: list[int] | None = None) -> list[int]:
    """Return the pids of the workers once every slot has one that is ready, and none is among `besides`."""

    def look() -> list[int]:
        found = status(server)["workers"]
        pids = [worker["pid"] for worker in found]
        return pids if all(worker["ready"] and worker["pid"] for worker in found) and not set(pids) & set(besides or []) else []

    return eventually(look)


def children(pid: int) -> list[int]:
    """Return the pids of the children of `pid`, be they only just forked."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descriptors(pid: int) -> int:
    """Return how many descriptors the process `pid` has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def strace(pid: int, *inject: str) -> Iterator[None]:
    """Have strace do to the process `pid` what `inject` says (strace(1), -e inject=)."""
    options = [word for what in inject for word in ("-e", f"inject={what}")]
    command = ["strace", "-o", os.devnull, *options, "-p", str(pid)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        try:
            line = tracer.stderr.readline()
            assert line.endswith("attached\n"), line
            yield
        finally:
            tracer.kill()  # asked to end, it may wait for a process that is held, or gone
            tracer.communicate(timeout=DEADLINE)


@dataclass
class Stream:
    """A client of the load, and where its stream is."""

    kind: str
    sock: socket.socket
    position: int | None = None  # in the file, of the next byte to come; None: it is counted from an end that we do not know
    earliest: int = 0  # where the first byte may come from, in that case
    unsent: bytes = b""  # of the header


KINDS = ("fast", "slow", "stalled", "half-closed", "junk", "late", "from end", "ahead", "slow half-closed junk", "only news")


class Load:
    """Clients of all kinds, a file that grows, and a comparison of every byte that comes."""

    def __init__(self, server: Server, path: Path, seed: int, count: int = 50) -> None:
        self.server, self.path = server, path
        self.dice = random.Random(seed)
        self.data = bytearray(path.read_bytes())
        self.selector = selectors.DefaultSelector()
        self.streams = [self.join(KINDS[number % len(KINDS)]) for number in range(count)]
        await_clients(server, count)

    def join(self, kind: str) -> Stream:
        """Return a new client of that kind."""
        size, junk, dice = len(self.data), bytes(100) if "junk" in kind else b"", self.dice
        sock = self.server.connect(receive_buffer=4096 if kind == "stalled" else 0)
        match kind:
            case "from end" | "only news":
                count = dice.randrange(1, size) if kind == "from end" else 0
                stream = Stream(kind, sock, None, size - count, b"-%d\n" % count)
            case "ahead":
                start = size + dice.randrange(1, 50_000)
                stream = Stream(kind, sock, start, 0, b"%d\n" % start)
            case _:
                start = dice.randrange(size // 4)
                stream = Stream(kind, sock, start, 0, b"%d\n" % start + junk)
        if kind != "late":
            sock.sendall(stream.unsent)
            stream.unsent = b""
        if "half-closed" in kind:
            sock.shutdown(socket.SHUT_WR)
        sock.setblocking(False)
        self.selector.register(sock, selectors.EVENT_READ, stream)
        return stream

    def turn(self, timeout: float = 0.002) -> None:
        """Let everyone do a little, each at its pace."""
        dice = self.dice
        if dice.random() < 0.3:
            news = dice.randbytes(dice.randrange(1, 3000))
            self.data += news
            append(self.path, news)
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
        """Take turns for that long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.turn()

    def run_until(self, check: Callable[[], object]) -> None:
        """Take turns until `check` is true."""
        end = time.monotonic() + DEADLINE
        while not check():
            assert time.monotonic() < end, self.server.log
            self.turn()

    def read(self, stream: Stream, count: int) -> int:
        """Read and compare up to `count` bytes; return how many there were."""
        try:
            some = stream.sock.recv(count)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise AssertionError(f"{stream}: {error}\n{self.server.log}") from error
        assert some, f"{stream} ended\n{self.server.log}"
        if stream.position is None:
            stream.position = self.data.find(some, stream.earliest)
            assert stream.position >= 0, f"{stream}: {some[:20]!r} is nowhere in the file\n{self.server.log}"
        ours = self.data[stream.position : stream.position + len(some)]
        assert ours == some, f"{stream} differs\n{self.server.log}"
        stream.position += len(some)
        return len(some)

    def catch_up(self) -> None:
        """Have every client read all that there is, at once, and no more."""
        for stream in self.streams:
            stream.sock.settimeout(DEADLINE)
            if stream.unsent:
                stream.sock.sendall(stream.unsent)
                stream.unsent = b""
        last = random_bytes(60_000, seed=len(self.data))  # all who are ahead get something, and the others too
        await_reading(self)
        self.data += last
        append(self.path, last)
        for stream in self.streams:
            while stream.position is None or stream.position < len(self.data):
                assert self.read(stream, 1 << 20)

    def close(self) -> None:
        """Forget the clients, whose sockets the server's fixture closes."""
        self.selector.close()


def await_reading(load: Load) -> None:
    """Wait until those who have sent their header late are streamed to: what comes then is news to them all."""
    for stream in load.streams:
        if stream.kind == "late" and (stream.position or 0) < len(load.data):
            assert load.read(stream, 1)


@contextmanager
def loaded(server: Server, path: Path, seed: int, count: int = 50) -> Iterator[Load]:
    """Give a load on `server`; at the end each of its streams has been read to the end of the file."""
    load = Load(server, path, seed, count)
    try:
        yield load
        load.catch_up()
        await_clients(server, count)
    finally:
        load.close()


def outcome(sock: socket.socket) -> bytes | None:
    """Return all that comes until the end of the stream, None if that is a reset before the first byte."""
    received = b""
    try:
        while some := sock.recv(1 << 16):
            received += some
    except ConnectionResetError:
        return received or None
    return received
