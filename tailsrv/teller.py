"""Gives long answers from a forked child, so that the supervisor waits for nobody who asks."""

import os
import signal
import socket
from collections.abc import Callable, Iterable

from tailsrv.signals import blocked, release

PATIENCE = 10  # seconds that those who asked have to take their answer


def tell(peers: Iterable[socket.socket], answer: Callable[[], bytes], let_go: Callable[[], None]) -> int | None:
    """Send `answer()` to each of `peers` from a child, and return its pid; None if nobody asks or fork(2) fails.

    The child first calls `let_go()`, to close what is the supervisor's: it must not outlive it in a forgotten child.
    """
    asked: list[socket.socket] = []
    try:
        asked.extend(peer.dup() for peer in peers)
        with blocked():
            pid = os.fork() if asked else None
            if pid == 0:
                _answer(asked, answer, let_go)
    except OSError:
        return None
    finally:
        for peer in asked:
            peer.close()
    return pid


def _answer(peers: Iterable[socket.socket], answer: Callable[[], bytes], let_go: Callable[[], None]) -> None:
    """Do the child's work, and end it."""
    try:
        let_go()
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
