"""What the supervisor passes to a worker through fork(2): log, listeners, channel and clients."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tailsrv.client_limit import ClientLimit
from tailsrv.segments import Log
from tailsrv.shared_counts import SharedCounts


@dataclass(slots=True)
class Entry:
    """The supervisor's record of one client.

    `fd` is a descriptor of the client's socket, and `start` is the log offset that its stream
    started from, in bytes. `start` is None until the client's header has been read. `end` is the
    second number of its `?` line, None if the client did not ask for one.
    """

    fd: int
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a worker gets from the supervisor. Besides this it needs only the configuration."""

    slot: int
    # The segments of the log, None while the server waits for the file. A worker never opens a
    # segment by its path, so that all workers and their successors serve the same files.
    log: Log | None
    # With --follow-name: for each slot, the largest end of the log that its workers have acted on.
    ends: SharedCounts | None
    # With --follow-name: what only the supervisor needs to find the files after the active segment.
    opened_at: SharedCounts | None
    # The end of the log if the worker starts frozen, because others may roll by themselves, or
    # because the active segment was truncated.
    frozen_end: int | None
    truncated: bool
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
    # The sockets at which the next supervisor finds this worker, if its own has died.
    sockets: Sequence[socket.socket]
    # Connections to the orphaned workers that have these clients until they get COMMIT.
    predecessors: Sequence[socket.socket]
