"""Finds servers by their control sockets, and asks them.

Nothing here opens a service port: a health check must not be a client. Nobody is believed whose user is not ours
(root believes all), and no pid that does not belong to the process that it belonged to when it was named.
"""

import os
import re
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import psutil  # type: ignore[import-untyped]

from tailsrv.control import CLIENTS, PREFIX, credentials, overflow_uid
from tailsrv.health.report import STOPPED, Level, Server
from tailsrv.health.users import user_names
from tailsrv.linux.process import read_stat
from tailsrv.status_schema import (
    AnswerError,
    ClientStatus,
    ServerStatus,
    decode_clients,
    decode_status,
)

# seconds for a status; a supervisor takes milliseconds, also while it replaces itself
STATUS_TIMEOUT = 5.0
# seconds for the list of clients, which can be megabytes
CLIENTS_TIMEOUT = 10.0
# seconds between two tries to connect to a control socket whose queue is full
CONNECT_RETRY = 0.02
# bytes of a status; a thousand workers with ten addresses each are half of that
MAX_STATUS = 1 << 22
# bytes of the list of clients; a million of them are a third of that
MAX_CLIENTS = 1 << 28

# How often to read the kernel's list of sockets. It comes page by page, and lacks one now and then where others are closed in
# between [measured: beside a process that makes and closes sockets all the time, 1 of 100 servers in every 20th reading].
LOOKS = 3

# __SO_ACCEPTCON in the flags of /proc/net/unix, see proc_net_unix(5)
_LISTENS = 0x10000

# Any user may take any name. Only an endpoint as we write it is a server's: `*`, a host's name or
# IPv4 address, or an IPv6 address in brackets with its scope, and a port. A name with a comma
# would read as several endpoints.
_ENDPOINT = r"(?:\*|[\w.~-]+|\[[0-9A-Fa-f:.]+(?:%[^][\s,:/%\"\\]+)?\]):[1-9][0-9]{0,4}"
# address, references, protocol, flags, type (SOCK_STREAM), state, inode, name, which is anybody's text
_LISTENER = re.compile(
    rf"[0-9a-f]+: [0-9A-F]+ [0-9A-F]+ ([0-9A-F]+) 0001 [0-9A-F]+ +[0-9]+ @{PREFIX}({_ENDPOINT})$"
)

Figure = TypeVar("Figure")


class InspectError(Exception):
    """A server cannot be inspected; the message says why, in one line, and `level` what that means for a check."""

    def __init__(self, message: str, level: Level = Level.UNKNOWN) -> None:
        super().__init__(message)
        self.level = level


class NotOursError(InspectError):
    """The server is another user's, who alone gets answers, besides root."""


class EndedError(InspectError):
    """The server has ended since it was found, or another has taken its place."""


# Finding


def find(port: int | None = None, pid: int | None = None) -> list[Server]:
    """Return the servers of this machine, in the order of their endpoints.

    `port` leaves those that listen on that TCP port, `pid` the one whose supervisor has that pid. Other users'
    servers are among them: `inspect` cannot tell more about these, unless we are root. "This machine" is our network
    namespace, whose abstract sockets (unix(7)) are listed in /proc/net/unix. A server that listens on
    several addresses is listed once. Raises OSError if there is no /proc to look in.
    """
    found: dict[object, tuple[Server, list[str]]] = {}
    for endpoint in list_endpoints():
        try:
            server = _find_holder(endpoint)
        except EndedError:
            continue
        # With its user: a pid may have been that of another process, which took its name before.
        key = (server.pid, server.uid) if server.pid else endpoint
        found.setdefault(key, (server, []))[1].append(endpoint)
    servers = [replace(server, endpoints=tuple(endpoints)) for server, endpoints in found.values()]
    wanted = [
        server
        for server in servers
        if pid in (None, server.pid) and (port is None or port in ports(server))
    ]
    users = user_names({server.uid for server in wanted if server.uid is not None})
    return [
        server if server.uid is None else replace(server, user=users[server.uid])
        for server in wanted
    ]


def list_endpoints() -> list[str]:
    """Return the endpoints that somebody holds a control socket for, whoever that is."""
    return sorted(set().union(*(_read_endpoints() for _ in range(LOOKS))))


def _read_endpoints() -> set[str]:
    # there also where the rest of /proc is hidden
    with open("/proc/self/net/unix", encoding="utf-8", errors="replace") as file:
        matches = [_LISTENER.match(line) for line in file]
    return {
        match[2]
        for match in matches
        if match and int(match[1], 16) & _LISTENS and _port(match[2]) <= 65535
    }


