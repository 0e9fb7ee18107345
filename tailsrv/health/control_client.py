"""Finds the servers of this machine and asks them for their status and clients.

It finds servers by the names of their control sockets in /proc/net/unix. If there is no control
socket for an endpoint, its supervisor has died, and it looks for workers that serve on. To ask a
question, it connects to a control socket, or to the socket of an orphaned worker. It sends nothing:
each question has a socket of its own, and a worker that is sent nothing hands nothing over. It
never connects to the TCP port, because a health check must not be a client. It trusts an answer
only if it comes from this process's user or from root; root trusts all users. It trusts a process
ID that a supervisor reports only after it has compared the start times.
"""

import os
import re
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import psutil  # type: ignore[import-untyped]

from tailsrv.config import MAX_WORKERS
from tailsrv.control_socket import (
    CLIENTS,
    PREFIX,
    credentials,
    list_sockets,
    list_worker_sockets,
    overflow_uid,
)
from tailsrv.health.report import (
    ENDED_STATES,
    STOPPED,
    Level,
    OrphanReport,
    Server,
    describe_orphans,
)
from tailsrv.health.user_names import user_names
from tailsrv.linux.process import read_stat
from tailsrv.linux.sockets import poll_once
from tailsrv.status_schema import (
    AnswerError,
    Listing,
    ServerStatus,
    decode_listing,
    decode_status,
)

# Seconds to wait for a status. A supervisor answers within milliseconds, even during an upgrade.
STATUS_TIMEOUT = 5.0
# Seconds to wait for the segments and clients, whose list can be several megabytes long.
CLIENTS_TIMEOUT = 10.0
# Seconds between two attempts to connect to a control socket whose queue is full.
CONNECT_RETRY = 0.02
# Seconds in which a supervisor that has closed a connection must end if it was killed.
EXIT_PATIENCE = 0.2
# Largest size of a status in bytes: twice that of a thousand workers with ten addresses each.
MAX_STATUS = 1 << 22
# Largest size of the list of segments and clients in bytes: twice that of a million clients and
# MAX_LISTED_SEGMENTS of status_schema.py with the longest paths.
MAX_CLIENTS = 1 << 28

# Any user can take any socket name, so only the endpoints that a server can have are accepted:
# `*`, a host name, an IPv4 address, or an IPv6 address in brackets with an optional scope; then a
# port. A name with a comma would be mistaken for several endpoints.
_ENDPOINT = re.compile(r"(?:\*|[\w.~-]+|\[[0-9A-Fa-f:.]+(?:%[^][\s,:/%\"\\]+)?\]):[1-9][0-9]{0,4}")

REPLACED = "the server has ended and another server has replaced it"
REFUSED = (
    "closed the connection without an answer: it may be in another user namespace and unable to"
    " identify this user; run the check there"
)
_OTHER_PID_NAMESPACE = "it may be in another pid namespace; run the check there"
_VERSION_MISMATCH = "unexpected answer from the supervisor (version mismatch?)"


class InspectError(Exception):
    """A server cannot be inspected. The message is one line that says why.

    Attributes:
        level: The level that a health check gives to a server with this error.

    """

    def __init__(self, message: str, level: Level = Level.UNKNOWN) -> None:
        super().__init__(message)
        self.level = level


class NotOursError(InspectError):
    """The server belongs to another user. Only that user and root can inspect it."""


class EndedError(InspectError):
    """The server has ended since it was found, or another server has replaced it."""


class NoSupervisorError(InspectError):
    """The supervisor of the server has died, and its workers serve on for a while.

    Attributes:
        report: What is known about them.

    """

    def __init__(self, report: OrphanReport) -> None:
        super().__init__(describe_orphans(report), Level.CRITICAL)
        self.report = report


# Finding


