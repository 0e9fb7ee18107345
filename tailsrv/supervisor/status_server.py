"""Answers status requests at the control sockets, and composes the status.

The supervisor must not wait for a caller, and a long answer must not keep it from other work. So it
composes and sends an answer in many turns of its loop.
"""

import logging
import os
import select
import socket
import sys
from collections.abc import Generator, Sequence
from functools import partial

from tailsrv import __version__
from tailsrv.config import Config
from tailsrv.control_socket import Control
from tailsrv.linux import systemd
from tailsrv.linux.event_loop import STALL_PAUSE, EventLoop
from tailsrv.linux.process import start_ticks
from tailsrv.linux.process_title import ProcessTitle
from tailsrv.log import RateLimited
from tailsrv.served_file import ServedFile
from tailsrv.status_schema import (
    MAX_LISTED_SEGMENTS,
    Listing,
    ServerState,
    ServerStatus,
    encode,
    encode_client,
    encode_listing,
)
from tailsrv.supervisor.worker_pool import WorkerPool
from tailsrv.titles import service_status, supervisor_title

# Seconds that a caller has to read its answer. Then its connection is closed.
ANSWER_TIMEOUT = 10.0
# Clients that are described in one turn, which takes about a millisecond.
LISTED_PER_TURN = 100

# An answer that is being composed: yields after each part of the work, and returns the answer.
Composition = Generator[None, None, bytes]


class StatusServer:
    """Accepts callers at the control sockets and sends them their answers.

    Each endpoint has two sockets: the answer at the first is the status, the answer at the second
    lists the clients. Each socket composes at most one answer at a time. Further callers wait.

    Args:
        loop: The supervisor's event loop.
        control: The control sockets.
        writer: Composes the answers.

    """

    def __init__(self, loop: EventLoop, control: Control, writer: "StatusWriter") -> None:
        self._loop, self._control, self._writer = loop, control, writer
        # The answers that are being composed, each with its socket and with its callers.
        self._compositions: list[tuple[Composition, socket.socket, list[socket.socket]]] = []
        # The callers that have not read all of their answer: the rest of it, and until when they
        # have time for it.
        self._callers: dict[socket.socket, tuple[memoryview, float]] = {}
        # The sockets that are paused for a moment, because accept(2) has failed.
        self._stalled: set[int] = set()
        self._out_of_resources = RateLimited(logging.WARNING, burst=1)
        for sock in control.status:
            loop.register(sock.fileno(), partial(self._answer_status, sock))
        for sock in control.clients:
            loop.register(sock.fileno(), partial(self._answer_clients, sock))

    def is_idle(self) -> bool:
        """Return whether no caller waits for its answer."""
        return not self._compositions and not self._callers

    def close_in_child(self) -> None:
        """In a forked child, close the connections to the callers."""
        for _, _, callers in self._compositions:
            for caller in callers:
                caller.close()
        for caller in self._callers:
            caller.close()

    def _answer_status(self, sock: socket.socket) -> None:
        # Check credentials before composing the status: callers that are not authorized get no
        # answer, and should cost almost nothing.
        if callers := self._accept(sock):
            self._send_to_all(callers, self._writer.render_status())

    def _answer_clients(self, sock: socket.socket) -> None:
        if callers := self._accept(sock):
            self._loop.pause(sock.fileno())
            self._compositions.append((self._writer.compose_listing(), sock, callers))
            self._loop.timers.set(self._compose, self._loop.now)

    def _accept(self, sock: socket.socket) -> list[socket.socket]:
        """Return connections to the authorized callers at `sock`.

        If accept(2) fails for lack of descriptors or memory, pause `sock` for a moment. It stays
        readable, and the loop would spin.
        """
        callers, error = self._control.accept_authorized(sock)
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
        return callers

    def _resume_stalled(self) -> None:
        """Accept at the paused sockets again, except for those that compose an answer."""
        for fd in self._stalled - {sock.fileno() for _, sock, _ in self._compositions}:
            self._loop.resume(fd)
        self._stalled.clear()

    def _compose(self) -> None:
        """Do one part of the work for each answer that is being composed."""
        for entry in self._compositions[:]:
            composition, sock, callers = entry
            try:
                next(composition)
            except StopIteration as finished:
                self._compositions.remove(entry)
                self._loop.resume(sock.fileno())
                self._send_to_all(callers, finished.value)
        if self._compositions:
            self._loop.timers.set(self._compose, self._loop.now)

    def _send_to_all(self, callers: Sequence[socket.socket], answer: bytes) -> None:
        until = self._loop.now + ANSWER_TIMEOUT
        for caller in callers:
            self._callers[caller] = memoryview(answer), until
            self._send(caller)
            if caller in self._callers:
                self._await_room(caller)

    def _send(self, caller: socket.socket) -> None:
        """Send what `caller` has room for. Close the connection if that was the rest."""
        rest, until = self._callers[caller]
        try:
            while rest:
                rest = rest[caller.send(rest) :]
        except BlockingIOError:
            self._callers[caller] = rest, until
            return
        except OSError:
            # The caller has closed its connection, or memory is short. It can ask again.
            pass
        self._close(caller)

    def _await_room(self, caller: socket.socket) -> None:
        """Send the rest when `caller` has read more."""
        try:
            self._loop.register(
                caller.fileno(), partial(self._send, caller), events=select.EPOLLOUT
            )
        except OSError:
            # There is no epoll watch.
            self._close(caller)
            return
        if self._expire not in self._loop.timers:
            self._loop.timers.set(self._expire, self._callers[caller][1])

    def _close(self, caller: socket.socket) -> None:
        del self._callers[caller]
        self._loop.unregister(caller.fileno())
        caller.close()

    def _expire(self) -> None:
        """Close the connections of callers that have not read their answers in time."""
        for caller, (_, until) in list(self._callers.items()):
            if until <= self._loop.now:
                self._close(caller)
        if self._callers:
            self._loop.timers.set(self._expire, min(until for _, until in self._callers.values()))


