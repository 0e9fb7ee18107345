"""The words that worker and supervisor say to each other on a slot's channel. Pure: bytes in, values out.

One message is one packet (SOCK_SEQPACKET): a JSON object with the version of this vocabulary. The sockets of the
clients in `joined` travel with their packet, in the same order.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

VERSION = 1

MAX_SOCKETS = 253  # that one packet can carry: SCM_MAX_FD of unix(7)
MAX_NEWS = 1000  # clients of one kind that one packet speaks of, so that it fits
MAX_MESSAGE = 64 << 10


class MessageError(ValueError):
    """A packet is not a message of this vocabulary."""


@dataclass(frozen=True, slots=True)
class Report:
    """A worker's news of one turn, to the supervisor. What is empty, None or False has not happened."""

    ready: bool = False
    joined: tuple[int, ...] = ()  # clients that have connected
    started: tuple[tuple[int, int], ...] = ()  # clients whose header is read, each with the offset it starts from
    left: tuple[int, ...] = ()  # clients that are not served any more
    gone: bool = False  # the path does not name the file any more
    truncated: int | None = None  # the file's size after it
    polling: str | None = None  # why the worker has to look at the file by the clock


@dataclass(frozen=True, slots=True)
class Drain:
    """The supervisor's order to stop accepting, to finish every stream at what is in the file now, and to end."""

    grace: float  # seconds for that


Message = Report | Drain
_KINDS: dict[str, type[Report] | type[Drain]] = {"report": Report, "drain": Drain}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def encode(message: Message) -> bytes:
    """Return the packet for `message`; what has not happened is left out."""
    said = {name: value for name, value in asdict(message).items() if value not in ((), None, False)}
    return json.dumps({"v": VERSION, "kind": _NAMES[type(message)], **said}).encode()


def decode(packet: bytes) -> Message:
    """Return the message in `packet`. Raises MessageError for what encode() of this version cannot have made."""
    try:
        said: dict[str, Any] = json.loads(packet)
        if said.pop("v") != VERSION:
            raise MessageError(f"not version {VERSION}: {packet[:80]!r}")
        kind = _KINDS[said.pop("kind")]
        return kind(**{name: _as_tuple(value) for name, value in said.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MessageError(f"not a message: {packet[:80]!r}") from error


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
