"""File contents, appending them, and what the kernel has of a file in memory."""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tailsrv.file_identity import FileIdentity

EVERY_BYTE = bytes(range(256)) * 1024


def random_bytes(count: int, seed: int = 1) -> bytes:
    """Return random bytes, so that a byte that is lost, duplicated or moved is detected."""
    return random.Random(seed).randbytes(count)


def append(path: str | Path, data: bytes) -> None:
    """Append `data` in one write(2)."""
    with open(path, "ab", buffering=0) as file:
        assert file.write(data) == len(data)


@contextmanager
def opened(path: Path | str) -> Iterator[int]:
    """Yield a descriptor of `path` that is open for reading."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def evict(file: int) -> None:
    """Drop the pages of `file` from the page cache; a file on tmpfs keeps them."""
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def is_gone(file: int, path: str) -> bool | None:
    """Tell whether `path` no longer names the open `file`."""
    return FileIdentity(file, path).is_gone(time.monotonic())
