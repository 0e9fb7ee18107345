"""Gives a served file's bytes, through lost connections."""

import select
import socket
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from tailsrv.client.connector import (
    CONNECTION_ENDED,
    QUIET_TIME,
    ConnectError,
    Connector,
    Wait,
    fetch,
    name_of,
)
from tailsrv.client.resume import ANCHOR, CONTEXT, FromEnd, FromStart, PlaceError, Position
from tailsrv.client.splicing import move

# the most that one step gives; twice as much costs a quarter more time, in page faults
RECEIVE_CHUNK = 1 << 16
# seconds without what a server surely has if it serves our file: time to say so, or to try another
STUCK_TIME = 2.0
# to that they double while one after the other is given up: all may be slow to begin
MAX_STUCK_TIME = 30.0
MISSING_BYTES = "does not send what came before: its file is shorter, or another one"
# attempts to learn the file's end; they fail where it grows meanwhile, and then enough comes by itself
ANCHOR_TRIES = 3


class Follow(Iterator[bytes]):
    """The iterator that `follow` returns. Close it, or use it in a `with` statement, to close its connection."""

    def __init__(
        self,
        connector: Connector,
        place: Position,
        wait: Wait,
        report: Callable[[str], object],
        *,
        once: bool,
        idle: float | None,
        whole_lines: bool,
    ) -> None:
        self._connector, self._position, self._wait, self._report = connector, place, wait, report
        self._once, self._idle = once, idle
        self._whole_lines = whole_lines
        # no connection yet
        self._first = True
        self._anchors = 0 if once else ANCHOR_TRIES
        self._sock: socket.socket | None = None
        # of the server that we are connected to
        self._name = ""
        # that it does not send what it should have
        self._told = False
        # when it sent something, or was connected to
        self._heard = 0.0
        # servers in a row that did not
        self._given_up = 0
        # when to ask for the file's end, in a search
        self._due = 0.0
        # is given next
        self._ready = b""
        # when something new came
        self._since = time.monotonic()
        self._closed = False

    @property
    def offset(self) -> int | None:
        """The offset of the next byte; None while it is not known, because the stream began from the end."""
        return None if self._position.offset is None else self._position.offset - len(self._ready)

    def close(self) -> None:
        """End the iteration."""
        self._closed = True
        self._hang_up()
        self._connector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __next__(self) -> bytes:
        """Return the next chunk."""
        while self._prepare():
            if self._ready:
                chunk, self._ready = self._ready, b""
                return chunk
            self._receive(RECEIVE_CHUNK)
        raise StopIteration

    def splice(self, pipe: int, count: int) -> int:
        """Move up to `count` new bytes into `pipe`, which is empty, without a copy where that goes; return how many, 0 at the end.

        For an offset of 0 or more only, with a `recall`.
        """
        assert isinstance(self._position, FromStart)
        while self._prepare():
            assert self._sock is not None
            try:
                moved = move(self._sock, pipe, count)
            except OSError as error:
                self._lost(error)
                continue
            if moved:
                self._position.pass_by(moved)
                self._came()
                return moved
            if moved == 0:
                self._lost(None)
        return 0

    def _prepare(self) -> bool:
        """Wait for something new; tell whether it is there, in `_ready` or in the socket, or has come to an end."""
        try:
            while not (self._closed or self._ready):
                if self._sock is None and not self._connect():
                    continue
                assert self._sock is not None
                if (
                    isinstance(self._position, FromEnd)
                    and self._position.searching
                    and time.monotonic() >= self._due
                ):
                    self._reach(self._sock, self._position)
                elif self._wait(self._sock.fileno(), select.POLLIN, self._patience()):
                    if not self._position.wanted:
                        return True
                    self._receive(min(self._position.wanted, RECEIVE_CHUNK))
                elif (left := self._left()) is not None and left <= 0:
                    self._end_idle()
                else:
                    self._use_the_quiet(self._sock)
        except (PlaceError, ConnectError):
            self.close()
            raise
        return bool(self._ready)

    def _end_idle(self) -> None:
        """End the iteration: nothing has come for long enough. Raises ConnectError where this server could have sent nothing."""
        self.close()
        if self._position.wanted:
            raise ConnectError(f"{self._name}: {MISSING_BYTES}")

    def _left(self) -> float | None:
        """Return the seconds until the iteration has been idle for too long."""
        return None if self._idle is None else self._since + self._idle - time.monotonic()

    def _patience(self) -> float | None:
        """Return for how many seconds to wait for bytes before something else is to be done."""
        now = time.monotonic()
        if self._position.wanted:
            quiet = (
                self._due - now
                if isinstance(self._position, FromEnd)
                else None
                if self._told
                else self._heard + self._stuck() - now
            )
        else:
            quiet = (
                QUIET_TIME
                if isinstance(self._position, FromEnd)
                and self._anchors
                and not self._position.anchored
                else None
            )
        return min(
            (max(0.0, seconds) for seconds in (self._left(), quiet) if seconds is not None),
            default=None,
        )

    def _stuck(self) -> float:
        """Return for how many seconds a server may be silent that should not be."""
        return min(MAX_STUCK_TIME, STUCK_TIME * 2.0 ** min(self._given_up, 30))

    def _connect(self) -> bool:
        """Connect and send the header; tell whether there is a connection. Raises ConnectError at the end of an idle time, too."""
        left = self._left()
        self._sock = self._connector.connect(
            None if left is None else time.monotonic() + left, self._once
        )
        self._told = False
        try:
            self._name = name_of(self._sock)
            if self._first:
                self._begin()
        except OSError as error:
            self._lost(error)
            return False
        # may read a file: its errors are not the connection's
        header = self._position.header()
        try:
            self._sock.send(header)
        except OSError as error:
            self._lost(error)
        self._heard = time.monotonic()
        self._due = self._heard + QUIET_TIME
        return self._sock is not None

    def _begin(self) -> None:
        """Do what is to be done at the first connection only.

        With `whole_lines`, begin one byte earlier, if there is one, and behind the first newline from there.
        Whether there is one, an offset from the start tells. In a file that is shorter, everything is whole.
        """
        assert self._sock is not None
        if self._whole_lines and isinstance(self._position, FromEnd):
            with self._sock as sock:
                longer = self._is_longer(sock, self._position.count)
                self._sock = self._connector.reconnect(sock, self._wait)
            if longer:
                self._position = FromEnd(self._position.count + 1, line=True)
        self._first = False
        # connecting is not idling
        self._since = time.monotonic()

    def _is_longer(self, sock: socket.socket, count: int) -> bool:
        """Tell whether the file has more than `count` bytes. Silence says that it has not only if the server gives its start.

        An empty one has none: that is believed a little later.
        """
        if fetch(sock, b"%d\n" % count, 1, self._wait):
            return True
        with self._connector.reconnect(sock, self._wait) as other:
            start = fetch(other, b"0\n", min(count, ANCHOR) + 1, self._wait)
            return len(start) > count or (
                not start and self._wait(other.fileno(), select.POLLIN, STUCK_TIME)
            )

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
            self._heard = time.monotonic()
            self._keep(self._position.take(data))
        else:
            self._lost(None)

    def _keep(self, data: bytes | None) -> None:
        """Keep what is new; None: the place needs another connection."""
        if isinstance(self._position, FromEnd):
            self._position = self._position.known()
        if data is None:
            self._hang_up()
        elif data:
            self._ready = data
            self._came()
        elif not self._position.wanted:
            self._succeeded()

    def _came(self) -> None:
        self._since = time.monotonic()
        self._succeeded()

    def _succeeded(self) -> None:
        self._given_up = 0
        self._connector.succeeded(self._name)

    def _use_the_quiet(self, sock: socket.socket) -> None:
        """Do what is to be done when nothing comes."""
        if isinstance(self._position, FromEnd):
            self._position.settle()
            self._keep(b"")
        if (
            isinstance(self._position, FromEnd)
            and self._anchors
            and not (self._position.wanted or self._position.anchored)
        ):
            self._anchors -= 1
            self._anchor(sock, self._position)
        self._complain()

    def _complain(self) -> None:
        """Try another replica, or say that there is none, if what is wanted has not come for long enough."""
        if not self._position.wanted or time.monotonic() < self._heard + self._stuck():
            return
        if self._connector.choice:
            # another replica may have it
            self._hang_up()
            self._given_up += 1
            self._connector.failed(f"{self._name}: {MISSING_BYTES}")
        elif not self._told:
            self._told = True
            self._report(f"{self._name}: {MISSING_BYTES}; waiting")

    def _reach(self, sock: socket.socket, place: FromEnd) -> None:
        """Ask how far the window has to reach. Raises LostPlaceError."""
        if place.unsearched and (end := self._fetch_end(sock, CONTEXT, self._wait)):
            self._keep(place.reach(end))
        self._due = time.monotonic() + QUIET_TIME
        self._complain()

    def _anchor(self, sock: socket.socket, place: FromEnd) -> None:
        """Ask what is before the place, if nothing comes meanwhile."""

        def wait_beside(fd: int, events: int, seconds: float | None) -> bool:
            # the stream goes first
            with select.epoll() as both:
                both.register(fd, events)
                both.register(sock, select.POLLIN)
                return self._wait(both.fileno(), select.POLLIN, seconds) and fd in dict(
                    both.poll(0)
                )

        if end := self._fetch_end(sock, ANCHOR, wait_beside):
            place.offer(end)

    def _fetch_end(self, sock: socket.socket, count: int, wait: Wait) -> bytes:
        """Return the file's last `count` bytes or all of a shorter one, from the server at the other end of `sock`; b"" if in doubt."""

        def ask(header: bytes) -> bytes:
            with self._connector.reconnect(sock, wait) as other:
                return fetch(other, header, count, wait)

        try:
            end = ask(b"-%d\n" % count)
            # A short answer may be a slow one, but not one that is the same from both ends, unless there is none.
            return end if len(end) == count or (end and end == ask(b"0\n")) else b""
        except OSError:
            return b""

    def _lost(self, error: OSError | None) -> None:
        """Note that the connection has ended, in good order if there is no error. Raises ConnectError for one with `once`."""
        self._hang_up()
        reason = f"{self._name}: {error.strerror if error else CONNECTION_ENDED}"
        if self._once:
            self._closed = True
            if error:
                raise ConnectError(reason)
        self._connector.failed(reason)

    def _hang_up(self) -> None:
        if self._sock:
            self._sock.close()
        self._sock = None
