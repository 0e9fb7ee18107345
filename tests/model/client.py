"""A client of the model: its socket, and what is known about it from outside of the server."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from model.history import Stream
from support.waiting import DEADLINE


@dataclass(eq=False)
class ModelClient:
    """A client of the server, and what the model knows about it."""

    sock: socket.socket
    header: bytes
    # How many bytes of the header have been sent.
    sent: int = 0
    half_closed: bool = False
    # The client has not sent a valid header, and never will.
    doomed: bool = False
    # The supervisor is known to hold the client.
    known: bool = False
    # The client's worker was killed, possibly before the supervisor received the client.
    may_be_lost: bool = False
    # The next bytes of the client may no longer exist, so the server may close the connection.
    may_end: bool = False
    ended: bool = False
    # The stream, once the header has been sent.
    stream: Stream | None = None

    @property
    def name(self) -> str:
        """The address of the client, as in the server's log and status."""
        host, port = self.sock.getsockname()
        return f"{host}:{port}"

    def due(self, size: int) -> int:
        """Return how many more bytes the client must receive at least."""
        return self.stream.due(size) if self.stream else 0

    @contextmanager
    def at_risk(self) -> Iterator[None]:
        """Treat an error of the socket as the end of a client that may have been lost."""
        try:
            yield
        except (BlockingIOError, TimeoutError):
            raise
        except OSError as error:
            self.end(error)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Return from the block early where the socket would have to wait."""
        self.sock.setblocking(False)
        with suppress(BlockingIOError):
            yield
        self.sock.settimeout(DEADLINE)

    def end(self, reason: object) -> None:
        """Record the end of the connection, and assert that there is a valid reason for it."""
        expected = self.doomed or self.may_end
        assert expected or self.may_be_lost, f"{self} ended: {reason}"
        assert expected or not self.known, f"{self} ended, though it was known: {reason}"
        self.ended = True

    def is_lost(self) -> bool:
        """Tell whether the connection has ended, without reading from it."""
        with self.without_waiting(), self.at_risk():
            if self.sock.recv(1, socket.MSG_PEEK) == b"":
                self.end("end of the stream")
        return self.ended
