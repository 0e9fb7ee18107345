"""A client of the model: its socket, and what is known of it from the outside."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from model.history import Stream
from support.waiting import DEADLINE


@dataclass(eq=False)
class ModelClient:
    """A client of the server, and what the model knows of it."""

    sock: socket.socket
    header: bytes
    # bytes of the header
    sent: int = 0
    half_closed: bool = False
    # it has not sent a header, and now it never will
    doomed: bool = False
    # to the supervisor
    known: bool = False
    # its worker was killed, perhaps before the supervisor knew of it
    may_be_lost: bool = False
    ended: bool = False
    # once the header has been sent
    stream: Stream | None = None

    @property
    def name(self) -> str:
        """The peer, as the server calls it."""
        host, port = self.sock.getsockname()
        return f"{host}:{port}"

    def due(self, size: int) -> int:
        """Return how many bytes more must come at least."""
        return self.stream.due(size) if self.stream else 0

    @contextmanager
    def at_risk(self) -> Iterator[None]:
        """Let an error of the socket be the end of a client that may have been lost, and only of such a one."""
        try:
            yield
        except (BlockingIOError, TimeoutError):
            raise
        except OSError as error:
            self.end(error)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Let what would have to wait do nothing instead."""
        self.sock.setblocking(False)
        with suppress(BlockingIOError):
            yield
        self.sock.settimeout(DEADLINE)

    def end(self, reason: object) -> None:
        """Take in that the connection has ended, which must have a good reason."""
        assert self.doomed or self.may_be_lost, f"{self} ended: {reason}"
        assert not self.known or self.doomed, f"{self} ended, though it was known: {reason}"
        self.ended = True

    def is_lost(self) -> bool:
        """Tell whether the connection has ended, without taking anything from it."""
        with self.without_waiting(), self.at_risk():
            if self.sock.recv(1, socket.MSG_PEEK) == b"":
                self.end("end of the stream")
        return self.ended
