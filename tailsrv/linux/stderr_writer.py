"""Writes lines to standard error without waiting, whatever standard error is.

Setting O_NONBLOCK on standard error would disturb other programs. The flag belongs to the open file
description (open(2)), which this process shares with the shell that started it, and with other
programs of that shell. Therefore a terminal or pipe is opened again, and the flag is set on the new
description. For a socket, each call of send(2) has the flag MSG_DONTWAIT. Anything else is written
to only when poll(2) reports room.
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
from tailsrv.linux.sockets import poll_once
from tailsrv.linux.systemd import FIRST_SOCKET, passed_sockets

STDERR = 2


def open_output(mode: int) -> Callable[[bytes], object]:
    """Return a function that writes one line to standard error without waiting.

    If there is no room, the function drops the line or the end of it, and may raise OSError. `mode`
    is the st_mode of standard error.

    If standard error is a terminal, this also makes the process ignore SIGTTOU, so that writing
    from the background does not stop it (`stty tostop`).
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
        # Descriptors or processes have run out, there is no /proc, or the pipe has no reader. Write
        # to standard error directly, but only when poll(2) reports room.
        pass
    return _write_if_ready


def _socket_output() -> Callable[[bytes], object]:
    # A socket cannot be opened again by its name in /proc. But send(2) has a flag that makes a
    # single call non-blocking.
    sock = socket.socket(fileno=_move_up(os.dup(STDERR)))
    return lambda line: sock.send(line, socket.MSG_DONTWAIT)


def _own_description() -> int:
    """Return a non-blocking descriptor of the terminal or pipe that is standard error.

    If this process has no permission to open it again, standard error becomes a pipe to a child
    process that copies to it. Raises OSError.
    """
    try:
        return _reopen()
    except PermissionError:
        _start_copier()
    return _reopen()


def _reopen() -> int:
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
    return _move_up(os.open(f"/proc/self/fd/{STDERR}", flags))


def _move_up(fd: int) -> int:
    """Move the descriptor `fd` to a number above those of the sockets that were passed.

    The service manager may have announced more sockets than it has passed. The number of a missing
    socket is free. If `fd` had that number, it would be mistaken for the socket.
    """
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_SOCKET + len(passed_sockets()))
    finally:
        os.close(fd)


def _start_copier() -> None:
    """Replace standard error by a pipe, and start a child that copies from the pipe to the old one.

    This is for a terminal or pipe of another user (su, sudo), for which there is no other way to
    write without waiting. The child ends when every process that can write to the pipe has ended.
    """
    others = [int(name) for name in os.listdir("/proc/self/fd") if int(name) != STDERR]
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        if os.fork() == 0:
            _copy(reader, [*others, reader, writer])
        os.dup2(writer, STDERR)
    finally:
        os.close(reader)
        os.close(writer)


def _copy(reader: int, others: Sequence[int]) -> None:
    """Copy from `reader` to standard error until one of them is closed, then end this process.

    `others` are all descriptors except standard error. They are closed, because neither the other
    end of the pipe nor passed sockets may stay open in this process.
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
    """Write as much of `line` to standard error as poll(2) reports room for.

    This is for files and devices, where a write never waits for long, and for a standard error that
    cannot be opened again.
    """
    # If poll(2) reports that a pipe is writable, it has room for PIPE_BUF bytes, but perhaps no
    # more.
    for start in range(0, len(line), select.PIPE_BUF):
        if not poll_once({STDERR: select.POLLOUT}, 0).get(STDERR, 0) & select.POLLOUT:
            return
        os.write(STDERR, line[start : start + select.PIPE_BUF])
