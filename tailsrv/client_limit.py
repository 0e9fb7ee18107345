"""Counts the clients of all slots against --max-clients, across processes and without a lock."""

import mmap

from tailsrv.linux.files import memory_file_with

# bytes: an aligned integer of the machine, which is stored and loaded in one piece
_COUNT = 8


class ClientLimit:
    """A page of shared memory with a count for each slot, which only that slot's worker writes.

    A count is what the slot has, not a sum of what came and went, so that a worker's death leaves nothing to be
    put right: its successor writes the count that it begins with. A worker claims room *before* it accepts, by
    raising its count; if all counts together are too many it takes that back. Two that claim the last place in the
    same instant may both go without, for a moment, but not both get it: between the store and the loads lie far more
    instructions of the interpreter's than a processor holds a store back for.
    """

    def __init__(self, limit: int, slots: int, fd: int | None = None) -> None:
        self.limit = limit
        self.fd = memory_file_with(bytes(slots * _COUNT)) if fd is None else fd
        self._counts = memoryview(mmap.mmap(self.fd, slots * _COUNT)).cast("q")

    def claim(self, slot: int, clients: int) -> bool:
        """Raise the count of `slot` to `clients` if there is room, and tell whether there was."""
        before = self._counts[slot]
        self._counts[slot] = clients
        if sum(self._counts) <= self.limit:
            return True
        self._counts[slot] = before
        return False

    def record(self, slot: int, clients: int) -> None:
        """Note how many clients `slot` has."""
        self._counts[slot] = clients
