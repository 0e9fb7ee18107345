"""Looks at a server's processes with psutil, each by its pid and start time, and puts together what there is to know.

Only single processes are looked at: a walk over all of /proc is dear, and fails where /proc hides other users'.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import psutil  # type: ignore[import-untyped]

from tailsrv.health.control_client import (
    STATUS_TIMEOUT,
    EndedError,
    ask_clients,
    ask_status,
    attempt,
    state_of,
)
from tailsrv.health.report import (
    HUNG_AFTER,
    STOPPED,
    HealthReport,
    Level,
    Process,
    Server,
    Totals,
    WorkerHealth,
    total,
)
from tailsrv.linux.process import Stat, read_stat
from tailsrv.status_schema import ServerStatus, SlotStatus

# seconds between two questions: pings are answered by then, and CPU time, counted in 10 ms, shows
SAMPLE_PAUSE = 0.25
# seconds after which a silent worker is what it is
ASK_TIMEOUT = HUNG_AFTER + 0.5
# seconds after which no more memory is looked at, which for gigabytes takes long
LOOK_TIMEOUT = 5.0


def _cpu_seconds(pid: int) -> float | None:
    times = attempt(lambda: psutil.Process(pid).cpu_times())
    return None if times is None else float(times.user + times.system)


def _sample(pids: Iterable[int]) -> dict[int, tuple[float, float]]:
    """Return for each process the time now and the processor time that it has used, both in seconds."""
    return {
        pid: (time.monotonic(), used) for pid in pids if (used := _cpu_seconds(pid)) is not None
    }


def _descriptor_limit(pid: int) -> int | None:
    """Return the soft limit of a process's descriptors, None if there is no limit (proc(5), /proc/PID/limits).

    psutil asks prlimit(2), which refuses root in a container where the process is another user's.
    """
    with open(f"/proc/{pid}/limits", encoding="ascii") as file:
        soft = [line.split()[3] for line in file if line.startswith("Max open files ")]
    return int(soft[0]) if soft and soft[0].isdigit() else None


def _look(pid: int, stat: Stat, before: tuple[float, float] | None, until: float) -> Process | None:
    """Return the figures of a process that started as `stat` says, None if it has ended meanwhile.

    After `until`, a time of time.monotonic(), its memory is not looked at.
    """
    if read_stat(pid) != stat:
        return None
    used = _cpu_seconds(pid)
    seen = Process(
        pid=pid,
        state=state_of(pid),
        uptime=time.clock_gettime(time.CLOCK_BOOTTIME) - stat.ticks / os.sysconf("SC_CLK_TCK"),
        cpu=None
        if used is None or before is None
        else max(0.0, 100 * (used - before[1]) / (time.monotonic() - before[0])),
        cpu_seconds=used,
        pss=attempt(lambda: int(psutil.Process(pid).memory_full_info().pss))
        if time.monotonic() < until
        else None,
        descriptors=attempt(lambda: int(psutil.Process(pid).num_fds())),
        descriptor_limit=attempt(lambda: _descriptor_limit(pid)),
    )
    # looked at last: before it the pid was the same process's
    return seen if read_stat(pid) == stat else None


def _look_at_worker(
    slot: SlotStatus, supervisor: int, samples: dict[int, tuple[float, float]], until: float
) -> WorkerHealth:
    process = None
    if slot.pid is not None and slot.ticks is not None:
        process = _look(slot.pid, Stat(supervisor, slot.ticks), samples.get(slot.pid), until)
    return WorkerHealth(
        slot.slot, process, slot.ready, slot.clients, slot.unprotected, slot.restarts, slot.restarted, slot.silent
    )  # fmt: skip


def inspect(server: Server, *, clients: bool = False) -> HealthReport:
    """Ask `server`, look at its processes, and return what there is to know; with `clients` also each client.

    It takes a quarter of a second, in which CPU use is measured; up to 2.5 seconds where a worker does
    not answer its supervisor, 5 where the supervisor does not answer us, and 15 at most, or 25 with
    `clients`, whatever is answered. `judge` says what to make of the report.

    Raises NotOursError if the server is another user's and we are not root; EndedError if it has ended; InspectError
    with level CRITICAL if the supervisor does not answer, and with level UNKNOWN if it cannot be understood.
    """
    deadline = time.monotonic() + 2 * STATUS_TIMEOUT
    status = ask_status(server, deadline)
    samples = _sample([status.pid, *(worker.pid for worker in status.workers if worker.pid)])
    status = _ask_again(server, status, deadline)
    listed = ask_clients(server) if clients else None
    until = time.monotonic() + LOOK_TIMEOUT
    stat = read_stat(status.pid)
    supervisor = _look(status.pid, stat, samples.get(status.pid), until) if stat else None
    if supervisor is None:
        raise EndedError("the server has ended", Level.CRITICAL)
    workers = tuple(_look_at_worker(slot, status.pid, samples, until) for slot in status.workers)
    return HealthReport(
        server=replace(server, pid=status.pid),
        version=status.version,
        state=status.state,
        started=status.started,
        file=status.file,
        supervisor=supervisor,
        workers=workers,
        listeners=status.listeners,
        totals=_add_up(
            status, [supervisor, *(worker.process for worker in workers if worker.process)]
        ),
        clients=listed,
    )


def _ask_again(server: Server, first: ServerStatus, deadline: float) -> ServerStatus:
    """Return a later status: the first question made the supervisor ping its workers, this one shows who did not answer."""
    end = time.monotonic() + ASK_TIMEOUT
    while True:
        time.sleep(SAMPLE_PAUSE)
        status = ask_status(server, deadline)
        if (status.pid, status.ticks) != (first.pid, first.ticks):
            raise EndedError("the server has ended, another has taken its place", Level.CRITICAL)
        if time.monotonic() >= end or not any(_is_open(worker) for worker in status.workers):
            return status


def _is_open(worker: SlotStatus) -> bool:
    """Tell whether it remains to be seen if a silent worker hangs."""
    if not 0 < worker.silent < HUNG_AFTER or worker.pid is None:
        return False
    return state_of(worker.pid) != STOPPED


def _add_up(status: ServerStatus, processes: Sequence[Process]) -> Totals:
    return Totals(
        clients=status.clients,
        unprotected=status.unprotected,
        max_clients=status.max_clients,
        restarts=sum(worker.restarts for worker in status.workers),
        queued=sum(listener.queued for listener in status.listeners),
        cpu=total(process.cpu for process in processes),
        pss=total(process.pss for process in processes),
        descriptors=total(process.descriptors for process in processes),
    )
