"""What the control sockets say, read strictly: an answer is either understood as a whole or refused. Pure."""

import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tailsrv.config import MAX_WORKERS

# What is larger is no figure or text of ours. An answer can be anybody's: it must not be one that
# takes long to work with, that fills a screen, or that is too large for whoever is asked with it.
MAX_INTEGER = (1 << 63) - 1
# see proc_sys_kernel(5), pid_max
MAX_PID = 1 << 22
# characters; a path has at most 4096 bytes, PATH_MAX of open(2)
MAX_TEXT = 1 << 14

Read = TypeVar("Read")


class AnswerError(ValueError):
    """An answer is not what this version understands; the message says what is wrong, in one line."""


@dataclass(frozen=True, slots=True)
class FileStatus:
    """The file as the supervisor knows it.

    `size` is in bytes, None while no file is open, or while its file system does not tell (a file
    server that is gone, fstat(2), ESTALE); `gone` means that the path does not name it any more.
    `error` is why the next file of that name cannot be opened, None if nothing is wrong with it.
    """

    path: str
    size: int | None
    gone: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class ListenerStatus:
    """One listening socket: `queued` of at most `backlog` connections wait to be accepted. `slot` None: all slots share it."""

    slot: int | None
    endpoint: str
    queued: int
    backlog: int


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """One client: `start`, `position` and `lag` are bytes, None until its header is read; `peer` None: it has gone already.

    `lag` is how far the position is behind the end of the file, 0 also for a client that waits `beyond` the end.
    """

    slot: int
    peer: str | None
    start: int | None
    position: int | None
    lag: int | None
    beyond: bool = False


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """A slot as the supervisor knows it; `restarted` and `silent` are seconds, see `Worker` in health_report."""

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
    """What the supervisor says of itself; `ticks` and `started` are when it started, in clock ticks since boot and in Unix time."""

    version: str
    pid: int
    ticks: int
    state: str
    started: float
    file: FileStatus
    clients: int
    unprotected: int
    max_clients: int
    workers: tuple[SlotStatus, ...]
    listeners: tuple[ListenerStatus, ...]


def decode_status(answer: bytes) -> ServerStatus:
    """Return the status that `answer` holds. Raises AnswerError."""
    return _decode(answer, _read_status)


def decode_clients(answer: bytes) -> tuple[int, tuple[ClientStatus, ...]]:
    """Return the supervisor's pid and the clients that `answer` holds. Raises AnswerError."""
    return _decode(answer, _read_clients)


def _decode(answer: bytes, read: Callable[[Any], Read]) -> Read:
    try:
        return read(json.loads(answer))
    except KeyError as error:
        raise AnswerError(f"the answer has no {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        # ValueError: also JSON's own errors, and text that is not UTF-8
        raise AnswerError(f"the answer is not to be understood: {str(error)[:200]!a}") from error


def _read_status(said: Any) -> ServerStatus:
    return ServerStatus(
        version=_text(said["version"]),
        pid=_pid(said["pid"]),
        ticks=_count(said["ticks"]),
        state=_text(said["state"]),
        started=_number(said["started"]),
        file=_read_file(said["file"]),
        clients=_count(said["clients"]),
        unprotected=_count(said["unprotected"]),
        max_clients=_count(said["max_clients"]),
        workers=tuple(_read_slot(worker) for worker in _all(said["workers"], MAX_WORKERS)),
        listeners=tuple(_read_listener(listener) for listener in _all(said["listeners"])),
    )  # fmt: skip


def _read_file(said: Any) -> FileStatus:
    return FileStatus(
        path=_text(said["path"]),
        size=_maybe(_count, said["size"]),
        gone=_flag(said["gone"]),
        error=_maybe(_text, said["error"]),
    )


def _read_slot(said: Any) -> SlotStatus:
    return SlotStatus(
        slot=_count(said["slot"]),
        pid=_maybe(_pid, said["pid"]),
        ticks=_maybe(_count, said["ticks"]),
        ready=_flag(said["ready"]),
        clients=_count(said["clients"]),
        unprotected=_count(said["unprotected"]),
        restarts=_count(said["restarts"]),
        restarted=_maybe(_number, said["restarted"]),
        silent=_number(said["silent"]),
    )


def _read_listener(said: Any) -> ListenerStatus:
    return ListenerStatus(
        slot=_maybe(_count, said["slot"]),
        endpoint=_text(said["endpoint"]),
        queued=_count(said["queued"]),
        backlog=_count(said["backlog"]),
    )


def _read_clients(said: Any) -> tuple[int, tuple[ClientStatus, ...]]:
    size = _maybe(_count, said["size"])
    return _pid(said["pid"]), tuple(_read_client(client, size) for client in _all(said["clients"]))


def _read_client(said: Any, size: int | None) -> ClientStatus:
    position = _maybe(_count, said["position"])
    return ClientStatus(
        slot=_count(said["slot"]),
        peer=_maybe(_text, said["peer"]),
        start=_maybe(_count, said["start"]),
        position=position,
        lag=None if size is None or position is None else max(0, size - position),
        beyond=size is not None and position is not None and position > size,
    )


def _maybe(read: Callable[[Any], Read], value: Any) -> Read | None:
    return None if value is None else read(value)


def _count(value: Any) -> int:
    # a bool would be an int, too
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise TypeError(f"not a count: {reprlib.repr(value)}")
    return value


def _pid(value: Any) -> int:
    if not 1 <= _count(value) <= MAX_PID:
        raise ValueError(f"not a pid: {value}")
    return int(value)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise TypeError(f"not a number: {reprlib.repr(value)}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise TypeError(f"not a text: {reprlib.repr(value)}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"neither true nor false: {reprlib.repr(value)}")
    return value


def _all(value: Any, most: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (most is not None and len(value) > most):
        raise TypeError(f"not a list of ours: {reprlib.repr(value)}")
    return value
