"""Sends the log's bytes to the clients, in queues by what each client waits for."""

import heapq
import itertools
import select
from collections import deque
from collections.abc import Iterable
from itertools import count as counter

from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.files import (
    Sent,
    close_file,
    is_cached,
    read_ahead,
    send_bytes,
    send_chunk,
    send_to_all,
)
from tailsrv.linux.sockets import Outcome, unsent
from tailsrv.segments import NO_FILE, Log, Segment
from tailsrv.worker.client import CLIENT_EVENTS, Client, ClientState, Departures
from tailsrv.worker.readahead import READ_AHEAD, ReadAhead

# The largest number of bytes that one sendfile(2) sends. Larger chunks need fewer system calls, but
# a client that reads a large file from the start then delays the others for longer: at 1 MiB, for a
# fraction of a millisecond.
SEND_CHUNK = 1 << 20

# About how many bytes are sent in one turn to clients that are behind. After that, the loop checks
# for new events.
TURN_BUDGET = 1 << 20

# Bytes of TURN_BUDGET that are charged for a send that transfers nothing, because it takes about as
# long as sending this many bytes. Clients that ask for data and disconnect cause such sends.
EMPTY_SEND_COST = 128 << 10


class BytesGoneError(Exception):
    """The next bytes of a client no longer exist: their file was deleted or truncated."""


