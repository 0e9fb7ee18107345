"""The messages that supervisor and workers send to each other. Pure: bytes in, values out.

Each slot has a channel, a pair of Unix sockets (SOCK_SEQPACKET). One packet carries one message. It
begins with the version of this protocol and the kind of the message.

In a report, the numbers and offsets of the clients follow as 64-bit integers in the byte order of
the machine: a report is sent for every client that connects or leaves, so it must be cheap. The
notices come last, as JSON, because they are rare. The sockets of the clients in `joined` travel
with the same packet, in the same order, and the descriptor of the next file with Agree and Roll.
"""

import json
import struct
from array import array
from dataclasses import asdict, dataclass, field
from itertools import chain

# The version of this protocol. During an upgrade, workers of the previous version use the channel.
VERSION = 4

# Largest number of sockets, and so of joined clients, in one packet: SCM_MAX_FD of unix(7).
MAX_REPORTED_SOCKETS = 253
# Largest number of started clients, and of departed clients, in one packet, so that it fits.
MAX_REPORTED_CLIENTS = 200
# Largest number of bytes in a packet.
MAX_PACKET = 16 << 10

# Version and kind.
_KIND = struct.Struct("=B4s")
_REPORT = b"rept"
# Version and kind as bytes, then how many clients have joined, started and left.
_COUNTS = struct.Struct("=5sHHH")
# In place of the second number of a `?` line that a client did not ask for.
_NO_LINE = -1
# Packed only once, because a worker may send a report in every turn.
_REPORT_HEAD = _KIND.pack(VERSION, _REPORT)


class MessageError(ValueError):
    """A packet does not hold a valid message of this version."""


@dataclass(frozen=True, slots=True)
class Notices:
    """The part of a report that is not about single clients.

    A field that has its default value reports nothing.
    """

    # The worker serves from now on.
    ready: bool = False
    # The path does not name the file any more.
    gone: bool = False
    # The file was truncated to this size, in bytes. With --follow-name, the worker does not look at
    # the size again until it gets Roll.
    truncated: int | None = None
    # The answer to Freeze, with its number.
    frozen: int | None = None
    # The worker does not need the segments that end at this offset or before it.
    needs: int | None = None
    # The worker polls the file, because inotify cannot be used for this reason.
    polling: str | None = None
    # The answer to a ping.
    alive: bool = False
    # In a drain: the worker has accepted every connection from its accept queues and has closed
    # its listeners.
    emptied: bool = False


NO_NOTICES = Notices()


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker reports to the supervisor after a turn of its loop.

    A field that is empty reports nothing.
    """

    # Clients that have connected.
    joined: list[int] = field(default_factory=list)
    # Clients whose stream starts, each with the offset that it starts from, in bytes, and with the
    # second number of its `?` line, None if it did not ask for one.
    started: list[tuple[int, int, int | None]] = field(default_factory=list)
    # Clients that the worker does not serve any more.
    left: list[int] = field(default_factory=list)
    notices: Notices = NO_NOTICES


@dataclass(frozen=True, slots=True)
class Drain:
    """Orders a worker to stop accepting, to send each client the rest of the file, and to exit."""

    # Seconds until the worker closes the connections that are still open.
    grace: float


@dataclass(frozen=True, slots=True)
class Freeze:
    """Orders a worker not to look at the size of the active segment until it gets Roll or Thaw.

    The worker answers with `Notices.frozen`. When all workers have answered, none of them has sent
    bytes beyond the size that the supervisor then reads, and none of them will.
    """

    # The number of this attempt to roll. Each attempt has another number.
    roll: int


@dataclass(frozen=True, slots=True)
class Agree:
    """Allows a frozen worker to roll by itself, to the file in this packet, when that has a byte.

    It does so only if the active segment has exactly `size` bytes then. Otherwise it waits for the
    supervisor. Freeze, Roll and Thaw withdraw this.
    """

    # The size of the active segment, in bytes.
    size: int


@dataclass(frozen=True, slots=True)
class Thaw:
    """Orders a worker to look at size and path again: the log does not roll."""


@dataclass(frozen=True, slots=True)
class Roll:
    """Orders a worker to seal the active segment, and to continue with the file in this packet.

    A worker that has rolled by itself has done so already.
    """

    # The log offset of the sealed segment's first byte.
    base: int
    # The number of bytes of the sealed segment.
    size: int
    # The bytes of the sealed segment no longer exist, because the file has been truncated.
    lost: bool


@dataclass(frozen=True, slots=True)
class Retire:
    """Orders a worker to close segments that have been deleted, once no client reads them.

    The worker answers with `Notices.needs`.
    """

    # The earliest offset for a new stream from now on.
    start: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks a worker whether its loop still runs. The worker answers with `Notices.alive`."""


