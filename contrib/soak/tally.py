"""Counts the events of a run: bytes checked, clients, faults, and everything that was wrong."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field

# A run stops after this many errors.
MAX_WRONG = 20
# Seconds that a connection may have waited in an accept queue before a worker accepted it and was
# killed immediately afterwards.
ACCEPTING = 10.0


@dataclass
class Tally:
    """The figures of a run."""

    # Bytes that were compared with the log.
    checked: int = 0
    # Connections by the kind of client.
    connections: Counter[str] = field(default_factory=Counter)
    # Faults by name.
    faults: Counter[str] = field(default_factory=Counter)
    # Connections whose worker was killed after accepting them and before reporting them.
    lost: int = 0
    # Rotations of the file by kind.
    rotations: Counter[str] = field(default_factory=Counter)
    # Connections that the server closed because the bytes they asked for had been deleted.
    gone: int = 0
    # The longest time in seconds that a client waited for bytes that the server could have sent.
    longest_wait: float = 0.0
    wrong: list[str] = field(default_factory=list)
    # The times of the last kills.
    _kills: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def note_wrong(self, what: str) -> None:
        """Record an error, with the time of day, so that it can be found in the server's log."""
        self.wrong.append(f"{time.strftime('%X')} {what}")

    def hopeless(self) -> bool:
        """Return whether there are so many errors that the run should stop."""
        return len(self.wrong) >= MAX_WRONG

    def note_kill(self) -> None:
        """Record that a worker is killed now."""
        self._kills.append(time.monotonic())

    def may_be_lost(self, connected: float) -> bool:
        """Return whether a kill may have lost the connection that was made at the time `connected`.

        It is lost if its worker is killed after accepting it and before reporting it.
        """
        return any(connected - 0.1 <= kill <= connected + ACCEPTING for kill in self._kills)
