"""A slot: a place for a worker, with its listeners; outlives the worker in it."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tailsrv.policy import Failures
from tailsrv.roster import Entry, Roster
from tailsrv.state import SlotState


@dataclass(slots=True)
class Slot:
    """The supervisor's record of one slot and of the worker in it, if any."""

    index: int
    listeners: list[socket.socket]
    pid: int | None = None
    channel: socket.socket | None = None  # the supervisor's end
    spawned: float = 0.0
    ready: bool = False
    adopted: bool = False  # the worker in it has taken over clients
    roster: Roster = field(default_factory=Roster)
    restarts: int = 0
    fill_at: float | None = None  # when the next worker is due, while there is none
    failures: Failures = field(default_factory=Failures)

    def save(self) -> SlotState:
        """Return what load() takes."""
        return SlotState(
            listeners=[listener.fileno() for listener in self.listeners],
            pid=self.pid,
            channel=self.channel.fileno() if self.channel else None,
            spawned=self.spawned,
            ready=self.ready,
            adopted=self.adopted,
            restarts=self.restarts,
            failures=[self.failures.short, self.failures.unready, self.failures.suspect],
            clients=self.roster.save(),
            unprotected=list(self.roster.unprotected),
        )

    @classmethod
    def load(cls, index: int, saved: SlotState) -> "Slot":
        """Return the slot that save() was called on, its descriptors being ours now."""
        return cls(
            index=index,
            listeners=[socket.socket(fileno=fd) for fd in saved.listeners],
            pid=saved.pid,
            channel=socket.socket(fileno=saved.channel) if saved.channel is not None else None,
            spawned=saved.spawned,
            ready=saved.ready,
            adopted=saved.adopted,
            restarts=saved.restarts,
            failures=Failures(*saved.failures),
            roster=Roster.load(saved.clients, saved.unprotected),
        )


@dataclass(frozen=True, slots=True)
class Inheritance:
    """All that a worker gets from the supervisor, through fork: it needs nothing else to serve."""

    slot: int
    file: int  # one open file for all workers and their successors, so that all serve the same inode
    listeners: Sequence[socket.socket]
    channel: socket.socket  # the worker's end
    endpoints: Sequence[str]
    clients: Mapping[int, Entry]  # to be adopted
