"""Answers status requests at the control sockets, and composes the status.

The supervisor must not wait for a caller. It sends a short status itself, and forks a child for an
answer that is long or takes time.
"""

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
from tailsrv.control_socket import Control
from tailsrv.linux import systemd
from tailsrv.linux.event_loop import STALL_PAUSE, EventLoop
from tailsrv.linux.process import start_ticks
from tailsrv.linux.process_title import ProcessTitle
from tailsrv.linux.signals import blocked, unblock_all
from tailsrv.log import RateLimited
from tailsrv.served_file import ServedFile
from tailsrv.status_schema import MAX_LISTED_SEGMENTS, Listing, ServerState, ServerStatus, encode
from tailsrv.supervisor.worker_pool import WorkerPool
from tailsrv.titles import service_status, supervisor_title

# Seconds that a child has to compose its answer and send it to each caller. Then SIGALRM ends it.
ANSWER_TIMEOUT = 10
# Bytes. An answer up to this length fits into the buffer of a unix socket, so that sending it does
# not block (net.core.wmem_default is 208 KiB).
MAX_IMMEDIATE = 64 << 10

Answer = Callable[[], bytes]


class StatusServer:
    """Accepts callers at the control sockets and sends them their answers.

    Each endpoint has two sockets. `status()` returns the answer at the first, which the supervisor
    sends itself if it is short. `clients()` returns the answer at the second, and is called in a
    child.

    A child first calls `close_in_child()`, to close its copies of what must be free once the
    supervisor has exited. Each socket has at most one child at a time: further callers wait until
    it has exited.
    """

    def __init__(
        self,
        loop: EventLoop,
        control: Control,
        status: Answer,
        clients: Answer,
        close_in_child: Callable[[], None],
    ) -> None:
        self._loop, self._control = loop, control
        self._status, self._clients, self._close_in_child = status, clients, close_in_child
        # The pid of each child, with the descriptor of the socket whose callers it answers.
        self._children: dict[int, int] = {}
        # The sockets that are paused for a moment, because accept(2) has failed.
        self._stalled: set[int] = set()
        self._out_of_resources = RateLimited(logging.WARNING, burst=1)
        for sock in control.status:
            loop.register(sock.fileno(), partial(self._answer_status, sock))
        for sock in control.clients:
            loop.register(sock.fileno(), partial(self._answer_clients, sock))

    def handle_exit(self, pid: int) -> bool:
        """Return whether `pid` was a child that answered callers.

        If it was, accept callers at its socket again.
        """
        if (fd := self._children.pop(pid, None)) is None:
            return False
        self._loop.resume(fd)
        return True

    def _answer_status(self, sock: socket.socket) -> None:
        with ExitStack() as stack:
            # Check credentials before composing the status: callers that are not authorized get no
            # answer, and should cost almost nothing.
            if not (peers := [stack.enter_context(peer) for peer in self._accept(sock)]):
                return
            status = self._status()
            if len(status) > MAX_IMMEDIATE:
                self._fork(sock, peers, lambda: status)
                return
            for peer in peers:
                # The caller may have closed its connection.
                with suppress(OSError):
                    peer.send(status)

    def _answer_clients(self, sock: socket.socket) -> None:
        with ExitStack() as stack:
            if peers := [stack.enter_context(peer) for peer in self._accept(sock)]:
                self._fork(sock, peers, self._clients)

    def _accept(self, sock: socket.socket) -> list[socket.socket]:
        """Return connections to the authorized callers at `sock`.

        If accept(2) fails for lack of descriptors or memory, pause `sock` for a moment. It stays
        readable, and the loop would spin.
        """
        peers, error = self._control.accept_authorized(sock)
        if error is not None:
            self._out_of_resources(
                "out of file descriptors or memory: "
                "health checks must wait, clients are not affected",
                reason=error.strerror,
                hint="raise LimitNOFILE=, fs.file-max or the memory limit, as the reason says",
            )
            self._loop.pause(sock.fileno())
            self._stalled.add(sock.fileno())
            self._loop.timers.set(self._resume_stalled, self._loop.now + STALL_PAUSE)
        return peers

    def _resume_stalled(self) -> None:
        """Accept at the paused sockets again, except for those that have a child.

        These are resumed when the child has exited.
        """
        for fd in self._stalled - set(self._children.values()):
            self._loop.resume(fd)
        self._stalled.clear()

    def _fork(self, sock: socket.socket, peers: Sequence[socket.socket], answer: Answer) -> None:
        """Fork a child that sends `answer()` to `peers`. Pause `sock` until it has exited."""
        try:
            with blocked():
                if (pid := os.fork()) == 0:
                    self._run_child(peers, answer)
        except OSError:
            # No memory, or the limit on tasks is reached. The callers get no answer, and can retry.
            return
        self._loop.pause(sock.fileno())
        self._children[pid] = sock.fileno()

    def _run_child(self, peers: Sequence[socket.socket], answer: Answer) -> None:
        """Do the work of a child, then exit."""
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
                    # The caller has closed its connection, or has not read its answer in time.
                    pass
        finally:
            os._exit(0)


