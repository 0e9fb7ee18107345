"""Measures processor time and memory of processes and the kernel, and describes the machine."""

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

PROC = Path("/proc")
# Fields of /proc/meminfo: the kernel's memory for sockets, descriptors and processes.
KERNEL = ("Slab", "KernelStack", "PageTables")


@dataclass(frozen=True)
class Look:
    """What all processes of a server together, and the kernel, had used at one moment."""

    pids: frozenset[int]
    # Processor time of the processes, in seconds.
    cpu: float
    # Memory of the processes, in KiB (PSS: shared pages are divided among the processes).
    pss: int
    # Memory of the kernel in KiB, for both ends of the connections, which are on one machine.
    kernel: int
    # Memory of the TCP queues in KiB, for both ends of the connections.
    sockets: int


def look(pids: Iterable[int]) -> Look:
    """Return what the processes `pids` and the kernel have used so far."""
    pids = frozenset(pids)
    return Look(pids, sum(map(_cpu_seconds, pids)), sum(map(_pss, pids)), _kernel(), _sockets())


def session(sid: int) -> list[int]:
    """Return the pids of the processes in the session `sid`, without zombies."""
    found = []
    for pid in (int(name) for name in os.listdir(PROC) if name.isdecimal()):
        fields = _read(PROC / str(pid) / "stat").rpartition(")")[2].split()
        if fields and int(fields[3]) == sid and fields[0] != "Z":
            found.append(pid)
    return found


def children(pid: int) -> list[int]:
    """Return the pids of the children of `pid`, a session leader, without zombies."""
    found = []
    for child in session(pid):
        fields = _read(PROC / str(child) / "stat").rpartition(")")[2].split()
        if fields and int(fields[1]) == pid:
            found.append(child)
    return found


def describe_machine() -> dict[str, object]:
    """Return the facts about this machine that a reader of the results needs."""
    return {
        "processor": _field(PROC / "cpuinfo", "model name") or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_mib": int(_field(PROC / "meminfo", "MemTotal").split()[0]) // 1024,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "revision": _revision(),
    }


def _revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        # This is not a repository, or git is not installed.
        return ""


def _cpu_seconds(pid: int) -> float:
    """Return the processor time of all threads of `pid` in seconds.

    The kernel counts nanoseconds in schedstat. If it has no schedstat, the time is exact to a clock
    tick, usually 10 ms.
    """
    spent = [_read(task / "schedstat").split() for task in _tasks(pid)]
    if all(spent) and spent:
        return sum(int(words[0]) for words in spent) / 1e9
    fields = _read(PROC / str(pid) / "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _tasks(pid: int) -> list[Path]:
    try:
        return list((PROC / str(pid) / "task").iterdir())
    except OSError:
        # The process has exited.
        return []


def _pss(pid: int) -> int:
    return int((_field(PROC / str(pid) / "smaps_rollup", "Pss") or "0").split()[0])


def _kernel() -> int:
    return sum(int(_field(PROC / "meminfo", name).split()[0]) for name in KERNEL)


def _sockets() -> int:
    words = _field(PROC / "net/sockstat", "TCP").split()
    return int(words[words.index("mem") + 1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def _field(path: Path, name: str) -> str:
    """Return the text after `name:` in the file `path`; empty if there is no such line."""
    for line in _read(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        # The process has exited, or belongs to another user.
        return ""
