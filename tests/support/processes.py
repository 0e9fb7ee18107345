"""Looking at processes, and commands that change what a process may do."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from support.waiting import DEADLINE, eventually

NOBODY = 65534

# setpriv execs the program, so the pid stays the same.
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")

# Workers that die of SIGSEGV leave no core files.
NO_CORE = ("prlimit", "--core=0:0")

as_root = os.geteuid() == 0


def runs(*command: str) -> bool:
    """Tell whether `command` is installed and succeeds."""
    try:
        return subprocess.run(command, capture_output=True, timeout=DEADLINE).returncode == 0
    except FileNotFoundError:
        return False


def session(sid: int) -> list[int]:
    """Return the pids of the living processes of the session `sid`."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == sid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except (OSError, psutil.Error):
            # The process ended while it was being looked at.
            pass
    return found


def children(pid: int) -> list[int]:
    """Return the pids of the living children of `pid`.

    psutil would look at all processes of the machine to find them.
    """
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in found if not gone(int(child))]


def forked_children(pid: int) -> list[int]:
    """Return the pids of the children of `pid`, including those that have just been forked."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def title(pid: int) -> str:
    """Return the title of the process `pid`, empty if the process is gone."""
    try:
        # The title is padded with blanks to the length of the old arguments.
        return " ".join(psutil.Process(pid).cmdline()).rstrip()
    except psutil.Error:
        return ""


def stop(pid: int) -> None:
    """Stop the process `pid`, and wait until it is stopped."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def gone(pid: int) -> bool:
    """Tell whether the process `pid` has ended."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Callable[[int], object]]:
    """Yield a function that moves a process to a cgroup with at most `limit` bytes of memory.

    Only pages that a process gets from then on count. Skips the test if there can be no such group.
    """
    roots = {"memory.limit_in_bytes": "/sys/fs/cgroup/memory", "memory.max": "/sys/fs/cgroup"}
    for name, root in roots.items():
        group = Path(root) / f"tailsrv-test-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            if (group / name).exists():
                break
            group.rmdir()
    else:
        pytest.skip("no memory cgroup can be made")
    try:
        (group / name).write_text(str(limit))
        yield lambda pid: (group / "cgroup.procs").write_text(str(pid))
    finally:
        group.rmdir()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that the process `pid` has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def switches(pid: int) -> int:
    """Return how often the process `pid` has gone to sleep; each wakeup adds one."""
    return int(psutil.Process(pid).num_ctx_switches().voluntary)


def descriptors(pid: int) -> list[str]:
    """Return what each open descriptor of the process `pid` leads to."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        # It may be closed meanwhile.
        with suppress(FileNotFoundError):
            found.append(os.readlink(fd))
    return found


def open_descriptors(pid: int) -> int:
    """Return how many descriptors the process `pid` has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
