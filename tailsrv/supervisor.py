"""Keeps N slots filled: forks, reaps, forwards signals, stops in order.

It never accepts a client, never reads a client's bytes and never sends a byte of the file: what does little
can be relied on. It has no threads, and makes no epoll or inotify object that a worker could share.
"""

import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial

from tailsrv import __version__
from tailsrv.config import Config, ExitStatus
from tailsrv.control import Control
from tailsrv.log import fields, logger
from tailsrv.messages import MAX_MESSAGE, Drain, MessageError, Report, decode, encode
from tailsrv.policy import KILL_MARGIN, Verdict, describe_status, verdict
from tailsrv.signals import Wakeup, blocked
from tailsrv.slot import Inheritance, Slot
from tailsrv.timers import Timers
from tailsrv.title import Title, supervisor_title
from tailsrv.watch import CannotServeError, is_gone, open_file

LOOK_INTERVAL = 0.5  # seconds between looks for a file that does not exist yet
FORK_RETRY = 1.0  # seconds; fork(2) fails for lack of memory or of room in the task limit, and both may pass
KILL_PATIENCE = 2.0  # seconds that killed workers get to go; one in an uninterruptible sleep must not keep us
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

    `listeners` holds the listening sockets of each slot; `work` is what a worker does, called in the forked
    child, which ends with the exit status that it returns.
    """

    def __init__(
        self,
        config: Config,
        listeners: Sequence[list[socket.socket]],
        endpoints: Sequence[str],
        control: Control,
        work: Callable[[Inheritance], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.endpoints = endpoints
        self.control = control
        self.work = work
        self.clock = clock
        self.now = clock()
        self.started = time.time()
        self.slots = [Slot(index, sockets) for index, sockets in enumerate(listeners)]
        self.file: int | None = None
        self.phase = Phase.WAITING
        self.status = ExitStatus.DONE
        self.ended = False
        self.file_gone = False
        self.started_up = False  # every slot has had a worker that was ready
        self.polling: str | None = None
        self.truncation_seen = float("-inf")
        self.timers = Timers()
        self.title = Title(self.timers, self.render_title)
        self.wakeup = Wakeup(CAUGHT)
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self.register(self.wakeup.fileno(), self.handle_signals)
        for sock in control.sockets:
            self.register(sock.fileno(), partial(self.handle_control, sock))

    def register(self, fd: int, handler: Callable[[], None]) -> None:
        self.handlers[fd] = handler
        self.epoll.register(fd, select.EPOLLIN)

    def unregister(self, fd: int) -> None:
        del self.handlers[fd]
        self.epoll.unregister(fd)

    # The loop

    def run(self, file: int | None) -> int:
        """Serve the open `file`, or wait for it if None; return the exit status at the end."""
        self.file = file
        if file is None:
            logger.info("waiting for file: %s", fields(path=self.config.path))
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
        events = self.epoll.poll(timeout)
        self.now = self.clock()
        for fd, _ in events:
            if (handler := self.handlers.get(fd)) is not None:  # else: it went earlier in this turn
                handler()
        self.timers.run(self.now)
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
            self.spawn(slot)

    def spawn(self, slot: Slot) -> None:
        """Fill `slot` with a worker."""
        assert self.file is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with blocked():
            try:
                pid = os.fork()
            except OSError as error:
                logger.error("cannot fork: %s", fields(slot=slot.index, reason=error.strerror))
                ours.close()
                theirs.close()
                self.fill_at(slot, self.now + FORK_RETRY)
                return
            if pid == 0:  # here the worker leaves the supervisor's code, never to return
                self.become_worker(slot, ours, theirs)
        theirs.close()
        ours.setblocking(False)
        slot.pid, slot.channel, slot.spawned, slot.ready, slot.clients = pid, ours, self.now, False, 0
        self.register(ours.fileno(), partial(self.handle_channel, slot))
        logger.debug("worker spawned: %s", fields(slot=slot.index, pid=pid))

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
                    for listener in other.listeners:
                        listener.close()  # or clients would wait at one that nobody accepts from
            theirs.setblocking(False)
            assert self.file is not None
            status = self.work(Inheritance(slot.index, self.file, slot.listeners, theirs, self.endpoints))
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
            slot = next((slot for slot in self.slots if slot.pid == pid), None)
            if slot is not None:  # else: as PID 1 we are everybody's parent
                self.bury(slot, status)

    def bury(self, slot: Slot, status: int) -> None:
        """Take in that the worker of `slot` has ended, and decide what becomes of the slot."""
        self.handle_channel(slot)  # its last words
        assert slot.channel is not None
        self.unregister(slot.channel.fileno())
        slot.channel.close()
        pid, life = slot.pid, self.now - slot.spawned
        slot.pid, slot.channel, slot.clients = None, None, 0
        what = verdict(status)
        if self.phase is not Phase.RUNNING:
            logger.debug("worker %s: %s %s", what.value, fields(slot=slot.index, pid=pid), describe_status(status))
            return
        slot.failures = slot.failures.after_life(life, slot.ready)
        logger.warning("worker %s: %s %s", what.value, fields(slot=slot.index, pid=pid), describe_status(status))
        if what is Verdict.CANNOT_BOOT or slot.failures.hopeless():
            logger.critical("workers cannot start: %s %s", fields(slot=slot.index), describe_status(status))
            self.status = ExitStatus.CANNOT_BOOT
            self.terminate()
            return
        slot.restarts += 1
        delay = slot.failures.delay()
        if delay:
            logger.warning("respawning after a delay: %s", fields(slot=slot.index, seconds=delay))
        self.fill_at(slot, self.now + delay)

    def handle_channel(self, slot: Slot) -> None:
        """Take in what the worker of `slot` has reported."""
        assert slot.channel is not None
        while True:
            try:
                packet = slot.channel.recv(MAX_MESSAGE)
            except (BlockingIOError, ConnectionResetError):
                return
            if not packet:  # the worker is ending: SIGCHLD comes next, and the slot is buried then
                fd = slot.channel.fileno()
                if fd in self.handlers:
                    self.epoll.modify(fd, 0)
                return
            try:
                message = decode(packet)
            except MessageError as error:
                logger.error("worker speaks nonsense: %s", fields(slot=slot.index, reason=error))
                continue
            if isinstance(message, Report):
                self.handle_report(slot, message)

    def handle_report(self, slot: Slot, report: Report) -> None:
        if report.ready:
            slot.ready = True
            logger.info("worker ready: %s", fields(slot=slot.index, pid=slot.pid))
            self.started_up = self.started_up or all(slot.ready for slot in self.slots)
        if report.clients is not None:
            slot.clients = report.clients
        if report.polling is not None and self.polling is None:
            self.polling = report.polling
            logger.warning("looking at the file once a second: %s", fields(reason=report.polling))
        if report.truncated is not None and self.now - self.truncation_seen >= TRUNCATION_INTERVAL:
            self.truncation_seen = self.now
            logger.warning("file was truncated: %s", fields(path=self.config.path, size=report.truncated))
        if report.gone:
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
                case signal.SIGHUP:
                    logger.warning("SIGHUP is ignored: upgrade in place is not there yet")
        self.reap()  # after any signal: a full pipe may have lost SIGCHLD's byte

    def drain(self) -> None:
        """Let the workers bring every stream to what is in the file now, and end with them."""
        self.phase = Phase.DRAINING
        self.stop_filling()
        for slot in self.slots:
            for listener in slot.listeners:
                listener.close()  # the worker's is the last: it empties the queue, then closes
        for slot in self.running():
            assert slot.channel is not None
            try:
                slot.channel.send(encode(Drain()))
            except OSError:
                pass  # it is ending already
        self.signal_workers(signal.SIGTERM)
        self.timers.set(self.terminate, self.now + self.config.grace + KILL_MARGIN)

    def terminate(self) -> None:
        """End at once."""
        self.phase = Phase.KILLING
        self.stop_filling()
        self.signal_workers(signal.SIGKILL)
        self.timers.set(self.give_up, self.now + KILL_PATIENCE)

    def give_up(self) -> None:
        logger.error("workers do not end, leaving them to the kernel: %s", fields(pids=[slot.pid for slot in self.running()]))
        self.ended = True

    def stop_filling(self) -> None:
        self.timers.cancel(self.look_for_file)
        self.timers.cancel(self.terminate)
        self.timers.cancel(self.fill)

    def signal_workers(self, number: signal.Signals) -> None:
        for slot in self.running():
            assert slot.pid is not None
            os.kill(slot.pid, number)  # ours until we reap it: no other process can have this pid

    # What others see

    def render_title(self) -> str:
        workers, clients = len(self.running()), sum(slot.clients for slot in self.slots)
        return supervisor_title(self.endpoints, self.config.path, self.state(), workers, clients)

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
            "clients": sum(slot.clients for slot in self.slots),
            "workers": [
                {"slot": slot.index, "pid": slot.pid, "ready": slot.ready, "clients": slot.clients, "restarts": slot.restarts}
                for slot in self.slots
            ],
        }
