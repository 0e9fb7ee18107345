"""What the tests of the clients share: commands, their output, and servers that answer at will."""

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

from support.server import Serve, Server
from support.waiting import DEADLINE, eventually

TSCAT = (sys.executable, "-W", "error", "-m", "tailsrv.client.tscat")
TSSYNC = (sys.executable, "-W", "error", "-m", "tailsrv.client.tssync")


class Command:
    """A running client; its standard output and standard error are files."""

    def __init__(self, folder: Path, *command: str | Path) -> None:
        number = len(list(folder.glob("stdout-*")))
        self.out, self.err = folder / f"stdout-{number}", folder / f"errors-{number}"
        with self.out.open("wb") as stdout, self.err.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)
        assert "Traceback" not in self.errors, self.errors

    @property
    def errors(self) -> str:
        """Everything that the command has written to standard error."""
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
def started(
    *command: str | Path, stdout: int, stderr: int = subprocess.PIPE
) -> Iterator["subprocess.Popen[bytes]"]:
    """Yield a running client whose output the test reads; it is killed at the end of the block."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def holds(path: Path, data: bytes) -> None:
    """Wait until the file `path` contains `data`; on a difference, report its offset only."""

    def look() -> bool:
        found = path.read_bytes() if path.exists() else b""
        same = next(
            (
                i
                for i, (ours, theirs) in enumerate(zip(found, data, strict=False))
                if ours != theirs
            ),
            min(len(found), len(data)),
        )
        assert data.startswith(found), (
            f"{len(found)} of {len(data)} bytes; the first {same} are right"
        )
        return len(found) == len(data)

    eventually(look)


def run_client(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a client that ends by itself, and return its result."""
    done = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=DEADLINE
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def kill(server: Server) -> None:
    """Kill all processes of a server, and wait until they have ended."""
    server.kill_all()
    server.wait()


def restart(serve: Serve, server: Server, path: Path, *options: str) -> Server:
    """Start a server on the port of a server that has been killed."""
    return serve(path, "-p", str(server.port), "-v", *options)


def closed_port() -> int:
    """Return a port without a listener.

    Another program may listen there later, but the kernel assigns a port that was just freed last.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def answering(*answers: Callable[[socket.socket], object]) -> Iterator[str]:
    """Yield the HOST:PORT of a server that answers each connection with the next of `answers`.

    The server reads the header before it calls the answer. A socket that the answer leaves open
    stays open until the end of the block; connections after the last answer are not accepted.
    """
    connections: list[socket.socket] = []

    def serve() -> None:
        # The listener was shut down, or a client has disconnected.
        with suppress(OSError):
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
