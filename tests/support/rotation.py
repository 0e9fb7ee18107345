"""Rotating a log, and what a server with --follow-name logs about it."""

import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from support.server import Server
from support.status import status
from support.waiting import DEADLINE, eventually

# In place of a waiting time that must not explain what a test waits for.
HOUR = 3600.0

MOVED = "file was moved away or replaced, clients continue with the next one: "
ROLLED = " rolled: "
LATE_BYTES = "bytes were appended to the old file after the roll, no client gets them: "


def move_away(path: Path) -> Path:
    """Rename the file to the first number that is free, and return its new path.

    Unlike with logrotate, the newest old file has the highest number.
    """
    number = 1
    while (old := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(old)


def rotate(path: Path, data: bytes = b"") -> Path:
    """Move the file away, create the next one with `data`, and return the old one's path."""
    old = move_away(path)
    path.write_bytes(data)
    return old


def rotate_all(path: Path, data: bytes = b"") -> Path:
    """Rotate as logrotate does: the newest old file has the number 1, and all others are moved."""
    names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, 1000))]
    count = next(number for number, name in enumerate(names) if number and not name.exists())
    for number in reversed(range(count)):
        names[number].rename(names[number + 1])
    path.write_bytes(data)
    return names[1]


def replace(path: Path, data: bytes) -> None:
    """Rename a file with `data` to the path. The old file has no name any more."""
    (fresh := path.with_name(f"{path.name}.new")).write_bytes(data)
    fresh.rename(path)


def rotated(server: Server, count: int) -> int:
    """Wait until the log has rolled `count` times, and return the active segment's base."""
    return int(server.logged(ROLLED, count=count).rpartition(" offset=")[2])


def sealed_sizes(server: Server) -> list[int]:
    """Return the sizes at which the segments were sealed, according to the server's log."""
    return [int(size) for size in re.findall(r" rolled: .* sealed=(\d+) ", server.log)]


def await_gone(server: Server, gone: bool) -> None:
    """Wait until the server knows that its path names the active segment, or does not."""
    eventually(lambda: status(server)["file"]["gone"] is gone)


def held_files(pids: Sequence[int], path: Path) -> list[str]:
    """Return the files whose names begin like `path` that any of the processes has open."""
    links = []
    for pid in pids:
        # The process may have ended, or have closed the file by now.
        with suppress(FileNotFoundError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    links.append(os.readlink(link))
    return [link for link in links if link.startswith(str(path))]


def deleted_files(pids: Sequence[int], path: Path) -> list[str]:
    """Return the deleted ones of such files, according to lsof."""
    done = subprocess.run(
        ["lsof", "-w", "-n", "-P", "+L1", "-a", "-p", ",".join(map(str, pids)), "-Fn"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    return [line[1:] for line in done.stdout.splitlines() if line.startswith(f"n{path}")]
