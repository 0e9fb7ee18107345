"""Decides whether, and after what delay, a slot whose worker has died gets another worker.

Pure: the functions make no system calls, and get the time and the wait status as arguments.
"""

import os
import signal
from dataclasses import dataclass
from enum import Enum

from tailsrv.config import ExitStatus, Timing

# If this many workers in a row have crashed soon after adopting clients, one of these clients is
# assumed to be the cause.
MAX_SUSPECT = 2
# If this many workers in a row have died before they were ready, the next one is expected to fail
# in the same way.
MAX_UNREADY = 5


@dataclass(frozen=True, slots=True)
class Failures:
    """The record of a slot's dead workers. Each field is a number of deaths in a row."""

    # Deaths of workers that lived less than Timing.long_life.
    short: int = 0
    # Deaths of workers that were not ready yet. A worker that was killed, or that ran out of
    # descriptors or memory, sets this to 0.
    unready: int = 0
    # Crashes within Timing.long_life of workers that had adopted clients.
    suspect: int = 0

    def after_life(
        self, seconds: float, ready: bool, end: "ExitKind", adopted: bool, timing: Timing
    ) -> "Failures":
        """Return the record after one more worker has died.

        Args:
            seconds: The time from the worker's start to its death.
            ready: Whether the worker had reported that it was ready.
            end: How the worker has ended.
            adopted: Whether the worker had taken over clients of the worker before it.
            timing: The server's timing, for `long_life`.

        """
        short = seconds < timing.long_life
        return Failures(
            short=self.short + 1 if short else 0,
            unready=0 if ready or end in (ExitKind.KILLED, ExitKind.NO_ROOM) else self.unready + 1,
            suspect=self.suspect + 1 if short and adopted and end is ExitKind.FAULT else 0,
        )

    def delay(self, timing: Timing) -> float:
        """Return the seconds to wait before the slot gets its next worker.

        There is no delay after the first short life. After the second, it is `timing.first_delay`.
        It doubles with each further short life, up to `timing.max_delay`.
        """
        if self.short <= 1:
            return 0.0
        return float(min(timing.max_delay, timing.first_delay * 2 ** min(self.short - 2, 30)))

    def next_delay(self, end: "ExitKind", started_up: bool, timing: Timing) -> float | None:
        """Return the seconds to wait before the slot gets its next worker, None to give up.

        A server gives up only while it starts. Later its clients are better off if they wait.

        Args:
            end: How the worker has ended that has died last.
            started_up: Whether all slots have had ready workers at the same time.
            timing: The server's timing.

        """
        if not started_up and (self.hopeless() or end in (ExitKind.CANNOT_BOOT, ExitKind.NO_ROOM)):
            return None
        return timing.max_delay if end is ExitKind.CANNOT_BOOT else self.delay(timing)

    def poisoned(self) -> bool:
        """Return whether the slot's clients must be disconnected.

        One of them seems to crash each worker that adopts it, so no worker of the slot would live.
        """
        return self.suspect >= MAX_SUSPECT

    def hopeless(self) -> bool:
        """Return whether the next worker of this slot would probably fail to start as well."""
        return self.unready >= MAX_UNREADY


class ExitKind(Enum):
    """How a worker ended. The values are parts of log messages: "worker was killed: ..."."""

    # Exit status 0.
    DONE = "ended"
    # Exit status ExitStatus.CANNOT_BOOT: another worker would not start either.
    CANNOT_BOOT = "cannot boot"
    # Exit status EX_TEMPFAIL: another worker may succeed when descriptors or memory are free.
    NO_ROOM = "ran out of descriptors or memory"
    # Any other exit status, or a signal of `_FAULTS`.
    FAULT = "crashed"
    # Any other signal. It was sent by another process or by the kernel's OOM killer.
    KILLED = "was killed"


# The signals that the kernel sends to a process for its own errors, and SIGABRT from abort(3).
_FAULTS = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})


def classify_exit(status: int) -> ExitKind:
    """Return how a worker ended, from the wait `status` that waitpid(2) has returned."""
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
    """Return the wait `status` as a field of a log message: `signal=SIGKILL` or `status=1`."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"signal={signal.Signals(number).name}"
        except ValueError:
            # Most real-time signals have no name.
            return f"signal={number}"
    return f"status={os.WEXITSTATUS(status)}"
