"""The server's status as dataclasses, which are the schema of the JSON that carries it. Pure.

The supervisor sends this JSON at its control sockets, an orphaned worker sends its greeting at a
socket of its own. The reader accepts an answer as a whole or refuses it as a whole: any process can
take the name of such a socket and send what it likes.

An object of the JSON has the fields of its class, and the reader requires all of them. It ignores
further fields, which another version may send.
"""

import json
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from tailsrv.config import MAX_WORKERS

# Bounds of a valid answer. Without them an impostor could send an answer that takes long to
# process, fills the screen, or holds a number that is too large for a system call.
# `Annotated[int, 1, 9]` is an integer from 1 to 9. `Annotated[str, 9]` is a text of at most 9
# characters, and `Annotated[tuple[int, ...], 9]` a list of at most 9 integers. If these numbers are
# left out, an integer is from 0 to MAX_INTEGER, a text has at most MAX_TEXT characters, and a list
# has any length.

# Largest integer, and largest absolute value of any number.
MAX_INTEGER = (1 << 63) - 1
# Longest text in characters. A path has at most 4096 bytes (PATH_MAX of open(2)).
MAX_TEXT = 1 << 14
# Largest number of segments in a list. A server keeps 1000 open, and more of them only as long as
# clients read the oldest ones.
MAX_LISTED_SEGMENTS = 2000
# A process ID. For the largest one, see proc_sys_kernel(5), pid_max.
Pid = Annotated[int, 1, 1 << 22]
# An argument of a command. For the longest one, see execve(2): 32 pages, of at most 64 KiB each.
Argument = Annotated[str, 1 << 21]

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

    """

    slot: int
    peer: str | None
    start: int | None
    position: int | None


@dataclass(frozen=True, slots=True)
class Listing:
    """The answer at the second control socket.

    Attributes:
        pid: Process ID of the supervisor.
        end: The end of the log as an offset. None if it is unknown, or while there is no file.
        segments: The segments of the log in order, without the oldest ones if there are more than
            MAX_LISTED_SEGMENTS. Empty while there is no file.
        clients: The protected clients.

    """

    pid: Pid
    end: int | None
    segments: Annotated[tuple[SegmentStatus, ...], MAX_LISTED_SEGMENTS]
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
    pid: Pid | None
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
        command: The command line of the supervisor.
        pid: Process ID of the supervisor, as the supervisor itself sees it.
        ticks: When the supervisor started, in clock ticks since boot. None if it cannot read /proc.
        state: A `ServerState`. Another version may have further ones.
        started: When the server started, in seconds of Unix time.
        endpoints: The addresses and ports that it listens on, as in its process title.
        file: The served file.
        log: The log. None while there is no file.
        clients: Number of clients, including the unprotected ones.
        unprotected: Number of clients that would be disconnected if their worker died.
        max_clients: Limit of the number of clients (`--max-clients`). 0 means no limit.
        workers: All slots, with or without a worker.
        listeners: All listening sockets.

    """

    version: str
    command: tuple[Argument, ...]
    pid: Pid
    ticks: int | None
    state: str
    started: float
    endpoints: tuple[str, ...]
    file: FileStatus
    log: LogStatus | None
    clients: int
    unprotected: int
    max_clients: int
    workers: Annotated[tuple[SlotStatus, ...], MAX_WORKERS]
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


# The order of the fields of `file` in the JSON. Their order in FileStatus is the one in which
# `tailsrv-health --format json` shows them.
_FILE_FIELDS = ("path", "gone", "missing", "error", "size", "follow_name")


def encode(answer: ServerStatus | Listing) -> bytes:
    """Return `answer` as a JSON document on one line."""
    return (json.dumps(answer, default=_to_object) + "\n").encode()


def encode_client(client: ClientStatus) -> str:
    """Return the part for `client` of what encode_listing() returns."""
    return json.dumps(client, default=_to_object)


def encode_listing(listing: Listing, clients: Iterable[str]) -> bytes:
    """Return `listing` as encode() does, with `clients` from encode_client() instead of its own."""
    document = encode(replace(listing, clients=()))
    return document.removesuffix(b"]}\n") + ", ".join(clients).encode() + b"]}\n"


def _to_object(part: Any) -> dict[str, Any]:
    """Return the object of the JSON for `part`, one of the dataclasses above."""
    names = _FILE_FIELDS if isinstance(part, FileStatus) else part.__match_args__
    return {name: getattr(part, name) for name in names}


def decode_status(answer: bytes) -> ServerStatus:
    """Return the status in `answer`, a JSON document. Raises AnswerError."""
    return _decode(answer, ServerStatus)


def decode_listing(answer: bytes) -> Listing:
    """Return the segments and clients in `answer`, a JSON document. Raises AnswerError."""
    return _decode(answer, Listing)


def decode_greeting(answer: bytes) -> OrphanStatus:
    """Return what a health check needs of the greeting in `answer`. Raises AnswerError."""
    return _decode(answer, OrphanStatus)


def _decode(answer: bytes, kind: type[Decoded]) -> Decoded:
    try:
        decoded: Decoded = _reader(kind)(json.loads(answer))
    except KeyError as error:
        raise AnswerError(f"field {error} is missing") from error
    except (ValueError, TypeError, RecursionError) as error:
        # JSON errors and text that is not UTF-8 are ValueErrors.
        raise AnswerError(f"invalid data: {str(error)[:200]!a}") from error
    return decoded


def _reader(kind: Any, *bounds: int) -> Callable[[Any], Any]:
    """Return the function that makes a value of the type `kind` of a value of the JSON.

    It raises KeyError or TypeError if that is not possible. This is a function that returns
    functions, because an answer can have a million clients: their type is looked at only once.
    """
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return _reader(*arguments)
    if NoneType in arguments:
        read = _reader(arguments[0])
        return lambda value: None if value is None else read(value)
    if get_origin(kind) is tuple:
        read = _reader(arguments[0])
        return lambda value: tuple(map(read, _list(value, *bounds)))
    if kind in _SIMPLE:
        return lambda value: _SIMPLE[kind](value, *bounds)
    readers = {field.name: _reader(field.type) for field in fields(kind)}
    return lambda value: kind(**{name: read(value[name]) for name, read in readers.items()})


def _integer(value: Any, least: int = 0, most: int = MAX_INTEGER) -> int:
    # isinstance() would accept a bool, which is an int in Python.
    if type(value) is not int or not least <= value <= most:
        raise TypeError(f"not an integer from {least} to {most}: {reprlib.repr(value)}")
    return value


def _float(value: Any) -> float:
    if type(value) not in (int, float) or not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise TypeError(f"not a number, or out of range: {reprlib.repr(value)}")
    return float(value)


def _string(value: Any, most: int = MAX_TEXT) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise TypeError(f"not a string, or too long: {reprlib.repr(value)}")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"neither true nor false: {reprlib.repr(value)}")
    return value


def _list(value: Any, most: int = MAX_INTEGER) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise TypeError(f"not a list, or too long: {reprlib.repr(value)}")
    return value


_SIMPLE: dict[Any, Callable[..., Any]] = {
    int: _integer,
    float: _float,
    str: _string,
    bool: _bool,
}
