"""Asks the workers of a server whose supervisor has died, all at once.

An orphaned worker sends a greeting to each authorized process that connects to its socket (see
handover.py). It hands over nothing unless it is asked to, which this module does not do.
"""

import os
import select
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

from tailsrv.config import MAX_WORKERS
from tailsrv.control_socket import credentials
from tailsrv.handover import MAX_PACKET
from tailsrv.health.control_client import (
    REFUSED,
    REPLACED,
    STATUS_TIMEOUT,
    EndedError,
    InspectError,
    connect,
    ends,
    has_supervisor,
    list_orphan_sockets,
    not_ours,
)
from tailsrv.health.report import Level, Server
from tailsrv.linux.sockets import poll_once
from tailsrv.status_schema import AnswerError, OrphanStatus, decode_greeting


@dataclass(frozen=True, slots=True)
class Orphan:
    """An orphaned worker and its greeting.

    Attributes:
        pid: Process ID. 0 if it is unknown.
        status: The greeting. None if the worker has not answered.
        until: Until when the worker serves, as a time of time.monotonic(). Only with a status.

    """

    pid: int
    status: OrphanStatus | None = None
    until: float = 0.0


def ask_orphans(server: Server) -> list[Orphan]:
    """Return the orphaned workers of `server`, at least one. Waits at most STATUS_TIMEOUT seconds.

    Raises:
        NotOursError: They belong to another user, and this process is not root.
        EndedError: They have ended, or a supervisor has taken over from them.
        InspectError: A greeting is not valid in this version, or the workers refuse to answer.
        OSError: This process has no descriptor or memory left.

    """
    if server.uid is not None and os.geteuid() != 0 and not server.ours:
        raise not_ours(server.uid, server.user)
    found, closed = ([], []) if has_supervisor(server) else _ask(server)
    # While a supervisor takes over, some workers end, and others do not answer.
    if has_supervisor(server):
        raise EndedError(REPLACED, Level.CRITICAL)
    if not found:
        _check_refusal(server, closed)
        raise EndedError("the server has ended", Level.CRITICAL)
    return found


def _ask(server: Server) -> tuple[list[Orphan], list[int]]:
    """Return the workers of `server` with the greetings that arrive in time.

    Also return the pids of the workers that close the connection without a greeting. These have
    ended, if they have not refused to answer. Raises InspectError.
    """
    if server.uid is None:
        # The queues of these workers are full (see `find`).
        return [Orphan(pid) for pid in server.orphans], []
    found, closed = [], []
    deadline = time.monotonic() + STATUS_TIMEOUT
    with ExitStack() as connections:
        waiting = {}
        for sock, pid in islice(_connect(server), MAX_WORKERS):
            connections.enter_context(sock)
            waiting[sock.fileno()] = sock, pid
        while waiting and (
            ready := poll_once(dict.fromkeys(waiting, select.POLLIN), deadline - time.monotonic())
        ):
            for fd in ready:
                sock, pid = waiting.pop(fd)
                if packet := _receive(sock):
                    found.append(_read(pid, packet))
                else:
                    closed.append(pid)
    return found + [Orphan(pid) for _, pid in waiting.values()], closed


def _check_refusal(server: Server, closed: Iterable[int]) -> None:
    """Raise InspectError if the workers that have closed the connection still listen."""
    if any(pid == 0 or not ends(pid) for pid in closed):
        for sock, _ in _connect(server):
            sock.close()
            raise InspectError(f"orphaned worker {REFUSED}")


def _connect(server: Server) -> Iterator[tuple[socket.socket, int]]:
    """Yield a connection to each worker of `server`, and the worker's pid."""
    for name in list_orphan_sockets().get(server.endpoints[0], ()):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connect(sock, name, deadline=0.0)
        except (EndedError, OSError):
            # It has ended, or its queue is full. In the second case, its user is unknown.
            sock.close()
            continue
        pid, uid, _ = credentials(sock)
        if uid == server.uid:
            yield sock, pid
        else:
            sock.close()


def _receive(sock: socket.socket) -> bytes:
    """Return the packet that has arrived, empty if the worker has ended."""
    try:
        return sock.recv(MAX_PACKET)
    except ConnectionError:
        return b""


def _read(pid: int, packet: bytes) -> Orphan:
    try:
        status = decode_greeting(packet)
    except AnswerError as error:
        raise InspectError(
            f"unexpected answer from an orphaned worker (version mismatch?): {error}"
        ) from error
    return Orphan(pid, status, time.monotonic() + status.seconds)
