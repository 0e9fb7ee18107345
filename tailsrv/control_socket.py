"""The control sockets of a server: its lock, the way to find it, and where it reports its status.

For each endpoint (address and port) the supervisor listens at two abstract unix sockets: one for
its status and one for its list of clients. Their names are unique in a network namespace, so
binding them is also a lock against a second server on the same endpoint.
"""

import errno
import os
import socket
import struct
import zlib
from collections.abc import Sequence

# Largest number of connections to accept at one socket in one turn. Every local user can connect,
# and a flood of connections must not keep the supervisor from its other work.
ACCEPTS_PER_TURN = 16
# The name of a control socket is PREFIX and the endpoint.
PREFIX = "tailsrv:"
# The name of the socket for the list of clients ends with this.
CLIENTS = "/clients"

# Largest number of bytes for the endpoint in a socket name: unix(7) allows 107 after the NUL byte.
MAX_ENDPOINT_NAME = 107 - len(PREFIX) - len(CLIENTS)

# Number of users in a uid_map that maps every user, see user_namespaces(7).
EVERY_USER = 0xFFFFFFFF
# Default value of /proc/sys/kernel/overflowuid.
OVERFLOW_UID = 65534

# struct ucred of unix(7): pid, uid, gid.
_CREDENTIALS = struct.Struct("iII")


class AlreadyServedError(Exception):
    """Another server holds the lock for an endpoint. The message is one line that names it."""


class Control:
    """The control sockets that a supervisor listens at.

    They are its lock: the kernel releases it when the last process that holds the sockets closes
    them or dies.

    Attributes:
        sockets: All control sockets.
        status: The sockets for requests of the status, one for each endpoint.
        clients: The sockets for requests of the list of clients, one for each endpoint.

    """

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self.sockets = sockets
        half = len(sockets) // 2
        self.status, self.clients = sockets[:half], sockets[half:]
        self._unmapped_uid = overflow_uid()

    @classmethod
    def lock(cls, endpoints: Sequence[str]) -> "Control":
        """Take the lock for `endpoints`, such as `*:4321`, and listen at their control sockets.

        Raises:
            AlreadyServedError: Another server holds the lock for one of the endpoints. No lock is
                held.
            OSError: A socket cannot be created or used for another reason.

        """
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
        """Close the sockets, which releases the lock unless another process has copies of them.

        A forked child calls this too, to give up its copies.
        """
        for sock in self.sockets:
            sock.close()

    def accept_authorized(self, sock: socket.socket) -> tuple[list[socket.socket], OSError | None]:
        """Accept at most ACCEPTS_PER_TURN connections at `sock` and close the unauthorized ones.

        A caller is authorized if its uid is the supervisor's or 0. The uid that stands for unmapped
        users (see overflow_uid) is never authorized: it does not identify a user.

        Returns:
            The authorized connections, which are non-blocking, and the error that ended the loop,
            or None. An error means that accept(2) has found no descriptor or memory. `sock` then
            stays readable until there is room, even if the next caller has already disconnected.

        """
        authorized: list[socket.socket] = []
        for _ in range(ACCEPTS_PER_TURN):
            try:
                peer, _ = sock.accept()
            except BlockingIOError:
                # The queue is empty.
                break
            except OSError as error:
                return authorized, error
            peer.setblocking(False)
            uid = credentials(peer)[1]
            if uid in (0, os.geteuid()) and uid != self._unmapped_uid:
                authorized.append(peer)
            else:
                peer.close()
        return authorized, None


def find_supervisor(endpoint: str) -> int | None:
    """Return the process ID of the supervisor that serves `endpoint`, None if there is none.

    `endpoint` is an address and a port, such as `*:4321` or `127.0.0.1:4321`. The result is 0 if
    the supervisor is in another pid namespace (pid_namespaces(7)). None also means that the
    connection to the control socket failed, for example because its queue is full.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(_address(endpoint))
        except OSError:
            return None
        return credentials(sock)[0]


def describe_holder(endpoint: str) -> str:
    """Return a message that another server serves `endpoint`, with its process ID if known."""
    pid = find_supervisor(endpoint)
    return f"{endpoint} is served by another tailsrv" + (f", pid {pid}" if pid else "")


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of the process at the other end of `sock`, a connected unix socket.

    The pid is 0 if that process is outside this process's pid namespace. See unix(7), SO_PEERCRED:
    for a client these are the credentials of the process that called listen(2), for a server those
    of the process that called connect(2).
    """
    pid, uid, gid = _CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return pid, uid, gid


def overflow_uid() -> int | None:
    """Return the uid that stands for all users that this user namespace does not map.

    Such a uid does not identify a user. The result is None if the namespace maps all users, and
    65534 if /proc cannot be read. See user_namespaces(7), "Unmapped user and group IDs".
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
    """Return the name of the control socket of `endpoint`, without PREFIX.

    This is the endpoint itself if it has at most MAX_ENDPOINT_NAME bytes. Otherwise the end of the
    host name is replaced by a checksum of the whole host name. The port is kept, because the health
    check reads it from the socket name.
    """
    if len(endpoint.encode()) <= MAX_ENDPOINT_NAME:
        return endpoint
    host, _, port = endpoint.rpartition(":")
    end = f"~{zlib.crc32(host.encode()):08x}:{port}"
    return host.encode()[: MAX_ENDPOINT_NAME - len(end)].decode(errors="ignore") + end


def _address(name: str) -> str:
    """Return the address of a control socket. `name` is an endpoint, with or without CLIENTS.

    The address is abstract: no socket file can be left over after a crash, and the name is unique
    in the network namespace, as the port is.
    """
    endpoint = name.removesuffix(CLIENTS)
    return f"\0{PREFIX}{socket_name(endpoint)}{name[len(endpoint) :]}"
