"""The table of the worker pool: mode x state of a slot x event -> new state and actions.

The workers are real processes. Each of them notes the orders and the SIGTERM that it gets, and ends
only when its test wants it to.
"""

import faulthandler
import os
import resource
import signal
import socket
from collections.abc import Iterator, Sequence

import pytest

from support.waiting import DEADLINE
from tailsrv.config import ExitStatus, Timing
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.signals import unblock_all
from tailsrv.supervisor.restart_policy import Failures
from tailsrv.supervisor.rolling_restart import RollingRestart
from tailsrv.supervisor.slot import Slot, State
from tailsrv.supervisor.worker_pool import REPLACE_PATIENCE, CannotStart, WorkerPool
from tailsrv.worker_channel import MAX_PACKET, Notices, Ping, WorkerReport, decode, encode

# When the grace period of a drain ends, by the clock of the test.
GRACE_OVER = 100.0
TIMING = Timing(first_delay=2.0, max_delay=30.0, fork_retry=3.0, long_life=10.0)

# How a worker may end: by a signal, or with an exit status.
ENDS = {
    "done": 0,
    "killed": -signal.SIGKILL,
    "fault": -signal.SIGSEGV,
    "no-room": os.EX_TEMPFAIL,
    "cannot-boot": int(ExitStatus.CANNOT_BOOT),
}

# Each line: the mode, the state of the slot, the event, the new state, and what is done. The event
# `ended` stands for each way to end, and `due+2` means that a worker is due in two seconds.
TABLE = """
# The pool does not serve yet: it waits for the file, or an upgrade has just begun.
idle   empty     serve        starting   fork
idle   empty     drain        empty      close
idle   empty     kill         empty
idle   outdated  serve        outdated
idle   outdated  serve-anew   leaving    TERM
idle   outdated  drain        draining   Drain TERM
idle   outdated  kill         killed     KILL
idle   outdated  ended        empty

# It serves, and another slot has a worker that is ready.
run    starting  ready        ready
run    starting  done         due+0
run    starting  killed       due+0
run    starting  fault        due+0
run    starting  no-room      empty      give-up
run    starting  cannot-boot  empty      give-up
run    starting  serve-anew   leaving    TERM
run    starting  drain        draining   Drain TERM
run    starting  kill         killed     KILL
run    ready     alive        ready
run    ready     done         due+0
run    ready     killed       due+0
run    ready     fault        due+0
run    ready     no-room      due+0
run    ready     cannot-boot  due+30
run    ready     serve-anew   leaving    TERM
run    ready     drain        draining   Drain TERM
run    ready     kill         killed     KILL
run    due       time         again      fork
run    due       refused      due+3
run    due       serve-anew   again      fork
run    due       drain        draining   fork Drain TERM
run    due       kill         empty
run    again     ready        ready
run    again     done         due+2
run    again     killed       due+2
run    again     fault        due+2
run    again     no-room      due+2
run    again     cannot-boot  due+30

# A rolling restart: the workers of the version before are replaced one after another.
run    outdated  ready        outdated
run    outdated  replace      leaving    TERM
run    outdated  ended        again      fork
run    outdated  serve-anew   leaving    TERM
run    outdated  drain        draining   Drain TERM
run    outdated  kill         killed     KILL
run    leaving   ready        leaving
run    leaving   replace      leaving
run    leaving   ended        again      fork
run    leaving   overdue      leaving    KILL
run    leaving   drain        leaving
run    leaving   kill         killed     KILL

# A drain. A slot is unneeded if it has no clients, and its accept queue is empty and closed.
drain  draining  ready        draining
drain  draining  emptied      unneeded   close
drain  draining  ended        due+0
drain  draining  kill         killed     KILL
drain  unneeded  ended        empty
drain  late      ended        empty
drain  leaving   ended        due+0
drain  leaving   overdue      leaving    KILL
drain  leaving   kill         killed     KILL
drain  due       time         draining   fork Drain TERM
drain  due       refused      due+3
drain  due       kill         empty

# The end.
kill   killed    killed       empty
"""

NOTICES = {
    "ready": Notices(ready=True),
    "alive": Notices(alive=True),
    "emptied": Notices(emptied=True),
}

