"""Makes each system call of the tables in faults.md fail, and compares the outcome."""

import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from faults.bench import FaultBench
from faults.faults import (
    ACTS,
    NOT_MADE,
    NOT_TRIED,
    Case,
    perform,
    read_exempt,
    read_table,
    run,
    selection,
    traced,
)
from support.strace import can_inject

pytestmark = [pytest.mark.faults, pytest.mark.slow]

# Trying all cases takes minutes. Without the variable, later occurrences, and acts that run a whole
# program, are tried only with the first error of each line.
ALL = bool(os.environ.get("TAILSRV_TEST_FAULTS"))
WHOLE = ("start", "takeover", "state at start", "state at restart")


def is_tried(case: Case) -> bool:
    """Tell whether `case` is tried."""
    return case.expected not in (NOT_TRIED, NOT_MADE) and (
        ALL or case.first or (case.occurrence == 1 and case.act not in WHOLE)
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultBench]:
    """Yield a server that is used for one fault after another."""
    if reason := can_inject():
        pytest.skip(reason)
    bench = FaultBench(tmp_path_factory.mktemp("faults"))
    try:
        yield bench
        bench.finish()
    finally:
        bench.stop()


@pytest.mark.parametrize("case", [case for case in read_table() if is_tried(case)], ids=str)
def test_fault(bench: FaultBench, case: Case, tmp_path: Path) -> None:
    """A system call that fails has the outcome that the table lists, and no other effect."""
    trace = tmp_path / "trace"
    try:
        outcome = run(bench, case, trace)
        assert outcome in case.expected.split(" or "), f"{bench.log()}\n{trace.read_text()[-3000:]}"
    except BaseException:
        bench.stop()
        raise


@pytest.mark.parametrize(
    ("process", "name"), list(dict.fromkeys((case.process, case.act) for case in read_table()))
)
def test_each_call_is_in_a_table(
    bench: FaultBench, process: str, name: str, tmp_path: Path
) -> None:
    """Each call that a process makes is in its tables or in that of calls that do not fail.

    No call that a table lists as "not made" is made.
    """
    act = ACTS[name]
    cases = [case for case in read_table() if case.process == process]
    made = perform(
        bench,
        replace(act, turns=min(2, act.turns)),
        process,
        lambda pid: traced(pid, tmp_path / "trace", *selection(bench, act)),
    ).calls()
    assert bench.outcome() == "exact"
    for case in cases:
        if case.act == name and case.expected == NOT_MADE:
            assert act.turns <= 2
            assert made[case.call] < case.occurrence, case
    # The process continues as another program, whose interpreter starts.
    if (process, name) != ("supervisor", "upgrade"):
        assert set(made) <= {case.call for case in cases} | read_exempt()


def test_no_descriptor_for_the_next_file(bench: FaultBench) -> None:
    """A worker that has no descriptor left for the next file exits, and its successor has it.

    recvmsg(2) reports no error in this case: the message lacks the descriptor.
    """
    bench.ready()
    bench.rest()
    used = set(os.listdir(f"/proc/{bench.worker}/fd"))
    free = next(number for number in count() if str(number) not in used)
    _, hard = resource.prlimit(bench.worker, resource.RLIMIT_NOFILE)
    resource.prlimit(bench.worker, resource.RLIMIT_NOFILE, (free, hard))
    bench.rotate()
    assert bench.outcome() == "replaced"
