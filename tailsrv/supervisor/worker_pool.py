"""The pool of workers: forks a worker for each slot, replaces workers, and drains or kills them.

A worker may die at any time. Its clients stay in the client table of the slot, and the next worker
of the slot adopts them. One table says what to do when something happens to a slot.
"""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import count

from tailsrv.config import Timing
from tailsrv.control_socket import bind_for_worker
from tailsrv.handover import commit
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.signals import blocked
from tailsrv.log import fields, logger
from tailsrv.supervisor.report_reader import ReportReader
from tailsrv.supervisor.restart_policy import ExitKind, Failures, classify_exit, describe_exit
from tailsrv.supervisor.slot import Slot, State, WorkerProcess
from tailsrv.worker_channel import Drain, Notices, Order, Ping

# Seconds between SIGTERM and SIGKILL for a worker that is replaced. It can finish its turn.
REPLACE_PATIENCE = 1.0


class Mode(Enum):
    """What the pool is for."""

    # It does not serve yet.
    IDLE = "idle"
    # Each slot has a worker. One that dies is replaced.
    RUN = "run"
    # The workers send what is in the log, and exit. One that dies before is replaced.
    DRAIN = "drain"
    # No worker is left, or will be soon.
    KILL = "kill"


class Event(Enum):
    """What can happen to a slot."""

    # The pool has got its mode.
    ENTERED = 1
    # Its next worker is due.
    DUE = 2
    # Its worker is to be replaced now.
    REPLACE = 3
    # Its worker was asked to exit, and has not done so in time.
    OVERDUE = 4
    # Its worker has exited.
    EXITED = 5


class Action(Enum):
    """What the pool does then. The slot is EMPTY after an exit without an action."""

    # Fork a worker, which is SERVING or DRAINING, as the mode says. If that fails, one is DUE.
    FORK = 1
    # A worker is DUE after the delay of the restart policy, or the server gives up.
    RESPAWN = 2
    # As long as clients of the slot need one, a worker is DUE after a short delay.
    FINISH = 3
    # No worker is due any more.
    FORGET = 4
    # Send SIGTERM to the worker, which is LEAVING.
    TERMINATE = 5
    # Order the worker to drain: it is DRAINING.
    ORDER_DRAIN = 6
    # Kill the worker.
    KILL = 7
    # Close the listeners.
    CLOSE = 8


IDLE, RUN, DRAIN, KILL = Mode
EMPTY, DUE, SERVING, OUTDATED, LEAVING, DRAINING = State

# Everything that is not in this table has no consequence.
TABLE = {
    (RUN, EMPTY, Event.ENTERED): Action.FORK,
    (RUN, DUE, Event.ENTERED): Action.FORK,
    (RUN, DUE, Event.DUE): Action.FORK,
    (RUN, SERVING, Event.REPLACE): Action.TERMINATE,
    (RUN, SERVING, Event.EXITED): Action.RESPAWN,
    (RUN, OUTDATED, Event.REPLACE): Action.TERMINATE,
    (RUN, OUTDATED, Event.EXITED): Action.FORK,
    (RUN, LEAVING, Event.OVERDUE): Action.KILL,
    (RUN, LEAVING, Event.EXITED): Action.FORK,
    (DRAIN, EMPTY, Event.ENTERED): Action.CLOSE,
    # Clients and connections in its accept queue wait for this worker.
    (DRAIN, DUE, Event.ENTERED): Action.FORK,
    (DRAIN, DUE, Event.DUE): Action.FORK,
    (DRAIN, SERVING, Event.ENTERED): Action.ORDER_DRAIN,
    (DRAIN, OUTDATED, Event.ENTERED): Action.ORDER_DRAIN,
    # It may have begun to exit, so the order goes to its successor.
    (DRAIN, LEAVING, Event.OVERDUE): Action.KILL,
    (DRAIN, LEAVING, Event.EXITED): Action.FINISH,
    (DRAIN, DRAINING, Event.EXITED): Action.FINISH,
    (KILL, DUE, Event.ENTERED): Action.FORGET,
    (KILL, SERVING, Event.ENTERED): Action.KILL,
    (KILL, OUTDATED, Event.ENTERED): Action.KILL,
    (KILL, LEAVING, Event.ENTERED): Action.KILL,
    (KILL, DRAINING, Event.ENTERED): Action.KILL,
}


