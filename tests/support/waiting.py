"""Waiting for events: how long that may take, and how it is done."""

import time
from collections.abc import Callable
from typing import TypeVar

# seconds that an event may take on a busy machine; no test waits for it to pass
DEADLINE = 20.0

Seen = TypeVar("Seen")


def eventually(check: Callable[[], Seen], deadline: float = DEADLINE) -> Seen:
    """Return what `check` returns as soon as that is true, asking less and less often."""
    end, pause = time.monotonic() + deadline, 0.005
    while not (seen := check()):
        assert time.monotonic() < end, f"still {seen!r} after {deadline:g} seconds"
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return seen
