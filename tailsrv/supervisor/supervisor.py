"""Runs the server from start to exit: opens the file, starts the workers, acts on signals.

The supervisor also notices that the file is gone, and then drains or rolls to the next file. It
runs upgrades and answers status requests.

It never accepts a client, never reads a client's bytes and never sends a byte of the log. If it
dies, its workers serve on until another supervisor takes over from them (takeover.py). It has no
threads. It does not share its epoll object with workers.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

from tailsrv import __version__
from tailsrv.client_limit import ClientLimit
from tailsrv.config import Config, ExitStatus
from tailsrv.control_socket import Control
from tailsrv.error_hints import cannot_see
from tailsrv.linux import systemd
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.mounts import Mounts
from tailsrv.linux.process import raise_oom_score
from tailsrv.linux.signals import ACTED_ON, STRAY, Wakeup, name_of, unblock_all
from tailsrv.linux.sockets import lacks_room
from tailsrv.linux.tcp_info_check import counts_streams
from tailsrv.linux.terminal import is_hung_up, remember_nohup
from tailsrv.log import describe_error, fields, logger
from tailsrv.served_file import CannotServeError, ServedFile
from tailsrv.shared_counts import SharedCounts
from tailsrv.status_schema import ServerState
from tailsrv.stray_signals import StraySignals
from tailsrv.supervisor.log_store import LogStore, Restored
from tailsrv.supervisor.roller import Roller
from tailsrv.supervisor.rolling_restart import RollingRestart
from tailsrv.supervisor.slot import Slot, WorkerProcess
from tailsrv.supervisor.status_server import StatusServer, StatusWriter
from tailsrv.supervisor.upgrade import Upgrader, reason_of
from tailsrv.supervisor.upgrade_state import LogState, UpgradeState
from tailsrv.supervisor.watchdog import Watchdog
from tailsrv.supervisor.worker_pool import (
    CannotStart,
    PoolEvent,
    Reported,
    StartedUp,
    WorkerPool,
)
from tailsrv.worker_channel import Notices
from tailsrv.worker_context import WorkerContext

# Seconds between killing the workers and exiting without them. A worker in an uninterruptible sleep
# must not keep the supervisor from exiting.
KILL_PATIENCE = 2.0
# Seconds after a truncation has been logged during which no other one is logged: every worker
# reports the same truncation.
TRUNCATION_INTERVAL = 1.0

CAUGHT = ACTED_ON | STRAY | {signal.SIGCHLD}


class Phase(Enum):
    """The phases of the server's life."""

    # The server waits for the file.
    WAITING = auto()
    RUNNING = auto()
    # All streams are being drained. After that, the server exits.
    DRAINING = auto()
    # All workers have been killed. The server exits when they have been reaped.
    KILLING = auto()


