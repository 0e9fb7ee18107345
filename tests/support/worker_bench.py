"""A worker in this process: its files, its listener, and the supervisor's end of its channel."""

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from setproctitle import getproctitle, setproctitle

from support.sockets import closing_all, readable, recv_all
from support.waiting import DEADLINE
from tailsrv.addresses import endpoint
from tailsrv.config import Config
from tailsrv.control_socket import bind_for_worker
from tailsrv.linux.inotify import Watch
from tailsrv.linux.signals import Wakeup
from tailsrv.listeners import open_listeners
from tailsrv.segments import NO_FILE, Log, Segment
from tailsrv.shared_counts import SharedCounts
from tailsrv.worker.client import Client, ClientState
from tailsrv.worker.worker import Worker
from tailsrv.worker_channel import MAX_PACKET, Order, Roll, WorkerReport, decode, encode
from tailsrv.worker_context import Entry, WorkerContext


class WorkerBench:
    """A worker with its files, its listener and the supervisor's end of its channel.

    Args:
        stack: Undoes everything at its end.
        path: The path that the worker watches. The active segment of the log is this file.
        header_timeout: The setting of that name, in seconds.
        grace: The setting of that name, in seconds.
        ends: The shared ends of the log, None for a worker without --follow-name.
        sealed: The segments before the active one. The worker closes their descriptors.
        clients: The clients that the worker adopts.
        agreed: The end of the log if the worker starts frozen.

    """

    def __init__(
        self,
        stack: ExitStack,
        path: Path,
        header_timeout: float,
        grace: float,
        ends: SharedCounts | None,
        sealed: Sequence[Segment],
        clients: Mapping[int, Entry],
        agreed: int | None,
    ) -> None:
        self.stack = stack
        self.path = path
        self.ends = ends
        # Seconds by which the worker's clock is ahead.
        self.skew = 0.0
        self.listeners = open_listeners(["127.0.0.1"], 0, 1)
        stack.enter_context(closing_all(self.listeners[0]))
        self.address = self.listeners[0][0].getsockname()
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(self.channel)
        stack.enter_context(theirs)
        theirs.setblocking(False)
        self.channel.settimeout(DEADLINE)
        before = signal.getsignal(signal.SIGTERM)
        stack.callback(signal.signal, signal.SIGTERM, before)
        stack.callback(setproctitle, getproctitle())
        wakeup = Wakeup([signal.SIGTERM])
        stack.callback(wakeup.close)
        self.config = config = Config(
            str(path), self.address[1], grace=grace, header_timeout=header_timeout
        )
        base = sealed[-1].end if sealed else 0
        self.log = Log([*sealed, Segment(base, os.open(path, os.O_RDONLY))])
        context = WorkerContext(
            slot=0,
            log=self.log,
            ends=ends,
            opened_at=None,
            frozen_end=agreed,
            truncated=False,
            listeners=self.listeners[0],
            shared=False,
            channel=theirs,
            endpoints=["127.0.0.1:0"],
            client_limit=None,
            clients=clients,
            sockets=bind_for_worker(["127.0.0.1:0"], count()),
            predecessors=(),
        )
        self.worker = Worker(context, config, wakeup, lambda: time.monotonic() + self.skew)
        stack.callback(self.close)

    @property
    def watch(self) -> Watch:
        """The worker's watch on the active segment."""
        return self.worker.file_monitor._watch

    def close(self) -> None:
        """Close what a worker leaves open until its process ends."""
        worker = self.worker
        worker.orphan.close()
        worker.loop.epoll.close()
        self.watch.close()
        for client in worker.clients.values():
            client.sock.close()
        for segment in self.log:
            if segment.file != NO_FILE:
                os.close(segment.file)

    def order(self, order: Order) -> None:
        """Send `order` to the worker, and let the worker act on it."""
        self.channel.sendall(encode(order))
        self.worker.handle_channel()

    def roll(self, path: Path, size: int, lost: bool = False) -> None:
        """Order the worker to seal the active segment at `size`, and to continue with `path`."""
        self.order_with_file(Roll(self.worker.streams.log.active.base, size, lost), path)

    def order_with_file(self, order: Order, path: Path) -> None:
        """Send `order` with the open file `path` to the worker, and let the worker act on it."""
        file = os.open(path, os.O_RDONLY)
        socket.send_fds(self.channel, [encode(order)], [file])
        os.close(file)
        self.worker.handle_channel()

    def until(self, check: Callable[[], object]) -> None:
        """Run turns until `check` is true."""
        deadline = time.monotonic() + DEADLINE
        while not check():
            assert time.monotonic() < deadline, "the condition was not met in time"
            self.worker.step(0 if self.worker.streams.behind else 0.01)

    def settle(self) -> None:
        """Run turns until nothing is left to do, and all input has been processed."""
        self.until(
            lambda: (
                not (
                    readable(self.worker.loop.epoll.fileno())
                    or self.worker.streams.behind
                    or self.worker.departures
                )
            )
        )

    def connect(
        self, data: bytes = b"", receive: int | None = None
    ) -> tuple[socket.socket, Client]:
        """Connect, and run turns until the worker has read `data`; return both ends."""
        far = self.stack.enter_context(socket.socket())
        far.settimeout(DEADLINE)
        if receive:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        far.connect(self.address)
        name = far.getsockname()
        self.until(
            lambda: any(client.peer == endpoint(*name) for client in self.worker.clients.values())
        )
        [client] = [
            client for client in self.worker.clients.values() if client.peer == endpoint(*name)
        ]
        if data:
            far.sendall(data)
            self.until(lambda: client.state is not ClientState.AWAITING_HEADER)
        return far, client

    def receive(self, far: socket.socket, count: int) -> bytes:
        """Run turns until `far` has received `count` bytes."""
        parts = list[bytes]()

        def all_there() -> bool:
            while readable(far) and sum(map(len, parts)) < count:
                part = far.recv(count - sum(map(len, parts)))
                assert part, "the stream ended"
                parts.append(part)
            return sum(map(len, parts)) == count

        self.until(all_there)
        return b"".join(parts)

    def receive_to_the_end(self, *fars: socket.socket) -> list[bytes]:
        """Run turns until the worker has ended; return what each client has received."""
        got = dict.fromkeys(fars, b"")

        def ended() -> bool:
            for far in select.select(fars, [], [], 0)[0]:
                got[far] += far.recv(1 << 20)
            return self.worker.ended

        self.until(ended)
        return [got[far] + recv_all(far) for far in fars]

    def reports(self) -> list[WorkerReport]:
        """Return the reports that the worker has sent since the last call."""
        reports = []
        while readable(self.channel):
            report = decode(self.channel.recv(MAX_PACKET))
            assert isinstance(report, WorkerReport)
            reports.append(report)
        return reports


@contextmanager
def working(
    path: Path,
    header_timeout: float = 0.0,
    grace: float = 5.0,
    ends: SharedCounts | None = None,
    sealed: Sequence[Segment] = (),
    clients: Mapping[int, Entry] | None = None,
    agreed: int | None = None,
) -> Iterator[WorkerBench]:
    """Yield a bench with a worker."""
    with ExitStack() as stack:
        yield WorkerBench(stack, path, header_timeout, grace, ends, sealed, clients or {}, agreed)
