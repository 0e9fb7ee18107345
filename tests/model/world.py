"""A real server, the file that it serves, its clients, and all actions of the three.

Each action records in the model what it must lead to. The other methods check that.
"""

import atexit
import json
import os
import random
import resource
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from model.client import ModelClient
from model.history import History, Stream, in_pages
from support.processes import gone, session, title
from support.server import TAILSRV, Server
from support.sockets import reset
from support.status import ask, ready_workers, status
from support.waiting import DEADLINE, eventually
from tailsrv.control_socket import CLIENTS

# What processes have open, each with its number.
Links = Counter[str]
FILE = "file of this example"
MEMORY = "/memfd:tailsrv (deleted)"

# From linux/tcp.h: a socket that is closed with this option set sends no further packet.
TCP_REPAIR = 19
# The number of workers of the first server.
WORKERS = 2

# What an orphaned worker logs if the supervisor that takes over is killed halfway.
TAKER_DIED = ("cannot hand over: ",)

# Seconds for which workers serve without a supervisor: until the example takes them over.
ORPHAN_TIMEOUT = "600"


class World:
    """A server, its file, its clients, and the state of the model."""

    def __init__(self) -> None:
        super().__init__()
        # For a script that fails before it calls `teardown`.
        atexit.register(self.close)
        self.folder = tempfile.TemporaryDirectory(prefix="tailsrv-model-")
        self.path = Path(self.folder.name, "file.log")
        self.history = History()
        # The descriptor of the writer, and the offset of the first byte of its file.
        self.file: int | None = None
        self.file_base = 0
        self.living: list[ModelClient] = []
        # The highest offset that any client may be waiting for.
        self.furthest = 0
        self.stopping, self.stopped = False, list[int]()
        self.launches, self.kills, self.upgrades, self.moved = 0, 0, 0, False
        # The number of workers, and further options of the present server.
        self.workers, self.more = WORKERS, list[str]()
        # Whether the server has the file, and whether the supervisor has died.
        self.served = self.orphaned = False
        # How often the supervisor was killed, and the killed ones whose workers may still serve.
        self.deaths, self.dead = 0, list[Server]()
        # Whether another supervisor may not have finished to take over.
        self.taking_over = False
        # Whether a slot may be without a worker, and the workers that were killed.
        self.unsettled, self.killed = False, set[int]()
        # What the supervisor and all workers have open without clients; see `open_links`.
        self.base: tuple[Links, Links] | None = None

    def start(self, linger: bool, size: int | None) -> None:
        """Start the server with a file of `size` bytes, or with none yet."""
        if size is not None:
            self.create()
            self.append(size)
        self.linger = linger
        self.launch()

    def launch(self) -> None:
        """Start a server, and record what it has open without clients."""
        self.workers, self.more, self.served = WORKERS, [], False
        self.server = self.spawn(0)
        self.port = self.server.port
        # Later servers may be rolling at this moment, which opens and closes files.
        if self.file is not None and self.launches == 1:
            ready_workers(self.server)
            self.base, self.base_listeners = self.open_links(), self.listeners()

    def spawn(self, port: int) -> Server:
        """Start a server at `port`."""
        options = ["-w", str(self.workers), "--orphan-timeout", ORPHAN_TIMEOUT, *self.options()]
        command = [*self.program(), "-p", str(port), *options, *self.more, self.path]
        log = Path(self.folder.name, f"stderr-{self.launches}")
        self.launches += 1
        return Server(command, log, 0)

    def program(self) -> Sequence[str | Path]:
        """Return the command of the server."""
        return TAILSRV

    def options(self) -> list[str]:
        """Return the server's options for the case that the file is gone."""
        return ["--linger-after-file-is-gone"] if self.linger else []

    # Actions of clients.

    def connect(self, header: bytes, at_once: int = 64, narrow: bool = False) -> ModelClient:
        """Connect and send the first bytes of a header; `narrow` is a small receive buffer."""
        client = ModelClient(self.server.connect(receive_buffer=4096 if narrow else 0), header)
        self.living.append(client)
        self.send(client, at_once)
        return client

    def connect_badly(self, header: bytes) -> ModelClient:
        """Send an invalid header."""
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
            number = int(client.header.replace(b"?", b""))
            client.stream = self.new_stream(client.header, number)
            self.furthest = max(self.furthest, number)
            if self.file is not None:
                self.note_size_to(client)
        with client.at_risk():
            client.sock.sendall(piece)

    def send_junk(self, client: ModelClient, count: int) -> None:
        """Send data after the header, which the server must ignore."""
        if client.stream and not client.ended and not client.half_closed:
            with client.at_risk():
                client.sock.sendall(b"-5\n" * count)

    def half_close(self, client: ModelClient) -> None:
        """Shut down the sending side: an error before the end of the header, allowed after it."""
        if client.ended or client.half_closed:
            return
        client.half_closed = True
        client.doomed = client.doomed or client.stream is None
        with client.at_risk():
            client.sock.shutdown(socket.SHUT_WR)

    def read(self, client: ModelClient, count: int) -> None:
        """Read the bytes that are due, up to `count`, and further bytes if there are any."""
        self.go_on()
        if client.ended:
            return
        while not client.ended and (left := min(count, self.due(client))):
            count -= self.receive(client, left)
        if client.doomed and not client.ended and self.file is not None and not self.orphaned:
            assert self.receive(client, 1) == 0
        elif count and not client.ended:
            with client.without_waiting():
                self.receive(client, count)

    def leave(self, client: ModelClient, how: str) -> None:
        """Close or reset the connection, or vanish without a packet.

        The server notices a vanished client when it sends the next bytes.
        """
        if client not in self.living:
            # Its server has ended.
            return
        self.living.remove(client)
        if how == "reset":
            reset(client.sock)
            return
        if how == "vanish" and client.stream and client.due(self.history.size) == 0:
            # This option requires a privilege.
            with suppress(OSError):
                client.sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        client.sock.close()

    def settle(self, client: ModelClient) -> None:
        """Wait until the supervisor knows the client and the start of any requested stream."""
        self.await_known([client])

    def due(self, client: ModelClient) -> int:
        """Return how many more bytes `client` must receive at least, before anything changes."""
        reach = self.reach()
        return 0 if reach is None else client.due(reach)

    def reach(self) -> int | None:
        """Return the least offset up to which every worker serves the log, None if none does."""
        return self.history.size if self.served or not self.orphaned else None

    # Actions of the writer.

    def create(self) -> None:
        """Create the file."""
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.note_size()

    def append(self, count: int) -> None:
        """Append `count` bytes.

        They are written page by page if a stream may start relative to the end meanwhile, because
        the model could not know its start otherwise.
        """
        data = random.Random(f"{self.history.now} {self.history.size}").randbytes(count)
        waiting = any(stream.needs_end and not stream.started for stream in self.streams())
        for piece in in_pages(data, self.history.size - self.file_base) if waiting else [data]:
            self.write(piece, self.history.size)
            self.history.append(piece)
            self.note_size()

    def truncate(self, count: int) -> None:
        """Truncate the last `count` bytes."""
        assert self.file is not None
        self.note_change()
        self.history.truncate(max(0, self.history.size - count))
        os.ftruncate(self.file, self.history.size)
        self.note_size()

    def overwrite(self, before_end: int, count: int) -> None:
        """Overwrite bytes in the middle."""
        offset = max(0, self.history.size - before_end)
        data = random.Random(f"{self.history.now} {offset}").randbytes(
            min(count, self.history.size - offset)
        )
        self.note_change()
        self.history.overwrite(offset, data)
        self.write(data, offset)

    def move(self, how: str) -> None:
        """Remove the name of the file, which is still written and served."""
        # The server must have opened the file before.
        if not self.served:
            self.await_serving()
        self.moved = True
        if how == "unlink":
            self.path.unlink()
        else:
            self.path.rename(self.path.with_name("moved.log"))
        if how == "replace":
            self.path.write_bytes(b"another file\n")

    # Actions on the server.

    def stop(self) -> None:
        """Stop all workers, so that several actions occur before their next turn."""
        self.stopping = True
        for pid in self.worker_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.stopped.append(pid)

    def go_on(self) -> None:
        """Continue the stopped workers."""
        self.stopping = False
        while self.stopped:
            with suppress(ProcessLookupError):
                os.kill(self.stopped.pop(), signal.SIGCONT)

    def kill(self, slot: int, number: str, known: bool) -> None:
        """Kill a worker; with `known`, wait first until the supervisor knows all clients.

        Without that, a client that the supervisor does not know yet may be lost.
        """
        self.kills += 1
        if known:
            self.await_known(self.living)
        for client in self.living:
            client.may_be_lost = client.may_be_lost or not client.known
        workers = status(self.server)["workers"]
        if (pid := workers[slot % len(workers)]["pid"]) is not None:
            self.unsettled = True
            self.killed.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[number])

    def upgrade(self) -> None:
        """Upgrade the program while everything else continues."""
        self.go_on()
        self.upgrades += 1
        self.unsettled = True
        self.server.signal(signal.SIGHUP)

    # The death of the supervisor.

    def supervisor_dies(self, how: str, settled: bool) -> None:
        """Kill the supervisor alone.

        Args:
            how: The signal, or SIGSTOP for a supervisor that hangs before it is killed.
            settled: Whether to wait first until every slot has a worker.

        """
        # All workers are replaced when the file appears.
        appears = self.file is not None and not self.served
        if settled or appears or self.may_be_empty():
            self.await_settled()
        self.deaths += 1
        number = signal.SIGKILL if how == "SIGSTOP" else signal.Signals[how]
        resource.prlimit(self.server.pid, resource.RLIMIT_CORE, (0, 0))
        if how == "SIGSTOP":
            self.server.signal(signal.SIGSTOP)
        if self.server.pid in self.stopped:
            self.stopped.remove(self.server.pid)
        self.server.kill_supervisor(number)
        self.dead.append(self.server)
        self.orphaned = True
        if self.unsettled:
            self.note_lost()

    def may_be_empty(self) -> bool:
        """Tell whether there may be no worker, so that the port would be closed."""
        return self.unsettled and (self.workers == 1 or len(self.killed) >= self.workers)

    def kill_orphan(self, index: int, number: str) -> None:
        """Kill a worker that has no supervisor, but not the last one, which has the port."""
        self.go_on()
        if len(pids := sorted(self.worker_pids())) > 1:
            self.end_orphan(pids[index % len(pids)], signal.Signals[number])

    def end_orphan(self, pid: int, number: signal.Signals) -> None:
        os.kill(pid, number)
        eventually(lambda: gone(pid))
        self.note_lost()

    def note_lost(self) -> None:
        """Record that clients are lost that no living worker has.

        Those in an accept queue are not, but that cannot be seen from outside.
        """
        self.go_on()
        eventually(lambda: all("orphaned" in title(pid) for pid in self.worker_pids()))
        held = {port for pid in self.worker_pids() for port in peers_of(pid)}
        for client in self.living:
            if client.sock.getsockname()[1] not in held:
                client.may_end = True

    def takeover(self, workers: int, more: list[str], failing: list[int]) -> None:
        """Start another supervisor.

        Args:
            workers: The number of its workers.
            more: Further options.
            failing: Milliseconds after which others, which are started before that, are killed.

        """
        self.go_on()
        self.workers, self.more = workers, more
        for pause in failing:
            taker = self.spawn(self.port)
            time.sleep(pause / 1000)
            taker.kill_early()
            self.dead.append(taker)
        clients = self.server.clients
        self.server = self.spawn(self.port)
        self.server.clients = clients
        assert self.server.port == self.port
        self.orphaned, self.taking_over = False, True
        self.kills = self.upgrades = 0
        self.unsettled = False
        self.killed.clear()

    def finish_takeover(self) -> None:
        """Wait until all orphaned workers have ended."""
        if self.taking_over:
            self.server.logged("took over: ")
            for server in self.dead:
                server.wait()
                self.check_log(server)
            self.dead.clear()
            self.taking_over = False

    def await_settled(self) -> None:
        """Wait until every slot has a worker that is ready."""
        self.go_on()
        if self.file is not None:
            self.await_serving()
        eventually(self.is_settled)
        self.unsettled = False
        self.killed.clear()

    def is_settled(self) -> bool:
        workers = status(self.server)["workers"]
        pids = {worker["pid"] for worker in workers if worker["ready"]}
        if self.file is not None and not all(links_of(pid)[FILE] for pid in pids):
            return False
        return len(pids) == len(workers) and not pids & self.killed and not any(map(gone, pids))

    # The end of an example.

    def finish(self) -> None:
        """Bring every stream to an end that is known exactly."""
        self.go_on()
        if self.orphaned:
            self.takeover(self.workers, self.more, [])
        if self.file is None:
            self.create()
        self.append(max(0, self.furthest - self.history.size) + 100)
        self.await_serving()
        self.await_known(self.living)
        for client in self.living:
            # This detects clients that were lost. Some have received bytes before.
            self.read(client, 1 << 40 if client.may_end else 1)
        self.living = [client for client in self.living if not client.ended]
        eventually(self.is_left_alone)
        for client in self.living:
            self.read(client, 1 << 40)
            assert client.stream is None or client.stream.stands_at(self.history.size), client
        self.check_descriptors()
        self.end()
        for client in self.living:
            assert client.sock.recv(1 << 16) == b"", client
        self.server.wait()
        self.check_log(self.server)

    def check_log(self, server: Server) -> None:
        """Assert that no error was logged, except for those that the model has caused."""
        assert set(server.lines("error")) <= self.expected_errors(server), server.log

    def expected_errors(self, server: Server) -> set[str]:
        """Return the errors in the log of `server` that the model has caused."""
        return {line for text in TAKER_DIED for line in server.lines(text)}

    def end(self) -> None:
        """Make the server end, in the way that its options allow."""
        if self.linger:
            self.server.signal(signal.SIGTERM)
        else:
            self.path.rename(self.path.with_name("moved.log"))

    def is_left_alone(self) -> bool:
        """Append a byte and tell whether the server counts exactly the living clients.

        Sending the byte makes the server notice vanished clients.
        """
        self.append(1)
        return bool(status(self.server)["clients"] == len(self.living))

    def describe(self) -> str:
        """Return what helps to explain a failure."""
        logs = sorted(Path(self.folder.name).glob("stderr-*"))[:-1]
        before = "\n".join(log.read_text(errors="replace")[-4000:] for log in logs)
        return f"Earlier logs:\n{before}\nThe server's log:\n{self.server.log[-8000:]}"

    def close(self) -> None:
        """End the server and remove all files."""
        atexit.unregister(self.close)
        self.go_on()
        if hasattr(self, "server"):
            for client in self.server.clients:
                client.close()
            for server in (*self.dead, self.server):
                server.kill_all()
        if self.file is not None:
            os.close(self.file)
        self.folder.cleanup()

    # Helpers of the rules.

    def receive(self, client: ModelClient, count: int) -> int:
        """Receive up to `count` bytes, all of which must be correct, and return their number."""
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
        """Wait until the server has found its file and finished its upgrades."""
        self.go_on()
        eventually(lambda: status(self.server)["state"] == "serving")
        self.served = True
        self.finish_takeover()
        if self.upgrades:
            self.server.logged("upgraded: version=", count=self.upgrades)

    def await_known(self, clients: list[ModelClient]) -> None:
        """Wait until the supervisor knows each of `clients` and where its stream starts.

        A client that was lost is not waited for.
        """
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
            if not client.doomed
            and not client.may_end
            and not client.ended
            and not self.is_known(client, starts)
        ]
        return not [
            client
            for client in missing
            if not (client.may_be_lost and not client.known and client.is_lost())
        ]

    def is_known(self, client: ModelClient, starts: dict[str, int | None]) -> bool:
        """Record what the supervisor reports of `client`, and tell whether it is complete."""
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
        """Yield the streams of all living clients."""
        return (client.stream for client in self.living if client.stream)

    def note_size(self) -> None:
        """Record that the size of the file has changed."""
        self.furthest = max(self.furthest, self.history.size)
        for client in self.living:
            self.note_size_to(client)

    def note_change(self) -> None:
        """Record that bytes of the file are about to change."""
        for stream in self.streams():
            stream.note_change(self.history)

    def worker_pids(self) -> list[int]:
        if self.orphaned:
            pids = [pid for server in self.dead for pid in session(server.pid)]
            return [pid for pid in pids if title(pid).startswith("tailsrv: worker ")]
        return [
            worker["pid"] for worker in status(self.server)["workers"] if worker["pid"] is not None
        ]

    def new_stream(self, header: bytes, number: int) -> Stream:
        """Return the stream that `header` with its `number` asks for."""
        return Stream(abs(number), b"-" in header, self.history.now, b"?" in header)

    def note_size_to(self, client: ModelClient) -> None:
        """Record a size of the file at which the server may read the header of `client`."""
        if client.stream:
            client.stream.note_size(self.history.size)

    def check_descriptors(self) -> None:
        """Wait until the processes have open what they had at first, and one socket per client."""
        for pause in (0.0, *[0.1] * round(10 * DEADLINE)):
            time.sleep(pause)
            if not (found := self.differing_links()):
                return
        raise AssertionError(f"descriptors after {DEADLINE:g} seconds: {'; '.join(found)}")

    def differing_links(self) -> list[str]:
        """Return how the open descriptors differ from the expected ones, one line per process."""
        if self.base is None:
            return []
        clients = Links({"socket": len(self.living)})
        found = self.open_links()
        expected = [base + clients for base in self.expected_links()]
        return [
            f"{name}: too many {dict(links - right)}, too few {dict(right - links)}"
            for name, links, right in zip(("supervisor", "workers"), found, expected, strict=True)
            if links != right
        ]

    def expected_links(self) -> tuple[Links, Links]:
        """Return `base` for the present number of workers and listeners."""
        assert self.base is not None
        supervisor, workers = self.base
        more = self.listeners() - self.base_listeners
        if "--max-clients" in self.more:
            # The number of clients of each worker, in memory that Python has open twice.
            supervisor += Links({MEMORY: 2})
            workers += Links({MEMORY: 2 * WORKERS})
        each = {link: count // WORKERS for link, count in workers.items()}
        return (
            supervisor + Links({"socket": self.workers - WORKERS + more}),
            Links({link: count * self.workers for link, count in each.items()})
            + Links({"socket": more - (self.workers - WORKERS) * self.base_listeners // WORKERS}),
        )

    def listeners(self) -> int:
        """Return how many descriptors of listening sockets the supervisor has."""
        listeners = status(self.server)["listeners"]
        shared = any(listener["slot"] is None for listener in listeners)
        return len(listeners) * (self.workers if shared else 1)

    def open_links(self) -> tuple[Links, Links]:
        """Return what the supervisor and all workers have open."""
        return links_of(self.server.pid), sum(map(links_of, self.worker_pids()), Links())


def links_of(pid: int) -> Links:
    """Return how many descriptors of each kind the process `pid` has open.

    A kind is FILE, another path, or what the kernel says instead of it, without numbers.
    """
    found, fds = Links(), list[str]()
    # The process may end, and the file may be closed meanwhile.
    with suppress(FileNotFoundError):
        fds = os.listdir(f"/proc/{pid}/fd")
    for fd in fds:
        with suppress(FileNotFoundError):
            kind = os.readlink(f"/proc/{pid}/fd/{fd}").partition(":[")[0]
            # A file may have been renamed or deleted.
            found[FILE if "/tailsrv-model-" in kind else kind.replace(str(pid), "PID")] += 1
    return found


def peers_of(pid: int) -> set[int]:
    """Return the ports of the clients that the process `pid` has, empty if it has ended."""
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return set()
    return {connection.raddr.port for connection in found if connection.raddr}
