"""Signals: a byte wakes the loop, and none falls into the gap around a fork."""

import fcntl
import os
import signal
from collections.abc import Iterator

import pytest

from support.interpreter import run_program
from support.sockets import readable, wait_readable
from tailsrv.linux.signals import Wakeup, blocked

CAUGHT = [signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    """Give a wakeup for two signals that nobody else uses, and have their handlers back afterwards."""
    before = {number: signal.getsignal(number) for number in CAUGHT}
    woken = Wakeup(CAUGHT)
    yield woken
    woken.close()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_quiet(wakeup: Wakeup) -> None:
    """Without a signal there is nothing to read, and reading does not wait."""
    assert not readable(wakeup.fileno())
    assert wakeup.read() == []


def test_signals_are_read_in_order(wakeup: Wakeup) -> None:
    """Each signal is a byte that makes the descriptor readable, until it is read."""
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR2)
    signal.raise_signal(signal.SIGUSR1)
    wait_readable(wakeup.fileno())
    assert wakeup.read() == [signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1]
    assert not readable(wakeup.fileno())


def test_storm_neither_blocks_nor_warns(wakeup: Wakeup) -> None:
    """More signals than the pipe holds are dropped without a word; those that fit still wake."""
    fcntl.fcntl(wakeup.fileno(), fcntl.F_SETPIPE_SZ, 4096)
    for _ in range(5000):
        signal.raise_signal(signal.SIGUSR1)
    while signals := wakeup.read():
        assert {signal.SIGUSR1} == set(signals)


def test_descriptors_are_not_inherited(wakeup: Wakeup) -> None:
    """Programs that are started do not get the pipe."""
    assert not os.get_inheritable(wakeup.fileno())


def test_close_gives_everything_back() -> None:
    """After close() no signal writes to the descriptor, whoever has its number by then."""
    before = signal.getsignal(signal.SIGUSR1)
    woken = Wakeup([signal.SIGUSR1])
    fds = woken.fileno()
    woken.close()
    reader, writer = os.pipe2(os.O_NONBLOCK)
    try:
        assert fds in (reader, writer)
        signal.raise_signal(signal.SIGUSR1)
        assert not readable(reader)
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGUSR1, before)
        os.close(reader)
        os.close(writer)


def test_blocked_holds_signals_back(wakeup: Wakeup) -> None:
    """Within blocked() a signal stays pending, and comes when it ends."""
    with blocked():
        # kill(2) might choose another thread, which has not blocked it
        signal.raise_signal(signal.SIGUSR1)
        assert signal.SIGUSR1 in signal.sigpending()
        assert wakeup.read() == []
    assert wakeup.read() == [signal.SIGUSR1]
    assert set() == signal.sigpending()


def test_blocked_restores_the_mask() -> None:
    """The mask is as it was before, after an exception too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        with pytest.raises(ZeroDivisionError), blocked():
            raise ZeroDivisionError
        assert before | {signal.SIGUSR2} == signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_child_that_closes_does_not_wake_the_parent() -> None:
    """A forked child's signals stay its own once it has closed its copy."""
    done = run_program("signals_of_a_child")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_background_job_is_not_interrupted() -> None:
    """An ignored INT, as in a background job of a shell, stays ignored while the server starts."""
    done = run_program("ignored_interrupt")
    assert (done.returncode, done.stderr) == (0, "")
