"""What the supervisor passes to a worker through fork(2): file, listeners, channel and clients."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tailsrv.client_limit import ClientLimit


@dataclass(slots=True)
class Entry:
    """The supervisor's record of one client.

    `fd` is a descriptor of the client's socket, and `start` is the offset that its stream started
    from, in bytes. `start` is None until the client's header has been read. `end` is the second
    number of its `?` line, None if the client did not ask for one.
    """

    fd: int
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a worker gets from the supervisor. Besides this it needs only the configuration."""

    slot: int
    # The descriptor of the served file, None while the server waits for the file. All workers and
    # their successors use the same open file, so that all of them serve the same inode.
    file: int | None
    listeners: Sequence[socket.socket]
    # Whether the workers of all slots share the same listeners.
    shared: bool
    # The worker's end of the channel.
    channel: socket.socket
    # The addresses that the server listens on, as text.
    endpoints: Sequence[str]
    client_limit: ClientLimit | None
    # The clients that the worker adopts, by number.
    clients: Mapping[int, Entry]
