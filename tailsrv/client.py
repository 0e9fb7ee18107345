"""Follows a file that tailsrv serves, through lost connections, and gives its bytes: a library, and what the commands use.

from tailsrv.client import follow

for chunk in follow("logserver:4321"):
    print(chunk)
"""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from tailsrv.dial import QUIET, Backoff, ConnectError, Dialer, UnknownHostError, Wait, fetch, name_of, wait
from tailsrv.endpoint import EndpointError, parse_endpoint
from tailsrv.place import CONTEXT, FromEnd, FromStart, LostPlaceError, OtherFileError, Place, PlaceError, Recall, place_at

__all__ = [
    "Backoff", "ConnectError", "EndpointError", "Follow", "LostPlaceError", "OtherFileError", "PlaceError", "UnknownHostError", "follow",
]  # fmt: skip

Address = str | tuple[str, int]

CHUNK = 1 << 18  # the most that one step gives
STUCK = 5.0  # seconds without a byte where bytes must be: time to say so
ANCHORS = 3  # attempts to learn the end of the file


def follow(
    addresses: Address | Sequence[Address],
    offset: int | str = 0,
    *,
    once: bool = False,
    idle: float | None = None,
    whole_lines: bool = False,
    backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    connect_timeout: float = 10.0,
    recall: Recall | None = None,
    report: Callable[[str], object] = lambda _: None,
    wait: Wait = wait,
) -> "Follow":
    """Return an iterator of a served file's bytes from `offset` on, none lost and none twice, whatever happens to connections.

    `addresses` is "HOST:PORT" (an IPv6 address in brackets) or (host, port), or several of these that serve the same file.
    They are tried in turn, each with every address that its name has, `connect_timeout` seconds each.
    `offset` is N, -N or "-0", as in the protocol. The chunks end anywhere, and are never empty.

    `once` ends the iteration with the first connection, `idle` after so many seconds without a byte; by default it never ends.
    With `whole_lines`, an offset from the end begins at the next line. `report` is called with a line for people when connections
    are lost or cannot be made, once for each reason. `recall` and `wait` are for those who keep what they get in a file,
    or wait for other things as well; see `Recall` and `Wait`.

    Before it goes on after a lost connection, it asks for the last 4 KiB again and compares. With N this is exact, and OtherFileError
    says that the file is another one, after a rotation for instance. With -N and "-0" no offset is known, and it looks for those bytes
    near the end; LostPlaceError says that they are not there exactly once.

    Raises EndpointError and ValueError for bad arguments, at once; then, from the iteration, UnknownHostError if no name has an address
    at the start, ConnectError (`once`) if there is no connection, OSError (`once`) if the connection breaks, and the two above.
    """
    servers = [parse_endpoint(one) if isinstance(one, str) else one for one in _several(addresses)]
    if not servers:
        raise EndpointError("no HOST:PORT")
    dialer = Dialer(servers, backoff, connect_timeout, wait, report)
    return Follow(dialer, place_at(offset, recall), wait, report, once=once, idle=idle, whole_lines=whole_lines)


def _several(addresses: Address | Sequence[Address]) -> list[Address]:
    match addresses:
        case str():
            return [addresses]
        case (str() as host, int() as port):
            return [(host, port)]
        case _:
            return list(addresses)


