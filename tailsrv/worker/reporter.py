"""What a worker has yet to tell the supervisor."""

import select
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tailsrv.channel import (
    MAX_REPORTED_CLIENTS,
    MAX_REPORTED_SOCKETS,
    NO_NOTICES,
    WorkerReport,
    encode,
)
from tailsrv.linux.event_loop import EventLoop
from tailsrv.worker.client import Client, ClientState

# seconds; who left is reported with other news, or after this
DEPARTURE_DELAY = 0.05
# seconds; the supervisor was too busy to take a report
REPORT_RETRY = 0.005
# seconds that the last report may wait for a supervisor that is too busy to take it
LAST_REPORT_TIMEOUT = 0.5


class Reporter:
    """Clients that have joined, are to start or have left, and notices: each until the supervisor has been told.

    `start(client, offset)` is called for a stream once it has been, `end()` if there is no supervisor any more.
    """

    def __init__(
        self,
        channel: socket.socket,
        loop: EventLoop,
        start: Callable[[Client, int], None],
        end: Callable[[], None],
    ) -> None:
        self.joined: list[Client] = []
        # with the offset to start from
        self.starting: list[tuple[Client, int]] = []
        self.left: list[int] = []
        self.notices = NO_NOTICES
        self._channel, self._loop = channel, loop
        self._start, self._end = start, end

    def add_notice(self, **changes: Any) -> None:
        """Add to the notices, by the names of their fields."""
        self.notices = replace(self.notices, **changes)

    def add_departure(self, client: Client) -> None:
        """Note that `client` is not served any more; of one that the supervisor has not been told of, it need not be."""
        if client in self.joined:
            self.joined.remove(client)
        else:
            self.left.append(client.number)

    def send_if_due(self) -> None:
        """Tell what there is to tell, now or soon."""
        if self.notices is not NO_NOTICES:
            self.send_and_start()
        elif self.left and self.send_and_start not in self._loop.timers:
            # nothing is urgent about those who left
            self._loop.timers.set(self.send_and_start, self._loop.now + DEPARTURE_DELAY)

    def send_and_start(self) -> None:
        """Tell all of it now, in one message if it fits.

        Only then do the new streams start: should we die before, their headers are still in their sockets, and
        should we die after, the supervisor knows where they started.
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
                    (client.number, offset)
                    for client, offset in starting
                    if client.state is not ClientState.CLOSED
                ],
                left=left,
                notices=self.notices,
            )
            try:
                socket.send_fds(
                    self._channel,
                    [encode(report)],
                    [client.fd for client in joined],
                    socket.MSG_DONTWAIT,
                )
            except (BrokenPipeError, ConnectionResetError):
                self._end()
                return
            except OSError:
                # it is too busy, or the kernel short of memory
                self._loop.timers.set(self.send_and_start, self._loop.now + REPORT_RETRY)
                return
            del self.joined[: len(joined)], self.starting[: len(starting)], self.left[: len(left)]
            self.notices = NO_NOTICES
            for client, offset in starting:
                if client.state is ClientState.AWAITING_HEADER:
                    self._start(client, offset)

    def send_remaining(self) -> None:
        """Tell the rest before the worker ends: clients that were not passed up would be lost with it."""
        self.send_and_start()
        # the supervisor is busy: wait for it
        if self.joined or self.notices.emptied:
            poll = select.poll()
            poll.register(self._channel, select.POLLOUT)
            poll.poll(LAST_REPORT_TIMEOUT * 1000)
            self.send_and_start()
