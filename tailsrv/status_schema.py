"""The server's status as dataclasses, and the strict reader of the JSON that carries it. Pure.

The supervisor sends this JSON at its control sockets, an orphaned worker sends its greeting at a
socket of its own. The reader accepts an answer as a whole or
refuses it as a whole: any process can take the name of such a socket and send what it likes.
"""

import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from tailsrv.config import MAX_WORKERS

# Bounds of a valid answer. Without them an impostor could send an answer that takes long to
# process, fills the screen, or holds a number that is too large for a system call.

# Largest integer, and largest absolute value of any number.
MAX_INTEGER = (1 << 63) - 1
# Largest process ID, see proc_sys_kernel(5), pid_max.
MAX_PID = 1 << 22
# Longest text in characters. A path has at most 4096 bytes (PATH_MAX of open(2)).
MAX_TEXT = 1 << 14
# Largest number of segments in a list. A server keeps 1000 open, and more of them only as long as
# clients read the oldest ones.
MAX_LISTED_SEGMENTS = 2000

Decoded = TypeVar("Decoded")


class AnswerError(ValueError):
    """An answer is not valid in this version of tailsrv. The message is one line that says why."""


class ServerState(StrEnum):
    """The state of a server, as the status and the process title show it."""

    SERVING = "serving"
    STARTING = "starting"
    WAITING = "waiting for file"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class FileStatus:
    """The served file, which holds the active segment, as the supervisor knows it.

    Attributes:
        path: Absolute path of the file.
        size: Size in bytes. None while no file is open, or while its file system does not report
            the size, for example because its file server is gone (fstat(2), ESTALE).
        gone: Whether the path no longer names the open file. With `--follow-name`, the server
            continues to serve that file until the next one has a byte.
        error: Why the next file with this path cannot be opened. None if there is no such problem.
        follow_name: Whether the server continues with the next file with this path.
        missing: For how many seconds such a server has found no next file. None if it has found
            one, or does not look for one.

    """

    path: str
    size: int | None
    gone: bool
    error: str | None
    follow_name: bool = False
    missing: float | None = None


@dataclass(frozen=True, slots=True)
class LogStatus:
    """The log: the files that had the path, one after another. Each of them is a segment.

    Attributes:
        start: The earliest log offset for a new stream, in bytes.
        end: The log offset of its end. None if the size of the served file is unknown.
        segments: Number of segments that the server holds open.
        size: Number of bytes in these segments. None if `end` is unknown.
        retired: Number of these segments that are before `start`. They were deleted, and are open
            only because clients still read them.
        retired_size: Number of bytes in these retired segments.

    """

    start: int
    end: int | None
    segments: int
    size: int | None
    retired: int
    retired_size: int


@dataclass(frozen=True, slots=True)
class SegmentStatus:
    """One segment of the log.

    Attributes:
        base: The log offset of its first byte.
        size: Number of its bytes. None if it is unknown.
        sealed: Whether its size is final. Only the last segment of the log is not sealed.
        clients: Number of protected clients whose next byte is in it.
        path: Absolute path of its file. None if the path is unknown.
        deleted: Whether the file has no name any more, or was truncated.

    """

    base: int
    size: int | None
    sealed: bool
    clients: int
    path: str | None
    deleted: bool


