"""The report on one server, and the verdict on it: a level and the reasons for the level. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from tailsrv.formatting import counted
from tailsrv.status_schema import (
    ClientStatus,
    FileStatus,
    ListenerStatus,
    LogStatus,
    SegmentStatus,
    ServerState,
)

# Largest share of a process's descriptors, or of an accept queue, that may be in use without a
# WARNING.
NEARLY_ALL = 0.9
# Seconds without an answer to a ping after which a worker counts as hung. A healthy worker answers
# within milliseconds.
HUNG_AFTER = 2.0
# Seconds for which the death of a worker is a WARNING.
RECENTLY = 60.0
# Minutes without a next file after which this is a WARNING (`--follow-name`). Most writers create
# their next file at once, a few with their next line.
LONG_MISSING = 5

# The states in which there must be workers and the file must exist.
WORKING = frozenset({ServerState.SERVING, ServerState.STARTING})
# The value of psutil.STATUS_STOPPED. This module does not import psutil, because it is pure.
STOPPED = "stopped"
# States of a process that has ended, but has not been reaped yet.
ENDED_STATES = frozenset({"zombie", "dead"})

Number = TypeVar("Number", int, float)


class Level(IntEnum):
    """How healthy a server is. The number is the exit status of a check.

    The numbers are those of https://www.monitoring-plugins.org/doc/guidelines.html, section "Plugin
    Return Codes".

    Attributes:
        OK: There is no problem.
        WARNING: The server works, but something needs attention.
        CRITICAL: The server does not work, or not for all clients.
        UNKNOWN: The health of the server cannot be determined.

    """

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


# From the best level to the worst, in the order of max_state_alt() in the Monitoring Plugins: a
# known problem is worse than an unknown state.
_WORSE = (Level.OK, Level.UNKNOWN, Level.WARNING, Level.CRITICAL)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that `find` has found.

    Attributes:
        endpoints: The addresses and ports that it listens on, as in its process title: `*:4321`
            for all addresses, `127.0.0.1:4321`, `[::1]:4321`.
        pid: Process ID of its supervisor. 0 if the supervisor is in another pid namespace
            (pid_namespaces(7)), where this process cannot see it. None if it is unknown, because
            the connection to the control socket failed, or if the supervisor has died.
        uid: User ID of its supervisor or its orphaned workers. None if it is unknown.
        user: Name of that user. If no name was found within half a second, it is `uid` as text.
            None if `uid` is unknown.
        ours: Whether the server certainly belongs to the user of this process.
        orphans: Process IDs of its workers if its supervisor has died and they serve on. 0 stands
            for a worker in another pid namespace. Empty if there is a supervisor.

    """

    endpoints: tuple[str, ...]
    pid: int | None
    uid: int | None
    user: str | None
    ours: bool
    orphans: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a server. A figure that is not available is None.

    Attributes:
        pid: Process ID.
        state: psutil's word for its state: `sleeping`, `running`, `stopped`, `disk-sleep` and
            others.
        uptime: Seconds since it started.
        cpu: CPU use during the inspection, in percent of one processor.
        cpu_seconds: CPU time that it has used since it started, in seconds.
        pss: Memory in bytes. A page that several processes share counts in equal parts for each of
            them (proc(5), smaps).
        descriptors: Number of open descriptors.
        descriptor_limit: Largest number of open descriptors, the soft limit RLIMIT_NOFILE. None
            also if there is no limit.

    """

    pid: int
    state: str | None
    uptime: float | None
    cpu: float | None
    cpu_seconds: float | None
    pss: int | None
    descriptors: int | None
    descriptor_limit: int | None


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """One slot and its worker.

    Attributes:
        slot: Number of the slot, from 0.
        process: The worker. None while the slot is empty, or if the worker has just ended.
        ready: Whether the worker has reported that it is ready.
        clients: Number of clients of the slot, including the unprotected ones.
        unprotected: Number of clients that would be disconnected if the worker died.
        restarts: Number of workers of this slot that died and were replaced.
        restarted: Seconds since the last of these replacements. None if there was none.
        silent: For how many seconds the worker has not answered a ping. 0 if no answer is due.

    """

    slot: int
    process: Process | None
    ready: bool
    clients: int
    unprotected: int
    restarts: int
    restarted: float | None
    silent: float

    @property
    def alive(self) -> bool:
        """Whether the slot has a worker that has not ended."""
        return self.process is not None and self.process.state not in ENDED_STATES

    @property
    def stopped(self) -> bool:
        """Whether a signal such as SIGSTOP has stopped the worker (signal(7))."""
        return self.process is not None and self.process.state == STOPPED

    @property
    def hung(self) -> bool:
        """Whether the worker is alive, not stopped, and silent for at least HUNG_AFTER seconds."""
        return self.alive and not self.stopped and self.silent >= HUNG_AFTER


@dataclass(frozen=True, slots=True)
class ClientHealth(ClientStatus):
    """One client and its progress: the fields of `ClientStatus`, and what follows from them.

    Attributes:
        lag: Bytes between `position` and the end of the log, 0 if the position is beyond the end.
            None if the position or the end of the log is unknown.
        beyond: Whether the position is beyond the end of the log. Such a client waits until the
            log has grown that far.

    """

    lag: int | None
    beyond: bool = False

    @classmethod
    def of(cls, client: ClientStatus, end: int | None) -> "ClientHealth":
        """Return what is known about `client` in a log with this `end`."""
        position = client.position
        lag = None if end is None or position is None else end - position
        return cls(
            client.slot,
            client.peer,
            client.start,
            position,
            lag=None if lag is None else max(0, lag),
            beyond=lag is not None and lag < 0,
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all slots, listeners or processes of a server.

    Attributes:
        clients: Number of clients, including the unprotected ones.
        unprotected: Number of clients that would be disconnected if their worker died.
        max_clients: Limit of the number of clients (`--max-clients`). 0 means no limit.
        restarts: Number of workers that died and were replaced.
        queued: Number of connections that wait to be accepted, over all listeners.
        cpu: CPU use of all processes during the inspection, in percent of one processor. This
            figure and the two below are None if the figure of one process is not available.
        pss: Memory of all processes in bytes.
        descriptors: Number of open descriptors of all processes.

    """

    clients: int
    unprotected: int
    max_clients: int
    restarts: int
    queued: int
    cpu: float | None
    pss: int | None
    descriptors: int | None