def find(port: int | None = None, pid: int | None = None) -> list[Server]:
    """Return the servers of this machine.

    "This machine" is the network namespace of this process: the kernel lists its abstract unix
    sockets in /proc/net/unix. Servers of other users are included, but only root can inspect them.
    A server that listens on several addresses is one item.

    Args:
        port: Return only servers that listen on this TCP port.
        pid: Return only the server whose supervisor, or one of whose orphaned workers, has this
            process ID.

    Returns:
        The servers, in the order of their endpoints. The list is empty if there are none.

    Raises:
        OSError: /proc/self/net/unix cannot be read, or descriptors or memory have run out.

    """
    found: dict[object, tuple[_Found, list[str]]] = {}
    # The workers are listed first. So the supervisor of each worker in the list, if it still runs,
    # is found below.
    orphans = list_orphan_sockets()
    for endpoint in sorted({*list_endpoints(), *orphans}):
        # Workers are connected to only if they have no supervisor (see list_orphan_sockets).
        for each in _find_holder(endpoint) or _find_orphans(endpoint, orphans.get(endpoint, ())):
            found.setdefault(each.key, (each, []))[1].append(endpoint)
    wanted = [
        replace(each.server, endpoints=tuple(endpoints))
        for each, endpoints in found.values()
        if pid in (None, each.server.pid, *each.server.orphans)
        and (port is None or port in map(_port, endpoints))
    ]
    users = user_names({server.uid for server in wanted if server.uid is not None})
    return [
        server if server.uid is None else replace(server, user=users[server.uid])
        for server in wanted
    ]


@dataclass(frozen=True, slots=True)
class _Found:
    """A server that was found at one endpoint.

    Attributes:
        server: The server.
        key: The same for all endpoints of a server.

    """

    server: Server
    key: object


def list_endpoints() -> list[str]:
    """Return, sorted, the endpoints for which a process of any user listens at a control socket."""
    return sorted(filter(_is_endpoint, list_sockets(socket.SOCK_STREAM, listening=True)))


def _is_endpoint(name: str) -> bool:
    return _ENDPOINT.fullmatch(name) is not None and _port(name) <= 65535


