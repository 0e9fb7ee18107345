"""The pool of workers: forks a worker for each slot, replaces workers, and drains or kills them.

A worker may die at any time. Its clients stay in the client table of the slot, and the next worker
of the slot adopts them.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count

from tailsrv.client_limit import ClientLimit
from tailsrv.config import Timing
from tailsrv.control_socket import bind_for_worker
from tailsrv.handover import commit
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.signals import blocked
from tailsrv.log import fields, logger
from tailsrv.segments import Log
from tailsrv.shared_counts import SharedCounts
from tailsrv.supervisor.report_reader import ReportReader
from tailsrv.supervisor.restart_policy import ExitKind, Failures, classify_exit, describe_exit
from tailsrv.supervisor.slot import Slot
from tailsrv.worker_channel import Drain, Notices, Order, Ping, encode
from tailsrv.worker_context import WorkerContext

# Seconds between SIGTERM and SIGKILL for an outdated worker, in which it can finish its turn.
REPLACE_PATIENCE = 1.0


class WorkerPool:
    """The slots and their workers.

    Args:
        slots: The slots. After an upgrade, they may have workers of the previous version.
        loop: The supervisor's event loop.
        endpoints: The addresses that the server listens on, empty if workers do not outlive the
            supervisor.
        enter: `enter(slot, channel, sockets)` is called in each forked child, and must not return.
        notice: `notice(slot, notices)` is called for the notices in a worker's report.
        give_up: `give_up(reason)` is called when workers cannot start.
        keep_old: `keep_old(reason)` is called instead if this happens in an upgrade, while workers
            of the previous version are still serving.
        timing: The server's timing, for delays.

    """

    def __init__(
        self,
        slots: Sequence[Slot],
        loop: EventLoop,
        endpoints: Sequence[str],
        enter: Callable[[Slot, socket.socket, Sequence[socket.socket]], None],
        notice: Callable[[Slot, Notices], None],
        give_up: Callable[[str], None],
        keep_old: Callable[[str], None],
        timing: Timing,
    ) -> None:
        self._timing = timing
        self.slots = list(slots)
        # Whether a worker that dies is replaced.
        self.respawning = False
        # Whether all slots have had ready workers at the same time.
        self.started_up = False
        # When the grace period of the drain ends, None if there is no drain.
        self.drain_deadline: float | None = None
        # Workers that are to be replaced, by slot and pid.
        self.outdated = self._workers()
        # Outdated workers that were sent SIGTERM. They are killed after REPLACE_PATIENCE.
        self._ending: list[tuple[Slot, int]] = []
        self._loop = loop
        self._endpoints = endpoints
        # Distinguishes the sockets of workers.
        self._numbers = count()
        self._enter, self._notice, self._give_up = enter, notice, give_up
        self._keep_old = keep_old
        # True in an upgrade until a worker of this version is ready.
        self._unproven = bool(self.outdated)
        self.report_reader = ReportReader(self.slots, loop, self._handle_notices)
        for slot, _ in self.outdated:
            self._register_channel(slot)

    def running(self) -> list[Slot]:
        """Return the slots that have a worker."""
        return [slot for slot in self.slots if slot.pid is not None]

    def finished(self) -> bool:
        """Return whether no slot has a worker, and none is to be spawned."""
        return all(slot.pid is None and slot.spawn_at is None for slot in self.slots)

    def all_ready(self) -> bool:
        """Return whether every slot has a worker that is ready."""
        return all(slot.pid is not None and slot.ready for slot in self.slots)

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
        for slot in self.running():
            # If the ping was not sent, no answer is expected.
            if slot.ping_sent is None and self._send(slot, Ping()):
                slot.ping_sent = self._loop.now

    def order(self, slot: Slot, order: Order, files: Sequence[int] = ()) -> None:
        """Send `order`, with the descriptors `files`, to the worker of `slot`.

        A worker that cannot be told is killed. Its successor starts from the new state.
        """
        if not self._send(slot, order, files):
            self.kill_worker(slot)

    def order_all(self, order: Order, files: Sequence[int] = ()) -> None:
        """Send `order`, with the descriptors `files`, to every worker, as with `order`."""
        for slot in self.running():
            self.order(slot, order, files)

    def kill_worker(self, slot: Slot) -> None:
        """Kill the worker of `slot` with SIGKILL."""
        assert slot.pid is not None
        # The pid cannot belong to another process: the worker has not been reaped yet.
        os.kill(slot.pid, signal.SIGKILL)

    def _send(self, slot: Slot, order: Order, files: Sequence[int] = ()) -> bool:
        """Send `order` to the worker of `slot`, and return whether that was possible."""
        assert slot.channel is not None
        try:
            socket.send_fds(slot.channel, [encode(order)], files)
        except OSError:
            # The worker is exiting and SIGCHLD follows, or it does not read its channel, or the
            # kernel is out of memory.
            return False
        return True

    # Spawning and replacing

    def fill_slots(self) -> None:
        """Spawn a worker for every empty slot, and replace workers that die from now on."""
        self.respawning, self.drain_deadline = True, None
        self.outdated = self._still_outdated()
        # If no worker of the previous version is left, nothing else can serve when workers of this
        # version fail to start.
        self._unproven = bool(self.outdated)
        for slot in self.slots:
            if slot.pid is None:
                self.spawn(slot)

    def replace_all(self) -> None:
        """Spawn workers for the empty slots, and replace all existing workers, which lack the file.

        The replacements have the file, and adopt the clients.
        """
        without_file = self._workers()
        self.fill_slots()
        self.outdated = without_file
        self._terminate(without_file)

    def replace_next(self) -> bool:
        """Ask the next outdated worker to exit, if all replacements so far are ready.

        Its replacement adopts its clients. Returns whether any outdated worker is left.

        The worker is sent SIGTERM first, so that it can finish its turn and report the connections
        that it has accepted in this turn. SIGKILL would lose them.
        """
        self.outdated = self._still_outdated()
        replaced = [slot for slot in self.slots if not self._is_outdated(slot)]
        if self.outdated and all(slot.pid is not None and slot.ready for slot in replaced):
            self._terminate(self.outdated[:1])
        return bool(self.outdated)

    def _terminate(self, workers: Sequence[tuple[Slot, int]]) -> None:
        """Ask outdated workers to exit. Kill those that still run after REPLACE_PATIENCE."""
        self._ending = [
            *(worker for worker in self._still_ending() if worker not in workers),
            *workers,
        ]
        for _, pid in workers:
            os.kill(pid, signal.SIGTERM)
        self._loop.timers.set(self._kill_overdue, self._loop.now + REPLACE_PATIENCE)

    def _workers(self) -> list[tuple[Slot, int]]:
        """Return the slots that have a worker, each with its pid."""
        return [(slot, slot.pid) for slot in self.slots if slot.pid is not None]

    def _is_outdated(self, slot: Slot) -> bool:
        """Return whether the worker of `slot` is to be replaced.

        Call this only after updating `outdated` with `_still_outdated()`.
        """
        return any(other is slot for other, _ in self.outdated)

    def _still_outdated(self) -> list[tuple[Slot, int]]:
        """Return the workers that are still to be replaced."""
        return [(slot, pid) for slot, pid in self.outdated if slot.pid == pid]

    def _still_ending(self) -> list[tuple[Slot, int]]:
        """Return the outdated workers that were asked to exit, and have not exited yet."""
        return [(slot, pid) for slot, pid in self._ending if slot.pid == pid]

    def _kill_overdue(self) -> None:
        """Kill the outdated workers that were asked to exit, and have not exited yet."""
        for _, pid in self._still_ending():
            os.kill(pid, signal.SIGKILL)

    def spawn(self, slot: Slot) -> None:
        """Spawn a worker for the empty `slot`, or schedule a retry if fork(2) fails."""
        slot.spawn_at = None
        try:
            pid = self._fork(slot)
        except OSError as error:
            self._postpone(slot, error)
            return
        slot.pid, slot.spawned, slot.ready = pid, self._loop.now, False
        slot.ping_sent = self._loop.now
        slot.adopted = bool(slot.client_table.clients)
        logger.debug(
            "worker spawned: %s",
            fields(slot=slot.index, pid=pid, adopts=len(slot.client_table.clients)),
        )
        if self.drain_deadline is not None:
            self._order_drain(slot, self.drain_deadline)

    def _fork(self, slot: Slot) -> int:
        """Fork a worker for `slot`, with a channel to it, and return its pid.

        Everything else that can fail is done before fork(2). Raises OSError.
        """
        with ExitStack() as stack:
            sockets = bind_for_worker(self._endpoints, self._numbers)
            for sock in sockets:
                stack.enter_context(sock)
            slot.channel, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(worker_end)
            try:
                slot.channel.setblocking(False)
                self._register_channel(slot)
                with blocked():
                    # In the child, `_enter` does the work of a worker and never returns.
                    if (pid := os.fork()) == 0:
                        self._enter(slot, worker_end, sockets)
            except OSError:
                self._loop.unregister(slot.channel.fileno())
                slot.channel.close()
                slot.channel = None
                raise
        return pid

    def prepare_child(
        self,
        slot: Slot,
        log: Log | None,
        ends: SharedCounts | None,
        opened_at: SharedCounts | None,
        frozen_end: int | None,
        truncated: bool,
        channel: socket.socket,
        sockets: Sequence[socket.socket],
        endpoints: Sequence[str],
        client_limit: ClientLimit | None,
    ) -> WorkerContext:
        """In a forked child, close what belongs to other slots, and return what its worker needs.

        Args:
            slot: The slot of the new worker.
            log: The segments of the log, None while there is no file.
            ends: With --follow-name, the shared ends of the log.
            opened_at: With --follow-name, when the active segment was opened.
            frozen_end: The end of the log if the worker starts frozen.
            truncated: Whether the active segment is known to be truncated.
            channel: The worker's end of its channel.
            sockets: The sockets at which the next supervisor finds the worker.
            endpoints: The addresses that the server listens on.
            client_limit: The shared counts of --max-clients, None without that option.

        """
        self.close_in_child(keep=slot)
        for other in self.slots:
            if other is not slot:
                other.client_table.close_in_child()
        channel.setblocking(False)
        return WorkerContext(
            slot.index,
            log,
            ends,
            opened_at,
            frozen_end,
            truncated,
            slot.listeners,
            slot.shared,
            channel,
            endpoints,
            client_limit,
            slot.client_table.clients,
            sockets,
            slot.predecessors,
        )

    def close_in_child(self, keep: Slot | None = None) -> None:
        """In a forked child, close all channels and listeners, except the listeners of `keep`."""
        for slot in self.slots:
            if slot.channel is not None:
                # A worker exits when the supervisor's end of its channel is closed. A copy of that
                # end in another process would prevent this.
                slot.channel.close()
            if slot is not keep:
                slot.forget_predecessors()
                for listener in slot.listeners:
                    # The kernel distributes new connections over all open listeners of a port. If
                    # this child kept the listener of another slot open after the worker there has
                    # closed it, connections would wait in its queue forever.
                    listener.close()

    def _register_channel(self, slot: Slot) -> None:
        assert slot.channel is not None
        self._loop.register(slot.channel.fileno(), partial(self.report_reader.read_reports, slot))

    def _postpone(self, slot: Slot, error: OSError) -> None:
        slot.ready = False
        hint = "raise TasksMax=, LimitNOFILE= or the memory limit, as the reason says"
        logger.error(
            "cannot spawn a worker, clients of its slot wait: %s",
            fields(slot=slot.index, reason=error.strerror, hint=hint),
        )
        self._spawn_at(slot, self._loop.now + self._timing.fork_retry)

    def _spawn_at(self, slot: Slot, when: float) -> None:
        slot.spawn_at = when
        self._set_spawn_timer()

    def _set_spawn_timer(self) -> None:
        if planned := [slot.spawn_at for slot in self.slots if slot.spawn_at is not None]:
            self._loop.timers.set(self._spawn_due, min(planned))

    def _spawn_due(self) -> None:
        """Spawn a worker for each slot whose `spawn_at` has passed."""
        for slot in self.slots:
            if slot.spawn_at is not None and slot.spawn_at <= self._loop.now:
                self.spawn(slot)
        self._set_spawn_timer()

    # Exits of workers

    def handle_exit(self, pid: int, status: int) -> None:
        """Handle the exit of the child `pid`, with its wait `status`.

        If it was a worker, decide whether its slot gets another worker, and when.
        """
        slot = next((slot for slot in self.slots if slot.pid == pid), None)
        # Not a worker. As PID 1, the supervisor also reaps orphans of other programs.
        if slot is None:
            return
        assert slot.channel is not None
        # Compute this before reading the worker's last reports. A report with `ready` may start the
        # replacement of the next worker, which removes this one from `outdated`.
        expected = not self.respawning or (slot, pid) in self.outdated
        # Clear the pid first: from now on it may belong to another process.
        slot.pid = None
        self.report_reader.read_remaining(slot)
        self._loop.unregister(slot.channel.fileno())
        slot.channel.close()
        slot.channel = None
        lost = slot.client_table.forget_unprotected()
        kind = classify_exit(status)
        if expected and kind is ExitKind.DONE:
            slot.failures = Failures()
        detail = fields(slot=slot.index, pid=pid, keeps=len(slot.client_table), lost=lost or None)
        logger.log(
            logging.DEBUG if expected and not lost else logging.WARNING,
            "worker %s: %s %s",
            kind.value,
            detail,
            describe_exit(status),
        )
        if not expected:
            self._respawn_later(slot, kind, status)
        elif self.respawning:
            self.spawn(slot)
        elif (
            self.drain_deadline is not None
            and (slot.client_table.clients or slot.listeners)
            and self._loop.now < self.drain_deadline
        ):
            # The clients of this slot still need a worker. The delay is short, because the end of
            # the grace period bounds the number of attempts.
            self._record_failure(slot, kind)
            self._spawn_at(
                slot,
                self._loop.now + min(slot.failures.delay(self._timing), self._timing.first_delay),
            )

    def _respawn_later(self, slot: Slot, kind: ExitKind, status: int) -> None:
        """Schedule the next worker of a slot whose worker has died, or give up."""
        # If no worker of the new version has been ready yet, the program is at fault, not the
        # clients. Stop the upgrade. Only the empty slot gets another worker, after the longest
        # delay.
        if self._unproven and not slot.ready and kind not in (ExitKind.KILLED, ExitKind.NO_ROOM):
            self.outdated = []
            slot.restarts += 1
            self._spawn_at(slot, self._loop.now + self._timing.max_delay)
            self._keep_old(f"slot={slot.index} {describe_exit(status)}")
            return
        self._record_failure(slot, kind)
        if (
            kind is ExitKind.CANNOT_BOOT
            or (kind is ExitKind.NO_ROOM and not self.started_up)
            or slot.failures.hopeless()
        ):
            self._give_up(f"slot={slot.index} {describe_exit(status)}")
            return
        slot.restarts += 1
        slot.restarted = self._loop.now
        if delay := slot.failures.delay(self._timing):
            logger.warning("respawning after a delay: %s", fields(slot=slot.index, seconds=delay))
        self._spawn_at(slot, self._loop.now + delay)

    def _record_failure(self, slot: Slot, kind: ExitKind) -> None:
        """Add a worker's death to the slot's record.

        If one of the slot's clients seems to be the cause, close all of its connections.
        """
        slot.failures = slot.failures.after_life(
            self._loop.now - slot.spawned, slot.ready, kind, slot.adopted, self._timing
        )
        slot.ready = False
        # Clients that orphaned workers can still serve are better off with these.
        if slot.failures.poisoned() and not slot.predecessors:
            closed = slot.client_table.close_connections()
            hint = "one of these clients seems to crash its worker: please report this bug"
            logger.error(
                "workers crashed right after taking over clients, disconnected these clients: %s",
                fields(slot=slot.index, clients=closed, hint=hint),
            )

    # Drain and end

    def stop_respawning(self) -> None:
        """From now on, do not replace workers that die. Existing workers are not affected."""
        self.respawning = False
        self.outdated = []
        self._loop.timers.cancel(self._spawn_due)

    def drain(self, until: float) -> None:
        """Let all workers send what is in the log now, and exit, by the time `until`."""
        # These workers were asked to exit before, so the order goes to their replacements.
        ending = self._still_ending()
        self.stop_respawning()
        self.outdated = ending
        self.drain_deadline = until
        for slot in self.slots:
            # During the backoff, the slot's clients and the connections in its accept queue wait
            # for a worker. Spawn it now, so that it can serve them before it exits.
            if slot.spawn_at is not None:
                self.spawn(slot)
            elif slot.pid is None:
                self._close_listeners(slot)
            elif (slot, slot.pid) not in ending:
                self._order_drain(slot, until)

    def _order_drain(self, slot: Slot, until: float) -> None:
        assert slot.pid is not None
        # If the order cannot be sent, the worker exits without draining, and its replacement gets
        # the order.
        self._send(slot, Drain(max(0.0, until - self._loop.now)))
        # The pid cannot belong to another process: the worker has not been reaped yet.
        os.kill(slot.pid, signal.SIGTERM)

    def _close_listeners(self, slot: Slot) -> None:
        """Close the listeners of `slot`, whose accept queues are empty."""
        for listener in slot.listeners:
            listener.close()
        slot.listeners = []

    def kill(self) -> None:
        """Kill every worker with SIGKILL, and spawn no more."""
        self.stop_respawning()
        self.drain_deadline = None
        for slot in self.slots:
            slot.spawn_at = None
            if slot.pid is not None:
                os.kill(slot.pid, signal.SIGKILL)

    def _handle_notices(self, slot: Slot, notices: Notices) -> None:
        """Handle the notices about the worker itself, then pass all of them to `notice`."""
        if notices.ready or notices.alive:
            slot.ping_sent = None
        if notices.ready and slot.pid is not None and (slot, slot.pid) not in self.outdated:
            self._unproven = False
        if notices.emptied:
            self._close_listeners(slot)
        self._notice(slot, notices)
