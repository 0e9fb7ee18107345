"""Answers at the control sockets; what takes time is told by a forked child, so that the supervisor waits for nobody."""

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from tailsrv import __version__
from tailsrv.config import Config
from tailsrv.control import Control
from tailsrv.linux import systemd
from tailsrv.linux.event_loop import STALL_PAUSE, EventLoop
from tailsrv.linux.process import start_ticks
from tailsrv.linux.process_title import ProcessTitle
from tailsrv.linux.signals import blocked, unblock_all
from tailsrv.log import RateLimited
from tailsrv.served_file import ServedFile
from tailsrv.supervisor.worker_pool import WorkerPool
from tailsrv.titles import service_status, supervisor_title

# seconds that those who asked have to take their answer from a child
ANSWER_TIMEOUT = 10
# bytes of an answer that surely fit the buffer of a unix socket (net.core.wmem_default is 208 KiB)
MAX_IMMEDIATE = 64 << 10

Answer = Callable[[], bytes]


class StatusServer:
    """What is told at the control sockets: `status()` at once, `clients()` by a child.

    A child first calls `let_go()`, to close what must not outlive the supervisor in a forgotten child. There is one
    at a time for each socket: others who ask there wait until it has ended.
    """

    def __init__(
        self,
        loop: EventLoop,
        control: Control,
        status: Answer,
        clients: Answer,
        let_go: Callable[[], None],
    ) -> None:
        self._loop, self._control = loop, control
        self._status, self._clients, self._close_in_child = status, clients, let_go
        # the pid of each, and the socket at which others wait for its end
        self._children: dict[int, int] = {}
        # sockets at which nobody can be accepted for a moment
        self._stalled: set[int] = set()
        self._short_of_room = RateLimited(logging.WARNING, burst=1)
        for sock in control.status:
            loop.register(sock.fileno(), partial(self._answer_status, sock))
        for sock in control.clients:
            loop.register(sock.fileno(), partial(self._answer_clients, sock))

    def handle_exit(self, pid: int) -> bool:
        """Tell whether the child `pid` was one of ours; if so, others may ask again."""
        if (fd := self._children.pop(pid, None)) is None:
            return False
        self._loop.resume(fd)
        return True

    def _answer_status(self, sock: socket.socket) -> None:
        with ExitStack() as stack:
            # Who asks comes first: a stranger gets nothing, and is to cost next to nothing.
            if not (asked := [stack.enter_context(peer) for peer in self._accept(sock)]):
                return
            status = self._status()
            if len(status) > MAX_IMMEDIATE:
                self._fork(sock, asked, lambda: status)
                return
            for peer in asked:
                # gone already
                with suppress(OSError):
                    peer.send(status)

    def _answer_clients(self, sock: socket.socket) -> None:
        with ExitStack() as stack:
            if asked := [stack.enter_context(peer) for peer in self._accept(sock)]:
                self._fork(sock, asked, self._clients)

    def _accept(self, sock: socket.socket) -> list[socket.socket]:
        """Return those who ask at `sock`; where there is no room for them, leave it alone for a moment."""
        asked, error = self._control.accept_authorized(sock)
        if error is not None:
            self._short_of_room(
                "short of descriptors or memory, health checks have to wait, clients do not",
                reason=error.strerror,
            )
            self._loop.pause(sock.fileno())
            self._stalled.add(sock.fileno())
            self._loop.timers.set(self._resume_stalled, self._loop.now + STALL_PAUSE)
        return asked

    def _resume_stalled(self) -> None:
        """Heed the sockets again that were left alone; a child's end does so for those that wait for it."""
        for fd in self._stalled - set(self._children.values()):
            self._loop.resume(fd)
        self._stalled.clear()

    def _fork(self, sock: socket.socket, asked: Sequence[socket.socket], answer: Answer) -> None:
        """Give `answer()` to those who `asked` at `sock`, from a child; others who ask there wait for its end."""
        try:
            with blocked():
                if (pid := os.fork()) == 0:
                    self._run_child(asked, answer)
        except OSError:
            # they may ask again
            return
        self._loop.pause(sock.fileno())
        self._children[pid] = sock.fileno()

    def _run_child(self, peers: Sequence[socket.socket], answer: Answer) -> None:
        """Do a child's work, and end it."""
        try:
            self._close_in_child()
            for number in (
                signal.SIGTERM,
                signal.SIGINT,
                signal.SIGHUP,
                signal.SIGQUIT,
                signal.SIGALRM,
            ):
                signal.signal(number, signal.SIG_DFL)
            signal.alarm(ANSWER_TIMEOUT)
            unblock_all()
            data = answer()
            for peer in peers:
                peer.settimeout(ANSWER_TIMEOUT)
                try:
                    peer.sendall(data)
                except OSError:
                    # gone already
                    pass
        finally:
            os._exit(0)


class StatusWriter:
    """The supervisor's knowledge, put into words. `state()` returns the server's state, empty while all is as it should be."""

    def __init__(
        self,
        config: Config,
        endpoints: Sequence[str],
        started: float,
        pool: WorkerPool,
        served_file: ServedFile,
        state: Callable[[], str],
        loop: EventLoop,
    ) -> None:
        self._config, self._endpoints, self._started = config, endpoints, started
        self._pool, self._served_file, self._state, self._loop = pool, served_file, state, loop
        self._title = ProcessTitle(loop.timers, self._render_title)
        interval = config.timing.status_interval
        self._service_status = ProcessTitle(
            loop.timers, self.sentence, lambda status: systemd.notify(f"STATUS={status}"), interval
        )

    def update(self) -> None:
        """Note that something may have: what is shown is renewed, at a bounded pace."""
        self._title.changed(self._loop.now)
        if systemd.is_managed():
            self._service_status.changed(self._loop.now)

    def sentence(self) -> str:
        """Return the status as the service manager shows it."""
        return service_status(self._state(), len(self._pool.running()), self._pool.clients())

    def _render_title(self) -> str:
        return supervisor_title(
            self._endpoints,
            self._config.path,
            self._state(),
            len(self._pool.running()),
            self._pool.clients(),
        )

    def tell(self) -> bytes:
        """Return the status as JSON, and have the workers asked: whoever wants to know again soon learns who does not answer."""
        status = (json.dumps(self._describe()) + "\n").encode()
        self._pool.ping_workers()
        return status

    def _describe(self) -> dict[str, object]:
        return {
            "version": __version__,
            "command": sys.orig_argv,
            "pid": os.getpid(),
            "ticks": start_ticks(os.getpid()),
            "state": self._state() or "serving",
            "started": self._started,
            "endpoints": list(self._endpoints),
            "file": self._served_file.describe(),
            "clients": self._pool.clients(),
            "unprotected": self._pool.report_reader.unprotected(),
            "max_clients": self._config.max_clients,
            "workers": [slot.describe(self._loop.now) for slot in self._pool.slots],
            "listeners": [
                listener for slot in self._pool.slots for listener in slot.describe_listeners()
            ],
        }

    def render_clients(self) -> bytes:
        """Return as JSON who is connected and where each stream stands; takes time, and is for a child that has it."""
        clients = [
            {"slot": slot.index, **client}
            for slot in self._pool.slots
            for client in slot.client_table.describe()
        ]
        return (
            json.dumps({"pid": os.getppid(), "size": self._served_file.size(), "clients": clients})
            + "\n"
        ).encode()
