"""A slot of the worker pool: its listeners, its clients, and the worker that serves them.

When the worker dies, the slot keeps its listeners and its client table for the next worker.
"""

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
    """The supervisor's record of one slot and of its worker, if it has one.

    Times are seconds of the monotonic clock.
    """

    index: int
    listeners: list[socket.socket]
    # Whether all slots share the same listening sockets. Each slot has its own descriptors of them.
    shared: bool = False
    # The worker's pid, None while the slot has no worker.
    pid: int | None = None
    # The supervisor's end of the channel to the worker.
    channel: socket.socket | None = None
    # When the worker was forked.
    spawned: float = 0.0
    # Whether the worker has reported that it serves.
    ready: bool = False
    # Whether the worker has taken over clients of the worker before it.
    adopted: bool = False
    client_table: ClientTable = field(default_factory=ClientTable)
    # Connections to the orphaned workers that had these clients before. The first worker of this
    # slot takes over from them. Until then, they serve on if these connections are closed.
    predecessors: list[socket.socket] = field(default_factory=list)
    # When the unanswered ping was sent, None if every ping has been answered. The fork counts as a
    # ping, which the worker answers when it is ready.
    ping_sent: float | None = None
    # Number of workers of this slot that died unexpectedly and were replaced.
    restarts: int = 0
    # When the last of them was replaced, None if there was none.
    restarted: float | None = None
    # When to spawn the next worker, None if the slot has a worker or is to stay empty.
    spawn_at: float | None = None
    failures: Failures = field(default_factory=Failures)

    def forget_predecessors(self) -> None:
        """Close the connections to the orphaned workers."""
        for sock in self.predecessors:
            sock.close()
        self.predecessors = []

    def describe(self, now: float) -> dict[str, object]:
        """Return this slot's part of the status, at the time `now`. Durations are in seconds."""
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
        """Return the listeners' part of the status.

        Shared listeners are listed only once, by the first slot, and with None as their slot.
        """
        listeners = self.listeners if not self.shared or self.index == 0 else []
        return [_describe(listener, None if self.shared else self.index) for listener in listeners]

    def save(self) -> SlotState:
        """Return the state of this slot for load() in the next version of the program."""
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
        """Return the slot that save() was called on.

        The descriptors in `saved` must be open in this process. They belong to the slot now.
        """
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
