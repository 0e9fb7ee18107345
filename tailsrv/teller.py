"""Answers at the control sockets; what takes time is told by a forked child, so that the supervisor waits for nobody."""

import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from tailsrv.control import Control
from tailsrv.log import Limited
from tailsrv.loop import Loop
from tailsrv.policy import STALL_PAUSE
from tailsrv.signals import blocked, release

PATIENCE = 10  # seconds that those who asked have to take their answer from a child
AT_ONCE = 64 << 10  # bytes of an answer that surely fit the buffer of a unix socket (net.core.wmem_default is 208 KiB)

Answer = Callable[[], bytes]


class Teller:
    """What is told at the control sockets: `status()` at once, `clients()` by a child.

    A child first calls `let_go()`, to close what must not outlive the supervisor in a forgotten child. There is one
    at a time for each socket: others who ask there wait until it has ended.
    """

    def __init__(self, loop: Loop, control: Control, status: Answer, clients: Answer, let_go: Callable[[], None]) -> None:
        self._loop, self._control = loop, control
        self._status, self._clients, self._let_go = status, clients, let_go
        self._children: dict[int, int] = {}  # the pid of each, and the socket at which others wait for its end
        self._stalled: set[int] = set()  # sockets at which nobody can be accepted for a moment
        self._short_of_room = Limited(logging.WARNING, burst=1)
        for sock in control.status:
            loop.register(sock.fileno(), partial(self._tell_status, sock))
        for sock in control.clients:
            loop.register(sock.fileno(), partial(self._tell_clients, sock))

    def reaped(self, pid: int) -> bool:
        """Tell whether the child `pid` was one of ours; if so, others may ask again."""
        if (fd := self._children.pop(pid, None)) is None:
            return False
        self._loop.resume(fd)
        return True

    def _tell_status(self, sock: socket.socket) -> None:
        with ExitStack() as stack:
            # Who asks comes first: a stranger gets nothing, and is to cost next to nothing.
            if not (asked := [stack.enter_context(peer) for peer in self._accept(sock)]):
                return
            status = self._status()
            if len(status) > AT_ONCE:
                self._fork(sock, asked, lambda: status)
                return
            for peer in asked:
                with suppress(OSError):  # gone already
                    peer.send(status)

    def _tell_clients(self, sock: socket.socket) -> None:
        with ExitStack() as stack:
            if asked := [stack.enter_context(peer) for peer in self._accept(sock)]:
                self._fork(sock, asked, self._clients)

    def _accept(self, sock: socket.socket) -> list[socket.socket]:
        """Return those who ask at `sock`; where there is no room for them, leave it alone for a moment."""
        asked, error = self._control.askers(sock)
        if error is not None:
            self._short_of_room("short of descriptors or memory, health checks have to wait, clients do not", reason=error.strerror)
            self._loop.pause(sock.fileno())
            self._stalled.add(sock.fileno())
            self._loop.timers.set(self._retry, self._loop.now + STALL_PAUSE)
        return asked

    def _retry(self) -> None:
        """Heed the sockets again that were left alone; a child's end does so for those that wait for it."""
        for fd in self._stalled - set(self._children.values()):
            self._loop.resume(fd)
        self._stalled.clear()

    def _fork(self, sock: socket.socket, asked: Sequence[socket.socket], answer: Answer) -> None:
        """Give `answer()` to those who `asked` at `sock`, from a child; others who ask there wait for its end."""
        try:
            with blocked():
                if (pid := os.fork()) == 0:
                    self._become(asked, answer)
        except OSError:  # they may ask again
            return
        self._loop.pause(sock.fileno())
        self._children[pid] = sock.fileno()

    def _become(self, peers: Sequence[socket.socket], answer: Answer) -> None:
        """Do a child's work, and end it."""
        try:
            self._let_go()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            release()
            data = answer()
            for peer in peers:
                peer.settimeout(PATIENCE)
                try:
                    peer.sendall(data)
                except OSError:
                    pass  # gone already
        finally:
            os._exit(0)
