"""The words that worker and supervisor say to each other on a slot's channel. Pure: bytes in, values out.

One message is one packet (SOCK_SEQPACKET). It begins with the version of this vocabulary and the kind of message.
A report goes on with the numbers of the clients it speaks of, in the machine's own 64-bit integers, since one is
written for every client that comes or goes; then, as JSON, come the notices, which are rare. The sockets of the
clients in `joined` travel with their packet, in the same order.
"""

import json
import struct
from array import array
from dataclasses import asdict, dataclass, field
from itertools import chain

VERSION = 2

# that one packet can carry: SCM_MAX_FD of unix(7)
MAX_REPORTED_SOCKETS = 253
# clients of one kind that one packet speaks of, so that it fits
MAX_REPORTED_CLIENTS = 200
MAX_PACKET = 16 << 10

_KIND = struct.Struct("=B4s")
_REPORT, _DRAIN, _PING = b"rept", b"drai", b"ping"
# version and kind; how many joined, started and left
_COUNTS = struct.Struct("=5sHHH")
# version and kind; the fields of Drain
_END = struct.Struct("=5sd?")
# made once: one report is written for each turn with news
_REPORT_HEAD = _KIND.pack(VERSION, _REPORT)


class MessageError(ValueError):
    """A packet is not a message of this vocabulary."""


@dataclass(frozen=True, slots=True)
class Notices:
    """What a worker has to say that is not about its clients."""

    ready: bool = False
    # the path does not name the file any more
    gone: bool = False
    # the file's size after it
    truncated: int | None = None
    # why the worker has to look at the file by the clock
    polling: str | None = None
    # the answer to a ping
    alive: bool = False
    # in a drain, all who were in its accept queues are clients now, and it has closed its listeners
    emptied: bool = False


NO_NOTICES = Notices()


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker's news of one turn, to the supervisor. What is empty, None or False has not happened."""

    # clients that have connected
    joined: list[int] = field(default_factory=list)
    # clients with the offset that their stream starts from
    started: list[tuple[int, int]] = field(default_factory=list)
    # clients that are not served any more
    left: list[int] = field(default_factory=list)
    notices: Notices = NO_NOTICES


@dataclass(frozen=True, slots=True)
class Drain:
    """The supervisor's order to stop accepting, to finish every stream at what is in the file now, and to end."""

    # seconds for that
    grace: float
    # a next file comes: who has not started a stream waits for it, and the old one may still grow
    rotating: bool = False


@dataclass(frozen=True, slots=True)
class Ping:
    """The supervisor's question whether the worker's loop still turns; `Notices.alive` is the answer."""


Message = WorkerReport | Drain | Ping


def encode(message: Message) -> bytes:
    """Return the packet for `message`."""
    if isinstance(message, Drain):
        return _END.pack(_KIND.pack(VERSION, _DRAIN), message.grace, message.rotating)
    if isinstance(message, Ping):
        return _KIND.pack(VERSION, _PING)
    joined, started, left = message.joined, message.started, message.left
    head = _COUNTS.pack(_REPORT_HEAD, len(joined), len(started), len(left))
    numbers = array("q", [*joined, *chain.from_iterable(started), *left])
    return head + numbers.tobytes() + _encode_notices(message.notices)


def _encode_notices(notices: Notices) -> bytes:
    """Return the notices that are not as by default, so that another version reads all that it knows."""
    changed = {
        name: value for name, value in asdict(notices).items() if value != getattr(NO_NOTICES, name)
    }
    return json.dumps(changed).encode() if changed else b""


def decode(packet: bytes) -> Message:
    """Return the message in `packet`. Raises MessageError for what encode() of this version cannot have made."""
    try:
        version, kind = _KIND.unpack_from(packet)
        if version == VERSION and kind == _REPORT:
            return _decode_report(packet)
        if version == VERSION and kind == _DRAIN:
            return Drain(*_END.unpack(packet)[1:])
        if version == VERSION and kind == _PING:
            # which is all of it
            _KIND.unpack(packet)
            return Ping()
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise MessageError(f"not a message: {packet[:80]!r}") from error
    raise MessageError(f"not a message of version {VERSION}: {packet[:80]!r}")


def _decode_report(packet: bytes) -> WorkerReport:
    _, joined, started, left = _COUNTS.unpack_from(packet)
    end = _COUNTS.size + 8 * (joined + 2 * started + left)
    if len(packet) < end:
        raise ValueError("cut short")
    numbers = array("q", packet[_COUNTS.size : end]).tolist()
    pairs = numbers[joined : joined + 2 * started]
    return WorkerReport(
        joined=numbers[:joined],
        started=list(zip(pairs[::2], pairs[1::2], strict=True)),
        left=numbers[joined + 2 * started :],
        notices=Notices(**json.loads(packet[end:])) if len(packet) > end else NO_NOTICES,
    )