@dataclass(frozen=True, slots=True)
class HealthReport:
    """The result of `inspect` for one server.

    Attributes:
        server: The server, with the process ID of its supervisor.
        version: Version of tailsrv that the supervisor runs.
        state: `serving`, `starting`, `waiting for file` or `draining`.
        started: When the server started, in seconds of Unix time. An upgrade does not change it.
        file: The served file.
        log: The log, whose active segment is in the served file. None while there is no file.
        supervisor: The supervisor's process.
        workers: All slots, in the order of their numbers, with or without a worker.
        listeners: The listening sockets, in the order of their slots.
        totals: The sums over the server.
        segments: The segments of the log in order, without the oldest ones if there are more than
            2000. None if `inspect` was not asked for clients.
        clients: The clients that stay connected if their worker dies, in the order of their slots.
            None if `inspect` was not asked for them.

    """

    server: Server
    version: str
    state: str
    started: float
    file: FileStatus
    log: LogStatus | None
    supervisor: Process
    workers: tuple[WorkerHealth, ...]
    listeners: tuple[ListenerStatus, ...]
    totals: Totals
    segments: tuple[SegmentStatus, ...] | None
    clients: tuple[ClientHealth, ...] | None


@dataclass(frozen=True, slots=True)
class OrphanHealth:
    """One orphaned worker. All fields but the first and the last are None if it does not answer.

    Attributes:
        pid: Process ID. 0 if the worker is in another pid namespace.
        slot: Number of its slot.
        clients: Number of its clients.
        seconds: Seconds for which it still serves, unless a supervisor takes over.
        process: The worker's process, without its CPU use. None if it cannot be seen.

    """

    pid: int
    slot: int | None
    clients: int | None
    seconds: float | None
    process: Process | None


@dataclass(frozen=True, slots=True)
class OrphanReport:
    """What is known about a server whose supervisor has died and whose workers serve on.

    Attributes:
        version: Version of tailsrv that the workers run. This field and the next three are None if
            no worker answers.
        path: Absolute path of the served file.
        clients: Number of clients of the workers that answer.
        seconds: Seconds until the first of these workers begins to drain, unless a supervisor takes
            over.
        workers: The workers.

    """

    version: str | None
    path: str | None
    clients: int | None
    seconds: float | None
    workers: tuple[OrphanHealth, ...]


@dataclass(frozen=True, slots=True)
class HealthVerdict:
    """The verdict on a server.

    Attributes:
        level: The level.
        reasons: The reasons for the level, each a short phrase, those for CRITICAL first. Empty if
            the level is OK.

    """

    level: Level
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """A server, the verdict on it, and the report that is the basis of the verdict.

    `report` is None if the server could not be inspected, or has no supervisor. In the second case,
    `orphan_report` describes its workers.
    """

    server: Server
    verdict: HealthVerdict
    report: HealthReport | None = None
    orphan_report: OrphanReport | None = None


