"""The load: a file that grows by fits and starts, and clients of all kinds that come and go."""

import random
import sched
import selectors
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import clients
from clients import KINDS, Kind, Reader, Stranger
from growing import GrowingFile
from served import Server
from tally import Tally

# bytes at a time, small ones as often as large ones
APPENDS = (1, 64 << 10)
# bytes, now and then: more than one turn of the server's moves
OUTBURST = 3 << 20
# a second
STRANGERS = 5.0
# seconds after which a client that has got nothing counts as forgotten: a slot is empty for 5 at most
STARVED = 30.0
# seconds that all together may take in the end, with something new so often
CATCH_UP, CATCH_UP_TRIES = 60.0, 6
# seconds that a stranger stays who says nothing
SILENT = 10.0

Client = Reader | Stranger


class Traffic:
    """Lets everybody do a little, in one loop: `run()` it."""

    def __init__(
        self, server: Server, file: GrowingFile, tally: Tally, rate: float, dice: random.Random
    ) -> None:
        self.server, self.file, self.tally, self.rate, self.dice = server, file, tally, rate, dice
        self.readers: set[Reader] = set()
        self.strangers: set[Stranger] = set()
        # as long as clients that leave are followed by others
        self.busy = False
        self._selector = selectors.DefaultSelector()
        self._timers = sched.scheduler(time.monotonic)
        self._history: deque[tuple[float, int, int]] = deque(maxlen=int(2 * STARVED))

    # The loop

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        """Call back after that time."""
        self._timers.enter(seconds, 0, call)

    def run(self, seconds: float, check: Callable[[], bool] = lambda: False) -> bool:
        """Go on for so long, or until `check()` is true or all is lost, and tell whether it was true."""
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
            self.part(client)
        elif isinstance(client, Reader) and client.pause:
            self.hold(client, client.pause)

    # The file

    def start(self, scale: float) -> None:
        """Begin to append, and have `scale` times as many clients of each kind as usual, at least one."""
        self.busy = True
        self._write()
        self._watch()
        self._meet_strangers()
        for kind in KINDS:
            for _ in range(max(1, round(kind.count * scale))):
                self.join(kind)

    def _write(self) -> None:
        if not self.busy:
            return
        least, most = APPENDS
        count = (
            OUTBURST
            if self.dice.random() < 0.002
            else int(least * (most / least) ** self.dice.random())
        )
        self.file.append(count)
        self.later(self.dice.expovariate(1) * count / self.rate, self._write)

    def _watch(self) -> None:
        """Look, once a second, for clients that are owed something and do not get it."""
        now = time.monotonic()
        self._history.append((now, self.file.generation, self.file.size))
        for reader in list(self.readers):
            self._look_at(reader, now)
        for stranger in list(self.strangers):
            if now - stranger.connected > STARVED:
                self.tally.note_wrong(f"a stranger was not turned away in {STARVED:g} seconds")
                self.part(stranger)
        if self.busy:
            self.later(1.0, self._watch)

    def _look_at(self, reader: Reader, now: float) -> None:
        if reader.pause or reader.released > now or not reader.started:
            # it does not want to read, or has not asked for anything
            return
        if (since := reader.waiting_since(self._history)) is None:
            return
        self.tally.longest_wait = max(self.tally.longest_wait, now - since)
        if now - since > STARVED:
            self.tally.note_wrong(f"{reader}: nothing for {now - since:.0f} seconds")
            self.part(reader)

    # Clients

    def join(self, kind: Kind) -> None:
        """Let a client of that kind come, and another when it has left."""
        if not self.busy:
            # it was to follow one that left before the end began
            return
        number = clients.start_of(kind.start, self.file.size, self.dice)
        try:
            sock = clients.connect(self.server.port, kind.receive_buffer)
        except OSError as error:
            self.tally.note_wrong(f"{kind.name} client cannot connect: {error}")
            self.later(1.0, partial(self.join, kind))
            return
        self.tally.connections[kind.name] += 1
        reader = Reader(kind, sock, number, self.file, self.tally)
        self.readers.add(reader)
        self._selector.register(sock, selectors.EVENT_READ, reader)
        self._send_header(reader, number + b"\n")
        if kind.stay:
            self.later(self.dice.uniform(*kind.stay), partial(self.part, reader))

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
            # only junk can fill a socket, and some more or less is all the same
            pass
        except OSError:
            # what has become of it shows when it is read from
            return False
        return True

    def hold(self, reader: Reader, seconds: float) -> None:
        """Let it read nothing for that long."""
        if reader.closed or (reader.released > time.monotonic() and not reader.pause):
            return
        if reader.sock in self._selector.get_map():
            self._selector.unregister(reader.sock)
        reader.released = time.monotonic() + seconds
        self.later(seconds, partial(self._release, reader))

    def _release(self, reader: Reader) -> None:
        if not reader.closed and reader.sock not in self._selector.get_map():
            self._selector.register(reader.sock, selectors.EVENT_READ, reader)

    def part(self, client: Client, reset: bool = False) -> None:
        """Let a client leave."""
        if client.closed:
            return
        client.closed = True
        if client.sock in self._selector.get_map():
            self._selector.unregister(client.sock)
        if isinstance(client, Stranger):
            self.strangers.discard(client)
            client.sock.close()
            return
        self.readers.discard(client)
        clients.leave(client.sock, reset or client.kind.reset)
        if self.busy:
            self.later(self.dice.random(), partial(self.join, client.kind))

    def meet(self, says: bytes) -> None:
        """Let a stranger come."""
        try:
            sock = clients.connect(self.server.port)
        except OSError as error:
            self.tally.note_wrong(f"a stranger cannot connect: {error}")
            return
        # its worker was killed in that very moment
        with suppress(OSError):
            sock.send(says)
        self.tally.connections["stranger"] += 1
        stranger = Stranger(sock, self.tally)
        self.strangers.add(stranger)
        self._selector.register(sock, selectors.EVENT_READ, stranger)
        if not says:
            self.later(SILENT, partial(self.part, stranger))

    def _meet_strangers(self) -> None:
        if self.busy:
            self.meet(b"" if self.dice.random() < 0.1 else clients.nonsense(self.dice))
            self.later(self.dice.expovariate(STRANGERS), self._meet_strangers)

    # The end

    def catch_up(self) -> None:
        """Have every client that is there read all there is, and nobody else come."""
        self.busy = False
        for reader in self.readers:
            reader.pause = 0.0
            self._release(reader)
        for _ in range(CATCH_UP_TRIES):
            # who is ahead, or has been read from the end, gets something, too
            self.file.append(2 * clients.AHEAD)
            if self.run(
                CATCH_UP / CATCH_UP_TRIES,
                lambda: all(reader.caught_up() for reader in self.readers),
            ):
                return
        for reader in self.readers:
            if not reader.caught_up():
                self.tally.note_wrong(
                    f"{reader}: not caught up after {CATCH_UP:g} seconds, the file has {self.file.size} bytes"
                )

    def clear(self) -> None:
        """Let all clients leave, so that the server sees it at once."""
        self.busy = False
        everybody: list[Client] = [*self.readers, *self.strangers]
        for client in everybody:
            self.part(client, reset=True)
        for event in self._timers.queue:
            self._timers.cancel(event)
