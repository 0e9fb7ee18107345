"""Who is connected, and where each started; the sockets that let a successor go on where a worker was killed.

The supervisor keeps a duplicate of each client's socket here, and does nothing with it but close it.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tailsrv.addresses import endpoint
from tailsrv.inheritance import Entry
from tailsrv.linux.sockets import bytes_streamed

Saved = list[list[int | None]]


@dataclass(slots=True)
class ClientTable:
    """The clients of one slot, by the number that its workers know them by."""

    clients: dict[int, Entry] = field(default_factory=dict)
    # there was no room for their duplicates: they die with their worker
    unprotected: set[int] = field(default_factory=set)
    # the clients that have not started yet, the oldest first
    headerless: dict[int, None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clients) + len(self.unprotected)

    def add(self, clients: Sequence[int], sockets: Sequence[int], highest: int) -> int:
        """Take in new clients with their sockets and return how many of them had to stay unprotected.

        The kernel leaves out the last sockets where descriptors run out (MSG_CTRUNC of recvmsg(2)), and we close
        those above `highest`: the supervisor needs some for the next worker's channel.
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

    def set_start(self, client: int, offset: int) -> None:
        """Note where the stream of `client` starts."""
        if (entry := self.clients.get(client)) is not None:
            entry.start = offset
            self.headerless.pop(client, None)

    def unprotect_oldest_headerless(self) -> bool:
        """Stop protecting the oldest client that has not started yet, and tell whether there was one."""
        oldest = next(iter(self.headerless), None)
        if oldest is None:
            return False
        self.remove([oldest])
        self.unprotected.add(oldest)
        return True

    def remove(self, clients: Iterable[int]) -> None:
        """Forget clients that are not served any more; our duplicate is what kept their connections half open."""
        for client in clients:
            self.unprotected.discard(client)
            self.headerless.pop(client, None)
            if (entry := self.clients.pop(client, None)) is not None:
                os.close(entry.fd)

    def forget_unprotected(self) -> int:
        """Forget the clients that died with their worker and return how many they were."""
        lost = len(self.unprotected)
        self.unprotected.clear()
        return lost

    def has_streams(self) -> bool:
        """Tell whether any protected client has started its stream."""
        return len(self.headerless) < len(self.clients)

    def close_streams(self) -> None:
        """End the connections whose streams have started."""
        for client in [client for client in self.clients if client not in self.headerless]:
            _hang_up(self.clients.pop(client))

    def describe(self) -> list[dict[str, object]]:
        """Return who each protected client is, where its stream started and where it stands, as the kernel knows it."""
        return [_describe(entry) for entry in self.clients.values()]

    def close_connections(self) -> int:
        """End every connection and return how many there were."""
        for entry in self.clients.values():
            _hang_up(entry)
        ended = len(self.clients)
        self.clients.clear()
        self.headerless.clear()
        return ended

    def close_in_child(self) -> None:
        """Let go of the sockets, in a forked child that they are no business of."""
        for entry in self.clients.values():
            os.close(entry.fd)

    def save(self) -> Saved:
        """Return what load() takes, as JSON can hold it; unprotected clients cannot be handed on."""
        return [[client, entry.fd, entry.start] for client, entry in self.clients.items()]

    @classmethod
    def load(
        cls, saved: Iterable[Sequence[int | None]], unprotected: Iterable[int]
    ) -> "ClientTable":
        """Return the roster that save() was called on."""
        client_table = cls(unprotected=set(unprotected))
        for client, fd, start in saved:
            assert client is not None
            assert fd is not None
            client_table.clients[client] = Entry(fd, start)
            if start is None:
                client_table.headerless[client] = None
        return client_table


def _describe(entry: Entry) -> dict[str, object]:
    sock = socket.socket(fileno=entry.fd)
    try:
        peer, sent = endpoint(*sock.getpeername()[:2]), bytes_streamed(sock)
    except OSError:
        # gone already
        peer, sent = None, None
    finally:
        # it stays ours
        sock.detach()
    position = entry.start + sent if entry.start is not None and sent is not None else None
    return {"peer": peer, "start": entry.start, "position": position}


def _hang_up(entry: Entry) -> None:
    with socket.socket(fileno=entry.fd) as sock:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # gone already
            pass
