"""Finds out how many processors this process may use: affinity and the cgroups' CPU quotas."""

import os
from collections.abc import Iterator
from pathlib import Path

from tailsrv.policy import usable_processors

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


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
            if controllers:  # version 1: two files, a quota of -1 for none
                words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
            else:  # version 2: one file, "max" for none
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
