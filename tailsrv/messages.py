"""The words that worker and supervisor say to each other on a slot's channel. Pure: bytes in, values out.

One message is one packet (SOCK_SEQPACKET): a JSON object with the version of this vocabulary.
"""

import json
from dataclasses import asdict, dataclass

VERSION = 1


class MessageError(ValueError):
    """A packet is not a message of this vocabulary."""


@dataclass(frozen=True, slots=True)
class Report:
    """A worker's news of one turn, to the supervisor. What is None or False has not happened."""

    ready: bool = False
    clients: int | None = None
    gone: bool = False
    truncated: int | None = None  # the file's size after it
    polling: str | None = None  # why


@dataclass(frozen=True, slots=True)
class Drain:
    """The supervisor's order to stop accepting, to finish every stream at what is in the file now, and to end."""


Message = Report | Drain
_KINDS: dict[str, type[Report] | type[Drain]] = {"report": Report, "drain": Drain}
_NAMES = {kind: name for name, kind in _KINDS.items()}
MAX_MESSAGE = 64 << 10


def encode(message: Message) -> bytes:
    """Return the packet for `message`."""
    return json.dumps({"v": VERSION, "kind": _NAMES[type(message)], **asdict(message)}).encode()


def decode(packet: bytes) -> Message:
    """Return the message in `packet`. Raises MessageError for what encode() of this version cannot have made."""
    try:
        values = json.loads(packet)
        if values.pop("v") != VERSION:
            raise MessageError(f"not version {VERSION}: {packet!r}")
        return _KINDS[values.pop("kind")](**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MessageError(f"not a message: {packet!r}") from error
