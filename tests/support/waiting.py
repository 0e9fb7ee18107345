"""Waiting for events, and the maximum time for that."""

import time
from collections.abc import Callable
from typing import TypeVar

# Seconds that an event may need on a busy machine; no passing test waits that long.
DEADLINE = 20.0

Seen = TypeVar("Seen")


def eventually(check: Callable[[], Seen], deadline: float = DEADLINE) -> Seen:
    """Return what `check` returns as soon as that is true; the pauses between calls double."""
    end, pause = time.monotonic() + deadline, 0.005
    while not (seen := check()):
        assert time.monotonic() < end, f"still {seen!r} after {deadline:g} seconds"
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return seen
