"""Sets and reads properties of a process: descriptors, CPU limits, OOM score, start time."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_OOM_SCORE_FILE = "/proc/self/oom_score_adj"
# OOM_SCORE_ADJ_MAX of linux/oom.h.
_MAX_OOM_SCORE = 1000
# How much `raise_oom_score` adds: half of the maximum. The parent may use much more memory than the
# child, because it may hold many more descriptors [measured: with 10 or 100 instead of 500, the
# kernel still killed the parent when a memory cgroup was full].
_OOM_SCORE_INCREMENT = 500

# Where cgroup version 2 is mounted, and the file that names the cgroups of this process.
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def occupy_standard_descriptors() -> None:
    """Open /dev/null as each of the descriptors 0, 1 and 2 that is closed.

    Otherwise a socket or file that is opened later could get such a number, and messages for
    standard error would be written to it. Raises OSError if /dev/null cannot be opened.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def raise_descriptor_limit() -> int:
    """Raise the soft limit on open descriptors to the hard limit, and return the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # pragma: no cover: only a sandbox forbids this
            return soft
    return hard


def count_processors(membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> int:
    """Return the number of processors that this process may use, at least 1.

    The limits are the CPU affinity (sched_setaffinity(2)) and the CPU quotas of cgroups(7), version
    2. A quota that cannot be read is no limit. If version 1 has the controller `cpu`, also with
    version 2 mounted beside it, quotas do not count.
    """
    return usable_processors(len(os.sched_getaffinity(0)), list(_quotas(membership, cgroups)))


def _quotas(membership: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Yield the quota and period of every cgroup of this process, including the outer ones."""
    for line in _read(membership).splitlines():
        # Lines of version 1 begin with another number.
        if not line.startswith("0::"):
            continue
        for folder in _with_parents(cgroups, line.removeprefix("0::")):
            # A quota of "max" means that there is none.
            words = _read(folder / "cpu.max").split()
            if len(words) == 2 and all(word.isdigit() for word in words):
                yield int(words[0]), int(words[1])


def _with_parents(root: Path, group: str) -> Iterator[Path]:
    """Yield the folder of `group`, then every folder above it, up to and including `root`.

    In a container, only `root` may exist.
    """
    folder = root / group.lstrip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def usable_processors(affinity: int, quotas: list[tuple[int, int]]) -> int:
    """Return the smallest of these limits on processors, rounded up, and at least 1.

    `affinity` is the number of processors that this process may run on. Each of `quotas` is the CPU
    time of a cgroup and the period for which it is granted, in the same unit.
    """
    shares = [-(-quota // period) for quota, period in quotas if quota > 0 and period > 0]
    return max(1, min([affinity, *shares]))


def raise_oom_score() -> None:
    """Make the kernel kill this process rather than its parent when memory is short.

    This raises `oom_score_adj` above the inherited value (proc_pid_oom_score_adj(5)), which needs
    no privilege. It is for a child whose death does less harm than that of its parent. If /proc
    does not allow the change, the value stays as it is.
    """
    # Binary files: for a text file, each child would import a codec, which makes memory private
    # that it shares with its parent [measured: 0.3 MiB of 3.5].
    with suppress(OSError, ValueError):
        with open(_OOM_SCORE_FILE, "rb") as file:
            inherited = int(file.read())
        with open(_OOM_SCORE_FILE, "wb") as file:
            file.write(b"%d" % min(inherited + _OOM_SCORE_INCREMENT, _MAX_OOM_SCORE))


@dataclass(frozen=True, slots=True)
class Stat:
    """The parent of a process, and its start time in clock ticks since boot.

    These are fields 4 and 22 of /proc/PID/stat (proc_pid_stat(5)). Until the machine reboots, a pid
    together with a start time identifies one process. A pid alone may belong to a later process.
    """

    parent: int
    ticks: int


def read_stat(pid: int) -> Stat | None:
    """Return the parent and start time of the process `pid`, or None if it does not exist."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is a name in parentheses, which may contain spaces and parentheses.
            values = file.read().rpartition(b")")[2].split()
        return Stat(int(values[1]), int(values[19]))
    except (OSError, IndexError, ValueError):
        return None


def start_ticks(pid: int) -> int | None:
    """Return when the process `pid` started, in clock ticks since boot, or None if it is gone."""
    stat = read_stat(pid)
    return stat.ticks if stat else None