class Follow(Iterator[bytes]):
    """The iterator that `follow` returns. Close it, or use it in a `with` statement, to close its connection."""

    def __init__(
        self,
        dialer: Dialer,
        place: Place,
        wait: Wait,
        report: Callable[[str], object],
        *,
        once: bool,
        idle: float | None,
        whole_lines: bool,
    ) -> None:
        self._dialer, self._place, self._wait, self._report = dialer, place, wait, report
        self._once, self._idle = once, idle
        self._must_align = whole_lines and isinstance(place, FromEnd)
        self._sock: socket.socket | None = None
        self._name = ""  # of the server that we are connected to
        self._ready = b""  # is given next
        self._since = time.monotonic()  # when the last new byte came
        self._anchors = ANCHORS
        self._told = False  # that a server sends nothing to compare
        self._closed = False

    @property
    def offset(self) -> int | None:
        """The offset of the next byte; None where the stream began from the end: the protocol does not tell it."""
        return None if self._place.offset is None else self._place.offset - len(self._ready)

    def close(self) -> None:
        """End the iteration."""
        self._closed = True
        self._hang_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __next__(self) -> bytes:
        """Return the next chunk."""
        while self._prepare():
            if self._ready:
                chunk, self._ready = self._ready, b""
                return chunk
            self._receive(CHUNK)
        raise StopIteration

    def splice(self, pipe: int, count: int) -> int:
        """Move up to `count` new bytes into `pipe`, which has room, with no copy; return how many, 0 at the end."""
        assert isinstance(self._place, FromStart)
        while self._prepare():
            assert self._sock is not None
            try:
                if moved := os.splice(self._sock.fileno(), pipe, count):
                    self._place.skip(moved)
                    self._came()
                    return moved
                self._lost(None)
            except BlockingIOError:
                pass
            except OSError as error:
                self._lost(error)
        return 0

    def _prepare(self) -> bool:
        """Wait for something new; tell whether it is there, in `_ready` or in the socket."""
        while not (self._closed or self._ready):
            if self._sock is None and not self._connect():
                continue
            assert self._sock is not None
            if self._wait(self._sock.fileno(), select.POLLIN, self._patience()):
                if not self._place.wanted:
                    return True
                self._receive(min(self._place.wanted, CHUNK))
            elif (left := self._left()) is not None and left <= 0:
                self.close()
            else:
                self._stay_quiet(self._sock)
        return bool(self._ready)

    def _left(self) -> float | None:
        """Return the seconds until the iteration has been idle for too long."""
        return None if self._idle is None else self._since + self._idle - time.monotonic()

    def _patience(self) -> float | None:
        """Return for how long to wait for bytes before something else is to be done."""
        if isinstance(self._place, FromEnd):
            restless = self._place.wanted or (self._place.unsure and self._anchors)
        else:
            restless = self._place.wanted and not self._told
        quiet = QUIET if isinstance(self._place, FromEnd) else STUCK
        limits = [seconds for seconds in (self._left(), quiet if restless else None) if seconds is not None]
        return min(limits, default=None)

    def _connect(self) -> bool:
        """Connect and send the header; tell whether there is a connection."""
        left = self._left()
        self._sock = self._dialer.connect(None if left is None else time.monotonic() + left, self._once)
        if self._sock is None:
            self.close()  # it has been idle for too long
            return False
        self._told = False
        try:
            self._name = name_of(self._sock)
            if self._must_align:
                self._align(self._sock)
            self._sock.send(self._place.header())
        except OSError as error:
            self._lost(error)
        return self._sock is not None

    def _align(self, sock: socket.socket) -> None:
        """Begin at a whole line: one byte earlier, if there is one, and behind the first newline from there.

        Whether there is one, an offset from the start tells. In a file that is shorter, all is whole.
        """
        assert isinstance(self._place, FromEnd)
        longer = fetch(sock, b"%d\n" % self._place.count, 1, self._wait)
        self._sock = self._dialer.again(sock)
        sock.close()
        if longer:
            self._place = FromEnd(self._place.count + 1, line=True)
        self._must_align = False

    def _receive(self, count: int) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(count)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(error)
            return
        if data:
            self._take(self._place.take(data))
        else:
            self._lost(None)

    def _take(self, data: bytes | None) -> None:
        """Keep what the place has found to be new; where it has found that it needs another connection, end this one."""
        if data is None:
            self._hang_up()
        elif data:
            self._ready = data
            self._came()
        elif not self._place.wanted:
            self._dialer.succeeded(self._name)

    def _came(self) -> None:
        self._since = time.monotonic()
        self._dialer.succeeded(self._name)

    def _stay_quiet(self, sock: socket.socket) -> None:
        """Do what is to be done when nothing comes."""
        if isinstance(self._place, FromStart):
            self._told = True
            self._report(f"{self._name} sends nothing: is its file shorter than the {self._place.offset} bytes that we have? waiting")
            return
        self._take(self._place.settle())
        if self._sock and self._place.unsure and self._anchors:
            self._anchors -= 1
            if other := self._dialer.again(sock):
                with other:
                    self._place.offer(fetch(other, b"-%d\n" % CONTEXT, CONTEXT, self._wait))

    def _lost(self, error: OSError | None) -> None:
        """Note that the connection has ended, in good order if there is no error. Raises the error with `once`."""
        self._hang_up()
        if self._once:
            self._closed = True
            if error:
                raise error
        self._dialer.failed(f"{self._name}: {error.strerror if error else 'the connection was ended'}")

    def _hang_up(self) -> None:
        if self._sock:
            self._sock.close()
        self._sock = None
