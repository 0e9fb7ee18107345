"""The state that a supervisor passes to the next version of itself in an upgrade, as JSON.

It passes through exec(2) in a file. Pure: no system calls.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from tailsrv import worker_channel
from tailsrv.segments import NO_FILE, Log, Segment

# The format of this state. The supervisor must not exec a program that reads another format.
FORMAT = 5


class StateError(ValueError):
    """A state that this version cannot read. The message says why, in one line."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker. `channel` is a descriptor, `spawned` a time of the monotonic clock."""

    pid: int
    channel: int
    spawned: float
    ready: bool
    adopted: bool


@dataclass(frozen=True, slots=True)
class SlotState:
    """One slot: its sockets by descriptor number, the worker in it, and its clients."""

    listeners: list[int]
    shared: bool
    worker: WorkerState | None
    restarts: int
    # Seconds of the monotonic clock, which continues through exec(2).
    restarted: float | None
    # The fields of `Failures`, in their order.
    failures: list[int]
    # The number of each protected client, and the fields of its `Entry`, in their order.
    clients: list[list[int | None]]
    unprotected: list[int]


@dataclass(frozen=True, slots=True)
class LogState:
    """The segments of the log, each as the fields of `Segment`, and the earliest offset."""

    segments: list[list[int | None]]
    start: int

    @classmethod
    def of(cls, log: Log) -> "LogState":
        """Return the state of `log`."""
        return cls([[segment.base, segment.file, segment.size] for segment in log], log.start)

    def files(self) -> list[int]:
        """Return the descriptors of the segments."""
        return [file for _, file, _ in self.segments if file is not None and file != NO_FILE]

    def load(self) -> Log:
        """Return the log that of() was called with. Its descriptors must be open."""
        segments = []
        for base, file, size in self.segments:
            assert base is not None
            assert file is not None
            segments.append(Segment(base, file, size))
        return Log(segments, self.start)


@dataclass(frozen=True, slots=True)
class RollState:
    """The roll that is under way, or the number of the last one, and the files that come next."""

    number: int
    # The name of the roller's mode.
    mode: str
    truncated: bool
    # The size of the active segment at which a worker may have rolled by itself.
    agreed: int | None
    next_files: list[int]
    opened_at: int
    # The files that are polled for late bytes: the fields of each `Old`.
    late: list[list[int | float]]


@dataclass(frozen=True, slots=True)
class UpgradeState:
    """The complete state of a supervisor. Its descriptor numbers stay valid through exec(2)."""

    # The version of the program that wrote this state.
    version: str
    endpoints: list[str]
    started: float
    log: LogState | None
    # The log offset of the first file's first byte while the server waits for that file.
    base: int
    # None without --follow-name.
    roll: RollState | None
    # The descriptor of the shared ends of the log, empty without --follow-name.
    ends: list[int]
    # The descriptor of the state file's lock, empty without a state file.
    state_lock: list[int]
    file_gone: bool
    polling: str | None
    control: list[int]
    # The descriptor of the shared counts of --max-clients, empty without that option.
    quota: list[int]
    slots: list[SlotState]

    def descriptors(self) -> list[int]:
        """Return every descriptor that must stay open through exec(2)."""
        found = [*self.control, *self.quota, *self.ends, *self.state_lock]
        if self.log is not None:
            found += self.log.files()
        if self.roll is not None:
            found += self.roll.next_files
            found += [int(file) for file, _, _, owned, *_ in self.roll.late if owned]
        for slot in self.slots:
            found += slot.listeners
            found += [slot.worker.channel] if slot.worker else []
            found += [fd for _, fd, *_ in slot.clients if fd is not None]
        return found


def encode(state: UpgradeState) -> bytes:
    """Return `state` as bytes for decode()."""
    return json.dumps(
        {"format": FORMAT, "messages": worker_channel.VERSION, **asdict(state)}
    ).encode()


def decode(data: bytes) -> UpgradeState:
    """Return the state in `data`.

    Raises StateError if this version cannot take over from the version that wrote it.
    """
    try:
        values: dict[str, Any] = json.loads(data)
        formats = (values.pop("format"), values.pop("messages"))
        if formats != (FORMAT, worker_channel.VERSION):
            raise StateError(
                f"state and channel have format {formats}, this version reads "
                f"{(FORMAT, worker_channel.VERSION)}: "
                "restart the server instead"
            )
        slots = [_decode_slot(**slot) for slot in values.pop("slots")]
        log, roll = values.pop("log"), values.pop("roll")
        return UpgradeState(
            slots=slots,
            log=None if log is None else LogState(**log),
            roll=None if roll is None else RollState(**roll),
            **values,
        )
    except StateError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StateError(f"malformed state: {error!r}") from error


def _decode_slot(worker: dict[str, Any] | None, **values: Any) -> SlotState:
    return SlotState(worker=None if worker is None else WorkerState(**worker), **values)
