"""One connection: socket, state, offset."""

import socket
from enum import Enum

from tailsrv.addresses import endpoint


class ClientState(Enum):
    """Where a connection is in its life."""

    AWAITING_HEADER = "awaiting header"
    STREAMING = "streaming"
    # all is sent and the FIN behind it; what the peer still says is read until it has all
    FINISHED = "finished"
    # no longer served; its socket is closed at the end of the turn
    CLOSED = "closed"


class Client:
    """A worker's record of one connection, of which there may be very many: it holds no more than it must.

    `offset` is the next byte to send, except while the client is caught up: then it is the size of the file,
    which `Streams` keeps once for all of them.
    """

    __slots__ = ("fd", "number", "offset", "peer", "sock", "state")

    def __init__(self, number: int, sock: socket.socket, peer: tuple[str, int] | None) -> None:
        # its name in the roster; unlike `fd`, never used again in this slot
        self.number = number
        self.sock = sock
        # asked for once: this is the hot path's name for the client
        self.fd = sock.fileno()
        self.peer: str | None = endpoint(*peer) if peer else "unknown"
        self.state = ClientState.AWAITING_HEADER
        self.offset = 0

    def forget_peer(self) -> None:
        """Leave it to the kernel to know who this is, as long as the connection is there: a string for each of very many adds up."""
        self.peer = None

    def __str__(self) -> str:
        try:
            return self.peer or endpoint(*self.sock.getpeername()[:2])
        except OSError:
            # gone
            return "unknown"
