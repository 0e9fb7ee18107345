"""Looks at processes, and what they may do."""

import os
import signal
import subprocess
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from support.waiting import DEADLINE, eventually

NOBODY = 65534

# it execs: the pid stays
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")

# workers that die of SIGSEGV leave no files behind
NO_CORE = ("prlimit", "--core=0:0")

as_root = os.geteuid() == 0


def runs(*command: str) -> bool:
    """Tell whether `command` is there and succeeds."""
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
            # it ended while we looked
            pass
    return found


def children(pid: int) -> list[int]:
    """Return the pids of the living children of `pid`; psutil would look at every process of the machine for them."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in found if not gone(int(child))]


def forked_children(pid: int) -> list[int]:
    """Return the pids of the children of `pid`, be they only just forked."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def title(pid: int) -> str:
    """Return the title of the process `pid`, empty if it has gone."""
    try:
        # behind the title the old arguments' room is empty
        return " ".join(psutil.Process(pid).cmdline()).rstrip()
    except psutil.Error:
        return ""


def stop(pid: int) -> None:
    """Stop the process `pid`, and wait until it is."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def gone(pid: int) -> bool:
    """Tell whether the process `pid` has ended."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def cpu_seconds(pid: int) -> float:
    """Return the processor time that the process `pid` has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def switches(pid: int) -> int:
    """Return how often the process `pid` has gone to sleep: one that is woken must do so again."""
    return int(psutil.Process(pid).num_ctx_switches().voluntary)


def open_descriptors(pid: int) -> int:
    """Return how many descriptors the process `pid` has."""
    return len(os.listdir(f"/proc/{pid}/fd"))
