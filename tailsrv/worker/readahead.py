"""Keeps clients whose next bytes are still on the disk from holding up the others: has them read, and lets these clients wait."""

from collections import deque
from collections.abc import Callable

from tailsrv.worker.client import Client

# Asked of the disk at once, for a client whose next bytes are not in memory, and then sent to it. To ask costs the others
# a fifth of a microsecond for each KiB: that is a tenth of a millisecond.
READ_AHEAD = 512 << 10

# between the places looked at to see whether all has come
STRIDE = 128 << 10

# chunks that are looked at so closely after one was missing; otherwise the first byte and the last will do
WARY_CHUNKS = 256

# clients that the disk works for at a time: more would push each other's bytes out before they are sent
MAX_READERS = 16

# seconds, for each of them, until they look again; a fast disk has read so much by then
DISK_PAUSE = 0.00025

# the longest such pause: one who has looked in vain does so less and less often
MAX_PAUSES = 8

# in a row, 20 seconds for one reader, minutes for many: then the disk cannot read these bytes, as sendfile(2) will say
MAX_MISSES = 10_000


class ReadAhead:
    """Who waits for the disk, and whom it works for.

    `is_cached(offset, count, stride)` tells whether these bytes of the file are in memory, by a look at every `stride` and
    at the last; `read(offset, count)` has the disk get them there. It works for READERS clients at a time, so that their bytes
    are still in memory when their turn comes; more wait in a queue.
    """

    def __init__(
        self, is_cached: Callable[[int, int, int], bool], read: Callable[[int, int], None]
    ) -> None:
        self._is_cached, self._read = is_cached, read
        # of those whom the disk works for: how often they have looked in vain
        self._misses: dict[Client, int] = {}
        # those of them that are to look again
        self._looking: list[Client] = []
        self._queue: deque[Client] = deque()
        # so many times more it is looked closely: while the disk works, there are gaps
        self._wary = 0

    def __bool__(self) -> bool:
        """Tell whether anybody waits."""
        return bool(self._looking or self._queue)

    def admit(self, client: Client, wanted: int) -> int:
        """Return how many of the next `wanted` bytes `client` can be sent at once; if 0, it waits until `again` returns it."""
        misses = self._misses.get(client, 0)
        count = min(wanted, READ_AHEAD) if misses else wanted
        if (
            self._is_cached(client.offset, count, STRIDE if self._wary else count)
            or misses >= MAX_MISSES
        ):
            self._wary = max(0, self._wary - 1)
            if misses:
                del self._misses[client]
                # while these are sent
                self._read(client.offset + count, READ_AHEAD)
            return count
        self._wary = WARY_CHUNKS
        if not misses and len(self._misses) >= MAX_READERS:
            self._queue.append(client)
            return 0
        if not misses:
            self._read(client.offset, READ_AHEAD)
        self._misses[client] = misses + 1
        self._looking.append(client)
        return 0

    def pause(self) -> float:
        """Return the seconds until those who wait should try again."""
        return disk_pause(
            len(self._looking),
            min((self._misses.get(client, 0) for client in self._looking), default=0),
        )

    def take_due(self) -> list[Client]:
        """Return those who should try again now; some may have left in the meantime."""
        clients, self._looking = self._looking, []
        for _ in range(min(len(self._queue), MAX_READERS - len(self._misses))):
            clients.append(self._queue.popleft())
        return clients

    def forget(self, client: Client) -> None:
        """Give the place of a client that has left to another."""
        self._misses.pop(client, None)


def disk_pause(readers: int, misses: int) -> float:
    """Return the seconds until `readers` clients look again for their bytes, of whom one has done so only `misses` times."""
    return DISK_PAUSE * max(1, readers) * max(1, min(misses, MAX_PAUSES))
