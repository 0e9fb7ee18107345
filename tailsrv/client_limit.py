"""Enforces --max-clients across all worker processes, by shared counts and without a lock."""

from tailsrv.shared_counts import SharedCounts


class ClientLimit:
    """The number of clients of each slot, in shared memory.

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
        counts: The counts.

    """

    def __init__(self, limit: int, counts: SharedCounts) -> None:
        self.limit = limit
        self.counts = counts

    def claim(self, slot: int, clients: int) -> bool:
        """Raise the count of `slot` to `clients` if the limit allows it; return whether it does."""
        before = self.counts[slot]
        self.counts[slot] = clients
        if sum(self.counts) <= self.limit:
            return True
        self.counts[slot] = before
        return False

    def record(self, slot: int, clients: int) -> None:
        """Set the count of `slot` to `clients`, the number of clients that it has now."""
        self.counts[slot] = clients
