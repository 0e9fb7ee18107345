"""Delivers signals to an event loop through a descriptor, and blocks or ignores signals.

A caught signal has a handler that does nothing. The interpreter writes the number of the signal to
a pipe, which wakes the loop.
"""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# The sets below say how a process of this program treats each signal (signal(7)). It acts on these.
ACTED_ON = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGPWR})
# The default action, which ends the process, is right for these: faults of the process itself, the
# operator's limit on CPU time (RLIMIT_CPU), and SIGABRT, which systemd sends to a service that does
# not answer its watchdog.
FATAL = frozenset({
    signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV,
    signal.SIGSYS, signal.SIGXCPU, signal.SIGKILL,
})  # fmt: skip
# The default action, which stops the process, is right for these.
STOPPING = frozenset({signal.SIGSTOP, signal.SIGTSTP})
# The kernel sends these to a process that writes to a closed connection (SIGPIPE), to a file beyond
# RLIMIT_FSIZE (SIGXFSZ), or from the background to its terminal after `stty tostop` (SIGTTOU). When
# they are ignored, the first two writes fail with EPIPE and EFBIG, and the third one succeeds.
# SIGTTOU must not be caught: the write would be restarted, and the signal sent again, forever.
IGNORED = frozenset({signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTTOU})
# The default action of these neither ends nor stops a process.
HARMLESS = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH})
# All other signals, including the real-time signals, have no meaning for this program. Operators
# and scripts may send them because other servers use them: SIGUSR1 after a log rotation, SIGTTIN to
# start one more process.
_KNOWN = ACTED_ON | FATAL | STOPPING | IGNORED | HARMLESS
STRAY = frozenset(map(int, signal.valid_signals())) - _KNOWN

# Signals that may end the process during a call that hangs (see `interruptible`).
INTERRUPTING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})


class Wakeup:
    """A pipe to which the interpreter writes the number of each signal in `caught`.

    See `signal.set_wakeup_fd`. There can be only one such pipe in a process.
    """

    def __init__(self, caught: Iterable[int]) -> None:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in caught:
            signal.signal(number, _note)

    def fileno(self) -> int:
        """Return the descriptor that is readable when a signal has arrived."""
        return self._reader

    def read(self) -> list[int]:
        """Return the numbers of the signals that have arrived since the last call."""
        try:
            return list(os.read(self._reader, 4096))
        except BlockingIOError:
            return []

    def close(self) -> None:
        """Close the pipe. A forked child must do this first: its signals would wake the parent."""
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)


def _note(*_: object) -> None:
    """Do nothing. The byte that the interpreter writes to the pipe is sufficient."""


def name_of(number: int) -> str:
    """Return the name of a signal. Real-time signals count from SIGRTMIN, as in kill(1)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def ignore_io_signals() -> None:
    """Ignore the signals in `IGNORED`. Forked children and executed programs inherit this."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def block_all() -> None:
    """Block all signals. The kernel delivers those that arrive when they are unblocked."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())


def unblock_all() -> None:
    """Unblock all signals, including those that were blocked before execve(2) of this program."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


@contextmanager
def blocked() -> Iterator[None]:
    """Block all signals for the duration of the context.

    Around fork(2), this keeps signals from reaching the child before it has set its own handlers.
    """
    before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM, SIGINT and SIGQUIT end this process during a call that may hang.

    This is for a process that blocks signals. In PID 1 the signals stay blocked, and are delivered
    when the process unblocks them. Unblocking them during the call would not help: the kernel
    discards signals to PID 1 that have no handler (pid_namespaces(7)), and a handler in Python
    would not run before the call returns.
    """
    if os.getpid() == 1:
        yield
        return
    # If SIGINT is ignored, it must stay ignored: a shell ignores it for background jobs.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
