"""The table of faults: how each fault is brought about, and how its outcome is determined."""

import errno
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from faults.bench import FaultBench
from support.strace import attached
from support.waiting import DEADLINE, eventually
from tailsrv.supervisor.state_file import decode

TABLE = Path(__file__).with_name("faults.md")
POLLING = "polling the file once a second"
# The outcome of a call that the process does not make that often.
NOT_MADE = "not made"
NOT_TRIED = "-"
# In place of an error: the process is killed.
KILL = "KILL"
# Parts of the log lines about a state file that another server uses, or that cannot be written.
LOCKED = "another tailsrv uses it"
UNSAVED = "cannot save the log's state"

# The names of the system calls that the C library may make for one of its functions. They depend on
# the machine and the version of the library; "?" marks those that may not exist.
CALLS = {
    "fork": "clone,clone3,?fork,?vfork",
    "stat": "newfstatat,fstat,?stat,statx",
    "accept": "accept4,?accept",
    "epoll_wait": "epoll_pwait,?epoll_wait",
    "open": "openat",
    "poll": "ppoll,?poll",
    "wait": "wait4",
    "pread": "pread64",
    "recv": "recvfrom",
    "send": "sendto",
    "sleep": "clock_nanosleep",
}


@dataclass(frozen=True)
class Case:
    """One fault: the `occurrence`-th `call` that `process` makes in `act` fails with `error`.

    With the error KILL, the process is killed instead of making the call.
    """

    process: str
    act: str
    call: str
    error: str
    occurrence: int
    expected: str
    # Whether the error is the first one in its line of the table.
    first: bool

    def __str__(self) -> str:
        return "-".join(
            [self.process, self.act, self.call, self.error, str(self.occurrence)]
        ).replace(" ", "_")


def read_table(path: Path = TABLE) -> list[Case]:
    """Return the cases of the tables in `path`."""
    cases: list[Case] = []
    columns: list[str] = []
    for heading, cells in _rows(path):
        if cells[0] == "call":
            columns = cells
        elif heading:
            call, errors, *others, _ = cells
            if columns[2] == "which":
                which, outcome = others
                outcomes = dict.fromkeys(_numbers(which), outcome)
            else:
                outcomes = dict(zip(map(_number, columns[2:-1]), others, strict=True))
            names = errors.split()
            cases += [
                Case(
                    heading[0],
                    heading[1],
                    call.strip("`"),
                    name,
                    occurrence,
                    outcome,
                    name == names[0],
                )
                for occurrence, outcome in outcomes.items()
                for name in names
            ]
    return cases


def _number(ordinal: str) -> int:
    return int(re.sub(r"\D", "", ordinal))


def _numbers(which: str) -> Iterator[int]:
    """Yield the numbers in a text like "1 4-6"."""
    for part in which.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def read_exempt(path: Path = TABLE) -> set[str]:
    """Return the calls that do not fail, according to `path`."""
    return {
        name.strip("`")
        for heading, cells in _rows(path)
        if not heading
        for name in cells[0].split()
    }


def _rows(path: Path) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield the process and act of each table row about calls, and its cells.

    Process and act come from the heading; they are missing in the last section. The first row of a
    table begins with "call", and contains the names of the columns.
    """
    heading: tuple[str, ...] = ()
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            match = re.fullmatch(r"### (\w+): (.+)", line)
            heading = match.groups() if match else ()
        elif line.startswith(("| `", "| call |")):
            yield heading, [cell.strip() for cell in line.strip("| ").split(" | ")]


class Trace:
    """What strace has recorded of one process in which it makes a call fail."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def calls(self) -> Counter[str]:
        """Return how often the process has made each call, by the names in the table."""
        made = Counter(
            re.findall(r"^(\w+)\(", self._path.read_text(errors="replace"), re.MULTILINE)
        )
        names = {
            call.strip("?"): name for name, calls in CALLS.items() for call in calls.split(",")
        }
        found: Counter[str] = Counter()
        # strace counts each system call of a function separately.
        for call, count in made.items():
            found[names.get(call, call)] = max(count, found[names.get(call, call)])
        return found

    def fired(self) -> bool:
        """Tell whether the fault has been injected."""
        return "(INJECTED)" in self._path.read_text(errors="replace")

    def __str__(self) -> str:
        return self._path.read_text(errors="replace")[-2000:]


@contextmanager
def fault(pid: int, case: Case, path: Path, *options: str) -> Iterator[Trace]:
    """Make a call of the process `pid` fail; strace writes its trace to `path`."""
    calls = CALLS.get(case.call, case.call)
    effect = "signal=KILL" if case.error == KILL else f"error={case.error}"
    with traced(
        pid,
        path,
        *options,
        "-e",
        f"trace={calls}",
        "-e",
        f"inject={calls}:{effect}:when={case.occurrence}",
    ) as trace:
        yield trace