Order = Drain | Freeze | Agree | Thaw | Roll | Retire | Ping
Message = WorkerReport | Order

# The kind of each order, and its fields after version and kind. Clients wait for some orders, so
# they are no JSON [measured: a Roll in JSON delays the first bytes of the next file by 0.3 ms].
_ORDERS: dict[bytes, tuple[type[Order], struct.Struct]] = {
    b"drai": (Drain, struct.Struct("=d")),
    b"frez": (Freeze, struct.Struct("=q")),
    b"agre": (Agree, struct.Struct("=q")),
    b"thaw": (Thaw, struct.Struct("=")),
    b"roll": (Roll, struct.Struct("=qq?")),
    b"reti": (Retire, struct.Struct("=q")),
    b"ping": (Ping, struct.Struct("=")),
}
_KINDS = {order: kind for kind, (order, _) in _ORDERS.items()}


def encode(message: Message) -> bytes:
    """Return the packet for `message`.

    A report must fit into MAX_PACKET: at most MAX_REPORTED_SOCKETS clients in `joined`, and at most
    MAX_REPORTED_CLIENTS each in `started` and `left`.
    """
    if not isinstance(message, WorkerReport):
        kind = _KINDS[type(message)]
        values = (getattr(message, name) for name in message.__match_args__)
        return _KIND.pack(VERSION, kind) + _ORDERS[kind][1].pack(*values)
    joined, started, left = message.joined, message.started, message.left
    head = _COUNTS.pack(_REPORT_HEAD, len(joined), len(started), len(left))
    triples = ((client, start, _NO_LINE if end is None else end) for client, start, end in started)
    numbers = array("q", [*joined, *chain.from_iterable(triples), *left])
    return head + numbers.tobytes() + _encode_notices(message.notices)


def _encode_notices(notices: Notices) -> bytes:
    """Return the notices that differ from their default, as JSON.

    Another version can read them as long as it knows each of these fields.
    """
    # Most reports have no notices, and asdict() copies each field deeply [measured: a sixth of the
    # time that a worker needs for a connection].
    if notices is NO_NOTICES:
        return b""
    changed = {
        name: value for name, value in asdict(notices).items() if value != getattr(NO_NOTICES, name)
    }
    return json.dumps(changed).encode() if changed else b""


def decode(packet: bytes) -> Message:
    """Return the message in `packet`.

    Raises MessageError if `encode` of this version cannot have made the packet.
    """
    try:
        version, kind = _KIND.unpack_from(packet)
        if version == VERSION and kind == _REPORT:
            return _decode_report(packet)
        if version == VERSION and kind in _ORDERS:
            order, values = _ORDERS[kind]
            return order(*values.unpack(packet[_KIND.size :]))
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise MessageError(f"malformed message: {packet[:80]!r}") from error
    raise MessageError(f"message of an unknown kind, or not of version {VERSION}: {packet[:80]!r}")


def _decode_report(packet: bytes) -> WorkerReport:
    _, joined, started, left = _COUNTS.unpack_from(packet)
    end = _COUNTS.size + 8 * (joined + 3 * started + left)
    if len(packet) < end:
        raise ValueError("the packet is shorter than its counts say")
    numbers = array("q", packet[_COUNTS.size : end]).tolist()
    triples = numbers[joined : joined + 3 * started]
    return WorkerReport(
        joined=numbers[:joined],
        started=[
            (client, start, None if end == _NO_LINE else end)
            for client, start, end in zip(triples[::3], triples[1::3], triples[2::3], strict=True)
        ],
        left=numbers[joined + 3 * started :],
        notices=Notices(**json.loads(packet[end:])) if len(packet) > end else NO_NOTICES,
    )
