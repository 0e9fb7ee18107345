"""Leads the server from start to end: waits for the file, keeps the crew filled, acts on signals, upgrades, ends in order.

It never accepts a client, never reads a client's bytes and never sends a byte of the file: what does little
can be relied on. It has no threads, and makes no epoll or inotify object that a worker could share.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from enum import Enum

from setproctitle import setproctitle

from tailsrv import __version__
from tailsrv.channel import Notices
from tailsrv.client_limit import ClientLimit
from tailsrv.config import Config, ExitStatus
from tailsrv.control import Control
from tailsrv.diagnostics import cannot_see
from tailsrv.inheritance import Inheritance
from tailsrv.linux import systemd
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.mounts import Mounts
from tailsrv.linux.process import raise_oom_score
from tailsrv.linux.self_check import counts_streams
from tailsrv.linux.signals import ACTED_ON, STRAY, Wakeup, name_of, unblock_all
from tailsrv.linux.sockets import lacks_room
from tailsrv.linux.terminal import is_hung_up, remember_nohup
from tailsrv.log import describe_error, fields, logger
from tailsrv.served_file import CannotServeError, ServedFile
from tailsrv.stray_signals import StraySignals
from tailsrv.supervisor.late_appends import LateAppends
from tailsrv.supervisor.rotation_pace import RotationPace
from tailsrv.supervisor.slot import Slot
from tailsrv.supervisor.status_server import StatusServer, StatusWriter
from tailsrv.supervisor.upgrade import Upgrader
from tailsrv.supervisor.upgrade_state import UpgradeState
from tailsrv.supervisor.watchdog import Watchdog
from tailsrv.supervisor.worker_pool import WorkerPool
from tailsrv.titles import status_title

# seconds that killed workers get to go; one in an uninterruptible sleep must not keep us
KILL_PATIENCE = 2.0
# seconds in which the reports of all workers are one event
TRUNCATION_INTERVAL = 1.0

CAUGHT = ACTED_ON | STRAY | {signal.SIGCHLD}


class Phase(Enum):
    """Where the server is in its life."""

    WAITING = "waiting for file"
    RUNNING = "running"
    # the file is gone, and the next one of its name is to be served when its streams have ended
    ROTATING = "rotating"
    DRAINING = "draining"
    KILLING = "killing"


class Supervisor:
    """The server as a whole.

    `work` is what a worker does, called in the forked child, which ends with the exit status that it returns.
    `handed_on` is the state of the version before us where we are the outcome of an upgrade.
    """

    def __init__(
        self,
        config: Config,
        slots: Sequence[Slot],
        endpoints: Sequence[str],
        control: Control,
        work: Callable[[Inheritance], int],
        handed_on: UpgradeState | None = None,
    ) -> None:
        self.config = config
        self.endpoints = endpoints
        self.control = control
        self.work = work
        self.loop = EventLoop()
        self.pool = WorkerPool(
            slots,
            self.loop,
            self.run_worker,
            self.handle_notices,
            self.give_up,
            self.keep_old_workers,
            config.timing,
        )
        self.started = handed_on.started if handed_on else time.time()
        self.served_file = ServedFile(config.path)
        # of rotations
        self.pace = RotationPace(config.timing)
        self.late = LateAppends(self.loop, config.path, config.timing)
        if handed_on:
            self.served_file.gone, self.served_file.polling = handed_on.file_gone, handed_on.polling
        self.pool.started_up = handed_on is not None
        # the workers of the version before us
        self.replacing = handed_on is not None
        self.phase = Phase.WAITING
        self.exit_status = ExitStatus.DONE
        self.ended = False
        # by a signal
        self.told_to_end = False
        self.truncation_seen = float("-inf")
        self.client_limit = (
            ClientLimit(config.max_clients, len(slots), *(handed_on.quota if handed_on else ()))
            if config.max_clients
            else None
        )
        self.status = StatusWriter(
            config, endpoints, self.started, self.pool, self.served_file, self.state, self.loop
        )
        remember_nohup()
        self.wakeup = Wakeup(CAUGHT)
        self.stray_signals = StraySignals()
        self.lifecycle = systemd.Lifecycle(self.loop.timers.set)
        self.upgrader = Upgrader(
            self.loop.timers, self.save, self.wakeup.read, self.lifecycle, busy=self.replacing
        )
        self.loop.register(self.wakeup.fileno(), self.handle_signals)
        self.status_server = StatusServer(
            self.loop,
            control,
            self.status.tell,
            self.status.render_clients,
            self.enter_status_child,
        )
        self.mounts = Mounts(self.loop, self.handle_mount)

    # The loop

    def run(self, file: int | None) -> int:
        """Serve the open `file`, or wait for it if None; return the exit status at the end."""
        self.served_file.file = file
        # what the program that exec'd us held back comes now
        unblock_all()
        self.reap()
        if not counts_streams():
            self.pool.report_reader.stop_protecting()
        if self.replacing:
            # Once more: the version before us may have been replaced before it could deliver this.
            self.lifecycle.reloading()
        if file is None:
            self.wait_for_file()
            if not self.replacing:
                # clients can connect
                self.lifecycle.ready()
            self.continue_replacing()
        else:
            self.pool.fill_slots()
            self.start_serving()
        if (interval := systemd.watchdog_seconds()) is not None:
            Watchdog(self.loop, self.pool, interval).ping()
        while not self.ended:
            self.status.update()
            self.step()
        logger.info("ended: %s", fields(status=int(self.exit_status)))
        return self.exit_status

    def step(self) -> None:
        """Run one turn: wait, then act on what has happened."""
        self.loop.turn()
        self.pool.report_reader.yield_to_workers()
        self.upgrader.execute_if_proven(self.loop.now)
        if self.is_ending() and self.pool.finished():
            self.ended = True
        elif self.phase is Phase.ROTATING and self.pool.finished():
            self.finish_rotation()

    def is_ending(self) -> bool:
        return self.phase in (Phase.DRAINING, Phase.KILLING)

    # The file

    def wait_for_file(self) -> None:
        """Look for the file from time to time, while workers without a file accept connections."""
        logger.info(
            "waiting for file: %s", fields(path=self.config.path, hint=cannot_see(self.config.path))
        )
        self.loop.timers.set(self.retry_open, self.loop.now + self.config.timing.open_retry)
        self.accept_while_waiting()

    def accept_while_waiting(self) -> None:
        """Have connections accepted while there is no file: those that are closed again would fill the accept queues.

        Not where the workers' successors could not adopt the clients: there, the queues keep them.
        """
        if self.pool.report_reader.protects_clients:
            self.pool.fill_slots()

    def retry_open(self) -> None:
        try:
            there = self.served_file.open()
        except CannotServeError as error:
            self.handle_unusable(str(error))
            return
        if there:
            self.pool.replace_all()
            self.start_serving()
        else:
            self.loop.timers.set(self.retry_open, self.loop.now + self.config.timing.open_retry)

    def handle_unusable(self, reason: str) -> None:
        """Give up, unless we follow the name: who rotates a file may set its owner and mode a moment after making it."""
        if not self.config.follow_name:
            logger.critical("cannot serve: %s", fields(path=self.config.path, reason=reason))
            self.exit_status = ExitStatus.CANNOT_SERVE
            self.terminate()
            return
        if reason != self.served_file.open_error:
            logger.error(
                "cannot serve the file of that name, looking again: %s",
                fields(path=self.config.path, reason=reason),
            )
        self.served_file.open_error = reason
        self.loop.timers.set(self.retry_open, self.loop.now + self.config.timing.open_retry)

    def handle_gone(self) -> None:
        """Look for ourselves, and act: a worker has seen that the path does not name our file any more."""
        # a drain must know which slots are empty
        self.reap()
        if self.served_file.gone or self.phase is not Phase.RUNNING:
            return
        if not (gone := self.served_file.has_gone(self.loop.now)):
            # nobody will say so again
            if gone is None:
                self.loop.timers.set(
                    self.handle_gone, self.loop.now + self.config.timing.open_retry
                )
            return
        if self.config.follow_name and (pause := self.pace.pause(self.loop.now)):
            self.postpone_rotation(pause)
            return
        self.served_file.gone = True
        if self.config.linger:
            logger.warning(
                "file is gone, serving on what it was: %s", fields(path=self.config.path)
            )
        elif self.config.follow_name:
            # first: whoever connects after that line is to wait for the next file
            self.rotate()
            logger.info(
                "file is gone, going over to the next: %s",
                fields(path=self.config.path, clients=self.pool.clients()),
            )
        else:
            logger.warning("file is gone, draining: %s", fields(path=self.config.path))
            self.drain()

    def handle_mount(self) -> None:
        """Look whether the path leads somewhere else, now that something has been mounted or unmounted.

        Where the file is polled, the workers look each second: a file server that does not answer must not hold up the supervisor.
        """
        if self.served_file.polling is None:
            self.handle_gone()

    def postpone_rotation(self, seconds: float) -> None:
        """Serve the old file for a moment longer: whatever replaces it must not keep us busy."""
        if self.handle_gone not in self.loop.timers:
            hint = "what replaces it so often? does its file system change inode numbers?"
            logger.warning(
                "file is gone again so soon that clients get it as it was for a moment longer: %s",
                fields(path=self.config.path, seconds=f"{seconds:.1f}", hint=hint),
            )
        self.loop.timers.set(self.handle_gone, self.loop.now + seconds)

    def rotate(self) -> None:
        """Have every stream of this file brought to its end; whoever has not started one waits for the next file."""
        self.phase = Phase.ROTATING
        self.pace.begin(self.loop.now)
        if self.served_file.file is not None and any(
            slot.client_table.has_streams() for slot in self.pool.slots
        ):
            self.late.begin(self.served_file.file, polling=self.served_file.polling is not None)
        self.upgrader.pause()
        if self.replacing:
            self.replacing = False
            self.upgrader.finish(self.loop.now)
        until = self.loop.now + self.config.grace
        self.pool.drain(until, rotating=True)
        self.loop.timers.set(self.pool.kill, until + self.config.timing.kill_margin)

    def finish_rotation(self) -> None:
        """Let go of the file that is gone, now that nobody is served from it, and look for the next."""
        self.loop.timers.cancel(self.pool.kill)
        for slot in self.pool.slots:
            slot.client_table.close_streams()
            # those who wait for the next file have their places
            if self.client_limit is not None:
                self.client_limit.record(slot.index, len(slot.client_table))
        self.late.seal()
        self.pace.end(self.loop.now)
        self.served_file.close()
        self.phase = Phase.WAITING
        self.upgrader.resume(self.loop.now)
        self.retry_open()
        if self.served_file.file is None and self.served_file.open_error:
            self.accept_while_waiting()
        elif self.served_file.file is None:
            self.wait_for_file()

    # Workers

    def start_serving(self) -> None:
        """Note that the workers, some of which may still be starting, have the file."""
        self.phase, self.served_file.open_error = Phase.RUNNING, ""
        logger.info(
            "serving: %s",
            fields(
                path=self.config.path, size=self.served_file.size(), workers=len(self.pool.slots)
            ),
        )
        self.continue_replacing()

    def continue_replacing(self) -> None:
        """Replace the next worker of the version before us, if we are at that."""
        if self.replacing and not self.pool.replace_next() and self.pool.all_ready():
            self.replacing = False
            logger.info("upgraded: %s", fields(version=__version__, clients=self.pool.clients()))
            self.upgrader.finish(self.loop.now)

    def run_worker(self, slot: Slot, channel: socket.socket) -> None:
        """Let go of all that is the supervisor's, do a worker's work, and end the process."""
        status = os.EX_SOFTWARE
        try:
            raise_oom_score()
            self.close_in_child()
            status = self.work(
                self.pool.prepare_child(
                    slot, self.served_file.file, channel, self.endpoints, self.client_limit
                )
            )
        except (OSError, MemoryError) as error:
            logger.error("worker failed: %s %s", fields(slot=slot.index), describe_error(error))
            status = os.EX_TEMPFAIL if lacks_room(error) else status
        except BaseException:
            logger.exception("worker failed: %s", fields(slot=slot.index))
        finally:
            # no clean-up of the supervisor's, no buffers flushed twice
            os._exit(status)

    def close_in_child(self) -> None:
        """Close, in a forked child, what is the supervisor's alone."""
        self.wakeup.close()
        self.loop.epoll.close()
        self.control.close()
        self.upgrader.close_in_child()
        self.mounts.close()
        self.late.close()

    def handle_notices(self, slot: Slot, notices: Notices) -> None:
        if notices.ready:
            self.handle_ready(slot)
        if notices.polling is not None and self.served_file.polling is None:
            self.served_file.polling = notices.polling
            logger.warning("looking at the file once a second: %s", fields(reason=notices.polling))
        if (
            notices.truncated is not None
            and self.loop.now - self.truncation_seen >= TRUNCATION_INTERVAL
        ):
            self.truncation_seen = self.loop.now
            logger.warning(
                "file was truncated: %s", fields(path=self.config.path, size=notices.truncated)
            )
        if notices.gone and self.handle_gone not in self.loop.timers:
            # At the end of this turn: we may be in the middle of bury(), and a drain must not start there.
            self.loop.timers.set(self.handle_gone, self.loop.now)

    def handle_ready(self, slot: Slot) -> None:
        slot.ready = True
        # While there is no file, the last line of the log is to be the one that says what is waited for.
        level = logging.DEBUG if self.phase is Phase.WAITING else logging.INFO
        adopted = len(slot.client_table) if slot.adopted else None
        logger.log(
            level, "worker ready: %s", fields(slot=slot.index, pid=slot.pid, adopted=adopted)
        )
        if not self.pool.started_up and self.pool.all_ready() and not self.is_ending():
            self.pool.started_up = True
            self.lifecycle.ready()
            # at once, whatever its pace is
            systemd.notify(f"STATUS={self.status.sentence()}")
        self.continue_replacing()

    def give_up(self, reason: str) -> None:
        logger.critical("workers cannot start: %s", reason)
        self.exit_status = ExitStatus.CANNOT_BOOT
        self.terminate()

    def keep_old_workers(self, reason: str) -> None:
        """End the replacement of workers where ours do not start: those of the version before us go on."""
        logger.error(
            "workers of this version do not start: clients of the old workers are served on, all others wait: %s %s",
            reason,
            fields(
                old_workers=len(self.pool.running()),
                hint="install a version that works and send HUP",
            ),
        )
        if self.replacing:
            self.replacing = False
            self.upgrader.finish(self.loop.now)

    # Signals, and the end

    def handle_signals(self) -> None:
        numbers = self.wakeup.read()
        # After any signal: a full pipe may have lost SIGCHLD's byte. And first: a drain keeps the queue of an empty slot.
        self.reap()
        for number in numbers:
            match number:
                case signal.SIGTERM | signal.SIGINT if (
                    self.told_to_end and self.phase is Phase.DRAINING
                ):
                    self.terminate()
                case signal.SIGTERM | signal.SIGINT if self.phase is not Phase.KILLING:
                    self.told_to_end = True
                    logger.info(
                        "draining: %s",
                        fields(signal=signal.Signals(number).name, grace=f"{self.config.grace:g}"),
                    )
                    # else the file has gone, and the grace has begun with that
                    if self.phase is not Phase.DRAINING:
                        self.drain()
                case signal.SIGQUIT:
                    self.terminate()
                case signal.SIGPWR if not self.is_ending():
                    self.drain_on_signal(number, "power failure, or the container is stopped")
                case signal.SIGHUP if not self.is_ending() and is_hung_up():
                    self.drain_on_signal(number, "terminal closed; nohup would prevent this")
                case signal.SIGHUP if not self.is_ending():
                    self.upgrader.request(self.loop.now)
                case _ if number in STRAY:
                    self.stray_signals.note(number)

    def drain_on_signal(self, number: int, reason: str) -> None:
        """Drain for a signal that usually comes more than once, or together with SIGTERM.

        Unlike a second SIGTERM, none of these ends the server at once.
        """
        grace = f"{self.config.grace:g}"
        logger.info("draining: %s", fields(signal=name_of(number), grace=grace, reason=reason))
        self.drain()

    def reap(self) -> None:
        """Collect every child that has ended; SIGCHLDs merge, so their number says nothing."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            known = self.status_server.handle_exit(pid) or self.upgrader.handle_exit(
                pid, status, self.loop.now, ending=self.is_ending()
            )
            if not known:
                self.pool.handle_exit(pid, status)

    def drain(self) -> None:
        """Let the workers bring every stream to what is in the file now, and end with them."""
        self.phase = Phase.DRAINING
        self.cancel_plans()
        self.lifecycle.stopping()
        until = self.loop.now + self.config.grace
        self.pool.drain(until)
        self.loop.timers.set(self.terminate, until + self.config.timing.kill_margin)

    def terminate(self) -> None:
        """End at once."""
        self.phase = Phase.KILLING
        self.cancel_plans()
        self.pool.kill()
        self.loop.timers.set(self.abandon_workers, self.loop.now + KILL_PATIENCE)

    def cancel_plans(self) -> None:
        self.replacing = False
        self.loop.timers.cancel(self.retry_open)
        self.loop.timers.cancel(self.terminate)
        self.loop.timers.cancel(self.pool.kill)
        self.upgrader.cancel()

    def abandon_workers(
        self,
    ) -> None:  # pragma: no cover: takes a process that not even SIGKILL ends
        pids = [slot.pid for slot in self.pool.running()]
        logger.error("workers do not end, leaving them to the kernel: %s", fields(pids=pids))
        self.ended = True

    def save(self) -> UpgradeState:
        """Return all that the next version of this program needs to go on from here."""
        return UpgradeState(
            version=__version__,
            endpoints=list(self.endpoints),
            started=self.started,
            file=self.served_file.file,
            file_gone=self.served_file.gone,
            polling=self.served_file.polling,
            control=[sock.fileno() for sock in self.control.sockets],
            quota=[self.client_limit.fd] if self.client_limit else [],
            slots=[slot.save() for slot in self.pool.slots],
        )

    # What others see

    def state(self) -> str:
        """Return the state as titles and status show it, empty while all is as it should be."""
        match self.phase:
            case Phase.WAITING:
                return "waiting for file"
            case Phase.RUNNING:
                return "" if self.pool.started_up else "starting"
            case Phase.ROTATING:
                return "rotating"
            case _:
                return "draining"

    def enter_status_child(self) -> None:
        """Let go, in a child that only answers, of all that others must not find open when we are gone."""
        setproctitle(status_title(self.endpoints))
        self.close_in_child()
        self.pool.close_in_child()
