"""The world of the model: a real server, the file it serves and the clients that it has, and what they may do.

Every method that does something takes in what it must come to, and the others say whether it has.
"""

import atexit
import json
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from model.client import ModelClient
from model.history import History, Stream, in_pages
from support.processes import open_descriptors
from support.server import TAILSRV, Server
from support.sockets import reset
from support.status import ask, ready_workers, status
from support.waiting import DEADLINE, eventually
from tailsrv.config import Timing
from tailsrv.control_socket import CLIENTS

# linux/tcp.h: what is closed with this option set sends nothing any more
TCP_REPAIR = 19
WORKERS = 2


class World:
    """A server, its file and its clients, and what the model says of them."""

    def __init__(self) -> None:
        super().__init__()
        # where a script fails
        atexit.register(self.close)
        self.folder = tempfile.TemporaryDirectory(prefix="tailsrv-model-")
        self.path = Path(self.folder.name, "file.log")
        self.history = History()
        # the writer's descriptor
        self.file: int | None = None
        self.living: list[ModelClient] = []
        # the largest offset that any client may be waiting for
        self.furthest = 0
        self.stopping, self.stopped = False, list[int]()
        self.kills, self.upgrades, self.moved = 0, 0, False
        # descriptors of supervisor and workers without a client
        self.base: tuple[int, int] | None = None

    def start(self, linger: bool, size: int | None) -> None:
        """Start the server, on a file of `size` bytes or on none yet."""
        if size is not None:
            self.create()
            self.append(size)
        self.linger = linger
        command: list[str | Path] = [
            *TAILSRV,
            "-p",
            "0",
            "-w",
            str(WORKERS),
            *self.options(),
            self.path,
        ]
        self.server = Server(command, Path(self.folder.name, "stderr"), 0)
        self.port = self.server.port
        if size is not None:
            ready_workers(self.server)
            self.base = self.count_descriptors()

    def options(self) -> list[str]:
        """Return what the server is to do when the file is gone."""
        return ["--linger-after-file-is-gone"] if self.linger else []

    # What clients do

    def connect(self, header: bytes, at_once: int = 64, narrow: bool = False) -> ModelClient:
        """Connect, and send the first bytes of a header; a narrow client takes little that it has not read."""
        client = ModelClient(self.server.connect(receive_buffer=4096 if narrow else 0), header)
        self.living.append(client)
        self.send(client, at_once)
        return client

    def connect_badly(self, header: bytes) -> ModelClient:
        """Send what is not a header."""
        client = ModelClient(self.server.connect(header), header, sent=len(header), doomed=True)
        self.living.append(client)
        return client

    def send(self, client: ModelClient, count: int) -> None:
        """Send the next bytes of the header."""
        piece = client.header[client.sent : client.sent + count]
        if client.ended or client.half_closed or not piece:
            return
        client.sent += len(piece)
        if client.sent == len(client.header):
            number = int(client.header)
            client.stream = Stream(abs(number), b"-" in client.header, self.history.now)
            self.furthest = max(self.furthest, number)
            if self.file is not None:
                client.stream.note_size(self.history.size)
        with client.at_risk():
            client.sock.sendall(piece)

    def send_junk(self, client: ModelClient, count: int) -> None:
        """Send what nobody wants to know, behind the header."""
        if client.stream and not client.ended and not client.half_closed:
            with client.at_risk():
                client.sock.sendall(b"-5\n" * count)

    def half_close(self, client: ModelClient) -> None:
        """Send no more: before the header is whole that is a fault, and behind it nothing."""
        if client.ended or client.half_closed:
            return
        client.half_closed = True
        client.doomed = client.doomed or client.stream is None
        with client.at_risk():
            client.sock.shutdown(socket.SHUT_WR)

    def read(self, client: ModelClient, count: int) -> None:
        """Read what must be there, up to `count` bytes, and perhaps some that may be."""
        self.go_on()
        if client.ended:
            return
        while not client.ended and (left := min(count, client.due(self.history.size))):
            count -= self.receive(client, left)
        if client.doomed and not client.ended and self.file is not None:
            assert self.receive(client, 1) == 0
        elif count and not client.ended:
            with client.without_waiting():
                self.receive(client, count)

    def leave(self, client: ModelClient, how: str) -> None:
        """Close the connection, or let it vanish without a word, which is noticed when something is sent."""
        self.living.remove(client)
        if how == "reset":
            reset(client.sock)
            return
        if how == "vanish" and client.stream and client.due(self.history.size) == 0:
            # not everybody may do that
            with suppress(OSError):
                client.sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        client.sock.close()

    def settle(self, client: ModelClient) -> None:
        """Wait until the supervisor knows the client, and where its stream starts if it has sent its header."""
        self.await_known([client])

    # What the file does

    def create(self) -> None:
        """Let the file come into being."""
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.note_size()

    def append(self, count: int) -> None:
        """Append `count` bytes, in one write(2) where nobody counts from an end that we could not know then."""
        data = random.Random(f"{self.history.now} {self.history.size}").randbytes(count)
        waiting = any(
            client.stream and client.stream.from_end and not client.stream.started
            for client in self.living
        )
        for piece in in_pages(data, self.history.size) if waiting else [data]:
            self.write(piece, self.history.size)
            self.history.append(piece)
            self.note_size()

    def truncate(self, count: int) -> None:
        """Cut `count` bytes off the end."""
        assert self.file is not None
        self.note_change()
        self.history.truncate(max(0, self.history.size - count))
        os.ftruncate(self.file, self.history.size)
        self.note_size()

    def overwrite(self, before_end: int, count: int) -> None:
        """Change bytes in the middle."""
        offset = max(0, self.history.size - before_end)
        data = random.Random(f"{self.history.now} {offset}").randbytes(
            min(count, self.history.size - offset)
        )
        self.note_change()
        self.history.overwrite(offset, data)
        self.write(data, offset)

    def move(self, how: str) -> None:
        """Take the file's name away; it goes on being written and served."""
        # a file that it has not found yet would be none that it serves
        self.server.logged("serving: ")
        self.moved = True
        if how == "unlink":
            self.path.unlink()
        else:
            self.path.rename(self.path.with_name("moved.log"))
        if how == "replace":
            self.path.write_bytes(b"another file\n")

    # What happens to the server

    def stop(self) -> None:
        """Stop all workers, so that much may have happened when they look again."""
        self.stopping = True
        for pid in self.worker_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.stopped.append(pid)

    def go_on(self) -> None:
        """Let the stopped workers go on."""
        self.stopping = False
        while self.stopped:
            with suppress(ProcessLookupError):
                os.kill(self.stopped.pop(), signal.SIGCONT)

    def kill(self, slot: int, number: str, known: bool) -> None:
        """Kill a worker; a connection that the supervisor does not know of yet may be lost then, so it may be given the time to."""
        self.kills += 1
        if known:
            self.await_known(self.living)
        for client in self.living:
            client.may_be_lost = client.may_be_lost or not client.known
        if (pid := status(self.server)["workers"][slot]["pid"]) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[number])

    def upgrade(self) -> None:
        """Have the program replaced, while all goes on."""
        self.go_on()
        self.upgrades += 1
        self.server.signal(signal.SIGHUP)

    # The end

    def finish(self) -> None:
        """Bring all to an end that is known to the byte."""
        self.go_on()
        if self.file is None:
            self.create()
        self.append(max(0, self.furthest - self.history.size) + 100)
        self.await_serving()
        self.await_known(self.living)
        for client in self.living:
            # who was lost shows
            self.read(client, 1)
        self.living = [client for client in self.living if not client.ended]
        eventually(self.is_left_alone)
        for client in self.living:
            self.read(client, 1 << 40)
            assert client.stream is None or client.stream.stands_at(self.history.size), client
        if self.base is not None:
            expected = tuple(base + len(self.living) for base in self.base)
            eventually(lambda: self.count_descriptors() == expected)
        self.end()
        for client in self.living:
            assert client.sock.recv(1 << 16) == b"", client
        self.server.wait()
        assert not self.server.lines("error"), self.server.log

    def end(self) -> None:
        """Have the server end, by one of the ways that there are."""
        if self.linger:
            self.server.signal(signal.SIGTERM)
        else:
            self.path.rename(self.path.with_name("moved.log"))

    def is_left_alone(self) -> bool:
        """Send everybody something, which tells the server who has left, and tell whether it counts none but the living."""
        self.append(1)
        return bool(status(self.server)["clients"] == len(self.living))

    def close(self) -> None:
        """Leave nothing behind."""
        atexit.unregister(self.close)
        self.go_on()
        if hasattr(self, "server"):
            for client in self.server.clients:
                client.close()
            if self.server.process.poll() is None:
                self.server.process.kill()
                self.server.process.wait(DEADLINE)
        if self.file is not None:
            os.close(self.file)
        self.folder.cleanup()

    # What the rules share

    def receive(self, client: ModelClient, count: int) -> int:
        """Receive up to `count` bytes at once, all of which must be right, and return how many."""
        received = b""
        with client.at_risk():
            received = client.sock.recv(min(count, 1 << 20))
            if not received:
                client.end("end of the stream")
        if received:
            assert client.stream, f"{client} received {received[:20]!r}"
            client.known = True
            client.stream.take(received, self.history)
        return len(received)

    def await_serving(self) -> None:
        """Wait until the server has found its file, and no upgrade is going on."""
        self.go_on()
        eventually(lambda: status(self.server)["state"] == "serving")
        if self.upgrades:
            self.server.logged("upgraded: version=")

    def await_known(self, clients: list[ModelClient]) -> None:
        """Wait until the supervisor knows each of `clients`, and where each stream starts, or until it is clear that it was lost."""
        self.go_on()
        if self.file is not None:
            eventually(lambda: self.know(clients))

    def know(self, clients: list[ModelClient]) -> bool:
        starts = {
            client["peer"]: client["start"]
            for client in json.loads(ask(f"*:{self.port}{CLIENTS}")[0])["clients"]
        }
        missing = [
            client
            for client in clients
            if not client.doomed and not client.ended and not self.is_known(client, starts)
        ]
        return not [
            client
            for client in missing
            if not (client.may_be_lost and not client.known and client.is_lost())
        ]

    def is_known(self, client: ModelClient, starts: dict[str, int | None]) -> bool:
        """Take in what the supervisor says of `client`, and tell whether it is all that there is to know by now."""
        if client.name not in starts:
            return False
        client.known = True
        start = starts[client.name]
        if client.stream and start is not None:
            client.stream.note_start(start)
        return client.stream is None or start is not None

    def write(self, data: bytes, offset: int) -> None:
        assert self.file is not None
        while data:
            written = os.pwrite(self.file, data, offset)
            data, offset = data[written:], offset + written

    def streams(self) -> Iterator[Stream]:
        """Yield what is known of every stream there is."""
        return (client.stream for client in self.living if client.stream)

    def note_size(self) -> None:
        """Take in that the file's size has changed."""
        self.furthest = max(self.furthest, self.history.size)
        for stream in self.streams():
            stream.note_size(self.history.size)

    def note_change(self) -> None:
        """Take in that bytes of the file are about to change."""
        for stream in self.streams():
            stream.note_change(self.history)

    def worker_pids(self) -> list[int]:
        return [
            worker["pid"] for worker in status(self.server)["workers"] if worker["pid"] is not None
        ]

    def count_descriptors(self) -> tuple[int, int]:
        """Return how many the supervisor has, and how many all workers."""
        return open_descriptors(self.server.pid), sum(
            open_descriptors(pid) for pid in self.worker_pids()
        )


