"""What a run has seen: bytes, clients, faults, and whatever was wrong."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field

# then a run ends
MAX_WRONG = 20
# seconds that a connection may have waited in a queue when the worker that had just accepted it was killed
ACCEPTING = 10.0


@dataclass
class Tally:
    """The figures of a run."""

    # bytes compared with what the file holds there
    checked: int = 0
    # by the kind of client
    connections: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    # connections whose worker was killed between accepting them and passing them up
    lost: int = 0
    # streams that ended as they should, at the end of a file that was moved away
    rotated: int = 0
    # the same, before they had read it all: they were too slow for --grace
    cut_off: int = 0
    # seconds that a client who wanted to read got nothing, while there was something to be sent
    longest_wait: float = 0.0
    wrong: list[str] = field(default_factory=list)
    # when; the last ones
    _kills: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def note_wrong(self, what: str) -> None:
        """Keep what must not be."""
        self.wrong.append(what)

    def hopeless(self) -> bool:
        """Tell whether so much is wrong that going on shows nothing new."""
        return len(self.wrong) >= MAX_WRONG

    def note_kill(self) -> None:
        """Remember that a worker is killed now."""
        self._kills.append(time.monotonic())

    def may_be_lost(self, connected: float) -> bool:
        """Tell whether a connection may have been in the few lines of a worker where its death costs one."""
        return any(connected - 0.1 <= kill <= connected + ACCEPTING for kill in self._kills)
