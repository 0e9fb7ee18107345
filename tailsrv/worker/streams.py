"""The clients that are streamed to, by what each waits for: nothing, room in its socket, the disk, or a longer file."""

import heapq
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count as counter

from tailsrv.linux.files import Sent, is_cached, read_ahead, send_chunk, send_to_all
from tailsrv.linux.sockets import Outcome, unsent
from tailsrv.worker.client import Client, ClientState
from tailsrv.worker.readahead import READ_AHEAD, ReadAhead

# The most that one sendfile moves. A bigger chunk makes fewer system calls, and lets a client that replays
# a large file keep the others waiting longer: at 1 MiB that is a fraction of a millisecond.
SEND_CHUNK = 1 << 20

# The most that is sent to clients that are behind before the loop looks for news of the file again.
TURN_BUDGET = 1 << 20

# What a send that moves nothing counts for there: it takes about as long as one of so many bytes, and a crowd that asks and leaves
# makes many of them.
EMPTY_SEND_COST = 128 << 10


class Streams:
    """Sends the file's bytes to its clients, each of which is in one of six places.

    - `caught_up`: has all there is; its offset is `size`, kept once for all of them;
    - `behind`: can be sent more, in turn;
    - `blocked`: behind as well, but its socket is full: it waits for `writable`;
    - `read_ahead`: behind as well, but its next bytes are still on the disk: it waits for `look_again`;
    - `starved`: behind as well, but the kernel had no memory for its bytes: it waits for `try_again`;
    - `ahead`: wants an offset that the file has yet to grow beyond.

    `drop(client, error)` is called for one that has hung up (error None) or cannot be served, and `await_room(client)`
    when one is blocked.
    """

    def __init__(
        self,
        file: int,
        size: int,
        drop: Callable[[Client, Exception | None], None],
        await_writable: Callable[[Client], None],
    ) -> None:
        self.file = file
        # as last learned by the worker's look()
        self.size = size
        self.caught_up: dict[int, Client] = {}
        self.behind: deque[Client] = deque()
        self.blocked: dict[int, Client] = {}
        self.read_ahead = ReadAhead(partial(is_cached, file), partial(read_ahead, file))
        # those who left stay until then
        self.awaiting_memory: list[Client] = []
        # a heap by offset; those who left stay until met or swept
        self._ahead: list[tuple[int, int, Client]] = []
        self._sweep_at = 64
        self._tie = counter()
        self._drop, self._await_writable = drop, await_writable
        # a sendfile found less than `size`: somebody must look at the file again
        self.shrunk = False

    def add(self, client: Client, offset: int) -> None:
        """Start streaming to `client` from `offset`."""
        client.state = ClientState.STREAMING
        client.offset = offset
        self._enqueue(client)

    def remove(self, client: Client) -> None:
        """Forget `client`, whose state says that it is not streamed to any more."""
        if self.caught_up.pop(client.fd, None):
            client.offset = self.size
        self.blocked.pop(client.fd, None)
        self.read_ahead.forget(client)

    def without_work(self) -> list[Client]:
        """Return the clients that have nothing to be sent."""
        waiting = [client for _, _, client in self._ahead if client.state is ClientState.STREAMING]
        return [*self.caught_up.values(), *waiting]

    def offset_of(self, client: Client) -> int:
        """Return the next byte that `client` gets."""
        return self.size if client.fd in self.caught_up else client.offset

    def writable(self, client: Client) -> None:
        """Note that the socket of `client` has room again, if it waited for that."""
        if self.blocked.pop(client.fd, None):
            self.behind.append(client)

    def retry_disk(self) -> None:
        """Give those who wait for the disk another turn."""
        self.behind.extend(self.read_ahead.take_due())

    def retry_memory(self) -> None:
        """Give those who are starved another turn."""
        self.behind.extend(self.awaiting_memory)
        self.awaiting_memory.clear()

    def set_size(self, size: int) -> None:
        """Take in the file's new size; if it has grown, everyone who was caught up gets the new bytes at once."""
        start, self.size = self.size, size
        if start < size <= start + SEND_CHUNK:
            self._fan_out(start, size - start)
        elif start != size:
            # too much for one chunk, or less than the caught-up have: one by one, in turn
            followers, self.caught_up = self.caught_up, {}
            for client in followers.values():
                client.offset = start
                self._enqueue(client)
        while self._ahead and self._ahead[0][0] < size:
            client = heapq.heappop(self._ahead)[2]
            if client.state is ClientState.STREAMING:
                self.behind.append(client)

    def _fan_out(self, start: int, count: int) -> None:
        """Send the same bytes to every caught-up client."""
        for fd, sent in send_to_all(self.caught_up, self.file, start, count).items():
            client = self.caught_up.pop(fd)
            client.offset = start
            try:
                self._apply_send(client, sent)
            except Exception as error:
                self._drop(client, error)

    def pump(self, budget: int = TURN_BUDGET) -> None:
        """Send one chunk to each client that is behind, in turn, until about `budget` bytes have gone."""
        for _ in range(len(self.behind)):
            if budget <= 0 or self.shrunk:
                return
            client = self.behind.popleft()
            if client.state is not ClientState.STREAMING:
                continue
            try:
                budget -= self._send(client)
            except Exception as error:
                # Whatever has failed with this client, the others must get their bytes.
                budget -= EMPTY_SEND_COST
                self._drop(client, error)

    def _send(self, client: Client) -> int:
        """Send one chunk to `client`, and return what that takes of a turn's budget, in bytes."""
        wanted = next_chunk(client.offset, self.size)
        # the file has shrunk since: it waits for that, and no more for the disk
        if not wanted:
            self.read_ahead.forget(client)
            self._enqueue(client)
            return 0
        if (count := self.read_ahead.admit(client, wanted)) == 0:
            # to ask the disk for them has taken its time
            return READ_AHEAD
        sent = send_chunk(client.fd, self.file, client.offset, count)
        # not there, whatever the size says: not again before that has changed
        if sent == 0:
            self.shrunk = True
            self._await_growth(client)
            return 0
        self._apply_send(client, sent)
        return sent if isinstance(sent, int) else EMPTY_SEND_COST

    def _apply_send(self, client: Client, sent: Sent) -> None:
        """Put `client` where it belongs after a send from its offset came to that."""
        if isinstance(sent, int):
            client.offset += sent
            self._enqueue(client)
        elif sent is Outcome.NO_ROOM or (sent is Outcome.WOULD_BLOCK and not unsent(client.sock)):
            # a socket that refuses while it is empty never tells that it has room
            self.awaiting_memory.append(client)
        elif sent is Outcome.WOULD_BLOCK:
            self._await_writable(client)
            self.blocked[client.fd] = client
        else:
            self._drop(client, sent if isinstance(sent, OSError) else None)

    def _enqueue(self, client: Client) -> None:
        if client.offset < self.size:
            self.behind.append(client)
        elif client.offset == self.size:
            # the same number, and one object for all of them
            client.offset = self.size
            self.caught_up[client.fd] = client
        else:
            self._await_growth(client)

    def _await_growth(self, client: Client) -> None:
        """Leave `client` alone until the file's size changes to more than its offset."""
        # the file may never get to those who left
        if len(self._ahead) >= self._sweep_at:
            self._ahead = [
                entry for entry in self._ahead if entry[2].state is ClientState.STREAMING
            ]
            heapq.heapify(self._ahead)
            self._sweep_at = 2 * len(self._ahead) + 64
        heapq.heappush(self._ahead, (client.offset, next(self._tie), client))


def next_chunk(offset: int, size: int) -> int:
    """Return how many bytes one turn may send to a client at `offset` of a file of `size` bytes."""
    return max(0, min(size - offset, SEND_CHUNK))
