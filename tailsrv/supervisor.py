"""Keeps N slots filled: forks, reaps, forwards signals, stops in order.

It never accepts a client, never reads a client's bytes and never sends a byte of the file: what does little
can be relied on. It has no threads, and makes no epoll or inotify object that a worker could share.
"""

import json
import logging
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial

from tailsrv import __version__, systemd
from tailsrv.config import Config, ExitStatus
from tailsrv.control import Control
from tailsrv.log import Limited, fields, logger
from tailsrv.messages import MAX_MESSAGE, MAX_SOCKETS, NO_NOTICES, Drain, MessageError, Notices, Report, decode, encode
from tailsrv.policy import EVENTS, KILL_MARGIN, Verdict, describe_status, verdict
from tailsrv.signals import Wakeup, blocked, release
from tailsrv.slot import Inheritance, Slot
from tailsrv.state import State
from tailsrv.timers import Timers
from tailsrv.title import Title, supervisor_title
from tailsrv.upgrade import Upgrader
from tailsrv.watch import CannotServeError, is_gone, open_file

LOOK_INTERVAL = 0.5  # seconds between looks for a file that does not exist yet
FORK_RETRY = 1.0  # seconds; fork(2) fails for lack of memory or of room in the task limit, and both may pass
KILL_PATIENCE = 2.0  # seconds that killed workers get to go; one in an uninterruptible sleep must not keep us
REST = 0.002  # seconds after reports; more of them may wait in their channel, while workers need the processors
RESERVE = 32  # descriptors that clients do not get: a successor's channel, a proof's files and a health check need some
TRUNCATION_INTERVAL = 1.0  # seconds in which the reports of all workers are one event

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD, signal.SIGHUP)


class Phase(Enum):
    """Where the server is in its life."""

    WAITING = "waiting for file"
    RUNNING = "running"
    DRAINING = "draining"
    KILLING = "killing"