def ports(server: Server) -> set[int]:
    """Return the ports of a server's endpoints."""
    return {_port(endpoint) for endpoint in server.endpoints}


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def _find_holder(endpoint: str) -> Server:
    """Return who listens at an endpoint's control socket. Raises EndedError."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            _connect(sock, endpoint, deadline=0.0)
        except OSError:
            # its queue is full, or we are not permitted to: asking it tells which
            return Server((endpoint,), None, None, None, ours=False)
        pid, uid, _ = credentials(sock)
        return Server((endpoint,), pid, uid, None, ours=_is_ours(uid))


# Asking


@dataclass(frozen=True, slots=True)
class _Answer:
    pid: int
    data: bytes


def _connect(sock: socket.socket, name: str, deadline: float) -> None:
    """Connect to a control socket, at least once and until `deadline`, a time of time.monotonic().

    Raises BlockingIOError if its queue is still full then, EndedError if nobody listens there.
    """
    sock.setblocking(False)
    while True:
        try:
            sock.connect(f"\0{PREFIX}{name}")
        except BlockingIOError:
            # There is nothing to poll for, see connect(2), EAGAIN. SO_SNDTIMEO would wait, but what
            # it takes depends on the libc where a long has 32 bits and a time has 64.
            if time.monotonic() + CONNECT_RETRY > deadline:
                raise
            time.sleep(CONNECT_RETRY)
        except ConnectionRefusedError:
            raise EndedError("the server has ended", Level.CRITICAL) from None
        else:
            return


def _ask(server: Server, suffix: str, deadline: float, largest: int) -> _Answer:
    """Return what `server` answers until `deadline`, up to `largest` bytes. Raises InspectError."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            _connect(sock, server.endpoints[0] + suffix, deadline)
        except BlockingIOError:
            raise InspectError(
                "supervisor does not answer: too many questions wait", Level.CRITICAL
            ) from None
        pid, uid, _ = credentials(sock)
        _check_user(uid, server.user)
        if server.pid is not None and (pid, uid) != (server.pid, server.uid):
            raise EndedError("the server has ended, another has taken its place", Level.CRITICAL)
        try:
            data = _receive(sock, deadline, largest)
        except TimeoutError:
            raise InspectError(
                f"supervisor does not answer: {_describe(pid)}", Level.CRITICAL
            ) from None
        except ConnectionError:
            raise EndedError("the server has ended", Level.CRITICAL) from None
    if not data:
        _explain_silence(pid, uid, server.user)
    return _Answer(pid, data)


def _check_user(uid: int, name: str | None) -> None:
    """Raise NotOursError if whoever holds the name could be anybody: abstract names are for the first to come."""
    if os.geteuid() != 0 and uid != 0 and not _is_ours(uid):
        raise _not_ours(uid, name)


def _is_ours(uid: int) -> bool:
    """Tell whether `uid` is our user, and not one of another user namespace who looks like it."""
    return uid == os.geteuid() and uid != overflow_uid()


def _not_ours(uid: int, name: str | None) -> NotOursError:
    user = "that this user namespace does not know" if uid == overflow_uid() else name or uid
    return NotOursError(f"belongs to user {user}: only that user and root get an answer")


def _explain_silence(pid: int, uid: int, name: str | None) -> None:
    """Raise what it means that a supervisor has closed the connection without a word."""
    if os.geteuid() != 0 and not _is_ours(uid):
        raise _not_ours(uid, name)
    if pid and read_stat(pid) is None:
        raise EndedError("the server has ended", Level.CRITICAL)
    raise InspectError(
        "supervisor gives an empty answer: perhaps it is in another user namespace and cannot know our user, ask there"
    )


def _receive(sock: socket.socket, deadline: float, largest: int) -> bytes:
    """Return all that comes until the end. Raises TimeoutError, ConnectionError, InspectError."""
    received = bytearray()
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        some = sock.recv(1 << 20)
        if not some:
            return bytes(received)
        received += some
        if len(received) > largest:
            raise InspectError("the answer has no end")
    raise TimeoutError


def _describe(pid: int) -> str:
    """Return what a person wants to know of a process that does not answer."""
    if not pid:
        return "it is in another pid namespace"
    state = state_of(pid)
    return f"pid {pid} " + ("is stopped" if state == STOPPED else f"({state or 'state unknown'})")


def ask_status(server: Server, deadline: float) -> ServerStatus:
    """Return the status of `server`, who must be the process that it says it is.

    It waits for PATIENCE seconds, and not beyond `deadline`, a time of time.monotonic(). Raises
    InspectError.
    """
    answer = _ask(server, "", min(deadline, time.monotonic() + STATUS_TIMEOUT), MAX_STATUS)
    try:
        status = decode_status(answer.data)
    except AnswerError as error:
        raise InspectError(
            f"supervisor cannot be understood, perhaps it is of another version: {error}"
        ) from error
    if status.pid != answer.pid:
        raise InspectError(
            f"supervisor says that it is pid {status.pid}, here it is pid {answer.pid}: another pid namespace? Ask there"
        )
    stat = read_stat(status.pid)
    if stat is None:
        raise EndedError("the server has ended", Level.CRITICAL)
    if stat.ticks != status.ticks:
        raise InspectError(f"supervisor is not what started as pid {status.pid}")
    return status


def ask_clients(server: Server) -> tuple[ClientStatus, ...]:
    """Return the clients of `server`. Raises InspectError."""
    answer = _ask(server, CLIENTS, time.monotonic() + CLIENTS_TIMEOUT, MAX_CLIENTS)
    try:
        pid, clients = decode_clients(answer.data)
    except AnswerError as error:
        raise InspectError(
            f"list of clients cannot be understood, perhaps it is of another version: {error}"
        ) from error
    if pid != answer.pid:
        raise InspectError(f"list of clients is by pid {pid}, here that is pid {answer.pid}")
    return clients


# Looking


def attempt(get: Callable[[], Figure]) -> Figure | None:
    """Return a figure, None if it may not be had: not ours, gone, or not in a /proc that shows little (systemd's ProcSubset=)."""
    try:
        return get()
    except (psutil.Error, OSError, AttributeError, NotImplementedError):
        return None


def state_of(pid: int) -> str | None:
    """Return psutil's word for what a process does, None if that cannot be seen."""
    return attempt(lambda: str(psutil.Process(pid).status()))
