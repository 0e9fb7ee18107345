"""Reports a worker's new, started and departed clients, and its notices, to the supervisor."""

import select
import socket
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

    Attributes:
        supervisor_gone: Whether the supervisor has exited, so that nothing is sent any more.
        broken: Whether the last report could not be sent because the supervisor has exited. Its
            last orders can still be read.

    """

    def __init__(self, channel: socket.socket, loop: EventLoop) -> None:
        # Clients that have connected.
        self.joined: list[Client] = []
        # Clients whose stream is to start, each with the offset to start from, and with the second
        # number of its `?` line, None if it did not ask for one.
        self.starting: list[tuple[Client, int, int | None]] = []
        # The numbers of clients that have left.
        self.left: list[int] = []
        self.notices = NO_NOTICES
        self._channel, self._loop = channel, loop
        self.supervisor_gone = self.broken = False
        # Whether a report is due because its time has come.
        self._due = False

    def add_notice(self, **changes: Any) -> None:
        """Set fields of the next report's notices, given by their names."""
        self.notices = replace(self.notices, **changes)

    def add_departure(self, client: Client) -> None:
        """Report that `client` has left, unless its arrival has not been reported yet."""
        if client in self.joined:
            self.joined.remove(client)
        else:
            self.left.append(client.number)

    def is_due(self) -> bool:
        """Return whether to report now: notices at once, departed clients within DEPARTURE_DELAY.

        Call this in every turn.
        """
        if self.left and self._set_due not in self._loop.timers and not self._due:
            self._loop.timers.set(self._set_due, self._loop.now + DEPARTURE_DELAY)
        return self._due or self.notices is not NO_NOTICES

    def _set_due(self) -> None:
        self._due = True

    def flush(self) -> list[tuple[Client, int, int | None]]:
        """Report everything now, in one packet if it fits, and return the streams to start.

        This order lets another worker continue each stream if this worker dies. Before the report,
        the header is still in the client's socket; after it, the supervisor knows the offset that
        the stream started from.

        If the supervisor is gone, nothing is sent.

        Returns:
            Each client whose stream is to start now, the offset to start from, and the second
            number of its `?` line, None if it did not ask for one.

        """
        self._loop.timers.cancel(self._set_due)
        self._due = self.broken = False
        started: list[tuple[Client, int, int | None]] = []
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
            except OSError as error:
                # The supervisor has exited, or the channel is full, or the kernel is short of
                # memory.
                self.broken = isinstance(error, ConnectionError)
                self._loop.timers.set(self._set_due, self._loop.now + REPORT_RETRY)
                break
            del self.joined[: len(joined)], self.starting[: len(starting)], self.left[: len(left)]
            self.notices = NO_NOTICES
            started += [each for each in starting if each[0].state is ClientState.AWAITING_HEADER]
        return started

    def _send(self, report: WorkerReport, sockets: list[int]) -> None:
        if not self.supervisor_gone:
            socket.send_fds(self._channel, [encode(report)], sockets, socket.MSG_DONTWAIT)

    def send_remaining(self) -> None:
        """Report the rest before the worker exits.

        Clients whose sockets have not been passed to the supervisor are lost with the worker.
        """
        self.flush()
        # If this could not be sent, wait until the channel has room.
        if self.joined or self.notices.emptied:
            poll = select.poll()
            poll.register(self._channel, select.POLLOUT)
            poll.poll(LAST_REPORT_TIMEOUT * 1000)
            self.flush()
