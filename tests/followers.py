"""What the tests of the clients share: running commands, and a proxy that cuts connections."""

import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from helpers import DEADLINE, Serve, Server, eventually

TSCAT = (sys.executable, "-W", "error", "-m", "tailsrv.client.tscat")
TSSYNC = (sys.executable, "-W", "error", "-m", "tailsrv.client.tssync")


class Command:
    """A running client; its standard output and standard error are files."""

    def __init__(self, folder: Path, *command: str | Path) -> None:
        number = len(list(folder.glob("stdout-*")))
        self.out, self.err = folder / f"stdout-{number}", folder / f"errors-{number}"
        with self.out.open("wb") as stdout, self.err.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)
        assert "Traceback" not in self.errors, self.errors

    @property
    def errors(self) -> str:
        """What it has written to standard error."""
        return self.err.read_text()

    def wrote(self, data: bytes) -> None:
        """Wait until standard output is `data`."""
        holds(self.out, data)

    def says(self, text: str) -> None:
        """Wait until `text` is on standard error."""
        eventually(lambda: text in self.errors)

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if one is given, and return the exit status."""
        if number:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE)


@contextmanager
def started(*command: str | Path, stdout: int, stderr: int = subprocess.PIPE) -> Iterator["subprocess.Popen[bytes]"]:
    """Give a running client whose output the test reads itself; it surely has ended then."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr) as process:
        try:
            yield process
        finally:
            process.kill()


def holds(path: Path, data: bytes) -> None:
    """Wait until the file `path` is `data`, and say where it differs rather than show it."""

    def look() -> bool:
        found = path.read_bytes() if path.exists() else b""
        same = next((i for i, (ours, theirs) in enumerate(zip(found, data, strict=False)) if ours != theirs), min(len(found), len(data)))
        assert data.startswith(found), f"{len(found)} of {len(data)} bytes, of which {same} are right"
        return len(found) == len(data)

    eventually(look)


def run_client(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a client that ends by itself, to its end."""
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=DEADLINE)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def kill(server: Server) -> None:
    """Kill a server that was started to end so, and wait until none of its workers can send any more."""
    server.signal(signal.SIGKILL)
    server.wait()


def restart(serve: Serve, server: Server, path: Path, *options: str) -> Server:
    """Start a server on the port of one that has been killed."""
    return serve(path, "-p", str(server.port), "-v", *options)


def closed_port() -> int:
    """Return a port that nobody listens on; somebody might, but the kernel gives each to its next asker last."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def answering(*answers: Callable[[socket.socket], object]) -> Iterator[str]:
    """Give the HOST:PORT of a server that reads a header on each connection, and has the next of `answers` send what it likes.

    What an answer does not close stays open until the end of the block; connections after the last answer get nothing.
    """
    connections: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):  # the listener is shut down, or a client has gone
            for answer in answers:
                sock, _ = listener.accept()
                connections.append(sock)
                sock.recv(100)
                answer(sock)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for sock in (listener, *connections):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE)
            for sock in connections:
                sock.close()


class Cutter:
    """A proxy to a server on this machine that ends each of its first connections behind a random byte.

    It listens on every address of the loopback network, so that one can come back to it at once as to another server.
    A connection brings fewer than `longest` bytes; some ends are a reset, with `resets` all of them.
    """

    def __init__(self, port: int, cuts: int, longest: int, resets: bool = False) -> None:
        self._port, self._random, self._longest = port, random.Random(1), longest
        self._resets = resets
        self.left = cuts
        self._listener = socket.create_server(("0.0.0.0", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def endpoints(self, count: int = 20) -> list[str]:
        """Return `count` addresses of the proxy."""
        return [f"127.0.0.{number + 1}:{self.port}" for number in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sock in (self._listener, *self._open):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended by itself
        for thread in self._threads:
            thread.join(DEADLINE)
        for sock in (self._listener, *self._open):
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            limit = self._random.randrange(self._longest) if self.left > 0 else None
            self.left -= 1
            thread = threading.Thread(target=self._forward, args=(near, far, limit, self._resets or self._random.random() < 0.5))
            self._threads.append(thread)
            thread.start()

    def _forward(self, near: socket.socket, far: socket.socket, limit: int | None, reset: bool) -> None:
        try:
            far.sendall(near.recv(100))
            passed = 0
            while (limit is None or passed < limit) and (some := far.recv(1 << 16 if limit is None else min(1 << 16, limit - passed))):
                near.sendall(some)
                passed += len(some)
        except OSError:
            pass  # one of them has gone
        if reset and limit is not None:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        near.close()