SERVES = ["serve", "other-ready"]
# What must happen for a slot to be in a state of the table.
WAYS = {
    "idle empty": [],
    "idle outdated": ["serve", "upgrade"],
    "run outdated": ["serve", "upgrade", "serve"],
    "run leaving": ["serve", "upgrade", "serve", "replace"],
    "drain leaving": ["serve", "upgrade", "serve", "replace", "drain"],
    "run starting": SERVES,
    "run ready": [*SERVES, "ready"],
    "run due": [*SERVES, "ready", "fault"],
    "run again": [*SERVES, "ready", "fault", "time"],
    "drain draining": [*SERVES, "ready", "drain"],
    "drain unneeded": [*SERVES, "ready", "drain", "emptied"],
    "drain late": [*SERVES, "ready", "drain", "grace-over"],
    "drain due": [*SERVES, "ready", "drain", "fault"],
    "kill killed": [*SERVES, "ready", "kill"],
}


class Bench:
    """A pool of two slots. The first one is the slot of the table, the other one is ready."""

    def __init__(self) -> None:
        self.clock = 1.0
        self.loop = EventLoop(lambda: self.clock)
        self.slots = [Slot(index, [socket.create_server(("127.0.0.1", 0))]) for index in range(2)]
        self.slot = self.slots[0]
        self.journal, self._note_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.journal.settimeout(DEADLINE)
        self.done: list[str] = []
        self.mode = "idle"
        self.make_pool()

    def make_pool(self, started_up: bool = False) -> None:
        """Make the pool, with the workers that the slots have."""
        self.pool = WorkerPool(self.slots, self.loop, (), self._be_worker, TIMING, started_up)

    # In a worker

    def _be_worker(
        self, slot: Slot, channel: socket.socket, _sockets: Sequence[socket.socket]
    ) -> None:
        """Note what the supervisor wants, and end when the test says how."""

        def note(what: str) -> None:
            self._note_end.send(f"{slot.index} {what}".encode())

        try:
            faulthandler.disable()
            channel.setblocking(True)
            signal.signal(signal.SIGTERM, lambda *_: note("TERM"))
            unblock_all()
            note("fork")
            while packet := channel.recv(MAX_PACKET):
                if packet.startswith(b"end "):
                    os._exit(int(packet[4:]))
                if packet.startswith(b"report"):
                    channel.send(packet[6:])
                    continue
                note(type(decode(packet)).__name__)
        finally:
            os._exit(1)

    # In the supervisor

    def read_journal(self) -> None:
        """Add to `done` what the worker of the slot has noted, and wait until it has no more."""
        if (worker := self.slot.worker) is None or not is_running(worker.pid):
            return
        worker.channel.send(encode(Ping()))
        while (note := self.journal.recv(100).decode().split()) != ["0", "Ping"]:
            if note[0] == "0":
                self.done.append(note[1])

    def report(self, slot: Slot, notices: Notices) -> None:
        """Let the worker of `slot` report `notices`, and the pool read that."""
        assert slot.worker is not None
        slot.worker.channel.send(b"report" + encode(WorkerReport(notices=notices)))
        self.loop.turn()

    def end(self, slot: Slot, status: int) -> None:
        """End the worker of `slot`: with the exit `status`, or by the signal `-status`."""
        self.read_journal()
        worker = slot.worker
        assert worker is not None
        if status < 0:
            os.kill(worker.pid, -status)
        else:
            worker.channel.send(b"end %d" % status)
        self.pool.handle_exit(*os.waitpid(worker.pid, 0))

    def pass_time(self, seconds: float) -> None:
        """Let `seconds` pass, and run the timers that are due."""
        self.clock += seconds
        self.loop.now = self.clock
        self.loop.timers.run(self.clock)

    def state(self) -> str:
        """Return the state of the slot as the table names it."""
        slot = self.slot
        match slot.state:
            case State.DUE:
                assert slot.due is not None
                return f"due+{slot.due - self.clock:g}"
            case State.EMPTY:
                return "empty"
            case _ if self.mode == "kill":
                return "killed"
            case State.DRAINING if not slot.listeners:
                return "unneeded"
            case State.SERVING:
                assert slot.worker is not None
                if slot.worker.ready:
                    return "ready"
                return "again" if self.pool.started_up else "starting"
            case state:
                return str(state.value)

    # What can happen

    def serve(self) -> None:
        """Begin to serve, with a worker in each slot."""
        self.mode = "run"
        self.pool.run()

    def serve_anew(self) -> None:
        """Begin to serve the file, which no worker has."""
        self.mode = "run"
        self.pool.run_anew()

    def drain(self) -> None:
        """Begin a drain."""
        self.mode = "drain"
        self.pool.drain(GRACE_OVER)

    def kill(self) -> None:
        """Kill all workers, and wait until the worker of the slot is dead."""
        self.mode = "kill"
        self.pool.kill()
        if self.slot.worker is not None:
            os.waitid(os.P_PID, self.slot.worker.pid, os.WEXITED | os.WNOWAIT)

    def refuse(self) -> None:
        """Let the kernel refuse a worker that is due now."""
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            self.pass_time(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def happen(self, event: str) -> None:
        """Let `event` happen to the slot."""
        match event:
            case "serve" | "drain" | "kill" | "upgrade":
                getattr(self, event)()
            case "serve-anew":
                self.serve_anew()
            case "ready" | "alive" | "emptied":
                self.report(self.slot, NOTICES[event])
            case "replace":
                RollingRestart(self.pool, under_way=True).advance()
            case "time":
                self.pass_time(0)
            case "refused":
                self.refuse()
            case "overdue":
                self.pass_time(REPLACE_PATIENCE)
            case "other-ready":
                self.report(self.slots[1], Notices(ready=True))
            case "grace-over":
                self.clock = self.loop.now = GRACE_OVER
            case _:
                self.end(self.slot, ENDS[event])

    def upgrade(self) -> None:
        """Make a new pool, whose slots have the workers of the old one, as an upgrade does."""
        self.mode = "idle"
        for slot in self.slots:
            assert slot.worker is not None
            self.loop.unregister(slot.worker.channel.fileno())
            slot.worker.state = State.OUTDATED
        self.make_pool(started_up=True)

    def close(self) -> None:
        """End all workers, and close everything."""
        for slot in self.slots:
            if (worker := slot.worker) is not None:
                os.kill(worker.pid, signal.SIGKILL)
                os.waitpid(worker.pid, 0)
                worker.channel.close()
            for listener in slot.listeners:
                listener.close()
        for sock in (self.journal, self._note_end):
            sock.close()
        self.loop.epoll.close()


def is_running(pid: int) -> bool:
    """Return whether the child `pid`, which has not been reaped, has not ended."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def rows() -> list[list[str]]:
    """Return the lines of the table as words, with one line for each way to end."""
    lines = [line.split() for line in TABLE.splitlines() if line and not line.startswith("#")]
    return [
        [*line[:2], event, *line[3:]]
        for line in lines
        for event in (ENDS if line[2] == "ended" else [line[2]])
    ]


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Give a pool, and check that each descriptor of the test is closed afterwards."""
    before = os.listdir("/proc/self/fd")
    bench = Bench()
    yield bench
    bench.close()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("row", rows(), ids=" ".join)
def test_table(bench: Bench, row: list[str]) -> None:
    """Each event leads to the state and the actions of the table."""
    mode, state, event, new_state, *actions = row
    for step in WAYS[f"{mode} {state}"]:
        bench.happen(step)
    assert (bench.mode, bench.state().partition("+")[0]) == (
        mode,
        state.replace("late", "draining"),
    )
    bench.read_journal()
    bench.done.clear()
    worker, listeners = bench.slot.worker, bench.slot.listeners
    bench.happen(event)
    if "KILL" in actions:
        assert worker is not None
        ended = os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        bench.done += ["KILL"] if ended.si_status == signal.SIGKILL else []
    bench.read_journal()
    bench.done += ["close"] if listeners and not bench.slot.listeners else []
    events = bench.pool.take_events()
    bench.done += ["give-up" for each in events if isinstance(each, CannotStart)]
    assert (bench.state(), sorted(bench.done)) == (new_state, sorted(actions))


def test_rolling_restart(bench: Bench) -> None:
    """Workers are replaced one after another, each when the one before it is ready."""
    bench.serve()
    bench.upgrade()
    bench.serve()
    restart = RollingRestart(bench.pool, under_way=True)
    first, second = bench.slots
    for slot in (first, second):
        assert not restart.advance()
        assert slot.state.value == "leaving"
        # One that is leaving is not ready any more.
        bench.report(slot, NOTICES["ready"])
        assert not restart.advance()
        bench.end(slot, 0)
        assert slot.state.value == "serving"
        assert not restart.advance()
        assert second.state is (State.OUTDATED if slot is first else State.SERVING)
        bench.report(slot, NOTICES["ready"])
    assert restart.advance()
    assert not restart.under_way
    assert not restart.advance()


def test_failures_are_forgotten(bench: Bench) -> None:
    """The failures of a slot count no more when a worker of it has ended as it should."""
    for step in [*WAYS["run again"], "ready", "upgrade", "serve", "replace"]:
        bench.happen(step)
    assert bench.slot.failures != Failures()
    bench.happen("done")
    assert bench.slot.failures == Failures()
