"""Inspects one server: asks its supervisor, measures its processes, and returns a report.

The figures of processes come from psutil. The start time of each process is checked, so that no
figure can be that of another process to which the kernel has given the same pid. Only the processes
that the supervisor reports are measured. A scan of all of /proc would be expensive, and would fail
where /proc hides the processes of other users.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import psutil  # type: ignore[import-untyped]

from tailsrv.health.control_client import (
    REPLACED,
    STATUS_TIMEOUT,
    EndedError,
    NoSupervisorError,
    ask_listing,
    ask_status,
    attempt,
    state_of,
)
from tailsrv.health.orphans import Orphan, ask_orphans
from tailsrv.health.report import (
    HUNG_AFTER,
    STOPPED,
    ClientHealth,
    HealthReport,
    Level,
    OrphanHealth,
    OrphanReport,
    Process,
    Server,
    Totals,
    WorkerHealth,
    total,
)
from tailsrv.linux.process import Stat, read_stat
from tailsrv.status_schema import ServerStatus, SlotStatus

# Seconds between two requests for the status. The first request makes the supervisor ping its
# workers. After this time the workers have answered, and their CPU time, which the kernel counts in
# units of 10 ms, can have changed measurably.
SAMPLE_PAUSE = 0.25
# Seconds to wait for the answers to these pings, so that a hung worker is recognized.
PING_TIMEOUT = HUNG_AFTER + 0.5
# Seconds after which the memory of further processes is not measured. Measuring takes long for
# processes of several gigabytes.
MEMORY_TIMEOUT = 5.0


def _cpu_seconds(pid: int) -> float | None:
    times = attempt(lambda: psutil.Process(pid).cpu_times())
    return None if times is None else float(times.user + times.system)


def _sample(pids: Iterable[int]) -> dict[int, tuple[float, float]]:
    """Return, for each process, the current time and the CPU time used so far, in seconds."""
    return {
        pid: (time.monotonic(), used) for pid in pids if (used := _cpu_seconds(pid)) is not None
    }


def _descriptor_limit(pid: int) -> int | None:
    """Return the soft limit of open descriptors of a process, None if there is no limit.

    It reads /proc/PID/limits (proc(5)). psutil would call prlimit(2), which fails even for root in
    a container if the process belongs to another user.
    """
    with open(f"/proc/{pid}/limits", encoding="ascii") as file:
        soft = [line.split()[3] for line in file if line.startswith("Max open files ")]
    return int(soft[0]) if soft and soft[0].isdigit() else None


def _inspect_process(
    pid: int, stat: Stat, before: tuple[float, float] | None, until: float
) -> Process | None:
    """Return the figures of the process `pid`, None if it is not the process that `stat` describes.

    `before` is an earlier sample of its CPU time. After `until`, a time of time.monotonic(), the
    memory is not measured.
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
    # Check last, because only then all figures above are known to be of the same process.
    return seen if read_stat(pid) == stat else None


def _inspect_worker(
    slot: SlotStatus, supervisor: int, samples: dict[int, tuple[float, float]], until: float
) -> WorkerHealth:
    process = None
    if slot.pid is not None and slot.ticks is not None:
        process = _inspect_process(
            slot.pid, Stat(supervisor, slot.ticks), samples.get(slot.pid), until
        )
    return WorkerHealth(
        slot=slot.slot,
        process=process,
        ready=slot.ready,
        clients=slot.clients,
        unprotected=slot.unprotected,
        restarts=slot.restarts,
        restarted=slot.restarted,
        silent=slot.silent,
    )


