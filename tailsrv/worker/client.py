"""A worker's record of one client: its socket, its state and its offset in the file."""

import socket
from enum import Enum

from tailsrv.addresses import endpoint


class ClientState(Enum):
    """What the worker does for a client at the moment."""

    AWAITING_HEADER = "awaiting header"
    STREAMING = "streaming"
    # Everything was sent, and a FIN after it. The worker reads and discards what the client still
    # sends until the client has acknowledged everything.
    FINISHED = "finished"
    # The client is not served any more. Its socket is closed at the end of the turn.
    CLOSED = "closed"


class Client:
    """One connection. There may be very many, so this record is kept as small as possible.

    `offset` is the next byte to send. It may be out of date while the client is caught up: the next
    byte is then at the end of the file, and `Streams` stores that offset once for all such clients.
    `line` is what is left to send of its `?` line, before the byte at `offset`. `end` is the second
    number of that line, None if the client did not ask for one.
    """

    __slots__ = ("end", "fd", "line", "number", "offset", "peer", "sock", "state")

    def __init__(self, number: int, sock: socket.socket, peer: tuple[str, int] | None) -> None:
        # The client's key in the supervisor's client table. Unlike `fd`, a worker never uses it for
        # a second client.
        self.number = number
        self.sock = sock
        # Stored, because the code that sends data finds the client by its descriptor.
        self.fd = sock.fileno()
        self.peer: str | None = endpoint(*peer) if peer else "unknown"
        self.state = ClientState.AWAITING_HEADER
        self.end: int | None = None
        self.line = b""
        self.offset = 0

    def forget_peer(self) -> None:
        """Drop the text of the client's address, to save memory while there are very many clients.

        `str()` asks the kernel for the address from now on, which works while the connection
        exists.
        """
        self.peer = None

    def __str__(self) -> str:
        try:
            return self.peer or endpoint(*self.sock.getpeername()[:2])
        except OSError:
            # The connection does not exist any more.
            return "unknown"
