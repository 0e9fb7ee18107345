"""A slot: a place for a worker, with its listeners; outlives the worker in it."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from tailsrv.policy import Failures


@dataclass(slots=True)
class Slot:
    """The supervisor's record of one slot and of the worker in it, if any."""

    index: int
    listeners: list[socket.socket]
    pid: int | None = None
    channel: socket.socket | None = None  # the supervisor's end
    spawned: float = 0.0
    ready: bool = False
    clients: int = 0
    restarts: int = 0
    fill_at: float | None = None  # when the next worker is due, while there is none
    failures: Failures = field(default_factory=Failures)


@dataclass(frozen=True, slots=True)
class Inheritance:
    """All that a worker gets from the supervisor, through fork: it needs nothing else to serve."""

    slot: int
    file: int  # one open file for all workers and their successors, so that all serve the same inode
    listeners: Sequence[socket.socket]
    channel: socket.socket  # the worker's end
    endpoints: Sequence[str]
