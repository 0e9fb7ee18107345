"""Makes each system call of the tables in orphans.md fail, and compares the outcome."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from faults.faults import KILL, NOT_MADE, NOT_TRIED, Case, fault, read_exempt, read_table, traced
from faults.orphan_bench import OrphanBench
from faults.orphan_faults import SCENES, TABLE, perform, run, settle, start_taker
from support.strace import can_inject

pytestmark = [pytest.mark.faults, pytest.mark.slow]

# Trying all cases takes minutes. Without the variable, some of them are tried.
ALL = bool(os.environ.get("TAILSRV_TEST_FAULTS"))
CASES = [case for case in read_table(TABLE) if case.expected not in (NOT_TRIED, NOT_MADE)]
TAKEOVER = ("taker", "takeover")
# The takers that are killed, one after another.
KILLS = [case for case in CASES if (case.process, case.act, case.error) == (*TAKEOVER, KILL)]


def is_tried(case: Case) -> bool:
    """Tell whether `case` is tried by itself."""
    if case.occurrence > 1 and case in KILLS:
        return False
    return ALL or (case.first and (case.occurrence == 1 or case.expected == "lost"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrphanBench]:
    """Yield a bench that is used for one fault after another."""
    if reason := can_inject():
        pytest.skip(reason)
    bench = OrphanBench(tmp_path_factory.mktemp("orphans"))
    try:
        yield bench
    finally:
        bench.stop()


@pytest.mark.parametrize("case", [case for case in CASES if is_tried(case)], ids=str)
def test_fault(bench: OrphanBench, case: Case, tmp_path: Path) -> None:
    """A system call that fails has the outcome that the table lists, and no other effect."""
    trace = tmp_path / "trace"
    try:
        outcome = run(bench, SCENES[case.process, case.act], case, trace)
        assert outcome in case.expected.split(" or "), f"{bench.log()}\n{trace.read_text()[-3000:]}"
    except BaseException:
        bench.stop()
        raise


@pytest.mark.parametrize("scene", list(SCENES), ids=" ".join)
def test_each_call_is_in_a_table(
    bench: OrphanBench, scene: tuple[str, str], tmp_path: Path
) -> None:
    """Each call that a process makes is in its tables or in that of calls that do not fail."""
    process, _ = scene
    trace, taker = perform(
        bench, process, SCENES[scene], lambda pid: traced(pid, tmp_path / "trace")
    )
    made = set(trace.calls())
    settle(bench, taker)
    listed = {case.call for case in read_table(TABLE) if case.process == process}
    assert made <= listed | read_exempt()


def test_takers_that_die_one_after_another(bench: OrphanBench, tmp_path: Path) -> None:
    """Takers that are killed one after another, each at a later call, cost no client anything."""
    bench.ready()
    bench.kill_supervisor()
    for case in KILLS if ALL else KILLS[::8]:
        tracer = partial(fault, case=case, path=tmp_path / "trace")
        _, taker = start_taker(bench, "taker", SCENES[TAKEOVER], tracer)
        assert taker.process.poll() == -signal.SIGKILL, case
        assert bench.check_streams() == 0, case
        bench.check_descriptors()
    bench.take_over()
    assert bench.check_streams() == 0
    assert bench.complete_headers() == 0
    bench.check_descriptors()
