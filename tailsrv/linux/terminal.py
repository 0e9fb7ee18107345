"""Tells whether the server's terminal has been closed: SIGHUP then means drain, not upgrade."""

import errno
import os
import select
import signal
import stat

# Set in the environment where SIGHUP was ignored at the start, as nohup(1) and `trap '' HUP` do, or where there was no
# controlling terminal, as with setsid(1): the kernel sends no SIGHUP then, so that one is a request for an upgrade.
# The environment survives an upgrade, while exec(2) resets the signals that were caught.
VARIABLE = "TAILSRV_NOHUP"


def remember_nohup() -> None:
    """Note that the server must survive its terminal, if SIGHUP is ignored or cannot come from a terminal.

    Call this before SIGHUP is caught.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or not _has_terminal():
        os.environ[VARIABLE] = "1"


def _has_terminal() -> bool:
    """Tell whether this process has a controlling terminal (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError as error:
        return error.errno != errno.ENXIO
    return True


def is_hung_up() -> bool:
    """Tell whether a terminal of the server has been closed, and the server must end with it.

    Its terminals are those that are standard input, output or error.
    """
    return VARIABLE not in os.environ and any(_is_closed_terminal(fd) for fd in (0, 1, 2))


def _is_closed_terminal(fd: int) -> bool:
    """Tell whether `fd` is a terminal that has been closed.

    isatty(3) is false for such a terminal. No other character device reports a hang-up.
    """
    try:
        if not stat.S_ISCHR(os.fstat(fd).st_mode):
            return False
        poll = select.poll()
        # POLLHUP is always told
        poll.register(fd, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))
    except OSError:
        return False
