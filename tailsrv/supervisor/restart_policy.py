"""Decides how much to send, when to respawn, when to speak. Pure: time and facts are arguments."""

import os
import signal
from dataclasses import dataclass
from enum import Enum

from tailsrv.config import ExitStatus, Timing

# deaths in a row, each soon after adopting: one of the clients is what kills
MAX_SUSPECT = 2
# deaths in a row before a slot's worker was ready: the next would fare no better
MAX_UNREADY = 5


@dataclass(frozen=True, slots=True)
class Failures:
    """How a slot's workers have fared, each figure a number of deaths in a row."""

    # under `long_life`
    short: int = 0
    # before the worker was ready, and not because somebody killed it
    unready: int = 0
    # by the worker's own fault, soon after it had adopted clients
    suspect: int = 0

    def after_life(
        self, seconds: float, ready: bool, end: "ExitKind", adopted: bool, timing: Timing
    ) -> "Failures":
        """Return the record after one more worker has died at that age."""
        short = seconds < timing.long_life
        return Failures(
            short=self.short + 1 if short else 0,
            unready=0 if ready or end in (ExitKind.KILLED, ExitKind.NO_ROOM) else self.unready + 1,
            suspect=self.suspect + 1 if short and adopted and end is ExitKind.FAULT else 0,
        )

    def delay(self, timing: Timing) -> float:
        """Return the seconds to wait before the slot is filled again: none after the first short life."""
        if self.short <= 1:
            return 0.0
        return float(min(timing.max_delay, timing.first_delay * 2 ** min(self.short - 2, 30)))

    def poisoned(self) -> bool:
        """Tell whether the slot's clients must be given up, or one of them would keep the slot down."""
        return self.suspect >= MAX_SUSPECT

    def hopeless(self) -> bool:
        """Tell whether another worker in this slot would be of no use."""
        return self.unready >= MAX_UNREADY


class ExitKind(Enum):
    """What a worker's wait status says about it."""

    # exit status 0
    DONE = "ended"
    # its own exit code: do not respawn
    CANNOT_BOOT = "cannot boot"
    # its own exit code: the next may fare better
    NO_ROOM = "ended for want of descriptors or memory"
    # a crash of its own making
    FAULT = "died by its own fault"
    # somebody else's doing
    KILLED = "was killed"


_FAULTS = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})


def classify_exit(status: int) -> ExitKind:
    """Return what the wait status `status`, as waitpid(2) gives it, says about a worker."""
    if os.WIFSIGNALED(status):
        return ExitKind.FAULT if os.WTERMSIG(status) in _FAULTS else ExitKind.KILLED
    match os.WEXITSTATUS(status):
        case ExitStatus.DONE:
            return ExitKind.DONE
        case ExitStatus.CANNOT_BOOT:
            return ExitKind.CANNOT_BOOT
        case os.EX_TEMPFAIL:
            return ExitKind.NO_ROOM
        case _:
            return ExitKind.FAULT


def describe_exit(status: int) -> str:
    """Return the wait status `status` as an operator reads it: `signal=SIGKILL` or `status=1`."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"signal={signal.Signals(number).name}"
        except ValueError:
            # a real-time signal has no name of its own
            return f"signal={number}"
    return f"status={os.WEXITSTATUS(status)}"
