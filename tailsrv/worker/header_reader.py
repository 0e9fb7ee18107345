"""The clients that have not said yet where to start: reads their headers, and ends those that take too long."""

import logging
from collections.abc import Callable, Iterator

from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.sockets import Outcome, peek
from tailsrv.log import RateLimited
from tailsrv.protocol import PEEK, HeaderError, Start, parse_header
from tailsrv.worker.client import Client
from tailsrv.worker.file_monitor import FileMonitor
from tailsrv.worker.reporter import Reporter
from tailsrv.worker.streams import Streams


class HeaderReader:
    """Those whose header is awaited, for `timeout` seconds or, if that is 0, for ever.

    One that is answered goes to the news of those that are to start; `drop(client)` is called for one whose header
    never will be whole.
    """

    def __init__(
        self,
        slot: int,
        timeout: float,
        loop: EventLoop,
        file_monitor: FileMonitor,
        streams: Streams,
        reporter: Reporter,
        drop: Callable[[Client], None],
    ) -> None:
        self._slot, self._timeout = slot, timeout
        self._loop, self._file_monitor, self._streams, self._reporter, self._drop = (
            loop,
            file_monitor,
            streams,
            reporter,
            drop,
        )
        # and since when; the oldest first
        self._awaited: dict[Client, float] = {}
        self._refused = RateLimited(logging.WARNING)

    def __contains__(self, client: Client) -> bool:
        return client in self._awaited

    def __iter__(self) -> Iterator[Client]:
        """Return all of them as they are now, the oldest first."""
        return iter(list(self._awaited))

    def oldest(self) -> Client | None:
        """Return who has been waited for longest, None if nobody is."""
        return next(iter(self._awaited), None)

    def add(self, client: Client) -> None:
        """Wait for the header of `client`."""
        self._awaited[client] = self._loop.now
        if self._timeout and len(self._awaited) == 1:
            self._loop.timers.set(self._expire, self._loop.now + self._timeout)

    def forget(self, client: Client) -> None:
        """Wait for the header of `client` no more."""
        self._awaited.pop(client, None)

    def read_or_refuse(self, client: Client, ended: bool) -> Start | None:
        """Return where `client` wants to start if its header is whole, and leave it in the socket; `ended` says that it sends no more."""
        received = peek(client.sock, PEEK)
        if received is Outcome.HUNG_UP:
            self._drop(client)
            return None
        try:
            return parse_header(b"" if isinstance(received, Outcome) else received, ended)
        except HeaderError as error:
            self._refuse(client, str(error))
            return None

    def schedule_start(self, client: Client, start: Start) -> None:
        """Have `client` start there."""
        if start.from_end:
            # the end is where it is now
            self._file_monitor.deliver_appends()
        self.forget(client)
        self._reporter.starting.append((client, start.offset(self._streams.size)))

    def _expire(self) -> None:
        """End the connections whose header has not come in time."""
        for client, since in list(self._awaited.items()):
            if (due := since + self._timeout) > self._loop.now:
                self._loop.timers.set(self._expire, due)
                return
            self._refuse(client, f"no header in {self._timeout:g} s")

    def _refuse(self, client: Client, reason: str) -> None:
        self._refused("client refused", slot=self._slot, peer=client, reason=reason)
        self._drop(client)