def worst(levels: Iterable[Level]) -> Level:
    """Return the worst of `levels`, OK if there are none.

    CRITICAL is the worst, followed by WARNING, UNKNOWN and OK.
    """
    return max(levels, key=_WORSE.index, default=Level.OK)


def judge(report: HealthReport) -> HealthVerdict:
    """Return the verdict on a server: CRITICAL, WARNING or OK, and the reasons.

    This function never returns UNKNOWN, and makes no system call. If a figure of the report is
    None, the checks that need it are skipped. There is one exception: in the states `serving` and
    `starting`, an unknown file size is CRITICAL.
    """
    critical, warning = tuple(_critical(report)), tuple(_warning(report))
    level = Level.CRITICAL if critical else Level.WARNING if warning else Level.OK
    return HealthVerdict(level, critical + warning)


def describe_orphans(report: OrphanReport) -> str:
    """Return the sentence about a server without a supervisor."""
    workers = counted(len(report.workers), "orphaned worker")
    several = len(report.workers) > 1
    silent = sum(worker.clients is None for worker in report.workers)
    if report.clients is None or report.seconds is None:
        return f"no supervisor, {workers} {'do' if several else 'does'} not answer"
    sentence = (
        f"no supervisor, {workers} {'serve' if several else 'serves'}"
        f" {counted(report.clients, 'client')} for another {counted(int(report.seconds), 'second')}"
    )
    if silent:
        sentence += f", {silent} of them {'does' if silent == 1 else 'do'} not answer"
    return sentence


def ready(report: HealthReport) -> int:
    """Return the number of slots with a worker that is alive and ready."""
    return sum(worker.alive and worker.ready for worker in report.workers)


def total(figures: Iterable[Number | None]) -> Number | None:
    """Return the sum of `figures`, None if one of them is None or there are none."""
    known = []
    for figure in figures:
        if figure is None:
            return None
        known.append(figure)
    return sum(known[1:], known[0]) if known else None


def _critical(report: HealthReport) -> Iterator[str]:
    working = report.state in WORKING
    if working and not any(worker.alive for worker in report.workers):
        yield "no worker"
    yield from _name_workers(
        [worker for worker in report.workers if worker.stopped], "is stopped", "are stopped"
    )
    yield from _name_workers([worker for worker in report.workers if worker.hung], "hangs", "hang")
    if working and report.file.gone and not report.file.follow_name:
        yield "the file is gone"
    elif working and report.file.size is None:
        yield "the file cannot be read: its file system does not answer"
    if report.file.error is not None:
        yield f"cannot open the file: {report.file.error}"


def _warning(report: HealthReport) -> Iterator[str]:
    if (
        report.state in WORKING
        and ready(report) < len(report.workers)
        and any(worker.alive for worker in report.workers)
    ):
        yield f"{ready(report)} of {counted(len(report.workers), 'worker')} ready"
    if report.state in WORKING and (report.file.missing or 0.0) >= 60 * LONG_MISSING:
        yield f"the file is gone, and there has been no next one for {LONG_MISSING} minutes"
    yield from _descriptors_warning("supervisor", report.supervisor)
    for worker in report.workers:
        if worker.process is not None:
            yield from _descriptors_warning(f"worker {worker.slot}", worker.process)
    for listener in report.listeners:
        if listener.backlog and listener.queued > NEARLY_ALL * listener.backlog:
            slot = "" if listener.slot is None else f" of slot {listener.slot}"
            yield (
                f"the accept queue{slot} at {listener.endpoint} holds"
                f" {listener.queued} of {listener.backlog} connections"
            )
    if (
        (most := report.totals.max_clients)
        and report.totals.clients >= most
        and report.totals.queued
    ):
        waiting = counted(report.totals.queued, "connection")
        yield f"--max-clients is reached ({most}): {waiting} waiting"
    recent = [
        worker
        for worker in report.workers
        if worker.restarted is not None and worker.restarted < RECENTLY
    ]
    yield from _name_workers(
        recent, "was restarted in the last minute", "were restarted in the last minute"
    )


def _descriptors_warning(name: str, process: Process) -> Iterator[str]:
    used, limit = process.descriptors, process.descriptor_limit
    if used is not None and limit is not None and used > NEARLY_ALL * limit:
        yield f"{name} uses {used} of {limit} descriptors"


def _name_workers(workers: Sequence[WorkerHealth], singular: str, plural: str) -> Iterator[str]:
    if workers:
        slots = ", ".join(str(worker.slot) for worker in workers)
        yield f"worker {slots} {singular}" if len(workers) == 1 else f"workers {slots} {plural}"
