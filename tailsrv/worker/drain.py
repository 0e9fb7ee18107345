"""Ends the streams in a drain: each client gets the rest of the log, and then a FIN."""

from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.sockets import discard, shut_down_writing, unsent
from tailsrv.worker.client import Client, ClientState, Departures
from tailsrv.worker.file_monitor import FileMonitor
from tailsrv.worker.streams import Streams

# Seconds between two checks whether the finished clients have acknowledged everything.
ACK_CHECK_INTERVAL = 0.01
# Seconds added to that for each finished client. Checking one takes some microseconds, during which
# the other clients are not sent any bytes.
ACK_CHECK_SHARE = 20e-6


class Drainer:
    """Ends every stream at the end that the log has when the drain begins.

    Args:
        loop: The worker's event loop.
        streams: The worker's streams.
        file_monitor: The worker's file monitor.
        departures: Gets each client that has acknowledged everything.

    """

    def __init__(
        self,
        loop: EventLoop,
        streams: Streams,
        file_monitor: FileMonitor,
        departures: Departures,
    ) -> None:
        self._loop, self._streams, self._file_monitor = loop, streams, file_monitor
        self._departures = departures
        # Clients that have been sent everything and a FIN, but have not acknowledged all of it.
        self._finished: dict[int, Client] = {}

    def begin(self) -> None:
        """End the streams at the log's current end."""
        self._file_monitor.stop()

    def finish_caught_up(self) -> None:
        """Send a FIN to the clients that nothing is left to send to."""
        for client in self._streams.without_work():
            client.state = ClientState.FINISHED
            self._streams.remove(client)
            discard(client.sock)
            shut_down_writing(client.sock)
            self._finished[client.fd] = client
        if self._finished and self._check_finished not in self._loop.timers:
            self._check_finished()

    def _check_finished(self) -> None:
        """Drop the clients that have acknowledged everything."""
        for client in list(self._finished.values()):
            discard(client.sock)
            if unsent(client.sock) == 0:
                self._departures.add(client)
        if self._finished:
            self._loop.timers.set(
                self._check_finished,
                self._loop.now + ACK_CHECK_INTERVAL + len(self._finished) * ACK_CHECK_SHARE,
            )

    def forget(self, client: Client) -> None:
        """Stop waiting for `client`, which has left."""
        self._finished.pop(client.fd, None)
