"""Decides how much to send, when to respawn, when to speak. Pure: time and facts are arguments."""

import errno
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address

from tailsrv.config import ExitStatus, Network, Timing

# The most that one sendfile moves. A bigger chunk makes fewer system calls, and lets a client that replays
# a large file keep the others waiting longer: at 1 MiB that is a fraction of a millisecond.
CHUNK = 1 << 20

# The most that is sent to clients that are behind before the loop looks for news of the file again.
TURN = 1 << 20

# What a send that moves nothing counts for there: it takes about as long as one of so many bytes, and a crowd that asks and leaves
# makes many of them.
VAIN = 128 << 10

# An append up to this size is read once and written to every caught-up client: for so little, setting up a sendfile(2)
# costs more than a copy does [measured: 8 % of a delivery to one of 1000 clients; at 16 KiB it is the other way round].
SMALL = 4096

# Asked of the disk at once, for a client whose next bytes are not in memory, and then sent to it. To ask costs the others
# a fifth of a microsecond for each KiB: that is a tenth of a millisecond.
READ_AHEAD = 512 << 10
STRIDE = 128 << 10  # between the places looked at to see whether all has come
WARY = 256  # chunks that are looked at so closely after one was missing; otherwise the first byte and the last will do
READERS = 16  # clients that the disk works for at a time: more would push each other's bytes out before they are sent
DISK_PAUSE = 0.00025  # seconds, for each of them, until they look again; a fast disk has read so much by then
MAX_PAUSES = 8  # the longest such pause: one who has looked in vain does so less and less often
MAX_MISSES = 10_000  # in a row, 20 seconds for one reader, minutes for many: then the disk cannot read these bytes, as sendfile(2) will say

EVENTS = 64  # taken from epoll in one turn; more wait for the next, behind the news of the file
ACCEPTS = 64  # connections taken in one turn; a burst of thousands must not hold up those who stream
SHARED_ACCEPTS = 4  # the same from a listener that all workers share: more would let the first to wake take them all
STALL_PAUSE = 0.2  # seconds without accepting after running out of room: no spin, and soon back
MEMORY_PAUSE = 0.05  # seconds until those are tried again whose bytes the kernel had no memory for

MAX_SUSPECT = 2  # deaths in a row, each soon after adopting: one of the clients is what kills
MAX_UNREADY = 5  # deaths in a row before a slot's worker was ready: the next would fare no better


def is_allowed(host: str, networks: Sequence[Network]) -> bool:
    """Tell whether a client at the address `host` may be served; an IPv4 address mapped into IPv6 is an IPv4 address."""
    address = ip_address(host)
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in networks)


def next_chunk(offset: int, size: int) -> int:
    """Return how many bytes one turn may send to a client at `offset` of a file of `size` bytes."""
    return max(0, min(size - offset, CHUNK))


def disk_pause(readers: int, misses: int) -> float:
    """Return the seconds until `readers` clients look again for their bytes, of whom one has done so only `misses` times."""
    return DISK_PAUSE * max(1, readers) * max(1, min(misses, MAX_PAUSES))


@dataclass(frozen=True, slots=True)
class Failures:
    """How a slot's workers have fared, each figure a number of deaths in a row."""

    short: int = 0  # under `long_life`
    unready: int = 0  # before the worker was ready, and not because somebody killed it
    suspect: int = 0  # by the worker's own fault, soon after it had adopted clients

    def after_life(self, seconds: float, ready: bool, end: "Verdict", adopted: bool, timing: Timing) -> "Failures":
        """Return the record after one more worker has died at that age."""
        short = seconds < timing.long_life
        return Failures(
            short=self.short + 1 if short else 0,
            unready=0 if ready or end in (Verdict.KILLED, Verdict.NO_ROOM) else self.unready + 1,
            suspect=self.suspect + 1 if short and adopted and end is Verdict.FAULT else 0,
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


class Verdict(Enum):
    """What a worker's wait status says about it."""

    DONE = "ended"  # exit status 0
    CANNOT_BOOT = "cannot boot"  # its own exit code: do not respawn
    NO_ROOM = "ended for want of descriptors or memory"  # its own exit code: the next may fare better
    FAULT = "died by its own fault"  # a crash of its own making
    KILLED = "was killed"  # somebody else's doing


# The system, or a limit of ours, has no room for what a worker needs. That is no fault of the worker, and may pass.
NO_ROOM_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_SHORTAGES = NO_ROOM_ERRNOS | {errno.ENOSPC}  # of epoll watches


def lacks_room(error: BaseException) -> bool:
    """Tell whether `error` says that descriptors, memory or epoll watches have run out."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SHORTAGES)


_FAULTS = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})


def verdict(status: int) -> Verdict:
    """Return what the wait status `status`, as waitpid(2) gives it, says about a worker."""
    if os.WIFSIGNALED(status):
        return Verdict.FAULT if os.WTERMSIG(status) in _FAULTS else Verdict.KILLED
    match os.WEXITSTATUS(status):
        case ExitStatus.DONE:
            return Verdict.DONE
        case ExitStatus.CANNOT_BOOT:
            return Verdict.CANNOT_BOOT
        case os.EX_TEMPFAIL:
            return Verdict.NO_ROOM
        case _:
            return Verdict.FAULT


def describe_status(status: int) -> str:
    """Return the wait status `status` as an operator reads it: `signal=SIGKILL` or `status=1`."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"signal={signal.Signals(number).name}"
        except ValueError:  # a real-time signal has no name of its own
            return f"signal={number}"
    return f"status={os.WEXITSTATUS(status)}"


class Allowance:
    """Lets through so many per interval and counts the rest: what a stranger can cause must have a bound."""

    def __init__(self, burst: int, interval: float) -> None:
        self._burst, self._interval = burst, interval
        self._since, self._used, self._held_back = float("-inf"), 0, 0

    def ask(self, now: float) -> int | None:
        """Return None if this one must be held back, else how many were since the last that was not."""
        if now - self._since >= self._interval:
            self._since, self._used = now, 0
        if self._used >= self._burst:
            self._held_back += 1
            return None
        self._used += 1
        held_back, self._held_back = self._held_back, 0
        return held_back


def usable_processors(affinity: int, quotas: list[tuple[int, int]]) -> int:
    """Return how many workers `-w auto` means.

    `affinity` is the number of processors this process may run on; each of `quotas` is a cgroup's CPU time
    and the period it is for, in the same unit. The smallest share counts, rounded up.
    """
    shares = [-(-quota // period) for quota, period in quotas if quota > 0 and period > 0]
    return max(1, min([affinity, *shares]))
