"""Tests of signals: a byte wakes the loop, and none is lost around a fork."""

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
    """Give a wakeup for two unused signals, and restore their handlers afterwards."""
    before = {number: signal.getsignal(number) for number in CAUGHT}
    woken = Wakeup(CAUGHT)
    yield woken
    woken.close()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_quiet(wakeup: Wakeup) -> None:
    """Without a signal there is nothing to read, and read() does not wait."""
    assert not readable(wakeup.fileno())
    assert wakeup.read() == []


def test_signals_are_read_in_order(wakeup: Wakeup) -> None:
    """Each signal makes the descriptor readable, and signals are read in their order."""
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR2)
    signal.raise_signal(signal.SIGUSR1)
    wait_readable(wakeup.fileno())
    assert wakeup.read() == [signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1]
    assert not readable(wakeup.fileno())


def test_storm_neither_blocks_nor_warns(wakeup: Wakeup) -> None:
    """More signals than the pipe holds are dropped without a warning, and the rest still wake."""
    fcntl.fcntl(wakeup.fileno(), fcntl.F_SETPIPE_SZ, 4096)
    for _ in range(5000):
        signal.raise_signal(signal.SIGUSR1)
    while signals := wakeup.read():
        assert {signal.SIGUSR1} == set(signals)


def test_descriptors_are_not_inherited(wakeup: Wakeup) -> None:
    """Programs that are started do not inherit the pipe."""
    assert not os.get_inheritable(wakeup.fileno())


def test_close_gives_everything_back() -> None:
    """After close() no signal writes to the descriptor's number, which may have a new owner."""
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


def test_blocked_delays_signals(wakeup: Wakeup) -> None:
    """Within blocked() a signal stays pending, and is delivered when the block ends."""
    with blocked():
        # kill(2) might choose another thread, which has not blocked the signal.
        signal.raise_signal(signal.SIGUSR1)
        assert signal.SIGUSR1 in signal.sigpending()
        assert wakeup.read() == []
    assert wakeup.read() == [signal.SIGUSR1]
    assert set() == signal.sigpending()


def test_blocked_restores_the_mask() -> None:
    """The signal mask is restored, also after an exception."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        with pytest.raises(ZeroDivisionError), blocked():
            raise ZeroDivisionError
        assert before | {signal.SIGUSR2} == signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_child_that_closes_does_not_wake_the_parent() -> None:
    """The signals of a forked child that has closed its copy do not wake the parent."""
    done = run_program("signals_of_a_child")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_background_job_is_not_interrupted() -> None:
    """An ignored SIGINT, as in a shell's background job, stays ignored while the server starts."""
    done = run_program("ignored_interrupt")
    assert (done.returncode, done.stderr) == (0, "")
