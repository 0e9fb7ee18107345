"""What an orphaned worker and the supervisor that takes over from it send to each other.

A worker is orphaned when its supervisor has died. It listens at an abstract unix socket
(SOCK_SEQPACKET) for the next supervisor. Each message is one packet:

1. The worker sends a `Greeting` on each connection of an authorized process. A health check reads
   no more.
2. The supervisor sends a `Request`. From now on the worker sends nothing to its clients.
3. The worker sends its `Handover`, in as many packets as its descriptors need.
4. The worker that the new supervisor has forked for these clients sends COMMIT when it is about to
   serve them, and the orphan ends. If the connection ends before, the orphan serves on.

COMMIT is in the orphan's socket before the new worker sends its first byte. So, whatever process
dies at whatever moment, a client is served by one worker at most. An orphan that has waited for too
long first shuts its socket for COMMIT, and then sends REVOKED and serves on.

Apart from commit(), this module is pure: bytes in, values out.
"""

import errno
import json
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# The format of a handover. Greeting, Request, COMMIT, REVOKED and the listeners of a handover are
# the same in all formats, so that a version that cannot take over the clients can take the port.
FORMAT = 1
# Most descriptors in one packet: SCM_MAX_FD of unix(7).
MAX_FILES = 253
# Most bytes in one packet. An item has at most 70.
MAX_PACKET = 32 << 10

COMMIT = b"commit"
REVOKED = b"revoked"
# Seconds between attempts to send COMMIT while the kernel is short of memory.
SEND_RETRY = 0.01
# Seconds after which an orphan that has shut its socket, and says nothing, is left alone.
COMMIT_TIMEOUT = 5.0


class HandoverError(ValueError):
    """A message that this version cannot read. The message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """How an orphaned worker introduces itself."""

    version: str
    format: int
    pid: int
    slot: int
    # The absolute path of the served file.
    path: str
    clients: int
    # Seconds for which the worker still waits for a supervisor.
    seconds: float

    def encode(self) -> bytes:
        """Return the packet for this greeting."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, packet: bytes) -> "Greeting":
        """Return the greeting in `packet`. Raises HandoverError."""
        try:
            values = json.loads(packet)
            # Another version may have further fields.
            greeting = cls(**{name: values[name] for name in cls.__match_args__})
            if not isinstance(greeting.pid, int):
                raise TypeError("pid")
            return greeting
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise HandoverError(f"not a greeting: {packet[:80]!r}") from error


