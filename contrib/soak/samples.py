"""Samples the resources of a server: memory, descriptors, threads, and memory for sockets."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Sample:
    """The resources of all processes of a server together.

    `pss` is their memory and `sockets` the memory of all TCP sockets of the machine, both in bytes.
    """

    processes: int
    pss: int
    descriptors: int
    threads: int
    sockets: int


def take(pids: Iterable[int]) -> Sample:
    """Take a sample of these processes. One that exits meanwhile is not counted."""
    found = [figures for pid in pids if (figures := _look(pid))]
    pss, descriptors, threads = (
        (sum(column) for column in zip(*found, strict=True)) if found else (0, 0, 0)
    )
    return Sample(len(found), pss, descriptors, threads, _socket_memory())


def _look(pid: int) -> tuple[int, int, int] | None:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return None
    pss = re.search(r"^Pss: *(\d+) kB$", rollup, re.MULTILINE)
    return (int(pss[1]) << 10, descriptors, threads) if pss else None


def deleted_files(pids: Iterable[int], path: Path) -> list[str]:
    """Return the files that these processes have open, and that were deleted.

    Only files are returned whose path began with `path`.
    """
    return [link for pid in pids for link in _links(pid) if _is_deleted(link, path)]


def _links(pid: int) -> list[str]:
    found = []
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found.append(os.readlink(entry.path))
    return found


def _is_deleted(link: str, path: Path) -> bool:
    return link.startswith(str(path)) and link.endswith(" (deleted)")


def _socket_memory() -> int:
    """Return the kernel's memory for TCP in bytes. The kernel counts it in pages."""
    pages = re.search(r"^TCP: .* mem (\d+)$", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    return int(pages[1]) * PAGE if pages else 0
