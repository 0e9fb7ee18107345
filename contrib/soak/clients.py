"""The clients of a run, of several kinds. Each compares every byte it receives with the log."""

import random
import re
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass

from content import LOCATE
from growing import GrowingFile
from tally import Tally

# Slow clients start at most this many bytes before the end of the file. They could not read a file
# that has grown for hours before the run ends.
NEAR = 8 << 20
# Clients that start beyond the end of the file start at most this many bytes beyond it.
AHEAD = 64 << 10
# Seconds within which a connection must succeed. This is long enough even for a busy server,
# because the kernel completes the handshake.
CONNECT = 10.0
# The line that the server sends first to a client that asks for it: the log offsets of the first
# byte that follows, and of the end.
_PLACE = re.compile(rb"(\d{19}) (\d{19})\n")
PLACE = 40
# With this value of SO_LINGER, close(2) sends a reset instead of a FIN.
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of client, and how it behaves.

    `count` clients of this kind are connected at a time. Each stays for a random time between the
    two values of `stay`, in seconds, or until the end of the run if `stay` is None.
    """

    name: str
    count: int
    # Where the stream starts: one of the words of start_of().
    start: str
    stay: tuple[float, float] | None = None
    # The largest number of bytes in one read.
    chunk: int = 256 << 10
    # Seconds between two reads.
    pause: float = 0.0
    # SO_RCVBUF in bytes, 0 for the default.
    receive_buffer: int = 0
    # The client shuts down its sending side after the header.
    half_close: bool = False
    # The client keeps sending after its header.
    junk: bool = False
    # The client sends its header byte by byte.
    piecemeal: bool = False
    # The client disconnects with a reset.
    reset: bool = False


KINDS = (
    Kind("live", 10, "now"),
    Kind("replay", 2, "zero", stay=(2, 15)),
    Kind("tail", 5, "last", stay=(1, 30)),
    Kind("slow", 4, "near", stay=(5, 40), chunk=4096, pause=0.05, receive_buffer=4096),
    Kind("stalled", 4, "last", stay=(10, 40), chunk=1 << 20, pause=7.0),
    Kind("half-closed", 4, "near", half_close=True),
    Kind("junk", 4, "last", junk=True),
    Kind("piecemeal", 3, "anywhere", stay=(1, 5), piecemeal=True),
    # The server sends nothing to these clients, so no failing send tells it that they have left.
    Kind("ahead", 4, "ahead", stay=(5, 30), reset=True),
    Kind("visitor", 8, "anywhere", stay=(0, 1)),
    Kind("resetting", 6, "zero", stay=(0, 1), reset=True),
)


def start_of(where: str, oldest: int, size: int, dice: random.Random) -> bytes:
    """Return the number to send in a header, for a log from `oldest` to `size`.

    `where` is `zero`, `now`, `anywhere`, `near`, `last` or `ahead`.
    """
    match where:
        case "zero":
            return b"0"
        case "now":
            return b"-0"
        case "anywhere":
            return b"%d" % dice.randrange(oldest, size + 1)
        case "near":
            return b"%d" % max(oldest, size - dice.randrange(NEAR))
        case "last":
            return b"-%d" % dice.randrange(1, NEAR)
        case "ahead":
            return b"%d" % (size + dice.randrange(1, AHEAD))
    raise ValueError(where)


def connect(port: int, receive_buffer: int = 0) -> socket.socket:
    """Connect to the server, and return the non-blocking socket."""
    sock = socket.socket()
    try:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(CONNECT)
        sock.connect(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def leave(sock: socket.socket, reset: bool) -> None:
    """Close a connection, with a reset or in the normal way."""
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


def half_close(sock: socket.socket) -> None:
    """Shut down the sending side of a connection."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        # The connection has ended. The next read reports that.
        pass


