"""Receives the bytes of a served file, and reconnects and resumes when a connection is lost.

`Follow` is the iterator. It gets connections from a `Connector`, and asks a `Position` which header
to send and which of the received bytes are new.
"""

import select
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Self

from tailsrv.client.connector import (
    CONNECTION_ENDED,
    ConnectError,
    Connector,
    Wait,
    name_of,
)
from tailsrv.client.resume import LINE_SIZE, GoneError, PlaceError, Position, parse_line
from tailsrv.client.splicing import move

# The most bytes to receive at once. Twice as many take a quarter more time, because of page faults.
RECEIVE_CHUNK = 1 << 16
# Seconds to wait for bytes that the server must have if it serves the same file. After that, the
# client reports that they are missing, or tries another server.
STUCK_TIME = 2.0
# The upper limit of that wait. The wait doubles with each server in a row that did not send such
# bytes, because all of the servers may be slow to send their first byte.
MAX_STUCK_TIME = 30.0
# Seconds for the answer to a question on a separate connection.
ANSWER_TIMEOUT = 10.0
# What the messages call a server that does not answer `?`.
OLD_SERVER = "this server does not tell offsets (tailsrv before 2.0)"


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
        until_end: bool,
    ) -> None:
        self._connector, self._position = connector, position
        self._wait, self._report = wait, report
        self._once, self._idle = once, idle
        self._until_end = until_end
        # Whether there has been no connection yet.
        self._first = True
        self._sock: socket.socket | None = None
        # "HOST:PORT" of the server of the present connection, or of the last one.
        self._name = ""
        # Whether this client has reported that this server does not send bytes it must have.
        self._missing_reported = False
        # Whether nothing has arrived on the present connection.
        self._unanswered = True
        # Servers that were reported because they do not answer `?`.
        self._old_servers: set[str] = set()
        # Servers that no longer have the next byte, since bytes last arrived.
        self._gone: set[str] = set()
        # With `until_end`: the offset at which the iteration ends, as soon as it is known.
        self._until: int | None = None
        # The time when the server last sent something, or when this client connected to it.
        self._last_received = 0.0
        # The number of servers in a row that were left because they did not send such bytes.
        self._given_up = 0
        # The next chunk to return.
        self._chunk = b""
        # The time when new bytes last arrived.
        self._last_new = time.monotonic()
        self._closed = False

    @property
    def offset(self) -> int | None:
        """The offset after the last chunk.

        It is None before the first chunk of a stream from the end. It stays None if the server does
        not tell offsets (tailsrv before 2.0).
        """
        return None if self._position.offset is None else self._position.offset - len(self._chunk)

    @property
    def end(self) -> int | None:
        """The offset of the log's end when a server last told it. None: none has told it yet."""
        return self._position.end

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
            self._receive(self._most(RECEIVE_CHUNK))
        raise StopIteration

    def splice(self, pipe: int, count: int) -> int:
        """Move up to `count` new bytes into the empty `pipe`; return how many, 0 at the end.

        This is for programs like `tssync`. It moves the bytes inside the kernel if that is
        possible, so this object does not see them. Therefore `follow` must have been called with an
        offset from the start, and with `recall`.
        """
        while self._prepare():
            assert self._sock is not None
            try:
                moved = move(self._sock, pipe, self._most(count))
            except OSError as error:
                self._on_disconnect(error)
                continue
            if moved:
                self._position.advance(moved)
                self._on_new_bytes()
                return moved
            if moved == 0:
                self._on_end(self._sock)
        return 0

    def _most(self, count: int) -> int:
        """Return how many new bytes to receive at once: `count`, or fewer near the end."""
        if self._until is None:
            return count
        assert self._position.offset is not None
        return min(count, self._until - self._position.offset)

    def _prepare(self) -> bool:
        """Wait for new bytes. Return True if there are some, False at the end of the iteration.

        After True, the new bytes are in `_chunk`. If `_chunk` is empty, the socket is readable: the
        caller receives new bytes from it, or the end of the connection.
        """
        try:
            while not (self._closed or self._chunk):
                if self._reached_end():
                    self.close()
                elif self._sock is None:
                    self._connect()
                elif self._wait(self._sock.fileno(), select.POLLIN, self._time_to_wait()):
                    if not self._position.wanted:
                        return True
                    self._receive(min(self._position.wanted, RECEIVE_CHUNK))
                elif (left := self._idle_time_left()) is not None and left <= 0:
                    self._end_idle()
                else:
                    self._check_missing()
        except (PlaceError, ConnectError):
            self.close()
            raise
        return bool(self._chunk)

    def _reached_end(self) -> bool:
        """Return whether everything up to the end has arrived, with `until_end`.

        The end is where the log ended when the stream began.
        """
        if self._until_end and self._until is None and self._position.settled:
            self._until = self._position.end
        offset = self._position.offset
        return self._until is not None and offset is not None and offset >= self._until

    def _end_idle(self) -> None:
        """End the iteration, because no new bytes have arrived for `idle` seconds.

        Raises ConnectError if this server has not even sent the bytes before the offset, or if the
        iteration must not end yet. A server that sends nothing may have no file yet, or an empty
        one, so otherwise that is no error.
        """
        self.close()
        if self._position.compares or (self._until_end and self._position.awaits_line):
            raise ConnectError(self._missing_bytes())
        if self._until_end:
            raise ConnectError(f"{self._name}: the server did not send all bytes in time")

    def _idle_time_left(self) -> float | None:
        """Return the seconds until the iteration ends because no new bytes arrive; None: never."""
        return None if self._idle is None else self._last_new + self._idle - time.monotonic()

    def _time_to_wait(self) -> float | None:
        """Return for how many seconds to wait for bytes until something else has to be done."""
        now = time.monotonic()
        limits = [self._idle_time_left()]
        if self._position.wanted and not self._missing_reported:
            limits.append(self._last_received + self._stuck() - now)
        return min((max(0.0, seconds) for seconds in limits if seconds is not None), default=None)

    def _stuck(self) -> float:
        """Return for how many seconds to wait for bytes that the server must have."""
        return min(MAX_STUCK_TIME, STUCK_TIME * 2.0 ** min(self._given_up, 30))

    def _connect(self) -> None:
        """Connect and send the header.

        Raises ConnectError as `Connector.connect` does; the end of the idle time is its limit.
        """
        left = self._idle_time_left()
        self._sock = self._connector.connect(
            None if left is None else time.monotonic() + left, self._once
        )
        self._begin(self._sock)

    def _begin(self, sock: socket.socket, ask: bool = True) -> None:
        """Send the header on a new connection, without `?` if `ask` is false."""
        self._missing_reported = False
        self._unanswered = True
        self._last_received = time.monotonic()
        if self._first:
            self._first = False
            # The time needed to connect does not count as idle.
            self._last_new = self._last_received
        # Not inside the `try` statement: `recall` may read a file, whose errors must not be taken
        # for errors of the connection.
        header = self._position.header(ask)
        try:
            self._name = name_of(sock)
            sock.send(header)
        except OSError as error:
            self._on_disconnect(error)

    def _receive(self, count: int) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(count)
        except BlockingIOError:
            return
        except OSError as error:
            self._on_disconnect(error)
            return
        if not data:
            self._on_end(self._sock)
            return
        self._last_received = time.monotonic()
        self._unanswered = False
        try:
            self._chunk = self._position.take(data)
        except GoneError as error:
            self._on_gone(error)
            return
        if self._chunk:
            self._on_new_bytes()
        elif not self._position.wanted:
            self._succeeded()

    def _on_new_bytes(self) -> None:
        self._unanswered = False
        self._last_new = time.monotonic()
        self._succeeded()

    def _succeeded(self) -> None:
        self._given_up = 0
        self._gone.clear()
        self._connector.succeeded(self._name)

    def _check_missing(self) -> None:
        """Try another replica if this one does not send the bytes that it must have.

        If there is no other replica, report that once, and keep waiting. Raises ConnectError with
        `until_end`, if the server has fewer bytes than the caller.
        """
        if not self._position.wanted or time.monotonic() < self._last_received + self._stuck():
            return
        if self._connector.addresses > 1:
            self._disconnect()
            self._given_up += 1
            self._connector.failed(self._missing_bytes())
        elif self._until_end and not self._position.awaits_line:
            raise ConnectError(self._missing_bytes())
        elif not self._missing_reported:
            self._missing_reported = True
            self._report(f"{self._missing_bytes()}; waiting")

    def _missing_bytes(self) -> str:
        """Return the message for a server that does not send bytes it must have."""
        if self._position.awaits_line:
            return (
                f"{self._name}: the server does not answer:"
                " its file does not exist yet, or it has as many clients as it may have"
            )
        return (
            f"{self._name}: its file seems to be shorter than {self._position.offset} bytes:"
            " the server lags behind, or the file was rotated"
        )

    def _on_end(self, sock: socket.socket) -> None:
        """Handle the end of a connection that the server has closed normally.

        If the server has sent nothing, it may not know `?`, or the requested bytes may be gone. So
        ask where its log starts. If there is no answer either, it may be ending or starting. It is
        an old server only if it serves a header without `?`, and then still does not answer.
        """
        position = self._position
        if not (self._unanswered and (position.asked or position.requested)):
            self._on_disconnect(None)
            return
        ask = partial(self._connector.ask, sock)
        begun = time.monotonic()
        answer = ask(b"?0\n", LINE_SIZE, ANSWER_TIMEOUT)
        # Silence means that the server serves the header, and that its log is empty.
        serves = answer == b"" and position.asked and ask(b"-1\n", 1, STUCK_TIME) != b""
        if serves:
            answer = ask(b"?0\n", LINE_SIZE, ANSWER_TIMEOUT)
        # Like the time needed to connect, the time for the answers does not count as idle.
        self._last_new += time.monotonic() - begun
        if answer is not None and len(answer) == LINE_SIZE:
            self._on_log_start(sock, parse_line(answer)[0])
        elif serves and answer == b"":
            self._on_old_server(sock)
        else:
            self._on_disconnect(None)

    def _on_log_start(self, sock: socket.socket, log_start: int) -> None:
        """Handle a closed connection to a server whose log starts at `log_start`."""
        requested = self._position.requested
        if not requested or log_start <= requested:
            self._on_disconnect(None)
            return
        try:
            self._position.starts_at(log_start)
        except GoneError as error:
            self._on_gone(error)
        else:
            # Only bytes that were to be compared are gone.
            self._switch(sock)

    def _on_gone(self, error: GoneError) -> None:
        """Try the other servers. Raises `error` if none of them has the next byte."""
        self._disconnect()
        self._gone.add(self._name)
        if self._once or len(self._gone) >= self._connector.addresses:
            self.close()
            raise error
        self._connector.failed(f"{self._name}: its log starts at offset {error.start} now")

    def _on_old_server(self, sock: socket.socket) -> None:
        """Continue with a server that does not answer `?`.

        Raises PlaceError if that is not possible.
        """
        if self._until_end or self._position.needs_line:
            need = "the end of its log" if self._until_end else "the next beginning of a line"
            hint = "--until-idle" if self._until_end else "an offset of 0 or more"
            raise PlaceError(f"{self._name}: {OLD_SERVER}, so {need} is unknown; use {hint}")
        if self._name not in self._old_servers:
            self._old_servers.add(self._name)
            result = "cannot" if self._position.offset is None else "can"
            self._report(
                f"{self._name}: {OLD_SERVER}: after a lost connection, this stream {result} resume"
            )
        self._switch(sock, ask=False)

    def _switch(self, sock: socket.socket, ask: bool = True) -> None:
        """Replace the connection `sock` by a new one to the same server."""
        try:
            self._sock = self._connector.reconnect(sock)
        except OSError as error:
            self._on_disconnect(error)
            return
        sock.close()
        self._begin(self._sock, ask)

    def _on_disconnect(self, error: OSError | None) -> None:
        """Handle the end of the connection. `error` is None if the server has closed it normally.

        With `once`, this ends the iteration, and raises ConnectError if there is an `error`, or
        bytes are missing. Raises PlaceError if the stream cannot resume.
        """
        self._disconnect()
        reason = f"{self._name}: {error.strerror if error else CONNECTION_ENDED}"
        if self._once:
            self.close()
            if error or self._until_end:
                raise ConnectError(reason)
        elif not self._position.can_resume:
            self.close()
            raise PlaceError(
                f"{reason}; {OLD_SERVER}, so a stream from the end cannot resume;"
                " start again with -N, -0 or an offset of 0 or more"
            )
        self._connector.failed(reason)

    def _disconnect(self) -> None:
        if self._sock:
            self._sock.close()
        self._sock = None
