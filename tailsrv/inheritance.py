"""What a worker gets from the supervisor through fork(2)."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tailsrv.client_limit import ClientLimit


@dataclass(slots=True)
class Entry:
    """One client: our descriptor of its socket, and the offset its stream started from, None before its header."""

    fd: int
    start: int | None = None


@dataclass(frozen=True, slots=True)
class Inheritance:
    """All that a worker gets from the supervisor, through fork: it needs nothing else to serve."""

    slot: int
    # One open file for all workers and their successors, so that all serve the same inode; None while it is awaited.
    file: int | None
    listeners: Sequence[socket.socket]
    # with all other slots
    shared: bool
    # the worker's end
    channel: socket.socket
    endpoints: Sequence[str]
    client_limit: ClientLimit | None
    # to be adopted
    clients: Mapping[int, Entry]
