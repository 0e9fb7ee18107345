"""Decisions, each as a table; time is a number."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv.policy import (
    CHUNK,
    LONG_LIFE,
    MAX_DELAY,
    MAX_UNREADY,
    Allowance,
    Failures,
    Verdict,
    describe_status,
    next_chunk,
    usable_processors,
    verdict,
)


@pytest.mark.parametrize(
    ("offset", "size", "count"),
    [
        (0, 0, 0),
        (0, 1, 1),
        (7, 10, 3),
        (10, 10, 0),
        (11, 10, 0),
        (2**63 - 1, 10, 0),
        (0, CHUNK, CHUNK),
        (0, CHUNK + 1, CHUNK),
        (1, CHUNK + 1, CHUNK),
        (5, 2**62, CHUNK),
    ],
)
def test_next_chunk(offset: int, size: int, count: int) -> None:
    """A turn sends what is in the file beyond the offset, at most a chunk, and nothing to one who is ahead."""
    assert count == next_chunk(offset, size)


def ended(status: int) -> int:
    """Return the wait status of a process that ended with `status`, as wait(2) composes it."""
    return status << 8


def killed(number: int, core: bool = False) -> int:
    """Return the wait status of a process that a signal has ended."""
    return number | (0x80 if core else 0)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (ended(0), Verdict.DONE),
        (ended(3), Verdict.CANNOT_BOOT),
        (ended(1), Verdict.FAULT),
        (ended(2), Verdict.FAULT),
        (ended(120), Verdict.FAULT),
        (ended(255), Verdict.FAULT),
        (killed(signal.SIGSEGV), Verdict.FAULT),
        (killed(signal.SIGSEGV, core=True), Verdict.FAULT),
        (killed(signal.SIGABRT, core=True), Verdict.FAULT),
        (killed(signal.SIGBUS), Verdict.FAULT),
        (killed(signal.SIGILL), Verdict.FAULT),
        (killed(signal.SIGFPE), Verdict.FAULT),
        (killed(signal.SIGKILL), Verdict.KILLED),
        (killed(signal.SIGTERM), Verdict.KILLED),
        (killed(signal.SIGQUIT, core=True), Verdict.KILLED),
        (killed(signal.SIGRTMIN + 3), Verdict.KILLED),
    ],
)
def test_verdict(status: int, expected: Verdict) -> None:
    """A worker's end is as asked, its own fault, somebody else's doing, or says that there is no use in another."""
    assert expected is verdict(status)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (ended(0), "status=0"),
        (ended(3), "status=3"),
        (killed(signal.SIGKILL), "signal=SIGKILL"),
        (killed(signal.SIGSEGV, core=True), "signal=SIGSEGV"),
        (killed(40), "signal=40"),
    ],
)
def test_describe_status(status: int, words: str) -> None:
    """A wait status is told in the words that an operator knows."""
    assert words == describe_status(status)


def after(*lives: tuple[float, bool]) -> Failures:
    """Return the record of a slot after these lives: seconds, and whether the worker was ready."""
    failures = Failures()
    for seconds, ready in lives:
        failures = failures.after_life(seconds, ready)
    return failures


@pytest.mark.parametrize(
    ("short", "delay"),
    [(0, 0.0), (1, 0.0), (2, 0.1), (3, 0.2), (4, 0.4), (5, 0.8), (6, 1.6), (7, 3.2), (8, 5.0), (9, 5.0), (100_000, 5.0)],
)
def test_delay(short: int, delay: float) -> None:
    """The first short life costs no delay; from the second on it doubles from 0.1 to 5 seconds, and never overflows."""
    assert delay == pytest.approx(Failures(short=short).delay())
    assert Failures(short=short).delay() <= MAX_DELAY


def test_a_long_life_forgives() -> None:
    """A life of a second or more is no failure and wipes out those before."""
    assert after((LONG_LIFE, True)) == Failures()
    assert after((0.1, True), (0.1, True), (0.1, True)).short == 3
    assert after((0.1, True), (0.1, True), (LONG_LIFE, True)) == Failures()
    assert after((0.1, True), (LONG_LIFE - 0.001, True)).short == 2


def test_hopeless() -> None:
    """Five deaths in a row before ready are enough, long lives or short; one that was ready starts the count anew."""
    assert [after(*[(0.1, False)] * deaths).hopeless() for deaths in range(1, 6)] == [False] * 4 + [True]
    assert after(*[(60.0, False)] * MAX_UNREADY).hopeless()
    assert not after(*[(0.1, False)] * 4, (0.1, True), *[(0.1, False)] * 4).hopeless()
    assert not after(*[(0.1, True)] * 1000).hopeless()


def test_allowance() -> None:
    """So many pass in an interval; the first that passes in a later one learns how many were held back."""
    allowance = Allowance(burst=2, interval=10.0)
    assert [allowance.ask(now) for now in (100.0, 101.0, 102.0, 109.9)] == [0, 0, None, None]
    assert [allowance.ask(now) for now in (110.0, 110.0, 110.0)] == [2, 0, None]
    assert [allowance.ask(now) for now in (500.0, 600.0)] == [1, 0]


@given(st.integers(1, 5), st.lists(st.floats(0, 30), max_size=50))
def test_allowance_counts_everything(burst: int, pauses: list[float]) -> None:
    """Each is let through or told of as held back later, and never more than twice the burst pass in one interval."""
    allowance, now = Allowance(burst, 10.0), 0.0
    passed, told, held = list[float](), 0, 0
    for pause in pauses:
        now += pause
        answer = allowance.ask(now)
        if answer is None:
            held += 1
        else:
            passed.append(now)
            told += answer
            assert held == told
    assert len(pauses) == len(passed) + held
    assert all(sum(then <= time < then + 10.0 for time in passed) <= 2 * burst for then in passed)


@pytest.mark.parametrize(
    ("affinity", "quotas", "processors"),
    [
        (8, [], 8),
        (8, [(200_000, 100_000)], 2),
        (8, [(150_000, 100_000)], 2),
        (8, [(1_000, 100_000)], 1),
        (2, [(800_000, 100_000)], 2),
        (8, [(400_000, 100_000), (300_000, 100_000), (500_000, 100_000)], 3),
        (8, [(-1, 100_000)], 8),
        (8, [(0, 100_000), (100_000, 0)], 8),
        (1, [(50_000, 100_000)], 1),
    ],
)
def test_usable_processors(affinity: int, quotas: list[tuple[int, int]], processors: int) -> None:
    """The smallest share counts, rounded up, at least 1; what is not a quota sets no limit."""
    assert processors == usable_processors(affinity, quotas)
