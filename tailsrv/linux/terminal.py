"""Finds out whether SIGHUP was sent because the terminal of this process has been closed.

The signal itself does not say so: an operator may have sent it as a request.
"""

import errno
import os
import select
import signal
import stat

from tailsrv.linux.sockets import poll_once

# This environment variable says that every SIGHUP is a request. It is set if SIGHUP was ignored
# when the program started, as nohup(1) and `trap '' HUP` arrange. It is also set if there was no
# controlling terminal, as with setsid(1), because the kernel then sends no SIGHUP. The program
# catches SIGHUP, so after execve(2) it could not see any more that SIGHUP was ignored at the start.
# The environment survives execve(2).
VARIABLE = "TAILSRV_NOHUP"


def remember_nohup() -> None:
    """Set VARIABLE if no SIGHUP can mean that a terminal has been closed.

    That is so if SIGHUP is ignored, or if there is no controlling terminal. Call this before
    setting a handler for SIGHUP.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or not _has_terminal():
        os.environ[VARIABLE] = "1"


def _has_terminal() -> bool:
    """Return whether this process has a controlling terminal (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError as error:
        return error.errno != errno.ENXIO
    return True


def is_hung_up() -> bool:
    """Return whether a terminal of this process has been closed, so that the process must end.

    These are the terminals that are its standard input, output or error. The result is False if
    VARIABLE is set.
    """
    return VARIABLE not in os.environ and any(_is_closed_terminal(fd) for fd in (0, 1, 2))


def _is_closed_terminal(fd: int) -> bool:
    """Return whether `fd` is a terminal that has been closed.

    isatty(3) returns false for such a terminal, so check for a character device with a hang-up.
    Other character devices never report one.
    """
    try:
        if not stat.S_ISCHR(os.fstat(fd).st_mode):
            return False
        return bool(poll_once({fd: 0}, 0).get(fd, 0) & select.POLLHUP)
    except OSError:
        return False
