"""Brings every stream to what is in the file, and sees its client off."""

from collections.abc import Callable

from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.sockets import discard, shut_down_writing, unsent
from tailsrv.worker.client import Client, ClientState
from tailsrv.worker.file_monitor import FileMonitor
from tailsrv.worker.streams import Streams

# seconds between looks whether a finished client has acknowledged everything
LINGER_CHECK = 0.01
# seconds more for each: a look costs some microseconds, which the others' bytes need
LINGER_SHARE = 20e-6


class Drainer:
    """A drain: what is in the file when it begins is where the streams end.

    Unless it has to settle before: one that was moved away may still grow, for its writer needs a moment to go over to the
    next file. `drop(client)` is called for each client that has everything.
    """

    def __init__(
        self,
        loop: EventLoop,
        streams: Streams,
        file_monitor: FileMonitor,
        drop: Callable[[Client], None],
    ) -> None:
        self._loop, self._streams, self._file_monitor, self._drop = (
            loop,
            streams,
            file_monitor,
            drop,
        )
        self._settling = False
        # waiting for the peer to acknowledge
        self._finished: dict[int, Client] = {}

    def begin(self, settle: bool) -> None:
        """Have the streams end at what is in the file now, or when it has settled."""
        self._settling = settle
        self._file_monitor.deliver_appends()
        if settle:
            self._loop.timers.set(
                self._end_settling, self._loop.now + self._file_monitor.settling_pause()
            )
        else:
            self._file_monitor.stop()

    def _end_settling(self) -> None:
        """Take the file to be complete, unless it has changed since."""
        # an append that nobody has told of yet
        self._file_monitor.deliver_appends()
        if (
            due := self._file_monitor.size_changed_at + self._file_monitor.settling_pause()
        ) > self._loop.now:
            self._loop.timers.set(self._end_settling, due)
        else:
            self._settling = False
            self._file_monitor.stop()

    def finish_caught_up(self) -> None:
        """Send a FIN to those who have been sent all there is."""
        for client in self._streams.without_work() if not self._settling else ():
            client.state = ClientState.FINISHED
            self._streams.remove(client)
            discard(client.sock)
            shut_down_writing(client.sock)
            self._finished[client.fd] = client
        if self._finished and self._check_finished not in self._loop.timers:
            self._check_finished()

    def _check_finished(self) -> None:
        """Close the connections whose peers have acknowledged everything."""
        for client in list(self._finished.values()):
            discard(client.sock)
            if unsent(client.sock) == 0:
                self._drop(client)
        if self._finished:
            self._loop.timers.set(
                self._check_finished,
                self._loop.now + LINGER_CHECK + len(self._finished) * LINGER_SHARE,
            )

    def forget(self, client: Client) -> None:
        """Note that `client` is gone."""
        self._finished.pop(client.fd, None)
