"""The abstract socket: lock against a second server, discovery of the supervisor, status as JSON."""

import errno
import os
import socket
import struct
from collections.abc import Sequence

ANSWERS = 16  # at one go; any local user may ask, and must not keep us from our work

_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid: struct ucred of unix(7)


class AlreadyServedError(Exception):
    """Another server holds the lock for an endpoint; the message says who."""


class Control:
    """The supervisor's end: it holds the lock as long as it lives, and the kernel lets go of it when it dies."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self.sockets = sockets

    @classmethod
    def lock(cls, endpoints: Sequence[str]) -> "Control":
        """Take the lock for all of `endpoints`. Raises AlreadyServedError."""
        control = cls([socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in endpoints])
        for sock, endpoint in zip(control.sockets, endpoints, strict=True):
            try:
                sock.bind(_name(endpoint))
            except OSError as error:
                control.close()
                if error.errno != errno.EADDRINUSE:
                    raise
                raise AlreadyServedError(describe_holder(endpoint)) from error
            sock.listen()
            sock.setblocking(False)
        return control

    def close(self) -> None:
        """Let go of the lock (a forked child: of its copy)."""
        for sock in self.sockets:
            sock.close()

    def answer(self, sock: socket.socket, status: bytes) -> None:
        """Give `status` to everyone who waits at `sock` and is the same user or root; close on all others."""
        for _ in range(ANSWERS):
            try:
                peer, _ = sock.accept()
            except OSError:  # nobody waits any more, or no descriptor is left for whoever does
                return
            with peer:
                peer.setblocking(False)
                _, uid, _ = _credentials(peer)
                if uid in (0, os.geteuid()):
                    try:
                        peer.send(status)  # fits the socket's buffer
                    except OSError:
                        pass  # gone already


def find_supervisor(endpoint: str) -> int | None:
    """Return the pid of the supervisor that serves `endpoint` (`*:4321`, `127.0.0.1:4321`), None if there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(_name(endpoint))
        except OSError:
            return None
        return _credentials(sock)[0]


def describe_holder(endpoint: str) -> str:
    """Return who serves `endpoint`, as far as the control socket tells."""
    pid = find_supervisor(endpoint)
    return f"{endpoint} is served by another tailsrv" + (f", pid {pid}" if pid else "")


def _name(endpoint: str) -> str:
    return f"\0tailsrv:{endpoint}"  # abstract: no file to go stale, and as wide as the port is: a network namespace


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid, gid
