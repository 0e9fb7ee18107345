"""The table of a slot's clients: a duplicate of each client's socket, and where its stream started.

When a worker dies, the duplicates keep its connections open, and the next worker of the slot
continues the streams. The supervisor never sends or receives on a duplicate. It only closes the
duplicate, or shuts down the connection.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tailsrv.addresses import endpoint
from tailsrv.linux.sockets import bytes_streamed
from tailsrv.protocol import resume
from tailsrv.status_schema import ClientStatus
from tailsrv.worker_context import Entry

# The number of each protected client, and the fields of its `Entry`, as JSON can hold them.
Saved = list[list[int | None]]


@dataclass(slots=True)
class ClientTable:
    """The clients of one slot. The keys are the numbers that workers use for clients in reports."""

    # The protected clients: those whose socket the supervisor holds a duplicate of.
    clients: dict[int, Entry] = field(default_factory=dict)
    # Clients without a duplicate. They lose their connection if their worker dies.
    unprotected: set[int] = field(default_factory=set)
    # The protected clients whose stream has not started, in the order in which they connected.
    headerless: dict[int, None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clients) + len(self.unprotected)

    def add(self, clients: Sequence[int], sockets: Sequence[int], highest: int) -> int:
        """Add new clients and the duplicates of their sockets.

        Args:
            clients: The numbers of the new clients.
            sockets: Their descriptors, in the same order. There may be fewer of them than clients:
                when descriptors run out, the kernel omits the last ones (MSG_CTRUNC of recvmsg(2)).
            highest: The highest descriptor number to keep. Those above it are closed, because the
                supervisor needs some descriptors itself, for example for the next worker's channel.

        Returns:
            The number of clients that are unprotected because they got no duplicate.

        """
        before = len(self.unprotected)
        for client, fd in zip(clients, sockets, strict=False):
            if fd <= highest:
                self.clients[client] = Entry(fd)
                self.headerless[client] = None
            else:
                os.close(fd)
                self.unprotected.add(client)
        self.unprotected.update(clients[len(sockets) :])
        for fd in sockets[len(clients) :]:
            os.close(fd)
        return len(self.unprotected) - before

    def set_start(self, client: int, start: int, end: int | None) -> None:
        """Record where the stream of `client` starts, and the end in its `?` line, if it has one.

        Both are offsets in bytes.
        """
        if (entry := self.clients.get(client)) is not None:
            entry.start, entry.end = start, end
            self.headerless.pop(client, None)

    def unprotect_oldest_headerless(self) -> bool:
        """Close the duplicate of the oldest client whose stream has not started.

        Returns False if there is no such client.
        """
        oldest = next(iter(self.headerless), None)
        if oldest is None:
            return False
        self.remove([oldest])
        self.unprotected.add(oldest)
        return True

    def remove(self, clients: Iterable[int]) -> None:
        """Remove clients that are no longer served, and close their duplicates.

        The kernel ends a connection when its last descriptor is closed. The worker has closed only
        its own.
        """
        for client in clients:
            self.unprotected.discard(client)
            self.headerless.pop(client, None)
            if (entry := self.clients.pop(client, None)) is not None:
                os.close(entry.fd)

    def forget_unprotected(self) -> int:
        """Remove the unprotected clients after their worker died. Return how many there were."""
        lost = len(self.unprotected)
        self.unprotected.clear()
        return lost

    def describe(self, slot: int, clients: Iterable[int]) -> list[ClientStatus]:
        """Return the status of those of `clients` that are protected. `slot` is their slot.

        This makes a few system calls for each client, because only the kernel knows the number of
        bytes sent. `peer` and `position` are None if the connection is closed already.
        """
        return [
            _describe(slot, entry)
            for client in clients
            if (entry := self.clients.get(client)) is not None
        ]

    def close_connections(self) -> int:
        """Close the connections of all protected clients. Return how many there were."""
        for entry in self.clients.values():
            _close_connection(entry)
        closed = len(self.clients)
        self.clients.clear()
        self.headerless.clear()
        return closed

    def close_in_child(self) -> None:
        """Close the duplicates, in a forked child that does not serve this slot.

        The table itself stays unchanged, because the child does not use it again.
        """
        for entry in self.clients.values():
            os.close(entry.fd)

    def save(self) -> Saved:
        """Return the protected clients for load().

        The unprotected clients are not included, because they have no descriptor.
        """
        return [
            [client, entry.fd, entry.start, entry.end] for client, entry in self.clients.items()
        ]

    @classmethod
    def load(
        cls, saved: Iterable[Sequence[int | None]], unprotected: Iterable[int]
    ) -> "ClientTable":
        """Return the client table that save() was called on.

        `unprotected` holds the numbers of its unprotected clients. The descriptors in `saved` must
        be open in this process.
        """
        client_table = cls(unprotected=set(unprotected))
        for client, fd, start, end in saved:
            assert client is not None
            assert fd is not None
            client_table.clients[client] = Entry(fd, start, end)
            if start is None:
                client_table.headerless[client] = None
        return client_table


def _describe(slot: int, entry: Entry) -> ClientStatus:
    sock = socket.socket(fileno=entry.fd)
    try:
        peer, sent = endpoint(*sock.getpeername()[:2]), bytes_streamed(sock)
    except OSError:
        # The connection is closed already.
        peer, sent = None, None
    finally:
        # The client table still owns the descriptor, so it must not be closed with `sock`.
        sock.detach()
    position = None
    if entry.start is not None and sent is not None:
        _, position = resume(entry.start, entry.end, sent)
    return ClientStatus(slot, peer, entry.start, position)


def _close_connection(entry: Entry) -> None:
    with socket.socket(fileno=entry.fd) as sock:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The connection is closed already.
            pass
