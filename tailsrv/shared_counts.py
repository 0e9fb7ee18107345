"""Numbers in shared memory, one for each slot, that all processes of the server can read."""

import mmap
import sys
from collections.abc import Iterator

from tailsrv.linux.files import memory_file_with

# Bytes of one number: an aligned integer of this size is stored and loaded atomically.
_NUMBER = 8


class SharedCounts:
    """One number for each slot, which only the worker of that slot writes.

    The numbers survive the death of the worker, and an upgrade.

    Args:
        slots: The number of slots.
        fd: The memory file of existing numbers, passed on by an upgrade. None creates new ones.
        number: What new numbers are at first.

    """

    def __init__(self, slots: int, fd: int | None = None, number: int = 0) -> None:
        if fd is None:
            fd = memory_file_with(slots * number.to_bytes(_NUMBER, sys.byteorder))
        self.fd = fd
        self._numbers = memoryview(mmap.mmap(self.fd, slots * _NUMBER)).cast("q")

    def __getitem__(self, slot: int) -> int:
        return self._numbers[slot]

    def __setitem__(self, slot: int, number: int) -> None:
        self._numbers[slot] = number

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)
