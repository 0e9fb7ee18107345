"""A worker's record of one client: its socket, its state and its offset in the file."""

import select
import socket
from enum import Enum

from tailsrv.addresses import endpoint

# Edge-triggered, so that one registration is enough and a socket that stays readable is reported
# only once. EPOLLOUT is added only when a client blocks: otherwise every new socket would cause one
# more event.
CLIENT_EVENTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


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


class Departures:
    """The clients that the worker drops before it accepts others, each with the reason.

    Until then their sockets stay open, so that no other client gets the same descriptor while the
    events of this turn are handled.
    """

    def __init__(self) -> None:
        self._departures: list[tuple[Client, Exception | None]] = []

    def __bool__(self) -> bool:
        return bool(self._departures)

    def add(self, client: Client, error: Exception | None = None) -> None:
        """Let `client` leave, unless it does so already. From now on it is CLOSED.

        `error` is None if the client has left itself, or if the reason has been logged.
        """
        if client.state is not ClientState.CLOSED:
            client.state = ClientState.CLOSED
            self._departures.append((client, error))

    def take(self) -> list[tuple[Client, Exception | None]]:
        """Return the clients that have been added since the last call."""
        departures, self._departures = self._departures, []
        return departures