class Streams:
    """Sends the log's bytes to its clients. Each client is in one of six queues.

    - `caught_up`: has been sent everything; its offset is `end`, stored once for all of them.
    - `behind`: can be sent more; these clients are served in turn.
    - `blocked`: is behind, but its socket is full; waits for `writable`.
    - `read_ahead`: is behind, but its next bytes are on the disk; waits for `retry_disk`.
    - `awaiting_memory`: is behind, but the kernel had no memory for the send; waits for
      `retry_memory`.
    - `_ahead`: asked for an offset beyond the end of the log; waits until the log has grown.

    Args:
        log: The segments of the log.
        end: The end of the log, as an offset in bytes.
        loop: The worker's event loop. When it reports that the socket of a client has room again,
            `writable` must be called.
        departures: Gets the clients that have hung up, or that cannot be served.

    """

    def __init__(self, log: Log, end: int, loop: EventLoop, departures: Departures) -> None:
        self.log = log
        # The end of the log that FileMonitor.deliver_appends() has found last.
        self.end = end
        self.caught_up: dict[int, Client] = {}
        self.behind: deque[Client] = deque()
        self.blocked: dict[int, Client] = {}
        self.read_ahead = ReadAhead(is_cached, read_ahead)
        # Clients that have left stay in this list until the next retry.
        self.awaiting_memory: list[Client] = []
        # A heap, ordered by offset. Clients that have left stay in it until the log reaches their
        # offset or until the next sweep, see _await_growth().
        self._ahead: list[tuple[int, int, Client]] = []
        self._sweep_at = 64
        self._tie_breaker = counter()
        self._loop, self._departures = loop, departures
        # Whether sendfile(2) found the active segment shorter than `end` says. Its size must then
        # be read again.
        self.shrunk = False
        # Whether the active segment is known to be truncated. Its file may have new bytes at old
        # positions, so nothing is read from it before the next roll.
        self.truncated = False

    def add(self, client: Client, offset: int) -> None:
        """Start streaming to `client` from `offset`."""
        client.state = ClientState.STREAMING
        client.offset = offset
        self._enqueue(client)

    def remove(self, client: Client) -> None:
        """Stop streaming to `client`, whose state must no longer be STREAMING.

        The queues that are not searched here skip such clients later.
        """
        if self.caught_up.pop(client.fd, None):
            client.offset = self.end
        self.blocked.pop(client.fd, None)
        self.read_ahead.forget(client)

    def without_work(self) -> list[Client]:
        """Return the clients that there is nothing to send to."""
        waiting = [client for _, _, client in self._ahead if client.state is ClientState.STREAMING]
        caught_up = self.caught_up.values()
        return [client for client in caught_up if client.state is ClientState.STREAMING] + waiting

    def offset_of(self, client: Client) -> int:
        """Return the offset of the next byte to send to `client`."""
        return self.end if client.fd in self.caught_up else client.offset

    def writable(self, client: Client) -> None:
        """Queue `client` for sending again if it was blocked: its socket has room."""
        if self.blocked.pop(client.fd, None):
            self.behind.append(client)

    def retry_disk(self) -> None:
        """Queue the clients that waited for the disk for another attempt."""
        self.behind.extend(self.read_ahead.take_due())

    def retry_memory(self) -> None:
        """Queue the clients that waited for kernel memory for another attempt."""
        self.behind.extend(self.awaiting_memory)
        self.awaiting_memory.clear()

    def set_end(self, end: int) -> None:
        """Store the log's new end, and send new bytes to the caught-up clients at once."""
        start, self.end = self.end, end
        readable = self.log.active.file != NO_FILE and not self.truncated
        if start < end <= start + SEND_CHUNK and readable:
            self._fan_out(start, end - start)
        elif start != end:
            # The log has grown by more than one chunk, or the file was truncated: queue each client
            # instead.
            clients, self.caught_up = self.caught_up, {}
            for client in clients.values():
                client.offset = start
                self._enqueue(client)
        while self._ahead and self._ahead[0][0] < end:
            client = heapq.heappop(self._ahead)[2]
            if client.state is ClientState.STREAMING:
                self.behind.append(client)

    def roll(self, size: int, lost: bool, file: int) -> None:
        """Seal the active segment at `size` bytes, and continue the log with `file`.

        With `lost`, the bytes of the sealed segment no longer exist. Clients that have been sent
        all of them continue with `file`, the others are dropped.
        """
        replaced = self.log.active.file
        end = self.log.seal(size, lost).end
        # The caught-up clients get what they lack of the sealed segment.
        self.set_end(end)
        self.log.append(Segment(end, file))
        self.truncated = False
        if lost or size == 0:
            close_file(replaced)

    def close_unneeded(self, clients: Iterable[Client], starts: Iterable[int] = ()) -> None:
        """Close the segments before the log's start that none of `clients` reads.

        `starts` are the offsets of streams that are about to begin. They were decided before the
        log's start changed, and have perhaps been reported.
        """
        offsets = (
            self.offset_of(client) for client in clients if client.state is ClientState.STREAMING
        )
        needed = min(itertools.chain(offsets, starts), default=self.log.start)
        for segment in self.log.drop_before(needed):
            if segment.file != NO_FILE:
                close_file(segment.file)

    def _fan_out(self, start: int, count: int) -> None:
        """Send the same bytes of the active segment to every caught-up client."""
        active = self.log.active
        short = send_to_all(self.caught_up, active.file, start - active.base, count)
        for fd, sent in short.items():
            client = self.caught_up.pop(fd)
            client.offset = start
            try:
                self._apply_send(client, sent)
            except Exception as error:
                self._departures.add(client, error)

    def pump(self, budget: int = TURN_BUDGET) -> None:
        """Send one chunk to each client that is behind, until about `budget` bytes were sent."""
        for _ in range(len(self.behind)):
            if budget <= 0 or self.shrunk:
                return
            client = self.behind.popleft()
            if client.state is not ClientState.STREAMING:
                continue
            try:
                budget -= self._send(client)
            except Exception as error:
                # An error with one client must not keep the other clients from their bytes.
                budget -= EMPTY_SEND_COST
                self._departures.add(client, error)

    def _send(self, client: Client) -> int:
        """Send one chunk to `client`, and return the bytes to charge to the turn's budget."""
        if client.line and not self._send_line(client):
            return EMPTY_SEND_COST
        segment = self.log.find(client.offset)
        wanted = next_chunk(client.offset, self.end if segment.size is None else segment.end)
        # A client that wants nothing of a truncated segment continues after it.
        if segment.file == NO_FILE or (self.truncated and not segment.sealed and wanted):
            raise BytesGoneError
        # The file was truncated after the client was queued: the client no longer waits for the
        # disk, but for the file to grow.
        if not wanted:
            self.read_ahead.forget(client)
            self._enqueue(client)
            return 0
        position = client.offset - segment.base
        if (count := self.read_ahead.admit(client, segment.file, position, wanted)) == 0:
            # Charge the turn for the time that the request to read these bytes has taken.
            return READ_AHEAD
        sent = send_chunk(client.fd, segment.file, position, count)
        if sent == 0 and segment.size is not None:
            raise BytesGoneError
        # The bytes do not exist, although `end` includes them: do not retry before the size has
        # been read again.
        if sent == 0:
            self.shrunk = True
            self._await_growth(client)
            return 0
        self._apply_send(client, sent)
        return sent if isinstance(sent, int) else EMPTY_SEND_COST

    def _send_line(self, client: Client) -> bool:
        """Send what is left of the `?` line to `client`. Return whether the log's bytes follow.

        If not, `client` has been queued to wait, or has been dropped.
        """
        sent = send_bytes(client.fd, client.line)
        if isinstance(sent, int):
            client.line = client.line[sent:]
            # A part was sent: the socket is full. The next attempt reports that.
            return not client.line or self._send_line(client)
        self._apply_failure(client, sent)
        return False

    def _apply_send(self, client: Client, sent: Sent) -> None:
        """Move `client` to the right queue according to the result of its last send."""
        if isinstance(sent, int):
            client.offset += sent
            self._enqueue(client)
        else:
            self._apply_failure(client, sent)

    def _apply_failure(self, client: Client, sent: Outcome | OSError) -> None:
        """Let `client` wait, or drop it, because its last send has transferred nothing."""
        if sent is Outcome.NO_ROOM or (sent is Outcome.WOULD_BLOCK and not unsent(client.sock)):
            # A socket that is empty and still refuses data (WOULD_BLOCK) lacks kernel memory. No
            # event will report that it has room, so the send must be retried after a pause.
            self.awaiting_memory.append(client)
        elif sent is Outcome.WOULD_BLOCK:
            # Set the events before the client counts as blocked: this may fail. If there is room
            # already, it is reported at once.
            self._loop.epoll.modify(client.fd, CLIENT_EVENTS | select.EPOLLOUT)
            self.blocked[client.fd] = client
        else:
            self._departures.add(client, sent if isinstance(sent, OSError) else None)

    def _enqueue(self, client: Client) -> None:
        if client.line or client.offset < self.end:
            self.behind.append(client)
        elif client.offset == self.end:
            # The two numbers are equal. Assigning one to the other lets all caught-up clients share
            # one int object, which saves memory.
            client.offset = self.end
            self.caught_up[client.fd] = client
        else:
            self._await_growth(client)

    def _await_growth(self, client: Client) -> None:
        """Do not serve `client` until set_end() is called with an end beyond its offset."""
        # Remove the clients that have left each time the heap has about doubled: the log may never
        # reach their offsets, and the heap would grow without a bound.
        if len(self._ahead) >= self._sweep_at:
            self._ahead = [
                entry for entry in self._ahead if entry[2].state is ClientState.STREAMING
            ]
            heapq.heapify(self._ahead)
            self._sweep_at = 2 * len(self._ahead) + 64
        heapq.heappush(self._ahead, (client.offset, next(self._tie_breaker), client))


def next_chunk(offset: int, end: int) -> int:
    """Return how many bytes to send next to a client at `offset` of a segment that ends at `end`.

    The result is 0 if `end` is not beyond `offset`, and at most SEND_CHUNK.
    """
    return max(0, min(end - offset, SEND_CHUNK))