@dataclass(frozen=True, slots=True)
class Request:
    """Asks an orphaned worker for everything it has, or only for its listeners.

    In the second case, its clients cannot be taken over. It drains them after COMMIT.
    """

    clients: bool

    def encode(self) -> bytes:
        """Return the packet for this request."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, packet: bytes) -> "Request":
        """Return the request in `packet`. Raises HandoverError."""
        try:
            return cls(bool(json.loads(packet)["clients"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise HandoverError(f"not a request: {packet[:80]!r}") from error


@dataclass(frozen=True, slots=True)
class HandedClient:
    """A client: its socket, and what the client table has of its stream (see `Entry`)."""

    file: int
    start: int | None
    end: int | None


@dataclass(frozen=True, slots=True)
class HandedSegment:
    """A segment of the log: the fields of `Segment`. `file` is None if its bytes are lost."""

    base: int
    size: int | None
    file: int | None


@dataclass(frozen=True, slots=True)
class HandedNext:
    """The file that follows the active segment if that has the `agreed` size in bytes."""

    file: int
    agreed: int


@dataclass(slots=True)
class Handover:
    """What an orphaned worker hands over. All files are descriptors."""

    listeners: list[int] = field(default_factory=list)
    clients: list[HandedClient] = field(default_factory=list)
    # Empty while the server waits for the file.
    segments: list[HandedSegment] = field(default_factory=list)
    # The earliest offset for a new stream, and the end of the log that the worker has acted on.
    start: int = 0
    end: int = 0
    # Whether the active segment was truncated, so that the log must roll.
    truncated: bool = False
    # When the supervisor opened the active segment, as in RollState.
    opened_at: int = 0
    # The memory file of the shared ends of the log, None without --follow-name.
    ends: int | None = None
    # The file to which workers may have rolled by themselves.
    next: HandedNext | None = None
    # Whether the packets have only the listeners, which every format describes in the same way.
    only_listeners: bool = False

    def packets(self) -> Iterator[tuple[bytes, list[int]]]:
        """Yield each packet and the descriptors that go with it. The last packet says so."""
        items = list(self._items())
        for at in range(0, len(items), MAX_FILES):
            part = items[at : at + MAX_FILES]
            last = at + MAX_FILES >= len(items)
            content = {"last": last, "items": [values for values, _ in part]}
            yield json.dumps(content).encode(), [file for _, file in part if file is not None]

    def _items(self) -> Iterator[tuple[list[Any], int | None]]:
        """Yield the content of each item, and its descriptor, if it has one."""
        for listener in self.listeners:
            yield ["listener", True], listener
        if self.only_listeners:
            return
        yield ["log", False, self.start, self.end, self.truncated, self.opened_at], None
        for segment in self.segments:
            has_file = segment.file is not None
            yield ["segment", has_file, segment.base, segment.size], segment.file
        if self.ends is not None:
            yield ["ends", True], self.ends
        if self.next is not None:
            yield ["next", True, self.next.agreed], self.next.file
        for client in self.clients:
            yield ["client", True, client.start, client.end], client.file

    def add(self, packet: bytes, files: Iterable[int]) -> bool:
        """Add what is in `packet`, and return whether it is the last one.

        The `files` belong to this object from now on. Raises HandoverError: the packet cannot be
        read, or fewer files have arrived than it says.
        """
        left = iter(files)
        try:
            content = json.loads(packet)
            for kind, has_file, *values in content["items"]:
                self._add(kind, next(left) if has_file else None, values)
            return bool(content["last"])
        except StopIteration as error:
            raise HandoverError("out of file descriptors") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise HandoverError(f"malformed handover: {packet[:80]!r}") from error

    def _add(self, kind: str, file: int | None, values: list[Any]) -> None:
        match kind, file, values:
            case "log", None, [int(start), int(end), bool(truncated), int(opened_at)]:
                self.start, self.end = start, end
                self.truncated, self.opened_at = truncated, opened_at
            case "segment", _, [int(base), int() | None as size]:
                self.segments.append(HandedSegment(base, size, file))
            case "client", int(), [int() | None as start, int() | None as end]:
                self.clients.append(HandedClient(file, start, end))
            case "listener", int(), []:
                self.listeners.append(file)
            case "ends", int(), []:
                self.ends = file
            case "next", int(), [int(agreed)]:
                self.next = HandedNext(file, agreed)
            case _:
                raise ValueError(kind)

    def files(self) -> list[int]:
        """Return all descriptors."""
        optional = [
            self.ends,
            None if self.next is None else self.next.file,
            *(segment.file for segment in self.segments),
        ]
        return [
            *self.listeners,
            *(client.file for client in self.clients),
            *(file for file in optional if file is not None),
        ]


def commit(orphans: Sequence[socket.socket]) -> bool:
    """Let `orphans` end, whose clients this process has, and close the connections to them.

    Only after this may a process serve these clients.

    Returns:
        Whether all of them end, or have died. If one of them has revoked its handover, the result
        is False, and this process must not serve any client.

    """
    for orphan in orphans:
        orphan.setblocking(True)
    if any(_has_revoked(orphan) for orphan in orphans):
        return False
    return all(_commit(orphan) for orphan in orphans)


def _commit(orphan: socket.socket) -> bool:
    deadline = time.monotonic() + COMMIT_TIMEOUT
    with orphan:
        while time.monotonic() < deadline:
            try:
                orphan.send(COMMIT)
            except OSError as error:
                if isinstance(error, ConnectionError) or error.errno == errno.ENOTCONN:
                    # Either it has died, or it is about to send REVOKED.
                    return _has_died(orphan)
                # The kernel lacks memory for the packet.
                time.sleep(SEND_RETRY)
            else:
                return True
    return False


def _has_died(orphan: socket.socket) -> bool:
    """Return whether the connection ends without REVOKED within COMMIT_TIMEOUT seconds."""
    orphan.settimeout(COMMIT_TIMEOUT)
    try:
        return orphan.recv(MAX_PACKET) != REVOKED
    except TimeoutError:
        return False
    except OSError:
        return True


def _has_revoked(orphan: socket.socket) -> bool:
    try:
        return orphan.recv(MAX_PACKET, socket.MSG_DONTWAIT | socket.MSG_PEEK) == REVOKED
    except OSError:
        return False