class StatusWriter:
    """Composes the status: as JSON, as the supervisor's process title, and for the service manager.

    `state()` returns the state of the server. `started` is the time of its start, in seconds since
    the epoch.
    """

    def __init__(
        self,
        config: Config,
        endpoints: Sequence[str],
        started: float,
        pool: WorkerPool,
        served_file: ServedFile,
        state: Callable[[], ServerState],
        loop: EventLoop,
    ) -> None:
        self._config, self._endpoints, self._started = config, endpoints, started
        self._pool, self._served_file, self._state, self._loop = pool, served_file, state, loop
        self._title = ProcessTitle(loop.timers, self._render_title)
        interval = config.timing.status_interval
        self._service_status = ProcessTitle(
            loop.timers, self.summary, lambda status: systemd.notify(f"STATUS={status}"), interval
        )

    def update(self) -> None:
        """Renew the title and the service manager's status text, at most once per interval.

        Call this when something in them may have changed.
        """
        self._title.changed(self._loop.now)
        if systemd.is_managed():
            self._service_status.changed(self._loop.now)

    def summary(self) -> str:
        """Return the status as the service manager shows it, in a few words."""
        return service_status(self._state(), len(self._pool.workers()), self._pool.clients())

    def _render_title(self) -> str:
        return supervisor_title(
            self._endpoints,
            self._config.path,
            self._state(),
            len(self._pool.workers()),
            self._pool.clients(),
        )

    def render_status(self) -> bytes:
        """Return the status as JSON, and ping all workers.

        The next status shows the pings that have not been answered by then.
        """
        status = encode(self._describe())
        self._pool.ping_workers()
        return status

    def _describe(self) -> ServerStatus:
        now, slots = self._loop.now, self._pool.slots
        return ServerStatus(
            version=__version__,
            command=tuple(sys.orig_argv),
            pid=os.getpid(),
            ticks=start_ticks(os.getpid()),
            state=self._state(),
            started=self._started,
            endpoints=tuple(self._endpoints),
            file=self._served_file.describe(now, self._config.follow_name),
            log=self._served_file.describe_log(),
            clients=self._pool.clients(),
            unprotected=self._pool.report_reader.unprotected(),
            max_clients=self._config.max_clients,
            workers=tuple(slot.describe(now) for slot in slots),
            listeners=tuple(listener for slot in slots for listener in slot.describe_listeners()),
        )

    def render_clients(self) -> bytes:
        """Return the segments and all protected clients as JSON, with the clients' positions.

        This needs some system calls for each segment and client. Call it only in a child of the
        supervisor: the answer holds the parent's pid.
        """
        clients = tuple(
            client for slot in self._pool.slots for client in slot.client_table.describe(slot.index)
        )
        positions = [client.position for client in clients if client.position is not None]
        listing = Listing(
            pid=os.getppid(),
            # Read after the positions: no client can have reached bytes beyond this end.
            end=self._served_file.end(),
            segments=self._served_file.describe_segments(positions, MAX_LISTED_SEGMENTS),
            clients=clients,
        )
        return encode(listing)
