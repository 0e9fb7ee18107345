"""Sees to this process's own descriptors: how many it may have, and that the standard ones are taken."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ADJUSTMENT = "/proc/self/oom_score_adj"

# OOM_SCORE_ADJ_MAX of linux/oom.h
_HIGHEST = 1000

# Half of what may be had: the supervisor holds a descriptor of each client and so may be the larger process by far
# [measured: with 10 and 100 more, a full memory cgroup still cost the supervisor].
_MORE = 500


CGROUPS = Path("/sys/fs/cgroup")

MEMBERSHIP = Path("/proc/self/cgroup")


def occupy_standard_descriptors() -> None:
    """See to it that 0, 1 and 2 are open: what is written there must not go to a socket or into a file that got such a number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one and return what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (
            OSError,
            ValueError,
        ):  # pragma: no cover: a sandbox may forbid it; the soft limit then is what we have
            return soft
    return hard


def count_processors(membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> int:
    """Return the number of processors that this process may use, at least 1.

    Reads what cgroups(7) and sched_setaffinity(2) describe; a file that is not there sets no limit.
    """
    return usable_processors(len(os.sched_getaffinity(0)), list(_quotas(membership, cgroups)))


def _quotas(membership: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Yield quota and period of every cgroup that this process is in, the outer ones too."""
    for line in _read(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        for folder in _upwards(root, group):
            # version 1: two files, a quota of -1 for none
            if controllers:
                words = [
                    _read(folder / "cpu.cfs_quota_us").strip(),
                    _read(folder / "cpu.cfs_period_us").strip(),
                ]
            else:
                # version 2: one file, "max" for none
                words = _read(folder / "cpu.max").split()
            if len(words) == 2 and all(word.isdigit() for word in words):
                yield int(words[0]), int(words[1])


def _upwards(root: Path, group: str) -> Iterator[Path]:
    """Yield the folder of `group` below `root` and all above it, `root` last (in a container it is all there is)."""
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
    """Return how many workers `-w auto` means.

    `affinity` is the number of processors this process may run on; each of `quotas` is a cgroup's CPU time
    and the period it is for, in the same unit. The smallest share counts, rounded up.
    """
    shares = [-(-quota // period) for quota, period in quotas if quota > 0 and period > 0]
    return max(1, min([affinity, *shares]))


def raise_oom_score() -> None:
    """Raise this process's `oom_score_adj` above the one that it has inherited (proc_pid_oom_score_adj(5)).

    A worker's death costs no client anything, the supervisor's costs them all. Raising one's own adjustment takes no
    privilege. Where /proc does not allow it, the kernel's choice stays as it is.
    """
    with suppress(OSError, ValueError):
        with open(_ADJUSTMENT, encoding="ascii") as file:
            inherited = int(file.read())
        with open(_ADJUSTMENT, "w", encoding="ascii") as file:
            file.write(str(min(inherited + _MORE, _HIGHEST)))


@dataclass(frozen=True, slots=True)
class Stat:
    """A process's parent and its start in clock ticks since boot, fields 4 and 22 of /proc/PID/stat (proc_pid_stat(5)).

    A pid and its start time together name a process for good; a pid alone may be another's by now.
    """

    parent: int
    ticks: int


def read_stat(pid: int) -> Stat | None:
    """Return parent and start time of a process, None if there is none of that pid."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # a name can hold anything, also brackets
            values = file.read().rpartition(b")")[2].split()
        return Stat(int(values[1]), int(values[19]))
    except (OSError, IndexError, ValueError):
        return None


def start_ticks(pid: int) -> int | None:
    """Return when the process `pid` started, in clock ticks since boot; None if it is gone."""
    stat = read_stat(pid)
    return stat.ticks if stat else None