def ports(server: Server) -> set[int]:
    """Return the TCP ports that `server` listens on."""
    return {_port(endpoint) for endpoint in server.endpoints}


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def _find_holder(endpoint: str) -> list[_Found]:
    """Return the server that listens at the control socket of `endpoint`, if there is one."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            connect(sock, endpoint, deadline=0.0)
        except EndedError:
            return []
        except OSError:
            # The queue is full, or the connection is not permitted. If the server is inspected,
            # `_ask` finds out which.
            server = Server((endpoint,), None, None, None, ours=False)
            return [_Found(server, endpoint)]
        pid, uid, _ = credentials(sock)
    # The pid is that of the process that called listen(2). That process may have ended, and a
    # server of another user may have the same pid now. So the user is part of the key.
    key = (pid, uid) if pid else endpoint
    server = Server((endpoint,), pid, uid, None, ours=_is_ours(uid))
    return [_Found(server, key)]


def has_supervisor(server: Server) -> bool:
    """Return whether a process listens at a control socket of `server`."""
    return any(_find_holder(endpoint) for endpoint in server.endpoints)


def list_orphan_sockets() -> dict[str, list[str]]:
    """Return, by endpoint, the names of all workers' sockets.

    Only the workers of an endpoint without a supervisor are orphaned. The others must not be
    connected to: they accept nothing, so the connection would stay in their queue.
    """
    found: dict[str, list[str]] = {}
    for name, endpoint in sorted(list_worker_sockets().items()):
        if _is_endpoint(endpoint):
            found.setdefault(endpoint, []).append(name)
    return found


def _find_orphans(endpoint: str, names: Iterable[str]) -> list[_Found]:
    """Return for each user the server whose workers listen at the sockets `names`.

    `endpoint` must have no supervisor.
    """
    found: dict[int | None, list[int]] = {}
    for name in names:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            uid: int | None
            try:
                connect(sock, name, deadline=0.0)
                pid, uid, _ = credentials(sock)
            except BlockingIOError:
                # The queue is full.
                pid, uid = 0, None
            except (EndedError, OSError):
                continue
        found.setdefault(uid, []).append(pid)
    return [_describe_orphans(endpoint, uid, sorted(pids)) for uid, pids in found.items()]


def _describe_orphans(endpoint: str, uid: int | None, pids: Sequence[int]) -> _Found:
    """Return the server of the workers with these pids, of which one that is unknown is 0."""
    server = Server(
        (endpoint,),
        pid=None,
        uid=uid,
        user=None,
        ours=uid is not None and _is_ours(uid),
        orphans=tuple(pids[:MAX_WORKERS]),
    )
    return _Found(server, (*pids, uid) if all(pids) else (endpoint, uid))


# Asking


@dataclass(frozen=True, slots=True)
class _Answer:
    pid: int
    data: bytes


def connect(sock: socket.socket, name: str, deadline: float) -> None:
    """Connect to a control socket. While its queue is full, try again.

    The last attempt is before `deadline`, a time of time.monotonic(); there is at least one. Raises
    BlockingIOError if the queue is still full then, EndedError if no process listens at the socket,
    and OSError if connect(2) fails for another reason.
    """
    sock.setblocking(False)
    while True:
        try:
            sock.connect(f"\0{PREFIX}{name}")
        except BlockingIOError:
            # There is no event to poll(2) for, see connect(2), EAGAIN. SO_SNDTIMEO would wait, but
            # the layout of its argument depends on the libc if long has 32 bits and time_t has 64.
            if time.monotonic() + CONNECT_RETRY > deadline:
                raise
            time.sleep(CONNECT_RETRY)
        except ConnectionRefusedError:
            raise EndedError("the server has ended", Level.CRITICAL) from None
        else:
            return


def _ask(server: Server, suffix: str, deadline: float, largest: int) -> _Answer:
    """Return the answer of `server`, of at most `largest` bytes.

    Waits until `deadline`, a time of time.monotonic(). Raises InspectError, or OSError if
    descriptors or memory have run out.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            connect(sock, server.endpoints[0] + suffix, deadline)
        except BlockingIOError:
            raise InspectError(
                "supervisor does not answer: the queue of its control socket is full",
                Level.CRITICAL,
            ) from None
        pid, uid, _ = credentials(sock)
        _check_user(uid, server.user)
        if server.pid is not None and (pid, uid) != (server.pid, server.uid):
            raise EndedError(REPLACED, Level.CRITICAL)
        try:
            data = _receive(sock, deadline, largest)
        except TimeoutError:
            raise InspectError(
                f"supervisor does not answer: {_describe(pid)}", Level.CRITICAL
            ) from None
        except ConnectionError:
            raise EndedError("the server has ended", Level.CRITICAL) from None
    if not data:
        _explain_empty_answer(pid, uid, server.user)
    return _Answer(pid, data)


def _check_user(uid: int, name: str | None) -> None:
    """Raise NotOursError unless the process that listens at the control socket can be trusted.

    Abstract socket names are not protected: the first process that binds a name has it.
    """
    if os.geteuid() != 0 and uid != 0 and not _is_ours(uid):
        raise not_ours(uid, name)


def _is_ours(uid: int) -> bool:
    """Return whether `uid` certainly is this process's user.

    The overflow uid is not: it stands for every user that this user namespace does not map.
    """
    return uid == os.geteuid() and uid != overflow_uid()


def not_ours(uid: int, name: str | None) -> NotOursError:
    """Return the error for a server of the user `uid`, whose name is `name` if it is known."""
    if uid == overflow_uid():
        return NotOursError(
            "belongs to a user that this user namespace does not map: run the check in the"
            " user namespace of the server"
        )
    return NotOursError(f"belongs to user {name or uid}: run the check as that user or as root")


def _explain_empty_answer(pid: int, uid: int, name: str | None) -> None:
    """Raise the InspectError for a supervisor that closed the connection without an answer."""
    if os.geteuid() != 0 and not _is_ours(uid):
        raise not_ours(uid, name)
    if pid and ends(pid):
        raise EndedError("the server has ended", Level.CRITICAL)
    raise InspectError(f"supervisor {REFUSED}")


