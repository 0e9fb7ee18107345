"""What there is to know of a server, and the judgement on it. Pure: facts in, level and reasons out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from tailsrv.formatting import counted
from tailsrv.status_schema import ClientStatus, FileStatus, ListenerStatus

# of the descriptors or of an accept queue
NEARLY_ALL = 0.9
# seconds without an answer to a ping; a healthy worker takes milliseconds
HUNG_AFTER = 2.0
# seconds in which a restarted worker is news
RECENTLY = 60.0

# in every other state workers may rightly be missing, and the file gone
WORKING = frozenset({"serving", "starting"})
# psutil.STATUS_STOPPED
STOPPED = "stopped"
# a process of which only the entry in the process table is left
ENDED_STATES = frozenset({"zombie", "dead"})


Number = TypeVar("Number", int, float)


class Level(IntEnum):
    """How well a server is, and the exit status that says so to whoever monitors it.

    The numbers are those of https://www.monitoring-plugins.org/doc/guidelines.html, "Plugin Return Codes".
    """

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


# The order of max_state_alt() in the same project: what is known to be bad comes before what is not known.
_WORSE = (Level.OK, Level.UNKNOWN, Level.WARNING, Level.CRITICAL)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that was found: what it listens on, whose it is, and its supervisor's pid.

    `endpoints` are as in its titles: `*:4321`, `127.0.0.1:4321`. `pid`, `uid` and `user` are None where they cannot be
    known; a `pid` of 0 means that the supervisor is in another pid namespace (pid_namespaces(7)).
    `user` is the uid where there is no name, or none could be looked up in time. `ours`: its user is ours.
    """

    endpoints: tuple[str, ...]
    pid: int | None
    uid: int | None
    user: str | None
    ours: bool


@dataclass(frozen=True, slots=True)
class Process:
    """One process, as psutil sees it; a figure that may not be had is None.

    `state` is psutil's word (`sleeping`, `running`, `stopped`, `disk-sleep`, ...), `uptime` seconds, `cpu` percent of
    one processor while we looked, `cpu_seconds` the processor time since its start, `pss` bytes: its share of
    memory, pages that several processes have divided among them (proc(5), smaps). `descriptors` are open now, of
    `descriptor_limit`, its soft RLIMIT_NOFILE, None also if there is no limit.
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
    """A slot and its worker; `process` is None while the slot is empty.

    `silent` is for how many seconds a ping has had no answer, `restarted` how many seconds ago a worker was last
    replaced because it had died, None if never; `restarts` counts that.
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
        """Whether there is a process that can work."""
        return self.process is not None and self.process.state not in ENDED_STATES

    @property
    def stopped(self) -> bool:
        """Whether a signal has stopped it (SIGSTOP and the like, signal(7))."""
        return self.process is not None and self.process.state == STOPPED

    @property
    def hung(self) -> bool:
        """Whether it lives, is not stopped, and has not answered for HUNG_AFTER seconds."""
        return self.alive and not self.stopped and self.silent >= HUNG_AFTER


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the server: clients as the supervisor counts them, the rest of all processes; None where a part is unknown.

    `unprotected` clients would die with their worker. `max_clients` of 0 means no limit.
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
    """All that `inspect` found out about one server.

    `state` is the supervisor's word: `serving`, `starting`, `waiting for file`, `draining` or `rotating`; `started` is Unix time,
    kept through upgrades. `clients` is None unless it was asked for.
    """

    server: Server
    version: str
    state: str
    started: float
    file: FileStatus
    supervisor: Process
    workers: tuple[WorkerHealth, ...]
    listeners: tuple[ListenerStatus, ...]
    totals: Totals
    clients: tuple[ClientStatus, ...] | None


@dataclass(frozen=True, slots=True)
class HealthVerdict:
    """A level and, unless that is OK, the reasons for it, each a short phrase; the grave ones first."""

    level: Level
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """A server, the verdict on it, and the report that this rests on, None if there could be none."""

    server: Server
    verdict: HealthVerdict
    report: HealthReport | None = None


def worst(levels: Iterable[Level]) -> Level:
    """Return the worst of `levels`: CRITICAL before WARNING before UNKNOWN before OK, which is also that of none at all."""
    return max(levels, key=_WORSE.index, default=Level.OK)


def judge(report: HealthReport) -> HealthVerdict:
    """Return how well the server is, and why not better."""
    critical, warning = tuple(_critical(report)), tuple(_warning(report))
    level = Level.CRITICAL if critical else Level.WARNING if warning else Level.OK
    return HealthVerdict(level, critical + warning)


def ready(report: HealthReport) -> int:
    """Return how many slots have a worker that is ready."""
    return sum(worker.alive and worker.ready for worker in report.workers)


def total(figures: Iterable[Number | None]) -> Number | None:
    """Return the sum, None if a part of it is unknown."""
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
    yield from _named(
        [worker for worker in report.workers if worker.stopped], "is stopped", "are stopped"
    )
    yield from _named([worker for worker in report.workers if worker.hung], "hangs", "hang")
    if working and report.file.gone:
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
        yield f"{ready(report)} of {counted(len(report.workers), 'worker')}"
    yield from _crowded("supervisor", report.supervisor)
    for worker in report.workers:
        if worker.process is not None:
            yield from _crowded(f"worker {worker.slot}", worker.process)
    for listener in report.listeners:
        if listener.backlog and listener.queued > NEARLY_ALL * listener.backlog:
            whose = "" if listener.slot is None else f" of slot {listener.slot}"
            yield f"the queue{whose} at {listener.endpoint} holds {listener.queued} of {listener.backlog}"
    if (
        (most := report.totals.max_clients)
        and report.totals.clients >= most
        and report.totals.queued
    ):
        yield f"as many clients as --max-clients allows ({most}), {report.totals.queued} wait"
    recent = [
        worker
        for worker in report.workers
        if worker.restarted is not None and worker.restarted < RECENTLY
    ]
    yield from _named(
        recent, "was restarted in the last minute", "were restarted in the last minute"
    )


def _crowded(name: str, process: Process) -> Iterator[str]:
    used, limit = process.descriptors, process.descriptor_limit
    if used is not None and limit is not None and used > NEARLY_ALL * limit:
        yield f"{name} has {used} of {limit} descriptors"


def _named(workers: Sequence[WorkerHealth], singular: str, plural: str) -> Iterator[str]:
    if workers:
        slots = ", ".join(str(worker.slot) for worker in workers)
        yield f"worker {slots} {singular}" if len(workers) == 1 else f"workers {slots} {plural}"
