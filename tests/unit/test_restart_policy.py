"""Tests of what follows from the deaths of workers: tables with times as numbers."""

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv.config import Timing
from tailsrv.supervisor.restart_policy import (
    MAX_UNREADY,
    ExitKind,
    Failures,
    classify_exit,
    describe_exit,
)


def ended(status: int) -> int:
    """Return the wait status of a process that exited with `status`, as in wait(2)."""
    return status << 8


def killed(number: int, core: bool = False) -> int:
    """Return the wait status of a process that a signal ended."""
    return number | (0x80 if core else 0)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (ended(0), ExitKind.DONE),
        (ended(3), ExitKind.CANNOT_BOOT),
        (ended(os.EX_TEMPFAIL), ExitKind.NO_ROOM),
        (ended(1), ExitKind.FAULT),
        (ended(2), ExitKind.FAULT),
        (ended(120), ExitKind.FAULT),
        (ended(255), ExitKind.FAULT),
        (killed(signal.SIGSEGV), ExitKind.FAULT),
        (killed(signal.SIGSEGV, core=True), ExitKind.FAULT),
        (killed(signal.SIGABRT, core=True), ExitKind.FAULT),
        (killed(signal.SIGBUS), ExitKind.FAULT),
        (killed(signal.SIGILL), ExitKind.FAULT),
        (killed(signal.SIGFPE), ExitKind.FAULT),
        (killed(signal.SIGKILL), ExitKind.KILLED),
        (killed(signal.SIGTERM), ExitKind.KILLED),
        (killed(signal.SIGQUIT, core=True), ExitKind.KILLED),
        (killed(signal.SIGRTMIN + 3), ExitKind.KILLED),
    ],
)
def test_classify_exit(status: int, expected: ExitKind) -> None:
    """An exit is classified as requested, a fault, a kill, a shortage, or a failed boot."""
    assert expected is classify_exit(status)


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
def test_describe_exit(status: int, words: str) -> None:
    """A wait status is described with its exit status or the name of its signal."""
    assert words == describe_exit(status)


# A life is its length in seconds, whether the worker became ready, how it ended, and whether it had
# adopted clients.
Life = tuple[float, bool, ExitKind, bool]

TIMING = Timing()
SOON, LATE = TIMING.long_life - 0.001, TIMING.long_life
DONE, FAULT, KILLED, NO_ROOM = ExitKind.DONE, ExitKind.FAULT, ExitKind.KILLED, ExitKind.NO_ROOM


def after(*lives: Life) -> Failures:
    """Return the record of a slot after these lives."""
    failures = Failures()
    for life in lives:
        failures = failures.after_life(*life, TIMING)
    return failures


@pytest.mark.parametrize(
    ("life", "record"),
    # The record counts short, unready and suspect lives, and was 3, 3 and 1 before this one.
    [
        ((SOON, True, FAULT, True), Failures(4, 0, 2)),
        ((SOON, False, FAULT, True), Failures(4, 4, 2)),
        ((SOON, True, FAULT, False), Failures(4, 0, 0)),
        ((SOON, False, FAULT, False), Failures(4, 4, 0)),
        ((LATE, True, FAULT, True), Failures(0, 0, 0)),
        ((LATE, False, FAULT, True), Failures(0, 4, 0)),
        ((SOON, True, KILLED, True), Failures(4, 0, 0)),
        ((SOON, False, KILLED, True), Failures(4, 0, 0)),
        ((SOON, False, KILLED, False), Failures(4, 0, 0)),
        ((LATE, False, KILLED, True), Failures(0, 0, 0)),
        ((SOON, True, NO_ROOM, True), Failures(4, 0, 0)),
        ((SOON, False, NO_ROOM, True), Failures(4, 0, 0)),
        ((SOON, True, DONE, True), Failures(4, 0, 0)),
        ((SOON, False, DONE, True), Failures(4, 4, 0)),
        ((LATE, True, DONE, True), Failures(0, 0, 0)),
    ],
)
def test_after_life(life: Life, record: Failures) -> None:
    """Each life increases or resets the three counts of a slot's record."""
    assert record == Failures(short=3, unready=3, suspect=1).after_life(*life, TIMING)


def test_delays() -> None:
    """The delay is 0 after one short life, doubles from 0.1 to 5 s, and is reset by a long life."""
    short = (SOON, True, KILLED, True)
    delays = [after(*[short] * deaths).delay(TIMING) for deaths in range(11)]
    assert delays == pytest.approx([0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5])
    assert max(delays) == TIMING.max_delay
    # A large count causes no overflow.
    assert Failures(short=100_000).delay(TIMING) == TIMING.max_delay
    assert after(short, short, short, (LATE, True, KILLED, True)).delay(TIMING) == 0
    assert after(short, short, short, (LATE, True, KILLED, True), short).delay(TIMING) == 0


def test_poisoned() -> None:
    """Two faults in a row soon after adopting poison a slot, and other deaths reset the count."""
    suspect = (SOON, True, FAULT, True)
    assert [after(*[suspect] * deaths).poisoned() for deaths in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    assert after((SOON, False, FAULT, True), suspect).poisoned()
    for other_death in [
        (LATE, True, FAULT, True),
        (SOON, True, KILLED, True),
        (SOON, True, DONE, True),
        (SOON, True, FAULT, False),
    ]:
        assert not after(suspect, other_death, suspect).poisoned()
        assert not after(*[other_death] * 100).poisoned()


def test_hopeless() -> None:
    """Five deaths in a row before ready make a slot hopeless; a ready worker resets the count."""
    unready, ready = (SOON, False, FAULT, False), (SOON, True, FAULT, False)
    assert [after(*[unready] * deaths).hopeless() for deaths in range(1, 6)] == [False] * 4 + [True]
    assert after(*[(60.0, False, FAULT, False)] * MAX_UNREADY).hopeless()
    assert after(*[(SOON, False, DONE, True)] * MAX_UNREADY).hopeless()
    assert not after(*[unready] * 4, ready, *[unready] * 4).hopeless()
    assert not after(*[ready] * 1000).hopeless()


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans(), st.just(KILLED), st.booleans())))
def test_kills_from_outside_are_not_suspect(lives: list[Life]) -> None:
    """Kills from outside, however soon and frequent, make no slot poisoned or hopeless."""
    assert not after(*lives).poisoned()
    assert not after(*lives).hopeless()