def ends(pid: int) -> bool:
    """Return whether the process `pid` has ended, or does so now.

    The kernel closes the sockets of a process a moment before it shows that the process has ended.
    """
    deadline = time.monotonic() + EXIT_PATIENCE
    while read_stat(pid) is not None and state_of(pid) not in ENDED_STATES:
        if time.monotonic() >= deadline:
            return False
        time.sleep(CONNECT_RETRY)
    return True


def _receive(sock: socket.socket, deadline: float, largest: int) -> bytes:
    """Return all bytes that arrive before the supervisor closes the connection.

    Raises TimeoutError after `deadline`, ConnectionError if the connection is reset, and
    InspectError if more than `largest` bytes arrive.
    """
    received = bytearray()
    while poll_once({sock.fileno(): select.POLLIN}, deadline - time.monotonic()):
        chunk = sock.recv(1 << 20)
        if not chunk:
            return bytes(received)
        received += chunk
        if len(received) > largest:
            raise InspectError(f"{_VERSION_MISMATCH}: more than {largest} bytes")
    raise TimeoutError


def _describe(pid: int) -> str:
    """Return what is known about a process that does not answer, as a part of a message."""
    if not pid:
        return "it is in another pid namespace"
    state = state_of(pid)
    return f"pid {pid} " + ("is stopped" if state == STOPPED else f"({state or 'state unknown'})")


def ask_status(server: Server, deadline: float) -> ServerStatus:
    """Return the status of `server`, after a check that the answer comes from its supervisor.

    Waits at most STATUS_TIMEOUT seconds, and not beyond `deadline`, a time of time.monotonic().
    Raises InspectError, or OSError if descriptors or memory have run out.
    """
    answer = _ask(server, "", min(deadline, time.monotonic() + STATUS_TIMEOUT), MAX_STATUS)
    try:
        status = decode_status(answer.data)
    except AnswerError as error:
        raise InspectError(f"{_VERSION_MISMATCH}: {error}") from error
    if status.pid != answer.pid:
        raise InspectError(
            f"supervisor reports pid {status.pid}, but here it has pid {answer.pid}:"
            f" {_OTHER_PID_NAMESPACE}"
        )
    stat = read_stat(status.pid)
    if stat is None:
        raise EndedError("the server has ended", Level.CRITICAL)
    if stat.ticks != status.ticks:
        raise InspectError(f"supervisor reports a start time that is not that of pid {status.pid}")
    return status


def ask_listing(server: Server) -> Listing:
    """Return the segments and clients of `server`.

    Waits at most CLIENTS_TIMEOUT seconds. Raises InspectError, or OSError if descriptors or memory
    have run out.
    """
    answer = _ask(server, CLIENTS, time.monotonic() + CLIENTS_TIMEOUT, MAX_CLIENTS)
    try:
        listing = decode_listing(answer.data)
    except AnswerError as error:
        raise InspectError(f"{_VERSION_MISMATCH}: list of clients: {error}") from error
    if listing.pid != answer.pid:
        raise InspectError(
            f"list of clients reports pid {listing.pid}, but here the supervisor has pid"
            f" {answer.pid}: {_OTHER_PID_NAMESPACE}"
        )
    return listing


# Figures of processes

Figure = TypeVar("Figure")


def attempt(get: Callable[[], Figure]) -> Figure | None:
    """Return the result of `get()`, a figure of a process, or None if it is not available.

    It may be unavailable because the process belongs to another user, or has ended, or because
    /proc is restricted (ProcSubset= of systemd).
    """
    try:
        return get()
    except (psutil.Error, OSError, AttributeError, NotImplementedError):
        return None


def state_of(pid: int) -> str | None:
    """Return psutil's word for the state of a process, such as `sleeping`; None if unavailable."""
    return attempt(lambda: str(psutil.Process(pid).status()))