class Supervisor:
    """The supervisor of one server.

    Args:
        config: The settings of the server.
        slots: One slot for each worker, with its listeners.
        endpoints: The addresses that the server listens on, as text.
        control: The control sockets, which also lock the endpoints.
        work: Runs a worker. It is called in the forked child, and returns the child's exit status.
        store: Where the log is saved, None if it is not.
        handed_on: The state of the previous version if an upgrade started this process, or the
            state that the orphaned workers of another supervisor have handed over. None otherwise.

    """

    def __init__(
        self,
        config: Config,
        slots: Sequence[Slot],
        endpoints: Sequence[str],
        control: Control,
        work: Callable[[WorkerContext], int],
        store: LogStore | None = None,
        handed_on: UpgradeState | None = None,
    ) -> None:
        self.config = config
        self.endpoints = endpoints
        self.control = control
        self.work = work
        self.loop = EventLoop()
        # Whether orphaned workers still have clients of this server.
        self.taking_over = any(slot.predecessors for slot in slots)
        # Whether an upgrade started this process, and it still has workers to replace.
        replacing = handed_on is not None and not self.taking_over
        self.pool = WorkerPool(
            slots,
            self.loop,
            endpoints if config.orphan_timeout else (),
            self.run_worker,
            config.timing,
            started_up=replacing,
        )
        self.restart = RollingRestart(self.pool, replacing)
        self.started = handed_on.started if handed_on else time.time()
        self.served_file = ServedFile(config.path)
        if handed_on:
            self.served_file.gone, self.served_file.polling = handed_on.file_gone, handed_on.polling
            self.served_file.log = handed_on.log.load() if handed_on.log else None
            self.served_file.base = handed_on.base
        self.phase = Phase.WAITING
        self.exit_status = ExitStatus.DONE
        self.ended = False
        # Whether SIGTERM or SIGINT has been received.
        self.stop_requested = False
        # When a truncation was logged last.
        self.truncation_logged = float("-inf")
        self.client_limit = (
            ClientLimit(
                config.max_clients,
                SharedCounts(len(slots), *(handed_on.quota if handed_on else ())),
            )
            if config.max_clients
            else None
        )
        if self.client_limit is not None and self.taking_over:
            # Clients that no worker has adopted yet count as well.
            for slot in slots:
                self.client_limit.record(slot.index, len(slot.client_table))
        self.roller = (
            Roller(
                self.loop,
                self.pool,
                self.served_file,
                SharedCounts(len(slots), *(handed_on.ends if handed_on else ())),
                store,
                config.timing,
                handed_on.roll if handed_on else None,
            )
            if config.follow_name
            else None
        )
        self.status = StatusWriter(
            config, endpoints, self.started, self.pool, self.served_file, self.loop
        )
        remember_nohup()
        self.wakeup = Wakeup(CAUGHT)
        self.stray_signals = StraySignals()
        self.lifecycle = systemd.Lifecycle(self.loop.timers.set)
        self.upgrader = Upgrader(
            self.loop.timers,
            self.wakeup,
            self.lifecycle,
            busy=replacing or self.taking_over,
        )
        self.loop.register(self.wakeup.fileno(), self.handle_signals)
        self.status_server = StatusServer(self.loop, control, self.status)
        self.mounts = Mounts(self.loop, self.handle_mount)

    # The loop

    def begin(self, restored: Restored) -> None:
        """Serve the log that was found at the start, or wait for its file."""
        self.served_file.base, self.served_file.log = restored.end, restored.log
        if self.roller is not None and restored.log is not None:
            self.roller.begin(restored.next_files)

    def run(self) -> int:
        """Serve until the server ends, and return the exit status."""
        # Signals have been blocked since the program started, in an upgrade since before execve(2).
        # Those that have arrived are delivered now.
        unblock_all()
        self.reap()
        if not counts_streams():
            self.pool.report_reader.stop_protecting()
        if self.restart.under_way:
            # Notify again: the previous version may have been replaced before its message was sent.
            self.lifecycle.reloading()
        if self.served_file.log is None:
            self.wait_for_file()
            if not self.restart.under_way:
                # Clients can connect, so the service is ready, although there is no file yet.
                self.lifecycle.ready()
            self.continue_replacing()
        else:
            self.pool.run()
            self.start_serving()
        if (interval := systemd.watchdog_seconds()) is not None:
            Watchdog(self.loop, self.pool, interval).ping()
        while not self.ended:
            self.status.update(self.state())
            self.step()
        if self.roller is not None and self.is_ending():
            self.roller.finish()
        if self.exit_status is ExitStatus.DONE:
            # Orphaned workers whose clients no worker has adopted yet are to end as well.
            self.pool.dismiss_predecessors()
        logger.info("ended: %s", fields(status=int(self.exit_status)))
        return self.exit_status

    def step(self) -> None:
        """Run one turn of the loop: wait for events, then handle them."""
        self.loop.turn()
        self.handle_events()
        # Clients of all workers wait while the log rolls.
        if self.roller is None or not self.roller.rolling:
            self.pool.report_reader.yield_to_workers()
        self.continue_upgrade()
        if self.is_ending() and self.pool.finished():
            self.ended = True
        elif self.roller is not None:
            self.roller.advance()

    def continue_upgrade(self) -> None:
        """Do the next step of an upgrade, if one can be done now."""
        if self.restart.is_stuck() and self.upgrader.has_request():
            # The next program may have workers that start.
            self.upgrader.finish()
        # exec(2) would close the connections to the callers that wait for an answer.
        while self.upgrader.needs_state() and self.status_server.is_idle():
            try:
                self.upgrader.advance(self.save(), self.loop.now)
            # Catch every error: this program can still serve, and an upgrade must never end it.
            except Exception as error:
                self.upgrader.fail(reason_of(error))

    def is_ending(self) -> bool:
        return self.phase in (Phase.DRAINING, Phase.KILLING)

    # The file

    def wait_for_file(self) -> None:
        """Retry opening the file at intervals. Meanwhile, workers without a file accept clients."""
        logger.info(
            "waiting for file: %s", fields(path=self.config.path, hint=cannot_see(self.config.path))
        )
        self.loop.timers.set(self.retry_open, self.loop.now + self.config.timing.open_retry)
        self.accept_while_waiting()

    def accept_while_waiting(self) -> None:
        """Start workers that accept clients while there is no file.

        Without them, connections that clients close again would stay in the accept queues and fill
        them. If clients cannot be protected, start no workers: the workers that get the file could
        not adopt the clients, which are safe in the accept queues.
        """
        if self.pool.report_reader.protects_clients:
            self.pool.run()

    def retry_open(self) -> None:
        try:
            opened = self.served_file.open()
        except CannotServeError as error:
            self.handle_unusable(str(error))
            return
        if opened:
            if self.roller is not None:
                self.roller.begin()
            self.pool.run_anew()
            self.start_serving()
        else:
            self.loop.timers.set(self.retry_open, self.loop.now + self.config.timing.open_retry)

    def handle_unusable(self, reason: str) -> None:
        """Handle a file that cannot be served: exit, or retry with --follow-name.

        A log rotation may create the new file before it sets its owner and mode.
        """
        if not self.config.follow_name:
            logger.critical("cannot serve: %s", fields(path=self.config.path, reason=reason))
            self.exit_status = ExitStatus.CANNOT_SERVE
            self.terminate()
            return
        if reason != self.served_file.open_error:
            logger.error(
                "cannot serve the new file yet, clients wait, retrying: %s",
                fields(path=self.config.path, reason=reason),
            )
        self.served_file.open_error = reason
        self.loop.timers.set(self.retry_open, self.loop.now + self.config.timing.open_retry)

    def handle_gone(self) -> None:
        """Check whether the path still names the open file, and act if it does not.

        A worker has reported that it does not, or the mount table has changed.
        """
        # Reap first, because a drain must know which slots have no worker.
        self.reap()
        if self.roller is not None and self.phase is Phase.RUNNING:
            self.roller.check()
            return
        if self.served_file.gone or self.phase is not Phase.RUNNING:
            return
        if not (gone := self.served_file.has_gone(self.loop.now)):
            # None means that the path could not be checked. A worker may not report a second time
            # that the file is gone, so repeat the check.
            if gone is None:
                self.loop.timers.set(
                    self.handle_gone, self.loop.now + self.config.timing.open_retry
                )
            return
        self.served_file.gone = True
        if self.config.linger:
            logger.warning(
                "file is gone, continuing to serve the open file: %s",
                fields(path=self.config.path),
            )
        else:
            logger.warning("file is gone, draining: %s", fields(path=self.config.path))
            self.drain()

    def handle_mount(self) -> None:
        """Check the path after a file system has been mounted or unmounted.

        If the file is polled, leave this to the workers, which check the path every second. The
        file may be on a file server that does not answer, and this must not block the supervisor.
        """
        if self.served_file.polling is None:
            self.handle_gone()

    # Workers

    def start_serving(self) -> None:
        """Enter the phase RUNNING, now that workers have the file or are starting with it."""
        self.phase, self.served_file.open_error = Phase.RUNNING, ""
        logger.info(
            "serving: %s",
            fields(
                path=self.config.path, size=self.served_file.size(), workers=len(self.pool.slots)
            ),
        )
        self.continue_replacing()

    def continue_replacing(self) -> None:
        """In an upgrade, replace the next worker of the previous version.

        If none is left, and all new workers are ready, the upgrade is finished.
        """
        if self.restart.advance():
            logger.info("upgraded: %s", fields(version=__version__, clients=self.pool.clients()))
            self.upgrader.finish()

    def run_worker(
        self, slot: Slot, channel: socket.socket, sockets: Sequence[socket.socket]
    ) -> None:
        """In a forked child, close what belongs to the supervisor, run the worker, and exit."""
        status = os.EX_SOFTWARE
        try:
            raise_oom_score()
            self.close_in_child()
            self.pool.close_in_child(keep=slot)
            roller = self.roller
            status = self.work(
                WorkerContext(
                    slot.index,
                    self.served_file.log,
                    roller.ends if roller else None,
                    roller.opened_at if roller else None,
                    roller.frozen_end if roller else None,
                    roller is not None and roller.truncated,
                    slot.listeners,
                    slot.shared,
                    channel,
                    self.endpoints,
                    self.client_limit,
                    slot.client_table.clients,
                    sockets,
                    slot.predecessors,
                )
            )
        except (OSError, MemoryError) as error:
            logger.error("worker failed: %s %s", fields(slot=slot.index), describe_error(error))
            status = os.EX_TEMPFAIL if lacks_room(error) else status
        except BaseException:
            logger.exception(
                "worker failed with an internal error, please report this bug: %s",
                fields(slot=slot.index),
            )
        finally:
            # Exit without the supervisor's clean-up, and without flushing its buffers a second
            # time.
            os._exit(status)

    def close_in_child(self) -> None:
        """In a forked child, close what only the supervisor uses."""
        self.wakeup.close()
        self.loop.epoll.close()
        self.control.close()
        self.status_server.close_in_child()
        self.upgrader.close_in_child()
        self.mounts.close()
        if self.roller is not None:
            self.roller.close_in_child()

    def handle_events(self) -> None:
        """Handle what has happened to the workers, and what they have reported."""
        while events := self.pool.take_events():
            for event in events:
                self.handle_event(event)
            # Once for all workers, because all of them notice it.
            if any(isinstance(event, Reported) and event.notices.gone for event in events):
                self.handle_gone()

    def handle_event(self, event: PoolEvent) -> None:
        match event:
            case Reported(slot, worker, notices):
                if notices.ready:
                    self.handle_ready(slot, worker)
                self.handle_notices(notices)
            case StartedUp():
                self.lifecycle.ready()
                self.status.update(self.state())
                # Send the status text now. Otherwise it might be sent only after its interval.
                systemd.notify(f"STATUS={self.status.summary()}")
            case CannotStart(reason) if not self.is_ending():
                self.give_up(reason)

    def handle_notices(self, notices: Notices) -> None:
        if notices.polling is not None and self.served_file.polling is None:
            self.served_file.polling = notices.polling
            logger.warning(
                "polling the file once a second, clients get appends later: %s",
                fields(reason=notices.polling),
            )
        if self.roller is not None and not self.is_ending():
            self.roller.handle_notices(notices)
        elif (
            notices.truncated is not None
            and self.loop.now - self.truncation_logged >= TRUNCATION_INTERVAL
        ):
            self.truncation_logged = self.loop.now
            logger.warning(
                "file was truncated, clients beyond its new end wait until it grows past them: %s",
                fields(path=self.config.path, size=notices.truncated),
            )

    def handle_ready(self, slot: Slot, worker: WorkerProcess) -> None:
        # While the server waits for its file, "waiting for file" should stay the last line of the
        # log.
        level = logging.DEBUG if self.phase is Phase.WAITING else logging.INFO
        adopted = len(slot.client_table) if worker.adopted else None
        logger.log(
            level, "worker ready: %s", fields(slot=slot.index, pid=worker.pid, adopted=adopted)
        )
        self.continue_replacing()
        self.continue_takeover(slot)

    def continue_takeover(self, slot: Slot) -> None:
        """Note that the worker of `slot` has taken over from the orphaned workers."""
        slot.forget_predecessors()
        if self.taking_over and not self.pool.has_predecessors():
            self.taking_over = False
            logger.info("took over: %s", fields(clients=self.pool.clients()))
            if self.roller is not None and self.served_file.log is not None:
                self.loop.timers.set(self.roller.check, self.loop.now)
            self.upgrader.finish()

    def give_up(self, reason: str) -> None:
        logger.critical("workers cannot start: %s", reason)
        self.exit_status = ExitStatus.CANNOT_BOOT
        if self.taking_over:
            # Orphaned workers and those that have started serve until the next attempt.
            self.ended = True
        else:
            self.terminate()

    # Signals and exit

    def handle_signals(self) -> None:
        numbers = self.wakeup.read()
        # Reap after every signal, because a full wakeup pipe may have lost the byte of a SIGCHLD.
        # Reap before acting on SIGTERM: if a worker has just died, drain() must know that its slot
        # is empty, and spawn another worker for the connections in its accept queue.
        self.reap()
        for number in numbers:
            match number:
                case signal.SIGTERM | signal.SIGINT if (
                    self.stop_requested and self.phase is Phase.DRAINING
                ):
                    self.terminate()
                case signal.SIGTERM | signal.SIGINT if self.phase is not Phase.KILLING:
                    self.stop_requested = True
                    logger.info(
                        "draining: %s",
                        fields(signal=signal.Signals(number).name, grace=f"{self.config.grace:g}"),
                    )
                    # If the server drains already, its grace period has begun, and is not extended.
                    if self.phase is not Phase.DRAINING:
                        self.drain()
                case signal.SIGQUIT:
                    self.terminate()
                case signal.SIGPWR if not self.is_ending():
                    self.drain_on_signal(number, "power failure, or the container is being stopped")
                case signal.SIGHUP if not self.is_ending() and is_hung_up():
                    self.drain_on_signal(number, "terminal closed; nohup would prevent this")
                case signal.SIGHUP if not self.is_ending():
                    self.upgrader.request()
                case _ if number in STRAY:
                    self.stray_signals.note(number)

    def drain_on_signal(self, number: int, reason: str) -> None:
        """Drain for a signal that usually comes more than once, or together with SIGTERM.

        Unlike a second SIGTERM, a repeated signal of this kind does not end the server at once.
        """
        grace = f"{self.config.grace:g}"
        logger.info("draining: %s", fields(signal=name_of(number), grace=grace, reason=reason))
        self.drain()

    def reap(self) -> None:
        """Reap every child that has exited. One SIGCHLD may stand for several of them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if not self.upgrader.handle_exit(pid, status, ending=self.is_ending()):
                self.pool.handle_exit(pid, status)

    def drain(self) -> None:
        """Let the workers send what is in the file now, then exit when all of them have exited.

        Workers that have not exited after the grace period and `kill_margin` are killed.
        """
        self.phase = Phase.DRAINING
        self.cancel_pending()
        self.lifecycle.stopping()
        until = self.loop.now + self.config.grace
        self.pool.drain(until)
        self.loop.timers.set(self.terminate, until + self.config.timing.kill_margin)

    def terminate(self) -> None:
        """Kill all workers, then exit."""
        self.phase = Phase.KILLING
        self.cancel_pending()
        self.pool.kill()
        self.loop.timers.set(self.abandon_workers, self.loop.now + KILL_PATIENCE)

    def cancel_pending(self) -> None:
        self.restart.cancel()
        self.loop.timers.cancel(self.retry_open)
        self.loop.timers.cancel(self.terminate)
        self.upgrader.cancel()
        if self.roller is not None:
            self.roller.stop()

    def abandon_workers(
        self,
    ) -> None:  # pragma: no cover: needs a process that SIGKILL does not end
        pids = [worker.pid for worker in self.pool.workers()]
        logger.error("workers have not exited after SIGKILL, exiting anyway: %s", fields(pids=pids))
        self.ended = True

    def save(self) -> UpgradeState:
        """Return the state from which the next version of this program can continue."""
        return UpgradeState(
            version=__version__,
            endpoints=list(self.endpoints),
            started=self.started,
            log=LogState.of(self.served_file.log) if self.served_file.log else None,
            base=self.served_file.base,
            roll=self.roller.save() if self.roller else None,
            ends=[self.roller.ends.fd] if self.roller else [],
            state_lock=[self.roller.store.lock_file] if self.roller and self.roller.store else [],
            file_gone=self.served_file.gone,
            polling=self.served_file.polling,
            control=[sock.fileno() for sock in self.control.sockets],
            quota=[self.client_limit.counts.fd] if self.client_limit else [],
            slots=[slot.save() for slot in self.pool.slots],
        )

    # Status

    def state(self) -> ServerState:
        match self.phase:
            case Phase.WAITING:
                return ServerState.WAITING
            case Phase.RUNNING:
                return ServerState.SERVING if self.pool.started_up else ServerState.STARTING
            case _:
                return ServerState.DRAINING
