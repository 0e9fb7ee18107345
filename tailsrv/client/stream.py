"""Receives the bytes of a served file, and reconnects and resumes when a connection is lost.

`Follow` is the iterator. It gets connections from a `Connector`, and asks a position (`FromStart`
or `FromEnd`) which header to send and which of the received bytes are new.
"""

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

# The most bytes to receive at once. Twice as many take a quarter more time, because of page faults.
RECEIVE_CHUNK = 1 << 16
# Seconds to wait for bytes that the server must have if it serves the same file. After that, the
# client reports that they are missing, or tries another server.
STUCK_TIME = 2.0
# The upper limit of that wait. The wait doubles with each server in a row that did not send such
# bytes, because all of the servers may be slow to send their first byte.
MAX_STUCK_TIME = 30.0
# Attempts to fetch the bytes before the position. An attempt fails if the file grows meanwhile. If
# all of them fail, the stream itself has soon received enough bytes to resume.
ANCHOR_TRIES = 3


class Follow(Iterator[bytes]):
    """The iterator that `follow` returns: it yields the bytes of a served file in chunks.

    Call `close`, or use it in a `with` statement, to close its connection. Use it in one thread
    only.
    """

    def __init__(
        self,
        connector: Connector,
        position: Position,
        wait: Wait,
        report: Callable[[str], object],
        *,
        once: bool,
        idle: float | None,
        whole_lines: bool,
    ) -> None:
        self._connector, self._position = connector, position
        self._wait, self._report = wait, report
        self._once, self._idle = once, idle
        self._whole_lines = whole_lines
        # Whether there has been no connection yet.
        self._first = True
        # How many more times to try to fetch the bytes before the position.
        self._anchors = 0 if once else ANCHOR_TRIES
        self._sock: socket.socket | None = None
        # "HOST:PORT" of the server of the present connection, or of the last one.
        self._name = ""
        # Whether this client has reported that this server does not send bytes it must have.
        self._missing_reported = False
        # The time when the server last sent something, or when this client connected to it.
        self._last_received = 0.0
        # The number of servers in a row that were left because they did not send such bytes.
        self._given_up = 0
        # While the window is searched for the position: when to fetch the end of the file next.
        self._fetch_end_at = 0.0
        # The next chunk to return.
        self._chunk = b""
        # The time when new bytes last arrived.
        self._last_new = time.monotonic()
        self._closed = False

    @property
    def offset(self) -> int | None:
        """The offset after the last chunk; None while it is unknown.

        It can be unknown only if the stream began at an offset from the end.
        """
        return None if self._position.offset is None else self._position.offset - len(self._chunk)

    def close(self) -> None:
        """Close the connection and end the iteration: a further `next` raises StopIteration."""
        self._closed = True
        self._disconnect()
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
            if self._chunk:
                chunk, self._chunk = self._chunk, b""
                return chunk
            self._receive(RECEIVE_CHUNK)
        raise StopIteration

    def splice(self, pipe: int, count: int) -> int:
        """Move up to `count` new bytes into the empty `pipe`; return how many, 0 at the end.

        This is for programs like `tssync`. It moves the bytes inside the kernel if that is
        possible, so this object does not see them. Therefore `follow` must have been called with an
        offset from the start, and with `recall`.
        """
        assert isinstance(self._position, FromStart)
        while self._prepare():
            assert self._sock is not None
            try:
                moved = move(self._sock, pipe, count)
            except OSError as error:
                self._on_disconnect(error)
                continue
            if moved:
                self._position.advance(moved)
                self._on_new_bytes()
                return moved
            if moved == 0:
                self._on_disconnect(None)
        return 0

    def _prepare(self) -> bool:
        """Wait for new bytes. Return True if there are some, False at the end of the iteration.

        After True, the new bytes are in `_chunk`. If `_chunk` is empty, the socket is readable: the
        caller receives new bytes from it, or the end of the connection.
        """
        try:
            while not (self._closed or self._chunk):
                if self._sock is None and not self._connect():
                    continue
                assert self._sock is not None
                if (
                    isinstance(self._position, FromEnd)
                    and self._position.searching
                    and time.monotonic() >= self._fetch_end_at
                ):
                    self._find_window_end(self._sock, self._position)
                elif self._wait(self._sock.fileno(), select.POLLIN, self._time_to_wait()):
                    if not self._position.wanted:
                        return True
                    self._receive(min(self._position.wanted, RECEIVE_CHUNK))
                elif (left := self._idle_time_left()) is not None and left <= 0:
                    self._end_idle()
                else:
                    self._on_silence(self._sock)
        except (PlaceError, ConnectError):
            self.close()
            raise
        return bool(self._chunk)

    def _end_idle(self) -> None:
        """End the iteration, because no new bytes have arrived for `idle` seconds.

        Raises ConnectError if this server has not even sent the bytes before the position.
        """
        self.close()
        if self._position.wanted:
            raise ConnectError(self._missing_bytes())

    def _idle_time_left(self) -> float | None:
        """Return the seconds until the iteration ends because no new bytes arrive; None: never."""
        return None if self._idle is None else self._last_new + self._idle - time.monotonic()

    def _time_to_wait(self) -> float | None:
        """Return for how many seconds to wait for bytes until something else has to be done."""
        now = time.monotonic()
        if self._position.wanted:
            quiet = (
                self._fetch_end_at - now
                if isinstance(self._position, FromEnd)
                else None
                if self._missing_reported
                else self._last_received + self._stuck() - now
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
            (
                max(0.0, seconds)
                for seconds in (self._idle_time_left(), quiet)
                if seconds is not None
            ),
            default=None,
        )

    def _stuck(self) -> float:
        """Return for how many seconds to wait for bytes that the server must have."""
        return min(MAX_STUCK_TIME, STUCK_TIME * 2.0 ** min(self._given_up, 30))

    def _connect(self) -> bool:
        """Connect and send the header; return whether there is a connection now.

        Raises ConnectError as `Connector.connect` does; the end of the idle time is its limit.
        """
        left = self._idle_time_left()
        self._sock = self._connector.connect(
            None if left is None else time.monotonic() + left, self._once
        )
        self._missing_reported = False
        try:
            self._name = name_of(self._sock)
            if self._first:
                self._begin()
        except OSError as error:
            self._on_disconnect(error)
            return False
        # Not inside the `try` statement: `recall` may read a file, whose errors must not be taken
        # for errors of the connection.
        header = self._position.header()
        try:
            self._sock.send(header)
        except OSError as error:
            self._on_disconnect(error)
        self._last_received = time.monotonic()
        self._fetch_end_at = self._last_received + QUIET_TIME
        return self._sock is not None

    def _begin(self) -> None:
        """Prepare the first connection of this iterator.

        With `whole_lines` and an offset from the end, start one byte earlier, and skip everything
        up to and including the first newline. So no line is lost that begins exactly at the offset.
        If there is no byte before the offset, start at the beginning of the file, which is the
        beginning of a line.
        """
        assert self._sock is not None
        if self._whole_lines and isinstance(self._position, FromEnd):
            with self._sock as sock:
                longer = self._is_longer(sock, self._position.count)
                self._sock = self._connector.reconnect(sock, self._wait)
            if longer:
                self._position = FromEnd(self._position.count + 1, line=True)
        self._first = False
        # The time needed to connect does not count as idle.
        self._last_new = time.monotonic()

    def _is_longer(self, sock: socket.socket, count: int) -> bool:
        """Return whether the file has more than `count` bytes.

        First request the byte at offset `count`. If it does not arrive, it may still exist, because
        the server may only be slow. So request the start of the file, too. If that arrives in time,
        its length decides. If it arrives late, the server is slow, and the file is assumed to be
        longer. If it does not arrive at all, the file is assumed to be empty.
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
            self._on_disconnect(error)
            return
        if data:
            self._last_received = time.monotonic()
            self._keep(self._position.take(data))
        else:
            self._on_disconnect(None)

    def _keep(self, data: bytes | None) -> None:
        """Keep the new bytes in `data` for the caller.

        None means that a new connection is needed to find the position: disconnect.
        """
        if isinstance(self._position, FromEnd):
            self._position = self._position.known()
        if data is None:
            self._disconnect()
        elif data:
            self._chunk = data
            self._on_new_bytes()
        elif not self._position.wanted:
            self._succeeded()

    def _on_new_bytes(self) -> None:
        self._last_new = time.monotonic()
        self._succeeded()

    def _succeeded(self) -> None:
        self._given_up = 0
        self._connector.succeeded(self._name)

    def _on_silence(self, sock: socket.socket) -> None:
        """Handle a time without bytes: fetch those before the position, or report missing ones."""
        if isinstance(self._position, FromEnd):
            self._position.settle()
            self._keep(b"")
        if (
            isinstance(self._position, FromEnd)
            and self._anchors
            and not (self._position.wanted or self._position.anchored)
        ):
            self._anchors -= 1
            self._fetch_context(sock, self._position)
        self._check_missing()

    def _check_missing(self) -> None:
        """Try another replica if this one does not send the bytes that it must have.

        If there is no other replica, report that once, and keep waiting.
        """
        if not self._position.wanted or time.monotonic() < self._last_received + self._stuck():
            return
        if self._connector.choice:
            self._disconnect()
            self._given_up += 1
            self._connector.failed(self._missing_bytes())
        elif not self._missing_reported:
            self._missing_reported = True
            self._report(f"{self._missing_bytes()}; waiting for it to grow")

    def _missing_bytes(self) -> str:
        """Return the message for a server that does not send bytes it must have."""
        offset = self._position.offset
        size = "before" if offset is None else f"{offset} bytes"
        return (
            f"{self._name}: its file seems to be shorter than {size}:"
            " the server lags behind, or the file was rotated"
        )

    def _find_window_end(self, sock: socket.socket, position: FromEnd) -> None:
        """Fetch the end of the file, to see whether the window is complete.

        Raises LostPlaceError.
        """
        if position.unsearched and (end := self._fetch_end(sock, CONTEXT, self._wait)):
            self._keep(position.reach(end))
        self._fetch_end_at = time.monotonic() + QUIET_TIME
        self._check_missing()

    def _fetch_context(self, sock: socket.socket, position: FromEnd) -> None:
        """Fetch the bytes before the position, unless new bytes arrive in the meantime."""

        def wait_beside(fd: int, events: int, seconds: float | None) -> bool:
            # Stop waiting for `fd` as soon as the stream itself has new bytes, because the caller
            # waits for these.
            with select.epoll() as both:
                both.register(fd, events)
                both.register(sock, select.POLLIN)
                return self._wait(both.fileno(), select.POLLIN, seconds) and fd in dict(
                    both.poll(0)
                )

        if end := self._fetch_end(sock, ANCHOR, wait_beside):
            position.offer(end)

    def _fetch_end(self, sock: socket.socket, count: int, wait: Wait) -> bytes:
        """Return the last `count` bytes of the file, or the whole file if it is shorter.

        They are requested from the server that `sock` is connected to. Returns b"" if some of them
        may be missing.
        """

        def ask(header: bytes) -> bytes:
            with self._connector.reconnect(sock, wait) as other:
                return fetch(other, header, count, wait)

        try:
            end = ask(b"-%d\n" % count)
            # A shorter answer may be incomplete, because the server is slow. It is complete if it
            # is not empty, and the answer for the start of the file is the same.
            return end if len(end) == count or (end and end == ask(b"0\n")) else b""
        except OSError:
            return b""

    def _on_disconnect(self, error: OSError | None) -> None:
        """Handle the end of the connection. `error` is None if the server has closed it normally.

        With `once`, this ends the iteration, and raises ConnectError if there is an `error`.
        """
        self._disconnect()
        reason = f"{self._name}: {error.strerror if error else CONNECTION_ENDED}"
        if self._once:
            self._closed = True
            if error:
                raise ConnectError(reason)
        self._connector.failed(reason)

    def _disconnect(self) -> None:
        if self._sock:
            self._sock.close()
        self._sock = None