def inspect(server: Server, *, clients: bool = False) -> HealthReport:
    """Ask `server` for its status, measure its processes, and return the result.

    This takes a quarter of a second, in which CPU use is measured. It takes up to 2.5 seconds if a
    worker does not answer its supervisor, and 5 seconds if the supervisor does not answer. Whatever
    the server sends, it takes at most 15 seconds, or 25 with `clients`.

    Args:
        server: A server that `find` has returned.
        clients: Whether to ask for the segments and clients, too. Their list can be several
            megabytes long.

    Returns:
        The report. `judge` turns it into a level and the reasons for the level.

    Raises:
        NotOursError: The server belongs to another user, and this process is not root.
        EndedError: The server has ended, or another server has replaced it.
        NoSupervisorError: The supervisor has died, and the workers serve on for a while. The
            attribute `report` describes them.
        InspectError: With level CRITICAL: the supervisor does not answer. With level UNKNOWN: its
            answer is not valid in this version, or it is in another namespace. The three errors
            above are subclasses of this one.
        OSError: This process cannot ask, for example because it has no descriptor or memory left.

    """
    if server.orphans:
        raise NoSupervisorError(_inspect_orphans(ask_orphans(server)))
    deadline = time.monotonic() + 2 * STATUS_TIMEOUT
    status = ask_status(server, deadline)
    samples = _sample([status.pid, *(worker.pid for worker in status.workers if worker.pid)])
    status = _ask_after_pings(server, status, deadline)
    listing = ask_listing(server) if clients else None
    until = time.monotonic() + MEMORY_TIMEOUT
    stat = read_stat(status.pid)
    supervisor = (
        _inspect_process(status.pid, stat, samples.get(status.pid), until) if stat else None
    )
    if supervisor is None:
        raise EndedError("the server has ended", Level.CRITICAL)
    workers = tuple(_inspect_worker(slot, status.pid, samples, until) for slot in status.workers)
    return HealthReport(
        server=replace(server, pid=status.pid),
        version=status.version,
        state=status.state,
        started=status.started,
        file=status.file,
        log=status.log,
        supervisor=supervisor,
        workers=workers,
        listeners=status.listeners,
        totals=_add_up(
            status, [supervisor, *(worker.process for worker in workers if worker.process)]
        ),
        segments=listing.segments if listing else None,
        clients=tuple(ClientHealth.of(client, listing.end) for client in listing.clients)
        if listing
        else None,
    )


def _inspect_orphans(orphans: Sequence[Orphan]) -> OrphanReport:
    until = time.monotonic() + MEMORY_TIMEOUT
    workers = tuple(_inspect_orphan(orphan, until) for orphan in orphans)
    answers = [orphan.status for orphan in orphans if orphan.status is not None]
    seconds = [worker.seconds for worker in workers if worker.seconds is not None]
    return OrphanReport(
        version=answers[0].version if answers else None,
        path=answers[0].path if answers else None,
        clients=sum(status.clients for status in answers) if answers else None,
        seconds=min(seconds, default=None),
        workers=tuple(sorted(workers, key=lambda worker: (worker.slot is None, worker.slot or 0))),
    )


def _inspect_orphan(orphan: Orphan, until: float) -> OrphanHealth:
    status = orphan.status
    # The parent of an orphan depends on the system: init, or a subreaper (PR_SET_CHILD_SUBREAPER).
    stat = read_stat(orphan.pid) if orphan.pid else None
    return OrphanHealth(
        pid=orphan.pid,
        slot=None if status is None else status.slot,
        clients=None if status is None else status.clients,
        seconds=None if status is None else max(0.0, orphan.until - time.monotonic()),
        process=None if stat is None else _inspect_process(orphan.pid, stat, None, until),
    )


def _ask_after_pings(server: Server, first: ServerStatus, deadline: float) -> ServerStatus:
    """Return a later status than `first`: it shows which workers have not answered a ping.

    The request for `first` made the supervisor ping its workers.
    """
    end = time.monotonic() + PING_TIMEOUT
    while True:
        time.sleep(SAMPLE_PAUSE)
        status = ask_status(server, deadline)
        if (status.pid, status.ticks) != (first.pid, first.ticks):
            raise EndedError(REPLACED, Level.CRITICAL)
        if time.monotonic() >= end or not any(
            _may_still_answer(worker) for worker in status.workers
        ):
            return status


def _may_still_answer(worker: SlotStatus) -> bool:
    """Return whether `worker` is silent, but not yet for so long that it counts as hung."""
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