class Supervisor:
    """The slots, the workers in them, and what they inherit.

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
        handed_on: State | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.endpoints = endpoints
        self.control = control
        self.work = work
        self.clock = clock
        self.now = clock()
        self.started = handed_on.started if handed_on else time.time()
        self.slots = list(slots)
        self.outdated = [(slot, slot.pid) for slot in self.slots if slot.pid is not None]  # to be replaced, one by one
        self.replacing = handed_on is not None
        self.file: int | None = None
        self.phase = Phase.WAITING
        self.status = ExitStatus.DONE
        self.ended = False
        self.file_gone = handed_on.file_gone if handed_on else False
        self.started_up = handed_on is not None  # every slot has had a worker that was ready
        self.reported = False  # a worker has, in this turn
        self.polling = handed_on.polling if handed_on else None
        self.drain_until = float("-inf")
        self.highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVE
        self.truncation_seen = float("-inf")
        self.timers = Timers()
        self.title = Title(self.timers, self.render_title)
        self.upgrader = Upgrader(self.timers, self.save, busy=self.replacing)
        self.unprotected = Limited(logging.WARNING, burst=1)
        self.wakeup = Wakeup(CAUGHT)
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[], object]] = {}
        self.register(self.wakeup.fileno(), self.handle_signals)
        for sock in control.sockets:
            self.register(sock.fileno(), partial(self.handle_control, sock))
        for slot, _ in self.outdated:
            self.listen_to(slot)

    def register(self, fd: int, handler: Callable[[], object]) -> None:
        self.handlers[fd] = handler
        self.epoll.register(fd, select.EPOLLIN)

    def unregister(self, fd: int) -> None:
        del self.handlers[fd]
        self.epoll.unregister(fd)

    # The loop

    def run(self, file: int | None) -> int:
        """Serve the open `file`, or wait for it if None; return the exit status at the end."""
        self.file = file
        release()  # what the program that exec'd us held back comes now
        self.reap()
        if file is None:
            logger.info("waiting for file: %s", fields(path=self.config.path))
            systemd.notify("READY=1", "STATUS=waiting for file")  # clients can connect
            self.replace_next()
            self.timers.set(self.look_for_file, self.now + LOOK_INTERVAL)
        else:
            self.start_workers()
        while not self.ended:
            self.title.changed(self.now)
            self.step(self.timers.timeout(self.clock()))
        logger.info("ended: %s", fields(status=int(self.status)))
        return self.status

    def step(self, timeout: float | None) -> None:
        """Run one turn: wait, then act on what has happened."""
        events = self.epoll.poll(timeout, EVENTS)
        self.now = self.clock()
        for fd, _ in events:
            if (handler := self.handlers.get(fd)) is not None:  # else: it went earlier in this turn
                handler()
        self.timers.run(self.now)
        if self.reported:
            self.reported = False
            time.sleep(REST)
        if self.phase in (Phase.DRAINING, Phase.KILLING) and not self.running():
            self.ended = True

    def running(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.pid is not None]

    # The file

    def look_for_file(self) -> None:
        try:
            self.file = open_file(self.config.path)
        except CannotServeError as error:
            logger.critical("cannot serve: %s", fields(path=self.config.path, reason=error))
            self.status = ExitStatus.CANNOT_SERVE
            self.terminate()
            return
        if self.file is None:
            self.timers.set(self.look_for_file, self.now + LOOK_INTERVAL)
        else:
            self.start_workers()

    def handle_gone(self) -> None:
        """Look for ourselves, and act: a worker has seen that the path does not name our file any more."""
        assert self.file is not None
        if self.file_gone or self.phase is not Phase.RUNNING or not is_gone(self.file, self.config.path):
            return
        self.file_gone = True
        if self.config.linger:
            logger.warning("file is gone, serving on what it was: %s", fields(path=self.config.path))
        else:
            logger.warning("file is gone, draining: %s", fields(path=self.config.path))
            self.drain()

    # Workers

    def start_workers(self) -> None:
        assert self.file is not None
        self.phase = Phase.RUNNING
        logger.info("serving: %s", fields(path=self.config.path, size=os.fstat(self.file).st_size, workers=len(self.slots)))
        for slot in self.slots:
            if slot.pid is None and slot.fill_at is None:
                self.spawn(slot)
        self.replace_next()

    def replace_next(self) -> None:
        """Replace the next worker of the version before us: kill it, and let its successor adopt its clients."""
        self.outdated = [(slot, pid) for slot, pid in self.outdated if slot.pid == pid]
        if self.outdated:
            os.kill(self.outdated[0][1], signal.SIGKILL)
        elif self.replacing and (self.phase is Phase.WAITING or all(slot.ready for slot in self.slots)):
            self.replacing = False
            logger.info("upgraded: %s", fields(version=__version__, clients=self.count_clients()))
            self.upgrader.done(self.now)

    def spawn(self, slot: Slot) -> None:
        """Fill `slot` with a worker."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self.postpone(slot, error)
            return
        with blocked():
            try:
                pid = os.fork()
            except OSError as error:
                ours.close()
                theirs.close()
                self.postpone(slot, error)
                return
            if pid == 0:  # here the worker leaves the supervisor's code, never to return
                self.become_worker(slot, ours, theirs)
        theirs.close()
        ours.setblocking(False)
        slot.pid, slot.channel, slot.spawned, slot.ready = pid, ours, self.now, False
        slot.adopted = bool(slot.roster.clients)
        self.listen_to(slot)
        logger.debug("worker spawned: %s", fields(slot=slot.index, pid=pid, adopts=len(slot.roster.clients)))
        if self.phase is Phase.DRAINING:
            self.order_drain(slot)

    def postpone(self, slot: Slot, error: OSError) -> None:
        logger.error("cannot spawn a worker: %s", fields(slot=slot.index, reason=error.strerror))
        self.fill_at(slot, self.now + FORK_RETRY)

    def listen_to(self, slot: Slot) -> None:
        assert slot.channel is not None
        self.register(slot.channel.fileno(), partial(self.handle_channel, slot))

    def become_worker(self, slot: Slot, ours: socket.socket, theirs: socket.socket) -> None:
        """Let go of all that is the supervisor's, do a worker's work, and end the process."""
        status = os.EX_SOFTWARE
        try:
            self.wakeup.close()
            self.epoll.close()
            self.control.close()
            ours.close()
            for other in self.slots:
                if other.channel is not None:
                    other.channel.close()  # or its worker would not see our supervisor's end
                if other is not slot:
                    other.roster.close()
                    for listener in other.listeners:
                        listener.close()  # or clients would wait at one that nobody accepts from
            theirs.setblocking(False)
            assert self.file is not None
            status = self.work(Inheritance(slot.index, self.file, slot.listeners, theirs, self.endpoints, slot.roster.clients))
        except BaseException:
            logger.exception("worker failed: %s", fields(slot=slot.index))
        finally:
            os._exit(status)  # no clean-up of the supervisor's, no buffers flushed twice

    def fill_at(self, slot: Slot, when: float) -> None:
        slot.fill_at = when
        self.timers.set(self.fill, min(slot.fill_at for slot in self.slots if slot.fill_at is not None))

    def fill(self) -> None:
        """Spawn workers into the slots whose time has come."""
        for slot in self.slots:
            if slot.fill_at is not None and slot.fill_at <= self.now:
                slot.fill_at = None
                self.spawn(slot)
        if waiting := [slot.fill_at for slot in self.slots if slot.fill_at is not None]:
            self.timers.set(self.fill, min(waiting))

    def reap(self) -> None:
        """Collect every child that has ended; SIGCHLDs merge, so their number says nothing."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self.upgrader.reaped(pid, status, self.now, ending=self.phase in (Phase.DRAINING, Phase.KILLING)):
                continue
            slot = next((slot for slot in self.slots if slot.pid == pid), None)
            if slot is not None:  # else: as PID 1 we are everybody's parent
                self.bury(slot, status)

    def bury(self, slot: Slot, status: int) -> None:
        """Take in that the worker of `slot` has ended, and decide what becomes of the slot and its clients."""
        self.handle_channel(slot)  # its last words
        assert slot.channel is not None
        assert slot.pid is not None
        self.unregister(slot.channel.fileno())
        slot.channel.close()
        pid, life, what = slot.pid, self.now - slot.spawned, verdict(status)
        slot.pid, slot.channel = None, None
        lost = slot.roster.lose_unprotected()
        level = logging.WARNING if self.phase is Phase.RUNNING and (slot, pid) not in self.outdated else logging.DEBUG
        detail = fields(slot=slot.index, pid=pid, keeps=len(slot.roster), lost=lost or None)
        logger.log(level, "worker %s: %s %s", what.value, detail, describe_status(status))
        if self.phase is Phase.RUNNING and (slot, pid) in self.outdated:
            self.spawn(slot)
        elif self.phase is Phase.RUNNING:
            self.refill(slot, life, what, status)
        elif self.phase is Phase.DRAINING and what is not Verdict.DONE and slot.roster.clients and self.now < self.drain_until:
            self.spawn(slot)  # somebody still has to finish these streams

    def refill(self, slot: Slot, life: float, what: Verdict, status: int) -> None:
        """Plan the next worker of a slot whose last one has died."""
        slot.failures = slot.failures.after_life(life, slot.ready, what, slot.adopted)
        if what is Verdict.CANNOT_BOOT or slot.failures.hopeless():
            logger.critical("workers cannot start: %s %s", fields(slot=slot.index), describe_status(status))
            self.status = ExitStatus.CANNOT_BOOT
            self.terminate()
            return
        if slot.failures.poisoned():
            ended = slot.roster.hang_up()
            logger.error("a client kills the worker that adopts it, ended all of the slot: %s", fields(slot=slot.index, clients=ended))
        slot.restarts += 1
        delay = slot.failures.delay()
        if delay:
            logger.warning("respawning after a delay: %s", fields(slot=slot.index, seconds=delay))
        self.fill_at(slot, self.now + delay)

    def handle_channel(self, slot: Slot) -> None:
        """Take in all that the worker of `slot` has reported."""
        while self.take_report(slot):
            pass

    def take_report(self, slot: Slot) -> bool:
        """Take in one report of the worker of `slot` and tell whether there may be more."""
        assert slot.channel is not None
        try:
            packet, sockets, _, _ = socket.recv_fds(slot.channel, MAX_MESSAGE, MAX_SOCKETS, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, ConnectionResetError):
            return False
        if not packet:  # the worker is ending: SIGCHLD comes next, and the slot is buried then
            self.epoll.modify(slot.channel.fileno(), 0)
            return False
        try:
            message = decode(packet)
        except MessageError as error:
            logger.error("worker speaks nonsense: %s", fields(slot=slot.index, reason=error))
        else:
            if isinstance(message, Report):
                self.handle_report(slot, message, sockets)
        return True

    def handle_report(self, slot: Slot, report: Report, sockets: Sequence[int]) -> None:
        if slot.roster.join(report.joined, sockets, self.highest):
            total = sum(len(slot.roster.unprotected) for slot in self.slots)
            self.unprotected("no descriptor to protect a client with, it will not survive its worker", slot=slot.index, unprotected=total)
        for client, offset in report.started:
            slot.roster.start(client, offset)
        slot.roster.leave(report.left)
        self.reported = True
        if report.notices != NO_NOTICES:
            self.handle_notices(slot, report.notices)

    def handle_notices(self, slot: Slot, notices: Notices) -> None:
        if notices.ready:
            slot.ready = True
            logger.info("worker ready: %s", fields(slot=slot.index, pid=slot.pid, adopted=len(slot.roster) if slot.adopted else None))
            if not self.started_up and all(slot.ready for slot in self.slots):
                self.started_up = True
                systemd.notify("READY=1")
            self.replace_next()
        if notices.polling is not None and self.polling is None:
            self.polling = notices.polling
            logger.warning("looking at the file once a second: %s", fields(reason=notices.polling))
        if notices.truncated is not None and self.now - self.truncation_seen >= TRUNCATION_INTERVAL:
            self.truncation_seen = self.now
            logger.warning("file was truncated: %s", fields(path=self.config.path, size=notices.truncated))
        if notices.gone:
            self.handle_gone()

    # Signals, and the end

    def handle_signals(self) -> None:
        for number in self.wakeup.read():
            match number:
                case signal.SIGTERM | signal.SIGINT if self.phase is Phase.DRAINING:
                    self.terminate()
                case signal.SIGTERM | signal.SIGINT if self.phase is not Phase.KILLING:
                    logger.info("draining: %s", fields(signal=signal.Signals(number).name, grace=f"{self.config.grace:g}"))
                    self.drain()
                case signal.SIGQUIT:
                    self.terminate()
                case signal.SIGHUP if self.phase in (Phase.WAITING, Phase.RUNNING):
                    self.upgrader.request(self.now)
        self.reap()  # after any signal: a full pipe may have lost SIGCHLD's byte

    def drain(self) -> None:
        """Let the workers bring every stream to what is in the file now, and end with them."""
        self.phase = Phase.DRAINING
        self.drain_until = self.now + self.config.grace
        systemd.notify("STOPPING=1")
        self.stop_filling()
        for slot in self.slots:
            for listener in slot.listeners:
                listener.close()  # the worker's is the last: it empties the queue, then closes
        for slot in self.running():
            self.order_drain(slot)
        for slot in self.slots:
            if slot.pid is None and slot.roster.clients:  # in backoff: its clients have waited for this worker
                self.spawn(slot)
        self.timers.set(self.terminate, self.drain_until + KILL_MARGIN)

    def order_drain(self, slot: Slot) -> None:
        """Tell the worker of `slot` to drain, in what is left of the grace."""
        assert slot.channel is not None
        assert slot.pid is not None
        try:
            slot.channel.send(encode(Drain(max(0.0, self.drain_until - self.now))))
        except OSError:
            return  # it is ending already
        os.kill(slot.pid, signal.SIGTERM)  # ours until we reap it: no other process can have this pid

    def terminate(self) -> None:
        """End at once."""
        self.phase = Phase.KILLING
        self.stop_filling()
        for slot in self.running():
            assert slot.pid is not None
            os.kill(slot.pid, signal.SIGKILL)
        self.timers.set(self.give_up, self.now + KILL_PATIENCE)

    def give_up(self) -> None:
        logger.error("workers do not end, leaving them to the kernel: %s", fields(pids=[slot.pid for slot in self.running()]))
        self.ended = True

    def stop_filling(self) -> None:
        self.timers.cancel(self.look_for_file)
        self.timers.cancel(self.terminate)
        self.timers.cancel(self.fill)
        self.upgrader.abandon()

    def save(self) -> State:
        """Return all that the next version of this program needs to go on from here."""
        return State(
            version=__version__,
            endpoints=list(self.endpoints),
            started=self.started,
            file=self.file,
            file_gone=self.file_gone,
            polling=self.polling,
            control=[sock.fileno() for sock in self.control.sockets],
            slots=[slot.save() for slot in self.slots],
        )

    # What others see

    def render_title(self) -> str:
        return supervisor_title(self.endpoints, self.config.path, self.state(), len(self.running()), self.count_clients())

    def count_clients(self) -> int:
        return sum(len(slot.roster) for slot in self.slots)

    def state(self) -> str:
        """Return the state as titles and status show it, empty while all is as it should be."""
        match self.phase:
            case Phase.WAITING:
                return "waiting for file"
            case Phase.RUNNING:
                return "" if self.started_up else "starting"
            case _:
                return "draining"

    def handle_control(self, sock: socket.socket) -> None:
        self.control.answer(sock, (json.dumps(self.describe()) + "\n").encode())

    def describe(self) -> dict[str, object]:
        """Return the status that the control socket gives as JSON."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "state": self.state() or "serving",
            "started": self.started,
            "endpoints": list(self.endpoints),
            "file": {
                "path": self.config.path,
                "gone": self.file_gone,
                "size": os.fstat(self.file).st_size if self.file is not None else None,
            },
            "clients": self.count_clients(),
            "unprotected": sum(len(slot.roster.unprotected) for slot in self.slots),
            "workers": [
                {"slot": slot.index, "pid": slot.pid, "ready": slot.ready, "clients": len(slot.roster), "restarts": slot.restarts}
                for slot in self.slots
            ],
        }