class Reader:
    """A client that has requested a stream, and the position in it.

    `request` is the request without the newline. `seen` is a log offset that other clients had
    reached some time ago, so all workers know that the log has this size at least.
    """

    def __init__(
        self,
        kind: Kind,
        sock: socket.socket,
        request: bytes,
        file: GrowingFile,
        tally: Tally,
        seen: int = 0,
    ) -> None:
        self.kind, self.sock, self.file, self.tally = kind, sock, file, tally
        self.pause = kind.pause
        # Whether the client has sent its header, and whether it has disconnected.
        self.started = self.closed = False
        # `got` is the time of the last bytes. `released` is when the client last began to read
        # again after it was held.
        self.connected = self.got = self.released = time.monotonic()
        number = request.removeprefix(b"?")
        # Whether the server sends the place of the stream first.
        self._asked = request.startswith(b"?")
        # The end that the server may have seen at least, and the end of the log.
        self._seen, self._size = seen, file.size
        self._oldest = file.noticed
        # The number of bytes before the end, if the header asks for that.
        self._back = int(number[1:]) if number.startswith(b"-") else None
        # The position of the next byte, once it is known. 0 means the earliest byte.
        self.position = int(number) or None if self._back is None else None
        # Whether it is certain that the stream is at this position.
        self.located = False
        # The bytes received before that.
        self._head = bytearray()

    def __str__(self) -> str:
        position = (
            f"byte {self.position}"
            if self.position is not None
            else f"an unknown position, after {len(self._head)} bytes"
        )
        return f"{self.kind.name} client on port {self.sock.getsockname()[1]} at {position}"

    def read(self) -> bool:
        """Read once, and return whether the stream continues."""
        try:
            data = self.sock.recv(self.kind.chunk)
        except BlockingIOError:
            return True
        except OSError as error:
            return self._ended(str(error))
        if not data:
            return self._ended("end of stream")
        self.got = time.monotonic()
        if self.located:
            return self._compare(data)
        self._head += data
        if self._asked:
            return len(self._head) < PLACE or self._read_place()
        return len(self._head) < LOCATE or self._locate()

    def _read_place(self) -> bool:
        """Read the line with the place of the stream, and check it."""
        line, rest = bytes(self._head[:PLACE]), bytes(self._head[PLACE:])
        self._head.clear()
        if not (place := _PLACE.fullmatch(line)):
            return self._wrong(f"the line with its place is {line!r}")
        start, end = int(place[1]), int(place[2])
        if not self._seen <= end <= self.file.size:
            return self._wrong(
                f"the log's end is said to be {end}, not from {self._seen} to {self.file.size}"
            )
        if self._back is not None:
            requested = end - self._back
            if start != requested and not (start > requested and self._is_earliest(start)):
                return self._wrong(
                    f"the stream is said to start at {start}, the log to end at {end}"
                )
        return self._begin(start, rest)

    def _locate(self) -> bool:
        """Find out where the stream started."""
        head = bytes(self._head)
        self._head.clear()
        if (start := self.file.content.locate(head)) is None:
            return self._wrong(f"received bytes that are not in the log: {head[:40]!r}")
        return self._begin(start, head)

    def _begin(self, start: int, data: bytes) -> bool:
        """Begin the stream at `start`, if it may start there."""
        if not self._may_begin(start):
            return self._wrong(f"its stream started at byte {start}")
        self.position, self.located = start, True
        return not data or self._compare(data)

    def _may_begin(self, start: int) -> bool:
        """Return whether the stream may start at the log offset `start`.

        For a start before the end of the log, the end that the server saw was between the size that
        all workers knew at the time of the request, and the size now.
        """
        if self.position is not None:
            return start == self.position
        if self._back is None:
            return self._is_earliest(start)
        least, most = self._seen - self._back, self.file.size - self._back
        return max(self._oldest, least) <= start <= max(self.file.oldest, most)

    def _is_earliest(self, start: int) -> bool:
        """Return whether the log may have begun at `start` since the request.

        The server may not have noticed yet that the oldest file was deleted.
        """
        return self._oldest <= start <= self.file.oldest and self.file.is_base(start)

    def _compare(self, data: bytes) -> bool:
        assert self.position is not None
        expected = self.file.content.read(self.position, len(data))
        if data != expected or self.position + len(data) > self.file.size:
            index = next(
                (
                    i
                    for i, (received, right) in enumerate(zip(data, expected, strict=True))
                    if received != right
                ),
                len(data),
            )
            if self.position + index in self.file.truncated:
                # The file's new bytes were sent before the server noticed that it was truncated.
                return self._gone()
            return self._wrong(
                f"byte {self.position + index} differs: {data[index : index + 16]!r}"
            )
        self.position += len(data)
        self.tally.checked += len(data)
        self.file.delivered = max(self.file.delivered, self.position)
        return True

    def _ended(self, how: str) -> bool:
        """Count the end of a stream that the client did not end itself, or report it as wrong."""
        # Where the stream is if the server knows nothing of the last deletions.
        position = self._oldest if self.position is None else self.position
        if position < self.file.truncated.stop:
            return self._gone()
        if not self.located and not self._head:
            if self.position is not None and position < self.file.oldest:
                return self._gone()
            if self.tally.may_be_lost(self.connected):
                self.tally.lost += 1
                return False
        return self._wrong(how)

    def _gone(self) -> bool:
        self.tally.gone += 1
        return False

    def _wrong(self, what: str) -> bool:
        self.tally.note_wrong(f"{self}: {what}")
        return False

    def waiting_since(self, history: Iterable[tuple[float, int]]) -> float | None:
        """Return since when the server should have sent bytes; None if it need not.

        `history` has entries (time, size) of the log, the oldest first.
        """
        for when, size in history:
            if size > (self._size if self.position is None else self.position):
                return max(when, self.got, self.released)
        return None

    def caught_up(self) -> bool:
        """Return whether the client has all bytes; this includes one that starts beyond the end."""
        if not self.located:
            return self.position is not None and self.position >= self.file.size
        return self.position == self.file.size


class InvalidClient:
    """A client that sends no valid header: the server must send it nothing and disconnect it."""

    def __init__(self, sock: socket.socket, tally: Tally) -> None:
        self.sock, self.tally = sock, tally
        self.connected = time.monotonic()
        self.closed = False

    def read(self) -> bool:
        """Read once, and return whether the connection is still open."""
        try:
            data = self.sock.recv(100)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if data:
            self.tally.note_wrong(f"a client without a valid header received {data[:16]!r}")
        return False


def invalid_header(dice: random.Random) -> bytes:
    """Return random bytes that are not a valid header."""
    return dice.choice([
        b"\n", b"abc\n", b"1_000\n", b"1e3\n", b"99999999999999999999\n", b"0" * 33, b"-\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        # The beginning of a TLS handshake.
        b"\x16\x03\x01\x02\x00\x01" + dice.randbytes(512),
        b"x" + dice.randbytes(dice.randrange(200)) + b"\n",
    ])  # fmt: skip