@dataclass(frozen=True, slots=True)
class ListenerStatus:
    """One listening socket and its accept queue.

    Attributes:
        slot: Number of the slot that the socket belongs to. None if all slots share it.
        endpoint: Address and port, as in `0.0.0.0:4321` or `[::]:4321`.
        queued: Number of connections that wait to be accepted.
        backlog: Number of connections that may wait to be accepted.

    """

    slot: int | None
    endpoint: str
    queued: int
    backlog: int


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """One client and its progress.

    Attributes:
        slot: Number of the slot whose worker serves the client.
        peer: The client's address and port. None if it has already disconnected.
        start: Log offset at which its stream started. None until its header has been read.
        position: Log offset that it has reached, or None if it is unknown. Bytes that the kernel
            has accepted for the client count, even if they are not delivered yet.
        lag: Bytes between `position` and the end of the log, 0 if the position is beyond the end.
            None if the position or the end of the log is unknown.
        beyond: Whether the position is beyond the end of the log. Such a client waits until the
            log has grown that far.

    """

    slot: int
    peer: str | None
    start: int | None
    position: int | None
    lag: int | None
    beyond: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The answer at the second control socket.

    Attributes:
        pid: Process ID of the supervisor.
        segments: The segments of the log in order, without the oldest ones if there are more than
            MAX_LISTED_SEGMENTS. Empty while there is no file.
        clients: The protected clients.

    """

    pid: int
    segments: tuple[SegmentStatus, ...]
    clients: tuple[ClientStatus, ...]


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """One slot and its worker, as the supervisor knows them.

    Attributes:
        slot: Number of the slot, from 0.
        pid: Process ID of the worker. None while the slot is empty.
        ticks: When the worker started, in clock ticks since boot. None while the slot is empty.
        ready: Whether the worker has reported that it is ready.
        clients: Number of clients of the slot, including the unprotected ones.
        unprotected: Number of clients that would be disconnected if the worker died.
        restarts: Number of workers of this slot that died and were replaced.
        restarted: Seconds since the last of these replacements. None if there was none.
        silent: For how many seconds the worker has not answered a ping. 0 if no answer is due.

    """

    slot: int
    pid: int | None
    ticks: int | None
    ready: bool
    clients: int
    unprotected: int
    restarts: int
    restarted: float | None
    silent: float


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """A server, as its supervisor describes it.

    Attributes:
        version: Version of tailsrv that the supervisor runs.
        pid: Process ID of the supervisor, as the supervisor itself sees it.
        ticks: When the supervisor started, in clock ticks since boot.
        state: A `ServerState`. Another version may have further ones.
        started: When the server started, in seconds of Unix time.
        file: The served file.
        log: The log. None while there is no file.
        clients: Number of clients, including the unprotected ones.
        unprotected: Number of clients that would be disconnected if their worker died.
        max_clients: Limit of the number of clients (`--max-clients`). 0 means no limit.
        workers: All slots, with or without a worker.
        listeners: All listening sockets.

    """

    version: str
    pid: int
    ticks: int
    state: str
    started: float
    file: FileStatus
    log: LogStatus | None
    clients: int
    unprotected: int
    max_clients: int
    workers: tuple[SlotStatus, ...]
    listeners: tuple[ListenerStatus, ...]


@dataclass(frozen=True, slots=True)
class OrphanStatus:
    """An orphaned worker, as it describes itself in its greeting (see handover.py).

    Attributes:
        version: Version of tailsrv that the worker runs.
        slot: Number of its slot.
        path: Absolute path of the served file.
        clients: Number of its clients.
        seconds: Seconds for which it still waits for a supervisor.

    """

    version: str
    slot: int
    path: str
    clients: int
    seconds: float


def decode_status(answer: bytes) -> ServerStatus:
    """Return the status in `answer`, a JSON document. Raises AnswerError."""
    return _decode(answer, _read_status)


def decode_listing(answer: bytes) -> Listing:
    """Return the segments and clients in `answer`, a JSON document. Raises AnswerError."""
    return _decode(answer, _read_listing)


def decode_greeting(answer: bytes) -> OrphanStatus:
    """Return what a health check needs of the greeting in `answer`. Raises AnswerError."""
    return _decode(answer, _read_greeting)


def _decode(answer: bytes, read: Callable[[Any], Decoded]) -> Decoded:
    try:
        return read(json.loads(answer))
    except KeyError as error:
        raise AnswerError(f"field {error} is missing") from error
    except (ValueError, TypeError, RecursionError) as error:
        # JSON errors and text that is not UTF-8 are ValueErrors.
        raise AnswerError(f"invalid data: {str(error)[:200]!a}") from error


def _read_status(data: Any) -> ServerStatus:
    return ServerStatus(
        version=_string(data["version"]),
        pid=_pid(data["pid"]),
        ticks=_integer(data["ticks"]),
        state=_string(data["state"]),
        started=_float(data["started"]),
        file=_read_file(data["file"]),
        log=_optional(_read_log, data["log"]),
        clients=_integer(data["clients"]),
        unprotected=_integer(data["unprotected"]),
        max_clients=_integer(data["max_clients"]),
        workers=tuple(_read_slot(worker) for worker in _list(data["workers"], MAX_WORKERS)),
        listeners=tuple(_read_listener(listener) for listener in _list(data["listeners"])),
    )  # fmt: skip


def _read_file(data: Any) -> FileStatus:
    return FileStatus(
        path=_string(data["path"]),
        size=_optional(_integer, data["size"]),
        gone=_bool(data["gone"]),
        error=_optional(_string, data["error"]),
        follow_name=_bool(data["follow_name"]),
        missing=_optional(_float, data["missing"]),
    )


def _read_log(data: Any) -> LogStatus:
    return LogStatus(
        start=_integer(data["start"]),
        end=_optional(_integer, data["end"]),
        segments=_integer(data["segments"]),
        size=_optional(_integer, data["size"]),
        retired=_integer(data["retired"]),
        retired_size=_integer(data["retired_size"]),
    )


def _read_slot(data: Any) -> SlotStatus:
    return SlotStatus(
        slot=_integer(data["slot"]),
        pid=_optional(_pid, data["pid"]),
        ticks=_optional(_integer, data["ticks"]),
        ready=_bool(data["ready"]),
        clients=_integer(data["clients"]),
        unprotected=_integer(data["unprotected"]),
        restarts=_integer(data["restarts"]),
        restarted=_optional(_float, data["restarted"]),
        silent=_float(data["silent"]),
    )


def _read_listener(data: Any) -> ListenerStatus:
    return ListenerStatus(
        slot=_optional(_integer, data["slot"]),
        endpoint=_string(data["endpoint"]),
        queued=_integer(data["queued"]),
        backlog=_integer(data["backlog"]),
    )


def _read_listing(data: Any) -> Listing:
    end = _optional(_integer, data["end"])
    return Listing(
        pid=_pid(data["pid"]),
        segments=tuple(
            _read_segment(segment) for segment in _list(data["segments"], MAX_LISTED_SEGMENTS)
        ),
        clients=tuple(_read_client(client, end) for client in _list(data["clients"])),
    )


def _read_segment(data: Any) -> SegmentStatus:
    return SegmentStatus(
        base=_integer(data["base"]),
        size=_optional(_integer, data["size"]),
        sealed=_bool(data["sealed"]),
        clients=_integer(data["clients"]),
        path=_optional(_string, data["path"]),
        deleted=_bool(data["deleted"]),
    )


def _read_client(data: Any, end: int | None) -> ClientStatus:
    position = _optional(_integer, data["position"])
    return ClientStatus(
        slot=_integer(data["slot"]),
        peer=_optional(_string, data["peer"]),
        start=_optional(_integer, data["start"]),
        position=position,
        lag=None if end is None or position is None else max(0, end - position),
        beyond=end is not None and position is not None and position > end,
    )


def _read_greeting(data: Any) -> OrphanStatus:
    return OrphanStatus(
        version=_string(data["version"]),
        slot=_integer(data["slot"]),
        path=_string(data["path"]),
        clients=_integer(data["clients"]),
        seconds=_float(data["seconds"]),
    )


def _optional(read: Callable[[Any], Decoded], value: Any) -> Decoded | None:
    return None if value is None else read(value)


def _integer(value: Any) -> int:
    # isinstance() would accept a bool, which is an int in Python.
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise TypeError(f"not an integer from 0 to {MAX_INTEGER}: {reprlib.repr(value)}")
    return value


def _pid(value: Any) -> int:
    if not 1 <= _integer(value) <= MAX_PID:
        raise ValueError(f"not a process ID: {value}")
    return int(value)


def _float(value: Any) -> float:
    if type(value) not in (int, float) or not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise TypeError(f"not a number, or out of range: {reprlib.repr(value)}")
    return float(value)


def _string(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise TypeError(f"not a string, or too long: {reprlib.repr(value)}")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"neither true nor false: {reprlib.repr(value)}")
    return value


def _list(value: Any, most: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (most is not None and len(value) > most):
        raise TypeError(f"not a list, or too long: {reprlib.repr(value)}")
    return value
