"""Reports a worker's new, started and departed clients, and its notices, to the supervisor."""

import select
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tailsrv.linux.event_loop import EventLoop
from tailsrv.worker.client import Client, ClientState
from tailsrv.worker_channel import (
    MAX_REPORTED_CLIENTS,
    MAX_REPORTED_SOCKETS,
    NO_NOTICES,
    WorkerReport,
    encode,
)

# Seconds that the report of a departed client may be delayed, to be sent together with others.
DEPARTURE_DELAY = 0.05
# Seconds between attempts to send a report while the channel is full, because the supervisor is
# busy, or while the kernel is short of memory.
REPORT_RETRY = 0.005
# Seconds to wait for room in the channel before the worker exits.
LAST_REPORT_TIMEOUT = 0.5


class Reporter:
    """Collects what is to be reported to the supervisor, and sends it.

    A stream starts only after the report of its start has been sent.

    Args:
        channel: The worker's end of the channel.
        loop: The worker's event loop.
        start: `start(client, offset, end)` is called when the start of a stream has been reported.
        lose_supervisor: Called if the supervisor has exited. Its last orders can still be read.

    """

    def __init__(
        self,
        channel: socket.socket,
        loop: EventLoop,
        start: Callable[[Client, int, int | None], None],
        lose_supervisor: Callable[[], None],
    ) -> None:
        # Clients that have connected.
        self.joined: list[Client] = []
        # Clients whose stream is to start, each with the offset to start from, and with the second
        # number of its `?` line, None if it did not ask for one.
        self.starting: list[tuple[Client, int, int | None]] = []
        # The numbers of clients that have left.
        self.left: list[int] = []
        self.notices = NO_NOTICES
        self._channel, self._loop = channel, loop
        self._start, self._lose_supervisor = start, lose_supervisor
        # Whether there is no supervisor any more.
        self._orphaned = False

    def stop_sending(self) -> None:
        """Send nothing from now on, because the supervisor has exited."""
        self._orphaned = True
        self.send_and_start()

    def add_notice(self, **changes: Any) -> None:
        """Set fields of the next report's notices, given by their names."""
        self.notices = replace(self.notices, **changes)

    def add_departure(self, client: Client) -> None:
        """Report that `client` has left, unless its arrival has not been reported yet."""
        if client in self.joined:
            self.joined.remove(client)
        else:
            self.left.append(client.number)

    def send_if_due(self) -> None:
        """Report notices now, and departed clients within DEPARTURE_DELAY."""
        if self.notices is not NO_NOTICES:
            self.send_and_start()
        elif self.left and self.send_and_start not in self._loop.timers:
            self._loop.timers.set(self.send_and_start, self._loop.now + DEPARTURE_DELAY)

    def send_and_start(self) -> None:
        """Report everything now, in one packet if it fits, then start the reported streams.

        This order lets another worker continue each stream if this worker dies. Before the report,
        the header is still in the client's socket; after it, the supervisor knows the offset that
        the stream started from.
        """
        self._loop.timers.cancel(self.send_and_start)
        while self.left or self.joined or self.starting or self.notices is not NO_NOTICES:
            joined, left = self.joined[:MAX_REPORTED_SOCKETS], self.left[:MAX_REPORTED_CLIENTS]
            starting = (
                self.starting[:MAX_REPORTED_CLIENTS] if len(joined) == len(self.joined) else []
            )
            report = WorkerReport(
                joined=[client.number for client in joined],
                started=[
                    (client.number, offset, end)
                    for client, offset, end in starting
                    if client.state is not ClientState.CLOSED
                ],
                left=left,
                notices=self.notices,
            )
            try:
                self._send(report, [client.fd for client in joined])
            except (BrokenPipeError, ConnectionResetError):
                # This starts the streams.
                self._lose_supervisor()
                return
            except OSError:
                # The channel is full, or the kernel is short of memory.
                self._loop.timers.set(self.send_and_start, self._loop.now + REPORT_RETRY)
                return
            del self.joined[: len(joined)], self.starting[: len(starting)], self.left[: len(left)]
            self.notices = NO_NOTICES
            for client, offset, end in starting:
                if client.state is ClientState.AWAITING_HEADER:
                    self._start(client, offset, end)

    def _send(self, report: WorkerReport, sockets: list[int]) -> None:
        if not self._orphaned:
            socket.send_fds(self._channel, [encode(report)], sockets, socket.MSG_DONTWAIT)

    def send_remaining(self) -> None:
        """Report the rest before the worker exits.

        Clients whose sockets have not been passed to the supervisor are lost with the worker.
        """
        self.send_and_start()
        # If this could not be sent, wait until the channel has room.
        if self.joined or self.notices.emptied:
            poll = select.poll()
            poll.register(self._channel, select.POLLOUT)
            poll.poll(LAST_REPORT_TIMEOUT * 1000)
            self.send_and_start()
