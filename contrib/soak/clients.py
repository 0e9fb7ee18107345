"""The clients of a run, of several kinds. Each compares every byte it receives with the file."""

import random
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
# The server's --grace, in seconds: after a rotation, clients that do not read have this much time.
GRACE = 5.0
# Seconds within which a server on a busy machine notices a rotation. Until then it serves the old
# file to new clients.
NOTICE = 0.5

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
    Kind("slow", 4, "near", stay=(10, 60), chunk=4096, pause=0.05, receive_buffer=4096),
    Kind("stalled", 4, "last", chunk=1 << 20, pause=7.0),
    Kind("half-closed", 4, "near", half_close=True),
    Kind("junk", 4, "last", junk=True),
    Kind("piecemeal", 3, "anywhere", stay=(1, 5), piecemeal=True),
    # The server sends nothing to these clients, so no failing send tells it that they have left.
    Kind("ahead", 4, "ahead", stay=(5, 30), reset=True),
    Kind("visitor", 8, "anywhere", stay=(0, 1)),
    Kind("resetting", 6, "zero", stay=(0, 1), reset=True),
)


def start_of(where: str, size: int, dice: random.Random) -> bytes:
    """Return the number to send in a header, for a file of `size` bytes.

    `where` is `zero`, `now`, `anywhere`, `near`, `last` or `ahead`.
    """
    match where:
        case "zero":
            return b"0"
        case "now":
            return b"-0"
        case "anywhere":
            return b"%d" % dice.randrange(size + 1)
        case "near":
            return b"%d" % max(0, size - dice.randrange(NEAR))
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
    """A client that has requested a stream, and the position in it."""

    def __init__(
        self, kind: Kind, sock: socket.socket, number: bytes, file: GrowingFile, tally: Tally
    ) -> None:
        self.kind, self.sock, self.file, self.tally = kind, sock, file, tally
        self.pause = kind.pause
        # Whether the client has sent its header, and whether it has disconnected.
        self.started = self.closed = False
        # `got` is the time of the last bytes. `released` is when the client last began to read
        # again after it was held.
        self.connected = self.got = self.released = time.monotonic()
        # Generation and size of the file before the server can have read the header.
        self._generation, self._size = file.generation, file.size
        # The server may not have noticed the last rotation yet.
        unnoticed = self.connected - file.rotated < NOTICE
        self._oldest = self._generation - unnoticed
        # The number of bytes before the end, if the header asks for that.
        self._back = int(number[1:]) if number.startswith(b"-") else None
        # The position of the next byte, once it is known.
        self.position = int(number) if self._back is None else None
        # The generation that the client reads, once it is known.
        self.generation: int | None = None
        # The bytes received before the generation is known.
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
        if self.generation is not None:
            return self._compare(data)
        self._head += data
        return len(self._head) < LOCATE or self._locate()

    def _locate(self) -> bool:
        """Find out where the stream started, and whether it may start there."""
        head, self._head = bytes(self._head), bytearray()
        found = self.file.content.locate(head)
        if found is None:
            return self._wrong(f"received bytes that are in no file: {head[:40]!r}")
        self.generation, start = found
        if not self._may_begin(self.generation, start):
            return self._wrong(f"its stream started at byte {start} of file {self.generation}")
        self.position = start
        return self._compare(head)

    def _may_begin(self, generation: int, start: int) -> bool:
        """Return whether the stream may start at byte `start` of that generation.

        For a start before the end of the file, the end that the server saw was between the size at
        the time of the request and the size now.
        """
        if not self._oldest <= generation <= self.file.generation:
            return False
        if self._back is None:
            return start == self.position
        # A later generation did not exist at the time of the request.
        least = self._size if generation == self._generation else 0
        return (
            max(0, least - self._back) <= start <= max(0, self.file.sizes[generation] - self._back)
        )

    def _compare(self, data: bytes) -> bool:
        assert self.generation is not None
        assert self.position is not None
        expected = self.file.content.read(self.generation, self.position, len(data))
        if data != expected or self.position + len(data) > self.file.sizes[self.generation]:
            index = next(
                (
                    i
                    for i, (received, right) in enumerate(zip(data, expected, strict=True))
                    if received != right
                ),
                len(data),
            )
            return self._wrong(
                f"byte {self.position + index} of file {self.generation} differs:"
                f" {data[index : index + 16]!r}"
            )
        self.position += len(data)
        self.tally.checked += len(data)
        return True

    def _ended(self, how: str) -> bool:
        """Count the end of a stream that the client did not end itself, or report it as wrong."""
        if self.file.generation > (self._oldest if self.generation is None else self.generation):
            if self.generation is None or self.position == self.file.sizes[self.generation]:
                self.tally.rotated += 1
            elif self.pause or time.monotonic() - self.released < 2 * GRACE:
                self.tally.cut_off += 1
            else:
                self._wrong(f"{how}, before the end of file {self.generation}")
        elif self.generation is None and not self._head and self.tally.may_be_lost(self.connected):
            self.tally.lost += 1
        else:
            self._wrong(how)
        return False

    def _wrong(self, what: str) -> bool:
        self.tally.note_wrong(f"{self}: {what}")
        return False

    def waiting_since(self, history: Iterable[tuple[float, int, int]]) -> float | None:
        """Return since when the server should have sent bytes, or the end; None if it need not.

        `history` has entries (time, generation, size) of the file, the oldest first.
        """
        for when, generation, size in history:
            if self._is_due(generation, size):
                return max(when, self.got, self.released)
        return None

    def _is_due(self, generation: int, size: int) -> bool:
        """Return whether the server has something to send if the file has this state."""
        current = self._generation if self.generation is None else self.generation
        if generation != current and self.generation is not None:
            return generation > current
        if self.position is not None:
            return generation >= current and size > self.position
        return generation >= current and size > (self._size if generation == current else 0)

    def caught_up(self) -> bool:
        """Return whether the client has all bytes; this includes one that starts beyond the end."""
        if self.generation is None:
            return self.position is not None and self.position >= self.file.size
        return self.generation == self.file.generation and self.position == self.file.size


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
