"""Turns signals into readable bytes: a handler that does nothing, and a descriptor that wakes the loop."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# How the server's processes treat the signals that by default would end or stop them, signal(7).
ACTED_ON = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGPWR})
# Faults of the process itself, the limit on CPU time that the operator has set (RLIMIT_CPU), and
# ABRT, which systemd sends to a service that fails its watchdog: the default action is right.
FATAL = frozenset({
    signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV,
    signal.SIGSYS, signal.SIGXCPU, signal.SIGKILL,
})  # fmt: skip
STOPPING = frozenset({signal.SIGSTOP, signal.SIGTSTP})
# Sent by the kernel for a write of our own: to a closed connection (it then fails with EPIPE), to a
# file beyond RLIMIT_FSIZE (EFBIG), or to the terminal by a background process after `stty tostop`
# (it then succeeds). SIGTTOU must not be caught: the write would be retried and signalled for ever.
IGNORED = frozenset({signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTTOU})
HARMLESS = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH})
# All others, among them the real-time signals, mean nothing to tailsrv. They are sent because other
# servers use them: USR1 after a log rotation, TTIN for one more worker.
_KNOWN = ACTED_ON | FATAL | STOPPING | IGNORED | HARMLESS
STRAY = frozenset(map(int, signal.valid_signals())) - _KNOWN

INTERRUPTING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})


class Wakeup:
    """The pipe that the interpreter writes each caught signal's number to (`signal.set_wakeup_fd`)."""

    def __init__(self, caught: Iterable[int]) -> None:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in caught:
            signal.signal(number, _note)

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._reader

    def read(self) -> list[int]:
        """Return the signals that have come since the last call."""
        try:
            return list(os.read(self._reader, 4096))
        except BlockingIOError:
            return []

    def close(self) -> None:
        """Stop being woken. In a forked child this must come first: its signals would wake the parent."""
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)


def _note(*_: object) -> None:
    """Do nothing: the byte in the pipe is what counts."""


def name_of(number: int) -> str:
    """Return the name of a signal; real-time signals are counted from SIGRTMIN, as kill(1) does."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def ignore_io_signals() -> None:
    """Ignore the signals in `IGNORED`. Forked processes and executed programs inherit this."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def block_all() -> None:
    """Block all signals; those that come wait until somebody unblocks them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())


def unblock_all() -> None:
    """Let all signals through, also those that were held back by the program that exec'd this one."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


@contextmanager
def blocked() -> Iterator[None]:
    """Hold all signals back, so that none falls between fork(2) and the child's own handlers."""
    before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let TERM, INT and QUIT end a process that blocks signals, during a call that may hang.

    As PID 1 they stay blocked, and are acted on after the call. The kernel discards them there if
    there is no handler, pid_namespaces(7), and a handler in Python runs only when the call returns.
    """
    if os.getpid() == 1:
        yield
        return
    # An ignored SIGINT stays ignored: a shell does that for jobs in the background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
