"""Contents for files, appending them, and what the kernel keeps of them."""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tailsrv.file_identity import FileIdentity

EVERY_BYTE = bytes(range(256)) * 1024


def random_bytes(count: int, seed: int = 1) -> bytes:
    """Return bytes in which no two places look alike: one that is lost, doubled or moved shows."""
    return random.Random(seed).randbytes(count)


def append(path: str | Path, data: bytes) -> None:
    """Append `data` in one write(2)."""
    with open(path, "ab", buffering=0) as file:
        assert file.write(data) == len(data)


@contextmanager
def opened(path: Path | str) -> Iterator[int]:
    """Give a descriptor of `path` to read from."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def evict(file: int) -> None:
    """Have the kernel forget what it has in memory of `file`; one that is in memory alone stays there."""
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def is_gone(file: int, path: str) -> bool | None:
    """Tell whether `path` names something else than the open `file`, or nothing."""
    return FileIdentity(file, path).is_gone(time.monotonic())
