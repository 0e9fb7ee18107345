"""A slot of the worker pool: its listeners, its clients, and the worker that serves them.

When the worker dies, the slot keeps its listeners and its client table for the next worker.
"""

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from tailsrv.addresses import endpoint
from tailsrv.linux.process import start_ticks
from tailsrv.linux.sockets import accept_queue
from tailsrv.status_schema import ListenerStatus, SlotStatus
from tailsrv.supervisor.client_table import ClientTable
from tailsrv.supervisor.restart_policy import Failures
from tailsrv.supervisor.upgrade_state import SlotState, WorkerState
from tailsrv.worker_channel import Order, encode


class State(Enum):
    """The state of a slot."""

    # It has no worker, and none is due.
    EMPTY = "empty"
    # Its next worker is due at `Slot.due`.
    DUE = "due"
    # Its worker serves, or is starting.
    SERVING = "serving"
    # As before, but another worker is to replace this one.
    OUTDATED = "outdated"
    # Its worker has been asked to exit, so that another one can replace it.
    LEAVING = "leaving"
    # Its worker has been ordered to drain.
    DRAINING = "draining"


@dataclass(slots=True, eq=False)
class WorkerProcess:
    """The supervisor's record of a worker, from its fork until it has been reaped.

    Times are seconds of the monotonic clock.

    Attributes:
        slot: The number of its slot.
        pid: Its process.
        channel: The supervisor's end of the channel to it.
        spawned: When it was forked.
        state: What it has been asked to do: SERVING, OUTDATED, LEAVING or DRAINING.
        adopted: Whether it has taken over clients of the worker before it.
        ready: Whether it has reported that it serves.
        dead: Whether it has been killed, or has exited.
        ping_sent: When the unanswered ping was sent, None if every ping has been answered. The fork
            counts as a ping, which the worker answers when it is ready.
        freeze_ordered: The number of the last roll for which it was ordered to freeze.
        frozen: The number of the last roll for which it has frozen.
        allowed: The number of the last roll that it may do by itself.
        needs: It does not need the segments of the log that end at this offset, or before it.

    """

    slot: int
    pid: int
    channel: socket.socket
    spawned: float
    state: State = State.SERVING
    adopted: bool = False
    ready: bool = False
    dead: bool = False
    ping_sent: float | None = None
    freeze_ordered: int = 0
    frozen: int = 0
    allowed: int = 0
    needs: int = 0

    def send(self, order: Order, files: Sequence[int] = ()) -> bool:
        """Send `order` with the descriptors `files`, and return whether that was possible."""
        try:
            socket.send_fds(self.channel, [encode(order)], files)
        except OSError:
            # The worker is exiting and SIGCHLD follows, or it does not read its channel, or the
            # kernel is out of memory.
            return False
        return True

    def order(self, order: Order, files: Sequence[int] = ()) -> None:
        """Send `order` with the descriptors `files`.

        A worker that cannot be told is killed. Its successor starts from the new state.
        """
        if not self.send(order, files):
            self.kill()

    def kill(self) -> None:
        """Kill the worker with SIGKILL, unless it is dead."""
        if not self.dead:
            # The pid cannot belong to another process: the worker has not been reaped yet.
            os.kill(self.pid, signal.SIGKILL)
            self.dead = True

    def terminate(self) -> None:
        """Send SIGTERM to the worker, unless it is dead."""
        if not self.dead:
            os.kill(self.pid, signal.SIGTERM)

    def save(self) -> WorkerState:
        """Return the state of this worker for load() in the next version of the program."""
        return WorkerState(self.pid, self.channel.fileno(), self.spawned, self.ready, self.adopted)

    @classmethod
    def load(cls, slot: int, saved: WorkerState) -> "WorkerProcess":
        """Return the worker of the previous version that save() was called on."""
        return cls(
            slot,
            saved.pid,
            socket.socket(fileno=saved.channel),
            saved.spawned,
            State.OUTDATED,
            saved.adopted,
            saved.ready,
        )


@dataclass(slots=True)
class Slot:
    """The supervisor's record of one slot. Times are seconds of the monotonic clock."""

    index: int
    listeners: list[socket.socket]
    # Whether all slots share the same listening sockets. Each slot has its own descriptors of them.
    shared: bool = False
    worker: WorkerProcess | None = None
    # When to spawn the next worker, None if the slot has a worker or is to stay empty.
    due: float | None = None
    client_table: ClientTable = field(default_factory=ClientTable)
    # Connections to the orphaned workers that had these clients before. The first worker of this
    # slot takes over from them. Until then, they serve on if these connections are closed.
    predecessors: list[socket.socket] = field(default_factory=list)
    # Number of workers of this slot that died unexpectedly and were replaced.
    restarts: int = 0
    # When the last of them was replaced, None if there was none.
    restarted: float | None = None
    failures: Failures = field(default_factory=Failures)

    @property
    def state(self) -> State:
        """What the slot is doing."""
        if self.worker is not None:
            return self.worker.state
        return State.EMPTY if self.due is None else State.DUE

    def close_listeners(self) -> None:
        """Close the listeners, whose accept queues are empty."""
        for listener in self.listeners:
            listener.close()
        self.listeners = []

    def forget_predecessors(self) -> None:
        """Close the connections to the orphaned workers."""
        for sock in self.predecessors:
            sock.close()
        self.predecessors = []

    def describe(self, now: float) -> SlotStatus:
        """Return this slot's part of the status, at the time `now`. Durations are in seconds."""
        worker = self.worker
        return SlotStatus(
            slot=self.index,
            pid=worker.pid if worker else None,
            ticks=start_ticks(worker.pid) if worker else None,
            ready=worker.ready if worker else False,
            clients=len(self.client_table),
            unprotected=len(self.client_table.unprotected),
            restarts=self.restarts,
            restarted=now - self.restarted if self.restarted is not None else None,
            silent=now - worker.ping_sent if worker and worker.ping_sent is not None else 0.0,
        )

    def describe_listeners(self) -> list[ListenerStatus]:
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
            worker=self.worker.save() if self.worker else None,
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
            worker=WorkerProcess.load(index, saved.worker) if saved.worker else None,
            restarts=saved.restarts,
            restarted=saved.restarted,
            failures=Failures(*saved.failures),
            client_table=ClientTable.load(saved.clients, saved.unprotected),
        )


def _describe(listener: socket.socket, slot: int | None) -> ListenerStatus:
    queued, backlog = accept_queue(listener)
    return ListenerStatus(slot, endpoint(*listener.getsockname()[:2]), queued, backlog)
