"""The load of a run: a file that grows irregularly, and clients of all kinds."""

import random
import sched
import selectors
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import clients
from clients import KINDS, InvalidClient, Kind, Reader
from content import LOCATE
from growing import GrowingFile
from served import Server
from tally import Tally

# The smallest and largest append in bytes. Sizes are distributed evenly on a logarithmic scale.
APPENDS = (1, 64 << 10)
# Bytes of a rare large append: more than the server sends in one turn of its loop.
OUTBURST = 3 << 20
# Seconds of writing that the writer makes up for after a delay.
BEHIND = 0.2
# The largest number of appends at once, and the least time in seconds until the next ones.
APPENDS_AT_ONCE = 50
TURN = 0.001
# The shortest and longest time between two rotations, in seconds.
ROTATION = (0.5, 5.0)
# Clients with an invalid header per second.
INVALID_RATE = 5.0
# A client that has waited this many seconds for bytes counts as forgotten by the server. A slot is
# without a worker for 5 seconds at most.
FORGOTTEN = 30.0
# Seconds within which all clients must catch up at the end of a run, and how often bytes are
# appended during this time.
CATCH_UP, CATCH_UP_TRIES = 60.0, 6
# Seconds after which a client that sends nothing disconnects.
SILENT = 10.0

Client = Reader | InvalidClient


