"""How faults are brought about between the death of a supervisor and the end of a takeover."""

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from faults.faults import KILL, NOT_MADE, Case, Trace, fault
from faults.orphan_bench import KINDS, TOOK_OVER, OrphanBench
from support.processes import children, gone
from support.server import Server
from support.status import ask
from support.waiting import eventually

# Part of the log line about a port that is in use.
IN_USE = os.strerror(errno.EADDRINUSE)
TABLE = Path(__file__).with_name("orphans.md")


@dataclass(frozen=True)
class Scene:
    """What happens after the supervisor has been killed.

    The traced process is an orphan, the taker (the supervisor that takes over), or the worker that
    it has forked. `held` is the breakpoint at which the tracing starts. With `rotated`, the file is
    replaced before the taker starts. With `both`, the taker is killed as soon as its worker has
    ended.
    """

    held: str = ""
    rotated: bool = False
    both: bool = False


SCENES = {
    ("orphan", "handover"): Scene(),
    ("orphan", "handover after a rotation"): Scene(rotated=True),
    ("taker", "start"): Scene(held="main"),
    ("taker", "takeover"): Scene(held="find"),
    ("taker", "takeover after a rotation"): Scene(held="find", rotated=True),
    ("successor", "takeover"): Scene(held="worker"),
    ("successor", "death with the taker"): Scene(held="worker", both=True),
}

Tracer = Callable[[int], AbstractContextManager[Trace]]


def perform(bench: OrphanBench, process: str, scene: Scene, tracer: Tracer) -> tuple[Trace, Server]:
    """Kill the supervisor, start the taker, and wait until it has taken over or has ended.

    Returns the trace and the taker. `bench.server` is the taker if it has not ended.
    """
    if bench.is_used_up():
        bench.stop()
    bench.ready()
    bench.rest()
    bench.check_descriptors()
    orphan = json.loads(ask(f"*:{bench.port}")[0])["workers"][0]["pid"]
    if process == "orphan":
        with tracer(orphan) as trace:
            bench.kill_supervisor()
            taker = _start_taker(bench, scene)
            _await_takeover(bench, taker)
        return trace, taker
    bench.kill_supervisor()
    return start_taker(bench, process, scene, tracer)


def start_taker(
    bench: OrphanBench, process: str, scene: Scene, tracer: Tracer
) -> tuple[Trace, Server]:
    """Start the taker, and wait until it has taken over or has ended; return as perform() does."""
    with _held(bench, scene) as (taker, pids):
        traced = taker.pid if process == "taker" else pids[0]
        with tracer(traced) as trace:
            if scene.both:
                taker.signal(signal.SIGSTOP)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            if scene.both:
                # Without a fault, the worker waits for the supervisor.
                eventually(lambda: gone(traced) or _sleeps(traced))
                taker.kill_supervisor()
            _await_takeover(bench, taker)
    return trace, taker


def _start_taker(bench: OrphanBench, scene: Scene) -> Server:
    if scene.rotated:
        bench.rotate()
    return bench.start(bench.port)


@contextmanager
def _held(bench: OrphanBench, scene: Scene) -> Iterator[tuple[Server, list[int]]]:
    """Start the taker, and wait until the processes of this scene have stopped."""
    breakpoint_file = bench.hold / scene.held
    breakpoint_file.touch()
    taker = _start_taker(bench, scene)
    at_worker = scene.held == "worker"

    def look() -> list[int]:
        pids = children(taker.pid) if at_worker else [taker.pid]
        assert taker.process.poll() is None, taker.log
        stopped = [pid for pid in pids if _is_stopped(pid)]
        return stopped if len(stopped) == (bench.WORKERS if at_worker else 1) else []

    pids = eventually(look)
    breakpoint_file.unlink()
    yield taker, pids


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _is_stopped(pid: int) -> bool:
    return _state(pid) in ("T", "t")


def _sleeps(pid: int) -> bool:
    return _state(pid) == "S"


def _await_takeover(bench: OrphanBench, taker: Server) -> None:
    """Wait until the taker has taken over or has ended, and all processes sleep."""
    eventually(lambda: taker.process.poll() is not None or taker.lines(TOOK_OVER))
    bench.server = taker
    bench.rest()
    # It may have died after it had taken over, and before the workers have rolled.
    bench.rotated = bench.rotated and bench.server is None


def run(bench: OrphanBench, scene: Scene, case: Case, path: Path) -> str:
    """Make the fault occur and return its outcome; strace writes its trace to `path`."""
    traced: list[int] = []

    def tracer(pid: int) -> AbstractContextManager[Trace]:
        traced.append(pid)
        return fault(pid, case, path)

    trace, taker = perform(bench, case.process, scene, tracer)
    fired = gone(traced[0]) if case.error == KILL else trace.fired()
    # If the call of another process has failed, the log of the taker has another reason.
    known = case.process == "taker" and case.error != KILL
    outcome = settle(bench, taker, os.strerror(getattr(errno, case.error)) if known else "")
    return outcome if fired else f"{NOT_MADE} ({outcome})"


def settle(bench: OrphanBench, taker: Server, reason: str = "") -> str:
    """Return the outcome in the words of orphans.md; another supervisor takes over if needed."""
    lost = bench.check_streams()
    word = "exact"
    if bench.server is None:
        word = _describe_end(taker, reason)
        if not lost:
            bench.check_descriptors()
        bench.take_over()
        lost += bench.check_streams()
    assert all("Traceback" not in server.log for server in bench.servers)
    if not lost:
        # A stalled client can still read bytes after its end.
        lost = bench.uncounted()
    status = json.loads(ask(f"*:{bench.port}")[0])
    if any(worker["restarts"] for worker in status["workers"]):
        word = "replaced" if word == "exact" else f"{word}, replaced"
    elif lost and word in ("exact", "killed"):
        word = "closed" if lost == 1 else "lost"
    # An orphan that still serves beside the new supervisor would be one too many.
    if sorted(worker["pid"] for worker in status["workers"]) != bench.workers():
        word += ", left behind"
    affected = sum(len(group) < len(KINDS) for group in bench.groups)
    late = bench.complete_headers()
    if lost or late or word.endswith("left behind"):
        bench.stop()
        # Only one worker may have lost its clients.
        expected = word in ("closed", "lost") and affected <= 1 and not late
        return word if expected else f"{word}, {lost} lost"
    bench.rest()
    bench.check_descriptors()
    return word


def _describe_end(taker: Server, reason: str) -> str:
    status = taker.process.returncode
    if status == -signal.SIGKILL:
        return "killed"
    # The status is 3 if workers cannot start. Then each of them has logged the reason as well.
    critical = taker.lines(" critical: ")
    if status not in (1, 3) or not critical or (status == 1 and len(critical) > 1):
        return f"ends {status}, {len(critical)} lines"
    if any(reason in line for line in critical):
        return "served on"
    return "in use" if IN_USE in critical[0] else f"served on ({critical})"
