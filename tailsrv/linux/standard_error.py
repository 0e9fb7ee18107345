"""Writes to standard error without ever waiting for it, whatever it is.

O_NONBLOCK is a flag of the open file description (open(2)), which we share with the shell that has
started us and with everything else that it runs. So it is set on a description of our own, never on
the one that we were given.
"""

import fcntl
import os
import select
import signal
import socket
import stat
from collections.abc import Callable, Sequence
from functools import partial

from setproctitle import setproctitle

from tailsrv.linux.files import close_file
from tailsrv.linux.systemd import FIRST_SOCKET, passed_sockets

STDERR = 2


def open_output(mode: int) -> Callable[[bytes], object]:
    """Return a function that writes one line to standard error, and drops what there is no room for.

    `mode` is the st_mode of standard error. The function never waits; it raises OSError where a line
    is dropped. Where standard error is a terminal, writing to it from the background does not stop us
    any more (SIGTTOU, `stty tostop`).
    """
    try:
        if stat.S_ISSOCK(mode):
            return _socket_output()
        if stat.S_ISFIFO(mode):
            return partial(os.write, _own_description())
        if stat.S_ISCHR(mode) and os.isatty(STDERR):
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            return partial(os.write, _own_description())
    except OSError:
        # Out of descriptors or processes, no /proc, or a pipe without a reader: write to it directly,
        # and only when poll(2) reports room.
        pass
    return _write_if_ready


def _socket_output() -> Callable[[bytes], object]:
    # A socket cannot be opened by its name in /proc, but send(2) has a flag for a single call.
    sock = socket.socket(fileno=_out_of_the_way(os.dup(STDERR)))
    return lambda line: sock.send(line, socket.MSG_DONTWAIT)


def _own_description() -> int:
    """Return a non-blocking descriptor of the terminal or pipe that standard error is.

    Where it may not be opened again, a child waits for it in our stead. Raises OSError.
    """
    try:
        return _reopen()
    except PermissionError:
        _start_relay()
    return _reopen()


def _reopen() -> int:
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
    return _out_of_the_way(os.open(f"/proc/self/fd/{STDERR}", flags))


def _out_of_the_way(fd: int) -> int:
    """Return `fd` under a number that no socket of a service manager can be expected to have."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_SOCKET + len(passed_sockets()))
    finally:
        os.close(fd)


def _start_relay() -> None:
    """Put a pipe in the place of standard error, and a child behind it that writes to what was there.

    This is for a terminal or pipe of another user (su, sudo), which gives us no other way of writing
    without waiting. The child ends when every process that has the pipe has ended.
    """
    others = [int(name) for name in os.listdir("/proc/self/fd") if int(name) != STDERR]
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        if os.fork() == 0:
            _relay(reader, [*others, reader, writer])
        os.dup2(writer, STDERR)
    finally:
        os.close(reader)
        os.close(writer)


def _relay(reader: int, others: Sequence[int]) -> None:
    """Copy from `reader` to standard error until the end of the one or the other; does not return.

    `others` are all descriptors but standard error. None of them may stay open here: neither the pipe's other
    end nor sockets that were passed.
    """
    try:
        setproctitle("tailsrv: log")
        os.dup2(reader, 0)
        for fd in others:
            if fd != 0:
                close_file(fd)
        while data := os.read(0, select.PIPE_BUF):
            while data:
                data = data[os.write(STDERR, data) :]
    finally:
        os._exit(os.EX_OK)


def _write_if_ready(line: bytes) -> None:
    """Write `line` to what never waits for long: a file, a device, a pipe without a reader."""
    poll = select.poll()
    poll.register(STDERR, select.POLLOUT)
    # For a pipe, poll(2) promises room for so much, and no more.
    for start in range(0, len(line), select.PIPE_BUF):
        if not any(events & select.POLLOUT for _, events in poll.poll(0)):
            return
        os.write(STDERR, line[start : start + select.PIPE_BUF])