class Traffic:
    """The writer and all clients, in one event loop: `run()` runs it.

    `rate` is the growth of the log in bytes per second, and `rotations` are the kinds of rotations.
    """

    def __init__(
        self,
        server: Server,
        file: GrowingFile,
        tally: Tally,
        rate: float,
        rotations: Sequence[str],
        dice: random.Random,
    ) -> None:
        self._rotations = rotations
        # The kinds of the next rotations, and whether the file is to be truncated.
        self._coming: list[str] = []
        self._truncating = False
        self.server, self.file, self.tally, self.rate, self.dice = server, file, tally, rate, dice
        self.readers: set[Reader] = set()
        self.invalid_clients: set[InvalidClient] = set()
        # While this is set, the file grows, and each client that disconnects is replaced.
        self.busy = False
        # The time of the next append.
        self._due = 0.0
        # The largest log offset that clients had reached two seconds ago, and one second ago.
        self._known = self._reached = 0
        self._selector = selectors.DefaultSelector()
        self._timers = sched.scheduler(time.monotonic)
        self._history: deque[tuple[float, int]] = deque(maxlen=int(2 * FORGOTTEN))

    # The loop

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        """Call `call` after that many seconds."""
        self._timers.enter(seconds, 0, call)

    def run(self, seconds: float, check: Callable[[], bool] = lambda: False) -> bool:
        """Run the loop until `check()` is true, and return whether it is.

        The loop ends after `seconds` at the latest, or when there are too many errors.
        """
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end and not self.tally.hopeless():
            pause = self._timers.run(blocking=False)
            for key, _ in self._selector.select(
                max(0.0, min(0.1 if pause is None else pause, end - now))
            ):
                self._handle(key.data)
            if check():
                return True
        return False

    def _handle(self, client: Client) -> None:
        if client.closed:
            return
        if not client.read():
            self.disconnect(client)
        elif isinstance(client, Reader) and client.pause:
            self.hold(client, client.pause)

    # The file

    def start(self, scale: float) -> None:
        """Start the writer and the clients.

        Of each kind there are `scale` times the usual number of clients, but at least one.
        """
        self.busy = True
        self._write()
        self._watch()
        self._connect_invalid_clients()
        if self._rotations:
            self.later(ROTATION[0], self._rotate)
        for kind in KINDS:
            for _ in range(max(1, round(kind.count * scale))):
                self.connect(kind)

    def _write(self) -> None:
        if not self.busy:
            return
        if self._truncating:
            self._truncate()
            return
        now = time.monotonic()
        # A delay is made up for, but not one of more than a moment.
        self._due = max(self._due, now - BEHIND)
        # Clients must read between appends, also if the writer is too slow for the rate.
        for _ in range(APPENDS_AT_ONCE):
            self._append()
            if self._due > now:
                break
        self.later(max(TURN, self._due - now), self._write)

    def _append(self) -> None:
        least, most = APPENDS
        count = (
            OUTBURST
            if self.dice.random() < 0.002
            else int(least * (most / least) ** self.dice.random())
        )
        self.file.append(count)
        self._due += self.dice.expovariate(1) * count / self.rate

    def _rotate(self) -> None:
        """Rotate the file, and do it again in some seconds."""
        if not self.busy:
            return
        self.later(self.dice.uniform(*ROTATION), self._rotate)
        if self._truncating:
            return
        if not self._coming:
            self._coming = self.dice.sample(self._rotations, len(self._rotations))
        kind = self._coming.pop()
        self.tally.rotations[kind] += 1
        if kind == "truncate":
            self._truncating = True
        else:
            self.file.rotate(kind, self.dice)

    def _truncate(self) -> None:
        """Truncate the file when a client has received all of it, and write no more until then.

        Nor is anything but one byte written until a client has received that: the server could not
        tell a file that was truncated and has grown beyond its old size from one that has grown.
        """
        if self.file.truncated.stop == self.file.base and self.file.size == self.file.base + 1:
            self._truncating = self.file.delivered < self.file.size
        elif self.file.delivered == self.file.size > self.file.base + 1:
            self.file.truncate()
            self.file.append(1)
        self.later(0.01, self._write)

    def _watch(self) -> None:
        """Check once a second for clients that wait too long for bytes, or to be disconnected."""
        now = time.monotonic()
        self._history.append((now, self.file.size))
        # All workers know this size for a second now.
        self._known, self._reached = self._reached, self.file.delivered
        for reader in list(self.readers):
            self._check_wait(reader, now)
        for client in list(self.invalid_clients):
            if now - client.connected > FORGOTTEN:
                self.tally.note_wrong(
                    f"a client with an invalid header was connected for {FORGOTTEN:g} seconds"
                )
                self.disconnect(client)
        if self.busy:
            self.later(1.0, self._watch)

    def _check_wait(self, reader: Reader, now: float) -> None:
        if reader.pause or reader.released > now or not reader.started:
            # The client does not read at the moment, or has not sent its header yet.
            return
        if (since := reader.waiting_since(self._history)) is None:
            return
        self.tally.longest_wait = max(self.tally.longest_wait, now - since)
        if now - since > FORGOTTEN:
            self.tally.note_wrong(f"{reader}: received nothing for {now - since:.0f} seconds")
            self.disconnect(reader)

    # Clients

    def connect(self, kind: Kind) -> None:
        """Connect a client of that kind; when it disconnects, another one replaces it."""
        if not self.busy:
            # The run has ended since this client was scheduled.
            return
        request = clients.start_of(kind.start, self.file.oldest, self.file.size, self.dice)
        if self.dice.random() < 0.5:
            request = b"?" + request
        try:
            sock = clients.connect(self.server.port, kind.receive_buffer)
        except OSError as error:
            self.tally.note_wrong(f"{kind.name} client cannot connect: {error}")
            self.later(1.0, partial(self.connect, kind))
            return
        self.tally.connections[kind.name] += 1
        reader = Reader(kind, sock, request, self.file, self.tally, self._known)
        self.readers.add(reader)
        self._selector.register(sock, selectors.EVENT_READ, reader)
        self._send_header(reader, request + b"\n")
        if kind.stay:
            self.later(self.dice.uniform(*kind.stay), partial(self.disconnect, reader))

    def _send_header(self, reader: Reader, rest: bytes) -> None:
        count = 1 if reader.kind.piecemeal else len(rest)
        if reader.closed or not self.send(reader, rest[:count]):
            return
        if rest[count:]:
            self.later(0.05, partial(self._send_header, reader, rest[count:]))
            return
        reader.started = True
        if reader.kind.half_close:
            clients.half_close(reader.sock)
        if reader.kind.junk:
            self._send_junk(reader)

    def _send_junk(self, reader: Reader) -> None:
        if not reader.closed and self.send(
            reader, self.dice.randbytes(self.dice.randrange(1, 1000))
        ):
            self.later(self.dice.expovariate(5), partial(self._send_junk, reader))

    def send(self, reader: Reader, data: bytes) -> bool:
        try:
            reader.sock.send(data)
        except BlockingIOError:
            # Only junk can fill the socket, and it does not matter how much of it is sent.
            pass
        except OSError:
            # The next read reports what has happened to the connection.
            return False
        return True

    def hold(self, reader: Reader, seconds: float) -> None:
        """Stop reading at this client for that many seconds."""
        if reader.closed or (reader.released > time.monotonic() and not reader.pause):
            return
        if reader.sock in self._selector.get_map():
            self._selector.unregister(reader.sock)
        reader.released = time.monotonic() + seconds
        self.later(seconds, partial(self._release, reader))

    def _release(self, reader: Reader) -> None:
        if not reader.closed and reader.sock not in self._selector.get_map():
            self._selector.register(reader.sock, selectors.EVENT_READ, reader)

    def disconnect(self, client: Client, reset: bool = False) -> None:
        """Disconnect a client."""
        if client.closed:
            return
        client.closed = True
        if client.sock in self._selector.get_map():
            self._selector.unregister(client.sock)
        if isinstance(client, InvalidClient):
            self.invalid_clients.discard(client)
            client.sock.close()
            return
        self.readers.discard(client)
        clients.leave(client.sock, reset or client.kind.reset)
        if self.busy:
            self.later(self.dice.random(), partial(self.connect, client.kind))

    def connect_invalid(self, header: bytes) -> None:
        """Connect a client that sends an invalid header, or nothing if `header` is empty."""
        try:
            sock = clients.connect(self.server.port)
        except OSError as error:
            self.tally.note_wrong(f"a client with an invalid header cannot connect: {error}")
            return
        # Sending fails if the worker has just been killed.
        with suppress(OSError):
            sock.send(header)
        self.tally.connections["invalid"] += 1
        client = InvalidClient(sock, self.tally)
        self.invalid_clients.add(client)
        self._selector.register(sock, selectors.EVENT_READ, client)
        if not header:
            self.later(SILENT, partial(self.disconnect, client))

    def _connect_invalid_clients(self) -> None:
        if self.busy:
            header = b"" if self.dice.random() < 0.1 else clients.invalid_header(self.dice)
            self.connect_invalid(header)
            self.later(self.dice.expovariate(INVALID_RATE), self._connect_invalid_clients)

    # The end

    def catch_up(self) -> None:
        """Let every client read all bytes of the file, and connect no new ones."""
        self.busy = False
        for reader in self.readers:
            reader.pause = 0.0
            self._release(reader)
        for _ in range(CATCH_UP_TRIES):
            # Clients that started beyond the end of the file receive something as well.
            self.file.append(2 * max(clients.AHEAD, LOCATE))
            if self.run(
                CATCH_UP / CATCH_UP_TRIES,
                lambda: all(reader.caught_up() for reader in self.readers),
            ):
                return
        for reader in self.readers:
            if not reader.caught_up():
                self.tally.note_wrong(
                    f"{reader}: not caught up after {CATCH_UP:g} seconds,"
                    f" the log has {self.file.size} bytes"
                )

    def clear(self) -> None:
        """Disconnect all clients with a reset, which the server notices at once."""
        self.busy = False
        all_clients: list[Client] = [*self.readers, *self.invalid_clients]
        for client in all_clients:
            self.disconnect(client, reset=True)
        for event in self._timers.queue:
            self._timers.cancel(event)