class FollowingWorld(World):
    """The same with --follow-name: other files of that name come after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.rotations = 0

    def options(self) -> list[str]:
        """Have nobody cut off who only waits for its turn to be read."""
        self.linger = False
        return ["--follow-name", "--grace", str(DEADLINE)]

    def rotate(self, reporter: int, at_once: bool) -> None:
        """Move the file away, append to it once more, and see every stream of it end; whoever has sent no header yet waits for the next."""
        assert self.file is not None
        self.rotations += 1
        self.await_serving()
        self.await_known(self.living)
        before, began = self.history.size, time.monotonic()
        self.path.rename(self.path.with_name(f"moved-{self.rotations}.log"))
        self.append(reporter)
        # then it may go unnoticed
        late = time.monotonic() - began > Timing().settle / 2
        for client in self.living:
            if client.stream and not client.ended:
                self.read_to_the_end(client, before if late else self.history.size)
        os.close(self.file)
        self.file, self.history, self.furthest = None, History(), 0
        if at_once:
            self.create()
        self.server.logged("file is gone, switching to the next file", count=self.rotations)
        eventually(lambda: status(self.server)["state"] != "rotating")

    def read_to_the_end(self, client: ModelClient, size: int) -> None:
        """Read the rest of a stream, of the bytes up to `size` at least."""
        assert client.stream
        self.read(client, client.due(size))
        while received := client.sock.recv(1 << 20):
            client.stream.take(received, self.history)
        assert any(start + client.stream.count >= size for start in client.stream.starts), client
        client.ended = True

    def end(self) -> None:
        """Have the server end; moving the file would not do."""
        self.server.signal(signal.SIGTERM)
