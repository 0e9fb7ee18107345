"""What one supervisor hands to the next version of itself through exec(2), as JSON. Pure: no system call."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from tailsrv import channel as messages

# of this state; a program that cannot read it must not be exec'd
FORMAT = 2


class StateError(ValueError):
    """A state cannot be read by this version; the message says why."""


@dataclass(frozen=True, slots=True)
class SlotState:
    """One slot: its sockets by descriptor number, the worker in it, and its clients."""

    listeners: list[int]
    shared: bool
    pid: int | None
    channel: int | None
    # of the monotonic clock, which exec(2) does not touch
    spawned: float
    ready: bool
    adopted: bool
    restarts: int
    restarted: float | None
    failures: list[int]
    clients: list[list[int | None]]
    unprotected: list[int]


@dataclass(frozen=True, slots=True)
class UpgradeState:
    """All that a supervisor knows; every number of a descriptor is valid in the program that is exec'd."""

    # of the program that wrote this
    version: str
    endpoints: list[str]
    started: float
    file: int | None
    file_gone: bool
    polling: str | None
    control: list[int]
    quota: list[int]
    slots: list[SlotState]

    def descriptors(self) -> list[int]:
        """Return every descriptor that must live through exec(2)."""
        found = [*self.control, *self.quota, *([] if self.file is None else [self.file])]
        for slot in self.slots:
            found += slot.listeners
            found += [] if slot.channel is None else [slot.channel]
            found += [fd for _, fd, _ in slot.clients if fd is not None]
        return found


def encode(state: UpgradeState) -> bytes:
    """Return `state` as decode() reads it."""
    return json.dumps({"format": FORMAT, "messages": messages.VERSION, **asdict(state)}).encode()


def decode(data: bytes) -> UpgradeState:
    """Return the state in `data`. Raises StateError where this version cannot take over from the one that wrote it."""
    try:
        values: dict[str, Any] = json.loads(data)
        formats = (values.pop("format"), values.pop("messages"))
        if formats != (FORMAT, messages.VERSION):
            raise StateError(
                f"state and channel are of format {formats}, this version reads {(FORMAT, messages.VERSION)}"
            )
        slots = [SlotState(**slot) for slot in values.pop("slots")]
        return UpgradeState(slots=slots, **values)
    except StateError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StateError(f"not a state: {error!r}") from error