@contextmanager
def traced(pid: int, path: Path, *options: str) -> Iterator[Trace]:
    """Attach strace to the process `pid`; it writes its trace to `path`."""
    with attached(pid, path, "-e", "signal=none", *options):
        yield Trace(path)


def selection(bench: FaultBench, act: "Act") -> list[str]:
    """Return options of strace for the calls that count in `act`; all of them by default.

    With these options, strace counts how often a call is made about certain files.
    """
    state = str(bench.state_file)
    paths = {
        "": (),
        "file": (str(bench.path),),
        "state": (os.path.dirname(state), state, f"{state}.new", f"{state}.lock"),
    }[act.about]
    return [word for path in paths for word in ("-P", path)]


# How the faults are brought about.


@dataclass(frozen=True)
class Act:
    """What makes a process call.

    `begin`, then `turn` up to `turns` times. With `held`, tracing starts when a process has stopped
    at that breakpoint after `begin`. Only calls about the served file or about the state file are
    traced if `about` is "file" or "state". After a fault about the state file, the server is killed
    and started again.
    """

    turn: Callable[[FaultBench], None]
    turns: int = 1
    held: str = ""
    begin: Callable[[FaultBench], object] = FaultBench.ready
    about: str = ""


def upgrade(bench: FaultBench) -> None:
    """Replace the program by itself; it may fail with a log message."""
    begin_upgrade(bench)
    bench.await_upgrade()


def drain(bench: FaultBench) -> None:
    """Terminate the server; every client receives everything up to the end of the file."""
    assert bench.server is not None
    bench.server.signal(signal.SIGTERM)
    for client in bench.followers:
        bench.lost += not (client.read(bench.data) and client.ended())
    assert bench.stalled is not None
    bench.lost += not (bench.stalled.read(bench.data) and bench.stalled.ended())
    bench.server.process.wait(DEADLINE)


def begin_boot(bench: FaultBench) -> None:
    """Kill the worker, so that a successor boots."""
    bench.ready()
    os.kill(bench.worker, signal.SIGKILL)


def begin_upgrade(bench: FaultBench) -> None:
    """Request an upgrade, whose result appears in the log."""
    server = bench.ready()
    bench.upgrade_lines = len(server.lines("upgrade"))
    server.signal(signal.SIGHUP)


def begin_start(bench: FaultBench) -> None:
    """Start another server; a fault may make it end early."""
    bench.stop()
    bench.launch()


def begin_anew(bench: FaultBench) -> None:
    """Replace the server by another one, which serves."""
    bench.stop()
    bench.ready()


def begin_restart(bench: FaultBench) -> None:
    """Kill the server, rotate the file, and start another server for the same log."""
    bench.stop()
    bench.archive()
    bench.launch(fresh=False)


def await_start(bench: FaultBench) -> None:
    """Wait until the server serves or has ended."""
    server = bench.server
    assert server is not None
    eventually(lambda: server.process.poll() is not None or server.lines("worker ready"))
    if server.process.poll() is None:
        bench.connect_clients()


def await_restart(bench: FaultBench) -> None:
    """Wait until the server has rolled to the file of the rotation, or has ended."""
    server = bench.server
    assert server is not None
    eventually(lambda: server.process.poll() is not None or server.lines("rolled: "))
    await_start(bench)


def roll(bench: FaultBench) -> None:
    """Rotate the file; without a supervisor, no worker rolls to the next one."""
    server = bench.server
    assert server is not None
    before = len(server.lines("rolled: "))
    bench.move_away()
    bench.new_file()
    eventually(lambda: server.process.poll() is not None or len(server.lines("rolled: ")) > before)
    if server.process.poll() is None:
        bench.follow()


