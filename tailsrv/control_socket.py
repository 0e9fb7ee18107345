"""The control sockets of a server: its lock, the way to find it, and where it reports its status.

For each endpoint (address and port) the supervisor listens at two abstract unix sockets: one for
its status and one for its list of clients. Their names are unique in a network namespace, so
binding them is also a lock against a second server on the same endpoint.

Each worker listens at such a socket, too. When its supervisor has died, the next one finds it there
(see handover.py).
"""

import errno
import os
import re
import socket
import struct
import zlib
from collections.abc import Iterator, Sequence

# Largest number of connections to accept at one socket in one turn. Every local user can connect,
# and a flood of connections must not keep the supervisor from its other work.
ACCEPTS_PER_TURN = 16
# The name of a control socket is PREFIX and the endpoint.
PREFIX = "tailsrv:"
# The name of the socket for the list of clients ends with this.
CLIENTS = "/clients"
# The name of a worker's socket ends with this and a number.
WORKER = "/worker/"

# Largest number of bytes for the endpoint in a socket name: unix(7) allows 107 after the NUL byte.
MAX_ENDPOINT_NAME = 107 - len(PREFIX) - len(f"{WORKER}999999999")

# How often to read the kernel's list of sockets. The kernel produces it page by page and sometimes
# skips a socket if other sockets are closed in between [measured: beside a process that creates and
# closes sockets all the time, 1 of 100 servers is missing in every 20th reading].
LIST_READS = 3
# __SO_ACCEPTCON in the flags of /proc/net/unix, see proc_net_unix(5).
_LISTENS = 0x10000
# Address, references, protocol, flags, type, state, inode, and name. Every user can choose a name,
# so the name may hold any text.
_SOCKET = re.compile(
    rf"[0-9a-f]+: [0-9A-F]+ [0-9A-F]+ ([0-9A-F]+) ([0-9]+) [0-9A-F]+ +[0-9]+ @{PREFIX}(.*)"
)

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
        """Accept connections at one of the control sockets, as the function of this name does."""
        return accept_authorized(sock, self._unmapped_uid)


def accept_authorized(
    sock: socket.socket, unmapped_uid: int | None
) -> tuple[list[socket.socket], OSError | None]:
    """Accept at most ACCEPTS_PER_TURN connections at `sock` and close the unauthorized ones.

    A caller is authorized if its uid is this process's or 0.

    Args:
        sock: A listening unix socket.
        unmapped_uid: The result of `overflow_uid`. It is never authorized, because it does not
            identify a user.

    Returns:
        The authorized connections, which are non-blocking, and the error that ended the loop, or
        None. An error means that accept(2) has found no descriptor or memory. `sock` then stays
        readable until there is room, even if the next caller has already disconnected.

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
        if uid in (0, os.geteuid()) and uid != unmapped_uid:
            authorized.append(peer)
        else:
            peer.close()
    return authorized, None


def bind_for_worker(endpoints: Sequence[str], numbers: Iterator[int]) -> list[socket.socket]:
    """Return sockets at which a supervisor will find a new worker, one for each endpoint.

    Their names end with the same number, so that the next supervisor asks the worker only once.
    They are made before the fork, so that no worker is ever without a name. The worker calls
    listen(2), which also records its pid for SO_PEERCRED.

    Args:
        endpoints: The addresses that the server listens on.
        numbers: An endless series of numbers that this process has not used for other workers.

    Raises:
        OSError: A socket cannot be created or bound.

    """
    for number in numbers:
        sockets: list[socket.socket] = []
        try:
            for endpoint in endpoints:
                sockets.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                sockets[-1].bind(_address(f"{endpoint}{WORKER}{number}"))
                sockets[-1].setblocking(False)
        except OSError as error:
            for sock in sockets:
                sock.close()
            # A worker of the supervisor before this one has it.
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return sockets
    raise AssertionError("the numbers are endless")


def connect_to_worker(name: str) -> socket.socket:
    """Return a non-blocking connection to the worker socket `name`. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    try:
        sock.connect(f"\0{PREFIX}{name}")
    except OSError:
        sock.close()
        raise
    return sock


def list_worker_sockets() -> dict[str, str]:
    """Return the names of the workers' sockets, each with the (shortened) name of its endpoint.

    A worker that has just been forked does not listen at its socket yet. Raises OSError if
    /proc/self/net/unix cannot be read.
    """
    names = list_sockets(socket.SOCK_SEQPACKET, listening=False)
    parts = ((name, name.rpartition(WORKER)) for name in names)
    # Every user can take any name, so accept only those that a worker can have.
    return {
        name: endpoint
        for name, (endpoint, separator, number) in parts
        if separator and name.isascii() and number.isdigit()
    }


def list_sockets(kind: socket.SocketKind, listening: bool) -> set[str]:
    """Return the names, without PREFIX, of the control sockets of this kind that any user has.

    With `listening`, the result has only those that listen. Raises OSError if /proc/self/net/unix
    cannot be read.
    """
    return set().union(*(_read_sockets(kind, listening) for _ in range(LIST_READS)))


def _read_sockets(kind: socket.SocketKind, listening: bool) -> set[str]:
    # This path exists even where /proc shows nothing but processes (ProcSubset=pid of systemd).
    with open("/proc/self/net/unix", encoding="utf-8", errors="replace") as file:
        matches = [_SOCKET.match(line) for line in file]
    return {
        match[3]
        for match in matches
        if match and int(match[2], 16) == kind and (not listening or int(match[1], 16) & _LISTENS)
    }


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
    """Return the address of a control socket. `name` is an endpoint, or begins with one.

    The address is abstract: no socket file can be left over after a crash, and the name is unique
    in the network namespace, as the port is.
    """
    endpoint = name.partition("/")[0]
    return f"\0{PREFIX}{socket_name(endpoint)}{name[len(endpoint) :]}"
