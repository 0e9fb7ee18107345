"""Lets clients whose next bytes are on the disk wait for them without delaying the other clients.

sendfile(2) waits for the disk if the bytes are not in the page cache, and the whole worker would
wait with it. Therefore the worker first checks whether a client's next bytes are cached. If they
are not, it asks the kernel to read them, and checks again after a pause.
"""

from collections import deque
from collections.abc import Callable

from tailsrv.worker.client import Client

# Bytes to read ahead for a client whose next bytes are not in the page cache, and to send to it in
# one chunk when they have arrived. The request takes about 0.1 ms (0.2 us for each KiB), during
# which no other client is served.
READ_AHEAD = 512 << 10

# Bytes from one probe of the page cache to the next, where it is probed densely.
STRIDE = 128 << 10

# After a cache miss, this many chunks are probed densely, at every STRIDE and at the last byte.
# Otherwise only the first and the last byte of a chunk are probed.
DENSE_CHUNKS = 256

# Largest number of clients for which bytes are read at the same time. With more, the bytes for one
# would push those for another out of the page cache before they are sent.
MAX_READERS = 16

# Seconds until the next check, multiplied by the number of clients that wait for it. A fast disk
# reads READ_AHEAD bytes in this time.
DISK_PAUSE = 0.00025

# The pause is also multiplied by the number of failed checks in a row, but at most by this number.
MAX_PAUSES = 8

# Failed checks in a row after which sendfile(2) is called although the bytes are not cached. They
# take 20 seconds with one reader, and minutes with many. By then the disk probably cannot read the
# bytes, and sendfile(2) will report the error.
MAX_MISSES = 10_000


class ReadAhead:
    """The clients that wait for the disk.

    A client whose next bytes are not cached becomes a reader: READ_AHEAD bytes are requested for
    it, and it checks again after a pause. There are at most MAX_READERS readers, so that their data
    is still cached when it is sent. Further clients wait in a queue.

    Args:
        is_cached: `is_cached(file, position, count, stride)` returns whether these bytes of a file
            are cached, as probes at every `stride` and at the last byte show.
        read: `read(file, position, count)` asks the kernel to read these bytes, and does not wait
            for them.

    """

    def __init__(
        self,
        is_cached: Callable[[int, int, int, int], bool],
        read: Callable[[int, int, int], None],
    ) -> None:
        self._is_cached, self._read = is_cached, read
        # The readers, each with its failed checks in a row.
        self._misses: dict[Client, int] = {}
        # The readers that wait for their next check, until take_due() returns them.
        self._pausing: list[Client] = []
        self._queue: deque[Client] = deque()
        # Number of further chunks to probe densely: while data is being read, the cache has holes.
        self._dense_chunks = 0

    def __bool__(self) -> bool:
        """Return whether any client waits for the disk."""
        return bool(self._pausing or self._queue)

    def admit(self, client: Client, file: int, position: int, wanted: int) -> int:
        """Return how many of the next `wanted` bytes can be sent to `client` without waiting.

        They are the bytes from `position` on of the file with the descriptor `file`. If the result
        is 0, the client waits until `take_due` returns it. Otherwise it is `wanted`, or less for a
        client that had to wait before.
        """
        misses = self._misses.get(client, 0)
        count = min(wanted, READ_AHEAD) if misses else wanted
        if (
            self._is_cached(file, position, count, STRIDE if self._dense_chunks else count)
            or misses >= MAX_MISSES
        ):
            self._dense_chunks = max(0, self._dense_chunks - 1)
            if misses:
                del self._misses[client]
                # Read the following bytes while these are sent.
                self._read(file, position + count, READ_AHEAD)
            return count
        self._dense_chunks = DENSE_CHUNKS
        if not misses and len(self._misses) >= MAX_READERS:
            self._queue.append(client)
            return 0
        if not misses:
            self._read(file, position, READ_AHEAD)
        self._misses[client] = misses + 1
        self._pausing.append(client)
        return 0

    def pause(self) -> float:
        """Return the seconds until the waiting clients should check again."""
        return disk_pause(
            len(self._pausing),
            min((self._misses.get(client, 0) for client in self._pausing), default=0),
        )

    def take_due(self) -> list[Client]:
        """Remove and return the clients that should check again now.

        Clients that have left in the meantime may be among them.
        """
        clients, self._pausing = self._pausing, []
        for _ in range(min(len(self._queue), MAX_READERS - len(self._misses))):
            clients.append(self._queue.popleft())
        return clients

    def forget(self, client: Client) -> None:
        """Stop counting `client` as a reader, so that a client from the queue can become one."""
        self._misses.pop(client, None)


def disk_pause(readers: int, misses: int) -> float:
    """Return the seconds until `readers` clients check again whether their bytes are cached.

    `misses` is the smallest number of failed checks of any of them.
    """
    return DISK_PAUSE * max(1, readers) * max(1, min(misses, MAX_PAUSES))
