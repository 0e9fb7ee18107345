"""The clients of a run: of several kinds, each of which compares every byte that it gets with what the file holds there."""

import random
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass

from content import LOCATE
from growing import GrowingFile
from tally import Tally

# bytes from the end, for those who could not read a file of hours in the end
NEAR = 8 << 20
AHEAD = 64 << 10
# seconds; the kernel accepts for a server that is busy, so that this is long
CONNECT = 10.0
# seconds that a rotation gives to those who do not read: --grace
GRACE = 5.0
# seconds in which a busy machine's server notices a rotation; until then it serves the old file to those who come
NOTICE = 0.5

# SO_LINGER: no FIN on close, but a reset
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Kind:
    """How a client behaves; `count` of it are there at a time, and each stays between `stay` seconds, or to the end."""

    name: str
    count: int
    # where its stream begins: start_of() has the words
    start: str
    stay: tuple[float, float] | None = None
    # bytes that it reads at one go
    chunk: int = 256 << 10
    # seconds between these
    pause: float = 0.0
    receive_buffer: int = 0
    half_close: bool = False
    # it goes on sending behind its header
    junk: bool = False
    # it sends its header byte by byte
    piecemeal: bool = False
    # it leaves with a reset
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
    # nothing is sent to it, by which it could be found to have left
    Kind("ahead", 4, "ahead", stay=(5, 30), reset=True),
    Kind("visitor", 8, "anywhere", stay=(0, 1)),
    Kind("resetting", 6, "zero", stay=(0, 1), reset=True),
)


def start_of(where: str, size: int, dice: random.Random) -> bytes:
    """Return the number that a client of a file of `size` bytes asks for."""
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
    """Return a connection to the server, non-blocking."""
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
    """Close a connection, in order or with a reset."""
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


def half_close(sock: socket.socket) -> None:
    """Say no more on a connection."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        # it has ended, which shows when it is read from
        pass


class Reader:
    """A client that has asked for a stream, and where that stream is."""

    def __init__(
        self, kind: Kind, sock: socket.socket, number: bytes, file: GrowingFile, tally: Tally
    ) -> None:
        self.kind, self.sock, self.file, self.tally = kind, sock, file, tally
        self.pause = kind.pause
        # it has sent its header; it has left
        self.started = self.closed = False
        # `got`: bytes; `released`: it read again after it was held
        self.connected = self.got = self.released = time.monotonic()
        # of the file, before the server can have read the header
        self._generation, self._size = file.generation, file.size
        # the server may not know yet that the file has gone
        unnoticed = self.connected - file.rotated < NOTICE
        self._oldest = self._generation - unnoticed
        self._back = int(number[1:]) if number.startswith(b"-") else None
        # of the next byte, once that is known
        self.position = int(number) if self._back is None else None
        # of the file that it reads, once that is known
        self.generation: int | None = None
        # what has come before that
        self._head = bytearray()

    def __str__(self) -> str:
        place = (
            f"byte {self.position}"
            if self.position is not None
            else f"{len(self._head)} bytes from somewhere"
        )
        return f"{self.kind.name} client on port {self.sock.getsockname()[1]} at {place}"

    def read(self) -> bool:
        """Read once, and tell whether the stream goes on."""
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
        """Find out where the stream began, and whether it should have."""
        head, self._head = bytes(self._head), bytearray()
        found = self.file.content.locate(head)
        if found is None:
            return self._wrong(f"got bytes of no file: {head[:40]!r}")
        self.generation, start = found
        if not self._may_begin(self.generation, start):
            return self._wrong(f"its stream began at byte {start} of file {self.generation}")
        self.position = start
        return self._compare(head)

    def _may_begin(self, generation: int, start: int) -> bool:
        """Tell whether the stream may begin there: the end was between its size when we asked and its size now."""
        if not self._oldest <= generation <= self.file.generation:
            return False
        if self._back is None:
            return start == self.position
        # else it was another file when we asked
        least = self._size if generation == self._generation else 0
        return (
            max(0, least - self._back) <= start <= max(0, self.file.sizes[generation] - self._back)
        )

    def _compare(self, data: bytes) -> bool:
        assert self.generation is not None
        assert self.position is not None
        expected = self.file.content.read(self.generation, self.position, len(data))
        if data != expected or self.position + len(data) > self.file.sizes[self.generation]:
            place = next(
                (
                    i
                    for i, (ours, theirs) in enumerate(zip(data, expected, strict=True))
                    if ours != theirs
                ),
                len(data),
            )
            return self._wrong(
                f"byte {self.position + place} of file {self.generation} differs: {data[place : place + 16]!r}"
            )
        self.position += len(data)
        self.tally.checked += len(data)
        return True

    def _ended(self, how: str) -> bool:
        """Judge an end that we did not bring about."""
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
        """Return since when it has been owed bytes, or an end; None if it is not.

        `history` tells when the file was of which generation and size, the oldest first.
        """
        for when, generation, size in history:
            if self._is_owed(generation, size):
                return max(when, self.got, self.released)
        return None

    def _is_owed(self, generation: int, size: int) -> bool:
        ours = self._generation if self.generation is None else self.generation
        if generation != ours and self.generation is not None:
            return generation > ours
        if self.position is not None:
            return generation >= ours and size > self.position
        return generation >= ours and size > (self._size if generation == ours else 0)

    def caught_up(self) -> bool:
        """Tell whether it has all there is; one that waits for a byte beyond a new file's end has."""
        if self.generation is None:
            return self.position is not None and self.position >= self.file.size
        return self.generation == self.file.generation and self.position == self.file.size


class Stranger:
    """A client that does not speak our protocol: it must get nothing but an end."""

    def __init__(self, sock: socket.socket, tally: Tally) -> None:
        self.sock, self.tally = sock, tally
        self.connected = time.monotonic()
        self.closed = False

    def read(self) -> bool:
        """Read once, and tell whether there is more to come."""
        try:
            data = self.sock.recv(100)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if data:
            self.tally.note_wrong(f"a stranger got {data[:16]!r}")
        return False


def nonsense(dice: random.Random) -> bytes:
    """Return what is no header, whatever the dice say."""
    return dice.choice([
        b"\n", b"abc\n", b"1_000\n", b"1e3\n", b"99999999999999999999\n", b"0" * 33, b"-\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        # what a TLS client begins with
        b"\x16\x03\x01\x02\x00\x01" + dice.randbytes(512),
        b"x" + dice.randbytes(dice.randrange(200)) + b"\n",
    ])  # fmt: skip
