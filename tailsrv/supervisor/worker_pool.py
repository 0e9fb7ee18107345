"""Fills the slots: forks workers and reaps them.

A worker's death is nothing special here: its clients stay in the slot's roster, and its successor adopts them.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial

from tailsrv.channel import Drain, Notices, Ping, encode
from tailsrv.client_limit import ClientLimit
from tailsrv.config import Timing
from tailsrv.inheritance import Inheritance
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.signals import blocked
from tailsrv.log import fields, logger
from tailsrv.supervisor.report_reader import ReportReader
from tailsrv.supervisor.restart_policy import ExitKind, Failures, classify_exit, describe_exit
from tailsrv.supervisor.slot import Slot

# seconds that an outdated worker gets to finish its turn
REPLACE_PATIENCE = 1.0


class WorkerPool:
    """The slots and the workers in them.

    `enter(slot, channel)` is called in each forked child and does not return. `notice(slot, notices)` is called with
    what a worker has to say beyond its clients, `give_up(reason)` when workers cannot start, and `stuck(reason)` when
    that is so in an upgrade, while workers of the version before us still serve.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        loop: EventLoop,
        enter: Callable[[Slot, socket.socket], None],
        notice: Callable[[Slot, Notices], None],
        give_up: Callable[[str], None],
        stuck: Callable[[str], None],
        timing: Timing,
    ) -> None:
        self._timing = timing
        self.slots = list(slots)
        # empty slots are to be filled
        self.respawning = False
        # every slot has had a worker that was ready
        self.started_up = False
        self.drain_deadline: float | None = None
        # the drain is for a next file, not for the end
        self.rotating = False
        # to be replaced
        self.outdated = self._workers()
        # outdated workers that were sent SIGTERM; killed after REPLACE_PATIENCE
        self._ending: list[tuple[Slot, int]] = []
        self._loop = loop
        self._enter, self._notice, self._give_up, self._stuck = enter, notice, give_up, stuck
        # no worker of this version has been ready yet
        self._unproven = bool(self.outdated)
        self.report_reader = ReportReader(self.slots, loop, self._take_notices)
        for slot, _ in self.outdated:
            self._register_channel(slot)

    def running(self) -> list[Slot]:
        """Return the slots that have a worker."""
        return [slot for slot in self.slots if slot.pid is not None]

    def finished(self) -> bool:
        """Tell whether no slot has a worker, or is to get one."""
        return all(slot.pid is None and slot.spawn_at is None for slot in self.slots)

    def all_ready(self) -> bool:
        """Tell whether every slot has a worker that serves."""
        return all(slot.pid is not None and slot.ready for slot in self.slots)

    def clients(self) -> int:
        """Return the number of clients."""
        return sum(len(slot.client_table) for slot in self.slots)

    def ping_workers(self) -> None:
        """Ask every worker whether it still turns, unless it owes us that answer already."""
        for slot in self.running():
            if slot.ping_sent is None and slot.channel is not None:
                try:
                    slot.channel.send(encode(Ping()))
                except OSError:
                    # it ends, which shows; or there was no memory for the question: it owes no answer then
                    continue
                slot.ping_sent = self._loop.now

    # Filling

    def fill_slots(self) -> None:
        """Fill the slots, and keep them filled."""
        self.respawning, self.drain_deadline = True, None
        self.outdated = self._still_outdated()
        # without workers of the version before us there is nobody else to go on
        self._unproven = bool(self.outdated)
        for slot in self.slots:
            if slot.pid is None:
                self.spawn(slot)

    def replace_all(self) -> None:
        """Fill the slots, and end the workers that are there: their successors know the file, and adopt their clients."""
        without_file = self._workers()
        self.fill_slots()
        self.outdated = without_file
        self._terminate(without_file)

    def replace_next(self) -> bool:
        """End the next worker that is outdated, for its successor to adopt its clients; tell whether there is one.

        Its turn comes when the successors of those before it are ready.

        SIGTERM lets it finish its turn: what it has accepted in it is passed up, which SIGKILL would lose.
        """
        self.outdated = self._still_outdated()
        successors = [slot for slot in self.slots if not self._is_outdated(slot)]
        if self.outdated and all(slot.pid is not None and slot.ready for slot in successors):
            self._terminate(self.outdated[:1])
        return bool(self.outdated)

    def _terminate(self, workers: Sequence[tuple[Slot, int]]) -> None:
        """Ask outdated workers to end, and kill those that do not in time."""
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
        """Tell whether the worker of `slot` is to be replaced; to be asked when `outdated` has just been pruned."""
        return any(other is slot for other, _ in self.outdated)

    def _still_outdated(self) -> list[tuple[Slot, int]]:
        """Return the workers that are still to be replaced."""
        return [(slot, pid) for slot, pid in self.outdated if slot.pid == pid]

    def _still_ending(self) -> list[tuple[Slot, int]]:
        """Return the outdated workers that have been asked to end, and have not."""
        return [(slot, pid) for slot, pid in self._ending if slot.pid == pid]

    def _kill_overdue(self) -> None:
        """Kill the outdated workers that have been asked to end and have not."""
        for _, pid in self._still_ending():
            os.kill(pid, signal.SIGKILL)

    def spawn(self, slot: Slot) -> None:
        """Fill `slot` with a worker, or plan to if that is not possible now."""
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
        """Fork a worker for `slot`, with a channel to it, and return its pid; all that may be refused comes before."""
        slot.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            slot.channel.setblocking(False)
            self._register_channel(slot)
            with blocked():
                # here the worker leaves the supervisor's code, never to return
                if (pid := os.fork()) == 0:
                    self._enter(slot, theirs)
        except OSError:
            self._loop.unregister(slot.channel.fileno())
            slot.channel.close()
            slot.channel = None
            raise
        finally:
            theirs.close()
        return pid

    def prepare_child(
        self,
        slot: Slot,
        file: int | None,
        channel: socket.socket,
        endpoints: Sequence[str],
        client_limit: ClientLimit | None,
    ) -> Inheritance:
        """Let go, in the child, of all that is not of `slot`, and return what is."""
        self.close_in_child(keep=slot)
        for other in self.slots:
            if other is not slot:
                other.client_table.close_in_child()
        channel.setblocking(False)
        listeners, clients = slot.listeners, slot.client_table.clients
        # only the old file's streams: all others are for the next worker
        if self.drain_deadline is not None and self.rotating:
            listeners, clients = (
                [],
                {client: entry for client, entry in clients.items() if entry.start is not None},
            )
        return Inheritance(
            slot.index, file, listeners, slot.shared, channel, endpoints, client_limit, clients
        )

    def close_in_child(self, keep: Slot | None = None) -> None:
        """Close, in a forked child, the channels and the listeners, but for those of the slot to `keep`."""
        for slot in self.slots:
            if slot.channel is not None:
                # or its worker would not see our supervisor's end
                slot.channel.close()
            if slot is not keep:
                for listener in slot.listeners:
                    # or clients would wait at one that nobody accepts from
                    listener.close()

    def _register_channel(self, slot: Slot) -> None:
        assert slot.channel is not None
        self._loop.register(slot.channel.fileno(), partial(self.report_reader.read_reports, slot))

    def _postpone(self, slot: Slot, error: OSError) -> None:
        slot.ready = False
        logger.error("cannot spawn a worker: %s", fields(slot=slot.index, reason=error.strerror))
        self._spawn_at(slot, self._loop.now + self._timing.fork_retry)

    def _spawn_at(self, slot: Slot, when: float) -> None:
        slot.spawn_at = when
        self._plan()

    def _plan(self) -> None:
        if planned := [slot.spawn_at for slot in self.slots if slot.spawn_at is not None]:
            self._loop.timers.set(self._spawn_due, min(planned))

    def _spawn_due(self) -> None:
        """Spawn workers into the slots whose time has come."""
        for slot in self.slots:
            if slot.spawn_at is not None and slot.spawn_at <= self._loop.now:
                self.spawn(slot)
        self._plan()

    # Dying

    def handle_exit(self, pid: int, status: int) -> None:
        """Take in that the child `pid` has ended, and decide what becomes of its slot and its clients."""
        slot = next((slot for slot in self.slots if slot.pid == pid), None)
        # as PID 1 we are everybody's parent
        if slot is None:
            return
        assert slot.channel is not None
        # Before its last reports are taken in: one that says "ready" lets the next worker be replaced.
        expected = not self.respawning or (slot, pid) in self.outdated
        # at once: it may be another process's by now
        slot.pid = None
        self.report_reader.read_remaining(slot)
        self._loop.unregister(slot.channel.fileno())
        slot.channel.close()
        slot.channel = None
        lost = slot.client_table.forget_unprotected()
        what = classify_exit(status)
        if expected and what is ExitKind.DONE:
            slot.failures = Failures()
        detail = fields(slot=slot.index, pid=pid, keeps=len(slot.client_table), lost=lost or None)
        logger.log(
            logging.DEBUG if expected and not lost else logging.WARNING,
            "worker %s: %s %s",
            what.value,
            detail,
            describe_exit(status),
        )
        if not expected:
            self._respawn_later(slot, what, status)
        elif self.respawning:
            self.spawn(slot)
        elif (
            self.drain_deadline is not None
            and self._has_work(slot)
            and self._loop.now < self.drain_deadline
        ):
            # somebody still has to serve these clients, and the grace bounds how often
            self._note_failure(slot, what)
            self._spawn_at(
                slot,
                self._loop.now + min(slot.failures.delay(self._timing), self._timing.first_delay),
            )

    def _has_work(self, slot: Slot) -> bool:
        """Tell whether a drain has something to do in `slot`; those who have not started wait for a next file if one comes."""
        return (
            slot.client_table.has_streams()
            if self.rotating
            else bool(slot.client_table.clients or slot.listeners)
        )

    def _respawn_later(self, slot: Slot, what: ExitKind, status: int) -> None:
        """Plan the next worker of a slot whose last one has died."""
        # it is the program, not the clients
        if self._unproven and not slot.ready and what not in (ExitKind.KILLED, ExitKind.NO_ROOM):
            self.outdated = []
            slot.restarts += 1
            self._spawn_at(slot, self._loop.now + self._timing.max_delay)
            self._stuck(f"slot={slot.index} {describe_exit(status)}")
            return
        self._note_failure(slot, what)
        if (
            what is ExitKind.CANNOT_BOOT
            or (what is ExitKind.NO_ROOM and not self.started_up)
            or slot.failures.hopeless()
        ):
            self._give_up(f"slot={slot.index} {describe_exit(status)}")
            return
        slot.restarts += 1
        slot.restarted = self._loop.now
        if delay := slot.failures.delay(self._timing):
            logger.warning("respawning after a delay: %s", fields(slot=slot.index, seconds=delay))
        self._spawn_at(slot, self._loop.now + delay)

    def _note_failure(self, slot: Slot, what: ExitKind) -> None:
        """Take the death into the slot's record, and give its clients up if one of them seems to be the cause."""
        slot.failures = slot.failures.after_life(
            self._loop.now - slot.spawned, slot.ready, what, slot.adopted, self._timing
        )
        slot.ready = False
        if slot.failures.poisoned():
            ended = slot.client_table.close_connections()
            logger.error(
                "a client kills the worker that adopts it, ended all of the slot: %s",
                fields(slot=slot.index, clients=ended),
            )

    def stop_respawning(self) -> None:
        """Leave slots empty from now on, and workers as they are."""
        self.respawning = False
        self.outdated = []
        self._loop.timers.cancel(self._spawn_due)

    def drain(self, until: float, rotating: bool = False) -> None:
        """Have every stream brought to what is in the file now, and all workers end, by the time `until`.

        Where a next file is to be served (`rotating`), the listeners stay, and so do the clients that have not started.
        """
        # too late for an order: their successors get it
        ending = self._still_ending()
        self.stop_respawning()
        self.outdated = ending
        self.drain_deadline, self.rotating = until, rotating
        for slot in self.slots:
            # in backoff: its clients and its queue have waited for this worker
            if slot.spawn_at is not None:
                self.spawn(slot)
            elif slot.pid is None:
                self._close_listeners(slot)
            elif (slot, slot.pid) not in ending:
                self._order_drain(slot, until)

    def _order_drain(self, slot: Slot, until: float) -> None:
        assert slot.channel is not None
        assert slot.pid is not None
        try:
            slot.channel.send(encode(Drain(max(0.0, until - self._loop.now), self.rotating)))
        except OSError:
            # it is ending already; or there was no memory for the order: then it ends, and its successor gets it
            pass
        # ours until we reap it: no other process can have this pid
        os.kill(slot.pid, signal.SIGTERM)

    def _close_listeners(self, slot: Slot) -> None:
        """Close the listeners after a worker has emptied their queues. In a rotation, keep them for the next file's workers."""
        if self.rotating:
            return
        for listener in slot.listeners:
            listener.close()
        slot.listeners = []

    def kill(self) -> None:
        """End every worker at once."""
        self.stop_respawning()
        self.drain_deadline = None
        for slot in self.slots:
            slot.spawn_at = None
            if slot.pid is not None:
                os.kill(slot.pid, signal.SIGKILL)

    def _take_notices(self, slot: Slot, notices: Notices) -> None:
        """Note what is about the worker itself, and hand on the rest."""
        if notices.ready or notices.alive:
            slot.ping_sent = None
        if notices.ready and slot.pid is not None and (slot, slot.pid) not in self.outdated:
            self._unproven = False
        if notices.emptied:
            self._close_listeners(slot)
        self._notice(slot, notices)
