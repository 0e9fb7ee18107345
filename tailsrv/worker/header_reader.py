"""Reads the clients' headers, and disconnects clients that send a bad one or none in time."""

import logging
from collections.abc import Iterator

from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.sockets import Outcome, peek
from tailsrv.log import RateLimited
from tailsrv.protocol import PEEK, HeaderError, Start, parse_header
from tailsrv.worker.client import Client, ClientState, Departures
from tailsrv.worker.file_monitor import FileMonitor
from tailsrv.worker.reporter import Reporter
from tailsrv.worker.streams import Streams


class HeaderReader:
    """The clients whose header the worker waits for.

    When a header is complete, the client and the offset to start from go to the reporter. The
    stream starts after they have been reported.

    Args:
        slot: The worker's slot, for the log.
        timeout: Seconds to wait for a header. 0 means to wait forever.
        loop: The worker's event loop.
        file_monitor: The worker's file monitor.
        streams: The worker's streams.
        reporter: The worker's reporter.
        departures: Gets each client that has hung up, or whose header is invalid or late.

    """

    def __init__(
        self,
        slot: int,
        timeout: float,
        loop: EventLoop,
        file_monitor: FileMonitor,
        streams: Streams,
        reporter: Reporter,
        departures: Departures,
    ) -> None:
        self._slot, self._timeout = slot, timeout
        self._loop, self._file_monitor, self._streams = loop, file_monitor, streams
        self._reporter, self._departures = reporter, departures
        # Each client with the time at which the worker began to wait, the oldest first.
        self._awaited: dict[Client, float] = {}
        self._refused = RateLimited(logging.WARNING)

    def __contains__(self, client: Client) -> bool:
        return client in self._awaited

    def __iter__(self) -> Iterator[Client]:
        """Iterate over a copy of the clients, the oldest first."""
        return iter(list(self._awaited))

    def oldest(self) -> Client | None:
        """Return the client that has waited longest, None if there is none.

        Call this only while no client is leaving.
        """
        return next(iter(self._awaited), None)

    def add(self, client: Client) -> None:
        """Wait for the header of `client`."""
        self._awaited[client] = self._loop.now
        if self._timeout and self._expire not in self._loop.timers:
            self._loop.timers.set(self._expire, self._loop.now + self._timeout)

    def forget(self, client: Client) -> None:
        """Stop waiting for the header of `client`."""
        self._awaited.pop(client, None)

    def read_or_refuse(self, client: Client, ended: bool) -> Start | None:
        """Return the start that `client` asks for, or None if its header is not complete.

        The header stays in the socket, so that another worker can read it if this one dies. A
        client that has hung up or has sent an invalid header is dropped. `ended` says that the
        client will send nothing more.
        """
        received = peek(client.sock, PEEK)
        if received is Outcome.HUNG_UP:
            self._departures.add(client)
            return None
        try:
            return parse_header(b"" if isinstance(received, Outcome) else received, ended)
        except HeaderError as error:
            self._refuse(client, str(error))
            return None

    def schedule_start(self, client: Client, start: Start) -> None:
        """Have the reporter start the stream of `client` at `start`.

        A client that asks for bytes that have been deleted is dropped.
        """
        if start.from_end or start.with_offsets:
            # The end is where the log ends now, so it must be up to date.
            self._file_monitor.deliver_appends()
        self.forget(client)
        log, end = self._streams.log, self._streams.end
        offset = start.offset(log.start, end)
        if offset < log.start:
            self._refuse(client, f"offset {offset} no longer exists, the log begins at {log.start}")
            return
        self._reporter.starting.append((client, offset, end if start.with_offsets else None))

    def _expire(self) -> None:
        """Drop the clients whose header has not arrived in time."""
        for client, since in list(self._awaited.items()):
            if client.state is ClientState.CLOSED:
                continue
            if (due := since + self._timeout) > self._loop.now:
                self._loop.timers.set(self._expire, due)
                return
            self._refuse(client, f"no header in {self._timeout:g} s")

    def _refuse(self, client: Client, reason: str) -> None:
        self._refused("client refused", slot=self._slot, peer=client, reason=reason)
        self._departures.add(client)
