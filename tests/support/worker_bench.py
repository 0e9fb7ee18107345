"""A worker in this process: its file, its listener, and the supervisor's end of its channel."""

import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from setproctitle import getproctitle, setproctitle

from support.files import opened
from support.sockets import closing_all, readable, recv_all
from support.waiting import DEADLINE
from tailsrv.addresses import endpoint
from tailsrv.config import Config
from tailsrv.linux.signals import Wakeup
from tailsrv.listeners import open_listeners
from tailsrv.worker.client import Client, ClientState
from tailsrv.worker.worker import Worker
from tailsrv.worker_channel import MAX_PACKET, WorkerReport, decode
from tailsrv.worker_context import WorkerContext


class WorkerBench:
    """A worker with its file, its listener and the supervisor's end of its channel."""

    def __init__(self, stack: ExitStack, path: Path, header_timeout: float, grace: float) -> None:
        self.stack = stack
        self.path = path
        # Seconds by which the worker's clock is ahead.
        self.skew = 0.0
        file = stack.enter_context(opened(path))
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
        context = WorkerContext(
            0, file, self.listeners[0], False, theirs, ["127.0.0.1:0"], None, {}
        )
        self.worker = Worker(context, config, wakeup, lambda: time.monotonic() + self.skew)
        stack.callback(self.close)

    def close(self) -> None:
        """Close what a worker leaves open until its process ends."""
        worker = self.worker
        worker.loop.epoll.close()
        worker.watch.close()
        for client in [*worker.clients.values(), *worker.dropped]:
            client.sock.close()

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
                    or self.worker.dropped
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
def working(path: Path, header_timeout: float = 0.0, grace: float = 5.0) -> Iterator[WorkerBench]:
    """Yield a bench with a worker."""
    with ExitStack() as stack:
        yield WorkerBench(stack, path, header_timeout, grace)
