"""A slot: a place for a worker, with its listeners; outlives the worker in it."""

import socket
from dataclasses import dataclass, field

from tailsrv.addresses import endpoint
from tailsrv.linux.process import start_ticks
from tailsrv.linux.sockets import accept_queue
from tailsrv.supervisor.client_table import ClientTable
from tailsrv.supervisor.restart_policy import Failures
from tailsrv.supervisor.upgrade_state import SlotState


@dataclass(slots=True)
class Slot:
    """The supervisor's record of one slot and of the worker in it, if any."""

    index: int
    listeners: list[socket.socket]
    # the listeners are copies of the same sockets for all slots
    shared: bool = False
    pid: int | None = None
    # the supervisor's end
    channel: socket.socket | None = None
    spawned: float = 0.0
    ready: bool = False
    # the worker in it has taken over clients
    adopted: bool = False
    client_table: ClientTable = field(default_factory=ClientTable)
    # since when the worker owes us an answer, which its being ready is, too
    ping_sent: float | None = None
    restarts: int = 0
    # when a worker that died was last replaced
    restarted: float | None = None
    # when the next worker is due, while there is none
    spawn_at: float | None = None
    failures: Failures = field(default_factory=Failures)

    def describe(self, now: float) -> dict[str, object]:
        """Return what the status says of this slot and its worker."""
        return {
            "slot": self.index,
            "pid": self.pid,
            "ticks": start_ticks(self.pid) if self.pid is not None else None,
            "ready": self.ready and self.pid is not None,
            "clients": len(self.client_table),
            "unprotected": len(self.client_table.unprotected),
            "restarts": self.restarts,
            "restarted": now - self.restarted if self.restarted is not None else None,
            "silent": now - self.ping_sent
            if self.pid is not None and self.ping_sent is not None
            else 0.0,
        }

    def describe_listeners(self) -> list[dict[str, object]]:
        """Return what the status says of the listeners; those that are shared count once, as nobody's."""
        listeners = self.listeners if not self.shared or self.index == 0 else []
        return [_describe(listener, None if self.shared else self.index) for listener in listeners]

    def save(self) -> SlotState:
        """Return what load() takes."""
        return SlotState(
            listeners=[listener.fileno() for listener in self.listeners],
            shared=self.shared,
            pid=self.pid,
            channel=self.channel.fileno() if self.channel else None,
            spawned=self.spawned,
            ready=self.ready,
            adopted=self.adopted,
            restarts=self.restarts,
            restarted=self.restarted,
            failures=[self.failures.short, self.failures.unready, self.failures.suspect],
            clients=self.client_table.save(),
            unprotected=list(self.client_table.unprotected),
        )

    @classmethod
    def load(cls, index: int, saved: SlotState) -> "Slot":
        """Return the slot that save() was called on, its descriptors being ours now."""
        return cls(
            index=index,
            listeners=[socket.socket(fileno=fd) for fd in saved.listeners],
            shared=saved.shared,
            pid=saved.pid,
            channel=socket.socket(fileno=saved.channel) if saved.channel is not None else None,
            spawned=saved.spawned,
            ready=saved.ready,
            adopted=saved.adopted,
            restarts=saved.restarts,
            restarted=saved.restarted,
            failures=Failures(*saved.failures),
            client_table=ClientTable.load(saved.clients, saved.unprotected),
        )


def _describe(listener: socket.socket, slot: int | None) -> dict[str, object]:
    queued, backlog = accept_queue(listener)
    return {
        "slot": slot,
        "endpoint": endpoint(*listener.getsockname()[:2]),
        "queued": queued,
        "backlog": backlog,
    }