@dataclass(frozen=True, slots=True)
class Reported:
    """A worker has reported something that is not about single clients. It may be dead by now."""

    slot: Slot
    worker: WorkerProcess
    notices: Notices


@dataclass(frozen=True, slots=True)
class StartedUp:
    """For the first time, all slots have workers that are ready."""


@dataclass(frozen=True, slots=True)
class CannotStart:
    """Workers cannot start, and the server has not started up before. `reason` says why."""

    reason: str


PoolEvent = Reported | StartedUp | CannotStart


class WorkerPool:
    """The slots and their workers.

    Args:
        slots: The slots. After an upgrade, they may have workers of the previous version.
        loop: The supervisor's event loop.
        endpoints: The addresses that the server listens on, empty if workers do not outlive the
            supervisor.
        run_worker: `run_worker(slot, channel, sockets)` is called in each forked child, and must
            not return. It is a function because fork(2) has two returns, and only one of them may
            go on with the pool.
        timing: The server's timing, for delays.
        started_up: Whether all slots have had ready workers at the same time.

    """

    def __init__(
        self,
        slots: Sequence[Slot],
        loop: EventLoop,
        endpoints: Sequence[str],
        run_worker: Callable[[Slot, socket.socket, Sequence[socket.socket]], None],
        timing: Timing,
        started_up: bool = False,
    ) -> None:
        self.slots = list(slots)
        self.started_up = started_up
        self.report_reader = ReportReader(self.slots, loop)
        self._loop, self._endpoints, self._run_worker = loop, endpoints, run_worker
        self._timing = timing
        self._mode = IDLE
        # When the grace period of the drain ends.
        self._deadline = 0.0
        # Distinguishes the sockets of workers.
        self._numbers = count()
        self._events: list[PoolEvent] = []
        for slot in self.slots:
            if slot.worker is not None:
                self._register_channel(slot, slot.worker)

    def take_events(self) -> list[PoolEvent]:
        """Return what has happened since the last call. Call this in every turn."""
        events, self._events = self._events, []
        return events

    def workers(self) -> list[WorkerProcess]:
        """Return the workers, in the order of their slots."""
        return [slot.worker for slot in self.slots if slot.worker is not None]

    def finished(self) -> bool:
        """Return whether no slot has a worker, and none is to be spawned."""
        return all(slot.state is EMPTY for slot in self.slots)

    def _all_ready(self) -> bool:
        """Return whether every slot has a worker that is ready."""
        return all(slot.worker is not None and slot.worker.ready for slot in self.slots)

    def clients(self) -> int:
        """Return the number of clients in all slots, including unprotected ones."""
        return sum(len(slot.client_table) for slot in self.slots)

    def has_predecessors(self) -> bool:
        """Return whether a slot has clients that an orphaned worker may still serve."""
        return any(slot.predecessors for slot in self.slots)

    def dismiss_predecessors(self) -> None:
        """Let the orphaned workers end, because the server ends."""
        for slot in self.slots:
            for orphan in slot.predecessors:
                commit([orphan])
            slot.predecessors = []

    def ping_workers(self) -> None:
        """Ping every worker that has no unanswered ping."""
        for worker in self.workers():
            # If the ping was not sent, no answer is expected.
            if worker.ping_sent is None and worker.send(Ping()):
                worker.ping_sent = self._loop.now

    def order_all(self, order: Order, files: Sequence[int] = ()) -> None:
        """Send `order`, with the descriptors `files`, to every worker."""
        for worker in self.workers():
            worker.order(order, files)

    # The modes

    def run(self) -> None:
        """Spawn a worker for every slot without one, and replace workers that die from now on."""
        self._enter(RUN)

    def run_anew(self) -> None:
        """As run(), and replace all workers that exist, because they lack the file."""
        self._mode = RUN
        for slot in self.slots:
            self._handle(slot, Event.ENTERED if slot.worker is None else Event.REPLACE)

    def drain(self, until: float) -> None:
        """Let all workers send what is in the log now, and exit, by the time `until`."""
        self._deadline = until
        self._enter(DRAIN)

    def kill(self) -> None:
        """Kill every worker with SIGKILL, and spawn no more."""
        self._enter(KILL)

    def _enter(self, mode: Mode) -> None:
        self._mode = mode
        for slot in self.slots:
            self._handle(slot, Event.ENTERED)

    # What happens to a slot

    def replace(self, slot: Slot) -> None:
        """Ask the worker of `slot` to exit. Its replacement adopts its clients.

        The worker is sent SIGTERM first, so that it can finish its turn and report the connections
        that it has accepted in this turn. SIGKILL would lose them.
        """
        self._handle(slot, Event.REPLACE)

    def _handle_due(self) -> None:
        for slot in self.slots:
            if slot.due is not None and slot.due <= self._loop.now:
                self._handle(slot, Event.DUE)
        self._set_due_timer()

    def _handle_overdue(self) -> None:
        for slot in self.slots:
            self._handle(slot, Event.OVERDUE)

    def _handle(self, slot: Slot, event: Event) -> None:
        """Do what the table says, except if a worker has exited: see _handle_exit()."""
        worker = slot.worker
        match TABLE.get((self._mode, slot.state, event)):
            case Action.FORK:
                self._spawn(slot)
            case Action.FORGET:
                slot.due = None
            case Action.CLOSE:
                slot.close_listeners()
            case Action.TERMINATE if worker is not None:
                worker.state = LEAVING
                worker.terminate()
                self._loop.timers.set(self._handle_overdue, self._loop.now + REPLACE_PATIENCE)
            case Action.ORDER_DRAIN if worker is not None:
                self._order_drain(worker)
            case Action.KILL if worker is not None:
                worker.kill()

    def handle_exit(self, pid: int, status: int) -> None:
        """Handle the exit of the child `pid`, with its wait `status`.

        If it was a worker, decide whether its slot gets another worker, and when.
        """
        for slot in self.slots:
            if (worker := slot.worker) is not None and worker.pid == pid:
                self._handle_exit(slot, worker, status)
                return
        # Not a worker. As PID 1, the supervisor also reaps orphans of other programs.

    def _handle_exit(self, slot: Slot, worker: WorkerProcess, status: int) -> None:
        action = TABLE.get((self._mode, worker.state, Event.EXITED))
        # From now on, the pid may belong to another process.
        slot.worker, worker.dead = None, True
        self._handle_reports(slot, worker, self.report_reader.read_remaining(slot, worker))
        self._loop.unregister(worker.channel.fileno())
        worker.channel.close()
        kind, lost = classify_exit(status), slot.client_table.forget_unprotected()
        expected = action is not Action.RESPAWN
        logger.log(
            logging.DEBUG if expected and not lost else logging.WARNING,
            "worker %s: %s %s",
            kind.value,
            fields(
                slot=slot.index, pid=worker.pid, keeps=len(slot.client_table), lost=lost or None
            ),
            describe_exit(status),
        )
        if expected and kind is ExitKind.DONE:
            slot.failures = Failures()
        match action:
            case Action.FORK:
                self._spawn(slot)
            case Action.RESPAWN:
                self._respawn(slot, worker, kind, status)
            case Action.FINISH:
                self._finish(slot, worker, kind)

    def _respawn(self, slot: Slot, worker: WorkerProcess, kind: ExitKind, status: int) -> None:
        self._record_failure(slot, worker, kind)
        delay = slot.failures.next_delay(kind, self.started_up, self._timing)
        if delay is None:
            self._events.append(CannotStart(f"slot={slot.index} {describe_exit(status)}"))
            return
        slot.restarts += 1
        slot.restarted = self._loop.now
        if delay:
            logger.warning("respawning after a delay: %s", fields(slot=slot.index, seconds=delay))
        self._plan(slot, delay)

    def _finish(self, slot: Slot, worker: WorkerProcess, kind: ExitKind) -> None:
        """Plan another worker for the drain, if clients still need one and there is time."""
        needed = slot.client_table.clients or slot.listeners
        if needed and self._loop.now < self._deadline:
            self._record_failure(slot, worker, kind)
            # The delay is short, because the end of the grace period bounds the attempts.
            self._plan(slot, min(slot.failures.delay(self._timing), self._timing.first_delay))

    def _record_failure(self, slot: Slot, worker: WorkerProcess, kind: ExitKind) -> None:
        """Add a worker's death to the slot's record.

        If one of the slot's clients seems to be the cause, close all of its connections.
        """
        slot.failures = slot.failures.after_life(
            self._loop.now - worker.spawned, worker.ready, kind, worker.adopted, self._timing
        )
        # Clients that orphaned workers can still serve are better off with these.
        if slot.failures.poisoned() and not slot.predecessors:
            closed = slot.client_table.close_connections()
            hint = "one of these clients seems to crash its worker: please report this bug"
            logger.error(
                "workers crashed right after taking over clients, disconnected these clients: %s",
                fields(slot=slot.index, clients=closed, hint=hint),
            )

    def _plan(self, slot: Slot, delay: float) -> None:
        """Let the next worker of `slot` be due in `delay` seconds."""
        slot.due = self._loop.now + delay
        self._set_due_timer()

    def _set_due_timer(self) -> None:
        if planned := [slot.due for slot in self.slots if slot.due is not None]:
            self._loop.timers.set(self._handle_due, min(planned))

    def _order_drain(self, worker: WorkerProcess) -> None:
        worker.state = DRAINING
        # If the order cannot be sent, the worker exits without draining, and its replacement gets
        # the order.
        worker.send(Drain(max(0.0, self._deadline - self._loop.now)))
        worker.terminate()

    # Forking

    def _spawn(self, slot: Slot) -> None:
        """Spawn a worker for the empty `slot`, or plan another attempt if fork(2) fails."""
        slot.due = None
        try:
            worker = slot.worker = self._fork(slot)
        except OSError as error:
            logger.error(
                "cannot spawn a worker, clients of its slot wait: %s",
                fields(
                    slot=slot.index,
                    reason=error.strerror,
                    hint="raise TasksMax=, LimitNOFILE= or the memory limit, as the reason says",
                ),
            )
            self._plan(slot, self._timing.fork_retry)
            return
        logger.debug(
            "worker spawned: %s",
            fields(slot=slot.index, pid=worker.pid, adopts=len(slot.client_table.clients)),
        )
        if self._mode is DRAIN:
            self._order_drain(worker)

    def _fork(self, slot: Slot) -> WorkerProcess:
        """Fork a worker for `slot`, with a channel to it. Raises OSError.

        Everything else that can fail is done before fork(2).
        """
        with ExitStack() as stack:
            sockets = bind_for_worker(self._endpoints, self._numbers)
            for sock in sockets:
                stack.enter_context(sock)
            channel, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(worker_end)
            now = self._loop.now
            # It is not to be killed before it has a pid.
            worker = WorkerProcess(slot.index, 0, channel, now, ping_sent=now, dead=True)
            worker.adopted = bool(slot.client_table.clients)
            try:
                channel.setblocking(False)
                self._register_channel(slot, worker)
                with blocked():
                    if (pid := os.fork()) == 0:
                        channel.close()
                        worker_end.setblocking(False)
                        self._run_worker(slot, worker_end, sockets)
            except OSError:
                self._loop.unregister(channel.fileno())
                channel.close()
                raise
            worker.pid, worker.dead = pid, False
        return worker

    def close_in_child(self, keep: Slot) -> None:
        """In a forked child, close everything that the worker of the slot `keep` does not need."""
        for worker in self.workers():
            # A worker exits when the supervisor's end of its channel is closed. A copy of that end
            # in another process would prevent this.
            worker.channel.close()
        for slot in self.slots:
            if slot is not keep:
                slot.forget_predecessors()
                # The kernel distributes new connections over all open listeners of a port. If this
                # child kept the listener of another slot open after the worker there has closed it,
                # connections would wait in its queue forever.
                slot.close_listeners()
                slot.client_table.close_in_child()

    # Reports

    def _register_channel(self, slot: Slot, worker: WorkerProcess) -> None:
        self._loop.register(worker.channel.fileno(), partial(self._read_reports, slot, worker))

    def _read_reports(self, slot: Slot, worker: WorkerProcess) -> None:
        self._handle_reports(slot, worker, self.report_reader.read_reports(slot, worker))

    def _handle_reports(
        self, slot: Slot, worker: WorkerProcess, reported: Sequence[Notices]
    ) -> None:
        """Note what concerns the worker itself, and pass everything on as events."""
        for notices in reported:
            if notices.ready or notices.alive:
                worker.ping_sent = None
            worker.ready = worker.ready or notices.ready
            worker.frozen = worker.frozen if notices.frozen is None else notices.frozen
            worker.needs = worker.needs if notices.needs is None else notices.needs
            if notices.emptied:
                slot.close_listeners()
            if notices.ready and self._mode is RUN and not self.started_up and self._all_ready():
                self.started_up = True
                self._events.append(StartedUp())
            self._events.append(Reported(slot, worker, notices))
