"""The abstract sockets: lock against a second server, discovery of the supervisor, its status and its clients as JSON."""

import errno
import os
import socket
import struct
import zlib
from collections.abc import Sequence

# at one go; any local user may ask, and must not keep us from our work
ACCEPTS_PER_TURN = 16
PREFIX = "tailsrv:"
# an endpoint's second socket has this behind its name
CLIENTS = "/clients"

# Bytes of an endpoint in a socket's name, of the 107 that unix(7) has room for behind the NUL.
MAX_ENDPOINT_NAME = 107 - len(PREFIX) - len(CLIENTS)

# Users that there can be: the length of uid_map in user_namespaces(7) where it leaves none out.
EVERY_USER = 0xFFFFFFFF
# of /proc/sys/kernel/overflowuid, where nobody has set it to another
OVERFLOW_UID = 65534

# pid, uid, gid: struct ucred of unix(7)
_CREDENTIALS = struct.Struct("iII")


class AlreadyServedError(Exception):
    """Another server holds the lock for an endpoint; the message says who."""


class Control:
    """The supervisor's end: it holds the lock as long as it lives, and the kernel lets go of it when it dies."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self.sockets = sockets
        half = len(sockets) // 2
        # who connects is told the one or the other
        self.status, self.clients = sockets[:half], sockets[half:]
        self._nobody = overflow_uid()

    @classmethod
    def lock(cls, endpoints: Sequence[str]) -> "Control":
        """Take the lock for all of `endpoints`. Raises AlreadyServedError."""
        names = [*endpoints, *(endpoint + CLIENTS for endpoint in endpoints)]
        control = cls([socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in names])
        for sock, name in zip(control.sockets, names, strict=True):
            try:
                sock.bind(_address(name))
            except OSError as error:
                control.close()
                if error.errno != errno.EADDRINUSE:
                    raise
                raise AlreadyServedError(describe_holder(name)) from error
            sock.listen()
            sock.setblocking(False)
        return control

    def close(self) -> None:
        """Let go of the lock (a forked child: of its copy)."""
        for sock in self.sockets:
            sock.close()

    def accept_authorized(self, sock: socket.socket) -> tuple[list[socket.socket], OSError | None]:
        """Accept those who wait at `sock`, at most ANSWERS of them.

        Return a non-blocking connection to each who is certainly the same user or root (all others
        are closed), and the error if there is no descriptor or memory for the next (accept(2)).
        Until there is, `sock` stays readable, even when the next one has gone.
        """
        found: list[socket.socket] = []
        for _ in range(ACCEPTS_PER_TURN):
            try:
                peer, _ = sock.accept()
            except BlockingIOError:
                # nobody waits any more
                break
            except OSError as error:
                return found, error
            peer.setblocking(False)
            uid = credentials(peer)[1]
            if uid in (0, os.geteuid()) and uid != self._nobody:
                found.append(peer)
            else:
                peer.close()
        return found, None


def find_supervisor(endpoint: str) -> int | None:
    """Return the pid of the supervisor that serves `endpoint` (`*:4321`, `127.0.0.1:4321`), None if there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(_address(endpoint))
        except OSError:
            return None
        return credentials(sock)[0]


def describe_holder(endpoint: str) -> str:
    """Return who serves `endpoint`, as far as the control socket tells."""
    pid = find_supervisor(endpoint)
    return f"{endpoint} is served by another tailsrv" + (f", pid {pid}" if pid else "")


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of the other end of a unix socket (unix(7), SO_PEERCRED); pid 0: in no namespace of ours."""
    pid, uid, gid = _CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return pid, uid, gid


def overflow_uid() -> int | None:
    """Return the uid that any user may have whom our user namespace does not map, None if it maps all.

    See user_namespaces(7), "Unmapped user and group IDs". Where /proc cannot tell, it may be 65534.
    """
    try:
        with open("/proc/self/uid_map", "rb") as file:
            if sum(int(line.split()[2]) for line in file) >= EVERY_USER:
                return None
        with open("/proc/sys/kernel/overflowuid", "rb") as file:
            return int(file.read())
    except (OSError, ValueError, IndexError):
        return OVERFLOW_UID


def socket_name(endpoint: str) -> str:
    """Return the name of an endpoint's control socket, without PREFIX: the endpoint itself if it fits.

    The end of a host's name for which there is no room becomes a checksum of the whole name. The
    port stays where a health check looks for it.
    """
    if len(endpoint.encode()) <= MAX_ENDPOINT_NAME:
        return endpoint
    host, _, port = endpoint.rpartition(":")
    end = f"~{zlib.crc32(host.encode()):08x}:{port}"
    return host.encode()[: MAX_ENDPOINT_NAME - len(end)].decode(errors="ignore") + end


def _address(name: str) -> str:
    """Return the address of an endpoint's control socket, or of its second one if CLIENTS is behind it.

    It is abstract: no file to go stale, and as wide as the port is, a network namespace.
    """
    endpoint = name.removesuffix(CLIENTS)
    return f"\0{PREFIX}{socket_name(endpoint)}{name[len(endpoint) :]}"