ACTS = {
    "append": Act(FaultBench.append, 500),
    "visit": Act(FaultBench.visit, 100),
    "header in pieces": Act(FaultBench.visit_in_pieces, 20),
    "crowd": Act(FaultBench.crowd, 1),
    "slow reader": Act(FaultBench.visit_slowly, 100),
    "leave": Act(FaultBench.leave, 100),
    "refuse": Act(FaultBench.be_refused, 100),
    "alone": Act(FaultBench.be_alone, 50),
    "ask": Act(FaultBench.ask, 150),
    "death": Act(FaultBench.kill_worker, 2),
    "upgrade": Act(upgrade, 1),
    "rotation": Act(FaultBench.rotate, 1),
    "drain": Act(drain, 1),
    "boot": Act(FaultBench.await_worker, held="worker", begin=begin_boot),
    "start": Act(await_start, held="main", begin=begin_start),
    "proof": Act(FaultBench.await_upgrade, held="proof", begin=begin_upgrade),
    "takeover": Act(FaultBench.await_upgrade, held="main", begin=begin_upgrade),
    "slow rotation": Act(FaultBench.rotate_slowly, 1),
    "first slow rotation": Act(FaultBench.rotate_slowly, 1, begin=begin_anew),
    "truncation": Act(FaultBench.truncate, 1),
    "file at start": Act(await_start, held="main", begin=begin_start, about="file"),
    "state at start": Act(await_start, held="main", begin=begin_start, about="state"),
    "state at restart": Act(await_restart, held="main", begin=begin_restart, about="state"),
    "state at a roll": Act(roll, about="state"),
    "state at the end": Act(drain, about="state"),
}


Tracer = Callable[[int], AbstractContextManager[Trace]]


def perform(bench: FaultBench, act: Act, process: str, tracer: Tracer) -> Trace:
    """Trace the process and perform `act` until the fault has occurred or all turns are over."""
    if act.begin is not begin_start:
        bench.ready()
    if act.held:
        (bench.hold / act.held).touch()
    act.begin(bench)
    server = bench.server
    assert server is not None
    pid = bench.worker if process == "worker" else server.pid
    if act.held:
        pid = (
            bench.held(act.held, lambda: server.pid)
            if act.held == "main"
            else bench.held_child(act.held, bench.worker)
        )
    with tracer(pid) as trace:
        if act.held:
            os.kill(pid, signal.SIGCONT)
        for _ in range(act.turns):
            act.turn(bench)
            if trace.fired() or bench.ended():
                break
        if not bench.ended():
            bench.rest()
    return trace


def run(bench: FaultBench, case: Case, path: Path) -> str:
    """Make the fault occur and return its outcome; strace writes its trace to `path`."""
    act = ACTS[case.act]
    if act.about == "state":
        return run_about_state(bench, act, case, path)
    # These lines are rate-limited in the log, so use a new server before they are suppressed.
    if bench.log().count(": client disconnected") >= 9:
        bench.stop()
    if act.begin is not begin_start:
        bench.ready()
        # A worker reports a departed client after a moment. Until then the supervisor has a
        # descriptor too many, and the processes sleep.
        bench.await_clients()
        bench.rest()
    server, starts, begin, before = (
        bench.server,
        bench.starts,
        len(bench.log()),
        bench.count_descriptors(),
    )
    options = selection(bench, act)
    fired = perform(bench, act, case.process, lambda pid: fault(pid, case, path, *options)).fired()
    outcome = bench.outcome()
    log = bench.log()[begin if bench.starts == starts else 0 :]
    assert "Traceback" not in log
    if server is not None and bench.server is server and case.call != "close":
        eventually(
            lambda: all(
                count == before[pid]
                for pid, count in bench.count_descriptors().items()
                if pid in before
            )
        )
    # This server is polling from now on, which is slow.
    if POLLING in log:
        bench.stop()
    return qualify(outcome, case, log) if fired else NOT_MADE


def run_about_state(bench: FaultBench, act: Act, case: Case, path: Path) -> str:
    """Do the same for a call about the state file, and restart the server afterwards."""
    options = selection(bench, act)
    starts, begin = bench.starts, len(bench.log())
    trace = perform(bench, act, case.process, lambda pid: fault(pid, case, path, *options))
    outcome = bench.outcome()
    log = bench.log()[begin if bench.starts == starts else 0 :]
    assert "Traceback" not in log
    assert log.count(UNSAVED) <= 1
    content = bench.state_file.read_bytes() if bench.state_file.exists() else None
    # Only a server that starts for the first time may leave none.
    assert act.begin is begin_start if content is None else decode(content, str(bench.path))
    bench.restart()
    if case.error == KILL and outcome == f"ends {-signal.SIGKILL}":
        return "killed"
    if not trace.fired():
        return NOT_MADE
    if LOCKED in log and outcome == "ends 1":
        return "locked"
    return "unsaved" if UNSAVED in log and outcome == "exact" else qualify(outcome, case, log)


def qualify(outcome: str, case: Case, log: str) -> str:
    """Distinguish outcomes whose reason is in the log from those whose reason is not."""
    logged = os.strerror(getattr(errno, case.error)) in log
    if outcome == "closed":
        return "closed" if logged else "left"
    silent = outcome.startswith(("ends", "served on")) and not logged
    return f"{outcome} without a log line" if silent else outcome