class StatusWriter:
    """Composes the status: as JSON, as the supervisor's process title, and for the service manager.

    `started` is the time of the server's start, in seconds since the epoch.
    """

    def __init__(
        self,
        config: Config,
        endpoints: Sequence[str],
        started: float,
        pool: WorkerPool,
        served_file: ServedFile,
        loop: EventLoop,
    ) -> None:
        self._config, self._endpoints, self._started = config, endpoints, started
        self._pool, self._served_file, self._loop = pool, served_file, loop
        self._state = ServerState.STARTING
        self._title = ProcessTitle(loop.timers, self._render_title)
        interval = config.timing.status_interval
        self._service_status = ProcessTitle(
            loop.timers, self.summary, lambda status: systemd.notify(f"STATUS={status}"), interval
        )

    def update(self, state: ServerState) -> None:
        """Renew the title and the service manager's status text, at most once per interval.

        Call this when something in them may have changed. `state` is the state of the server.
        """
        self._state = state
        self._title.changed(self._loop.now)
        if systemd.is_managed():
            self._service_status.changed(self._loop.now)

    def summary(self) -> str:
        """Return the status as the service manager shows it, in a few words."""
        return service_status(self._state, len(self._pool.workers()), self._pool.clients())

    def _render_title(self) -> str:
        return supervisor_title(
            self._endpoints,
            self._config.path,
            self._state,
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
            state=self._state,
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

    def compose_listing(self) -> Composition:
        """Compose the list of the segments and of all protected clients, with their positions.

        This needs some system calls for each segment and client. Clients that connect meanwhile may
        be missing.
        """
        parts: list[str] = []
        positions: list[int] = []
        for slot in self._pool.slots:
            numbers = list(slot.client_table.clients)
            for first in range(0, len(numbers), LISTED_PER_TURN):
                batch = numbers[first : first + LISTED_PER_TURN]
                clients = slot.client_table.describe(slot.index, batch)
                parts += map(encode_client, clients)
                positions += [each.position for each in clients if each.position is not None]
                yield
        # Read after the positions: no client can have reached bytes beyond this end.
        end = self._served_file.end()
        segments = []
        for segment in self._served_file.describe_segments(positions, MAX_LISTED_SEGMENTS):
            segments.append(segment)
            yield
        listing = Listing(
            pid=os.getpid(),
            end=end,
            segments=tuple(segments),
            clients=(),
        )
        return encode_listing(listing, parts)
