"""Enforces --max-clients across all worker processes, by shared counts and without a lock."""

import mmap

from tailsrv.linux.files import memory_file_with

# Bytes of one count: an aligned integer of this size is stored and loaded atomically.
_COUNT = 8


class ClientLimit:
    """Shared memory with one count for each slot, written by the worker of that slot.

    A count is the number of clients that the slot has now, not a sum of arrivals and departures. So
    the death of a worker needs no correction: its successor writes the number that it adopts.

    A worker claims room before it accepts connections, by raising its count. If the sum of all
    counts exceeds the limit, the worker restores the old count. Two workers that claim the last
    room at the same moment cannot both get it, because each sees the other's count when it adds up
    all counts. Both may be refused, and then retry later. No memory barrier guarantees that a
    worker sees the other's count. But the interpreter takes far longer from storing one count to
    loading the others than a processor takes to make a store visible.

    Args:
        limit: The largest number of clients of all slots together.
        slots: The number of slots.
        fd: The memory file of existing counts, passed on by an upgrade. None creates new counts.

    """

    def __init__(self, limit: int, slots: int, fd: int | None = None) -> None:
        self.limit = limit
        self.fd = memory_file_with(bytes(slots * _COUNT)) if fd is None else fd
        self._counts = memoryview(mmap.mmap(self.fd, slots * _COUNT)).cast("q")

    def claim(self, slot: int, clients: int) -> bool:
        """Raise the count of `slot` to `clients` if the limit allows it; return whether it does."""
        before = self._counts[slot]
        self._counts[slot] = clients
        if sum(self._counts) <= self.limit:
            return True
        self._counts[slot] = before
        return False

    def record(self, slot: int, clients: int) -> None:
        """Set the count of `slot` to `clients`, the number of clients that it has now."""
        self._counts[slot] = clients
