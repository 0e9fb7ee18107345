"""Tests of the state that a supervisor passes to its successor in an upgrade."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv import worker_channel
from tailsrv.segments import NO_FILE, Log, Segment
from tailsrv.supervisor.upgrade_state import (
    FORMAT,
    LogState,
    RollState,
    SlotState,
    StateError,
    UpgradeState,
    WorkerState,
    decode,
    encode,
)

SLOTS = [
    SlotState(
        listeners=[10, 11],
        shared=False,
        worker=WorkerState(pid=4711, channel=12, spawned=17.25, ready=True, adopted=True),
        restarts=3,
        restarted=18.5,
        failures=[1, 0, 1],
        clients=[[0, 20, None], [5, 21, 0], [7, 22, 2**62]],
        unprotected=[6, 9],
    ),
    SlotState(
        listeners=[13],
        shared=True,
        worker=None,
        restarts=0,
        restarted=None,
        failures=[0, 0, 0],
        clients=[],
        unprotected=[],
    ),
]


# The first segment has been deleted, and the bytes of the second one no longer exist.
LOG = Log(
    [
        Segment(100, 40, 50),
        Segment(150, NO_FILE, 10),
        Segment(160, 42, 5),
        Segment(165, 30),
    ],
    start=160,
)
LOG_STATE = LogState.of(LOG)
ROLL = RollState(
    number=7,
    mode="AGREED",
    truncated=False,
    agreed=1234,
    next_files=[50, 51],
    opened_at=2**60,
    late=[[42, 5, 90.5, False, 3, True], [54, 0, 95.25, True, 0, False]],
)


def make_state(
    log: LogState | None = LOG_STATE,
    roll: RollState | None = ROLL,
    ends: Sequence[int] = (52,),
    state_lock: Sequence[int] = (53,),
    polling: str | None = "no inotify: 'ünï'",
) -> UpgradeState:
    """Return a state in which every field has a value."""
    return UpgradeState(
        version="1.0.0",
        endpoints=["*:4321", "[::1]:4321"],
        started=1.5,
        log=log,
        base=17,
        roll=roll,
        ends=[*ends],
        state_lock=[*state_lock],
        file_gone=True,
        polling=polling,
        control=[31, 32],
        quota=[33],
        slots=SLOTS,
    )


@pytest.mark.parametrize("state", [make_state(), make_state(None, None, [], [], None)])
def test_round_trip(state: UpgradeState) -> None:
    """decode() returns the state that encode() was given."""
    assert state == decode(encode(state))


def test_descriptors() -> None:
    """Each descriptor that the successor needs is listed once."""
    found = make_state().descriptors()
    slots, files = [10, 11, 12, 13, 20, 21, 22], [30, 31, 32, 33, 40, 42, 50, 51, 52, 53, 54]
    assert sorted(found) == [*slots, *files]


def test_descriptors_while_waiting_for_the_file() -> None:
    """Without an open file, there is no descriptor of a file in the list."""
    found = make_state(log=None, roll=None, ends=[], state_lock=[]).descriptors()
    assert sorted(found) == [10, 11, 12, 13, 20, 21, 22, 31, 32, 33]


@pytest.mark.parametrize("log", [LOG, Log([Segment(0, 3)]), Log([Segment(7, 3, 5)])])
def test_log_round_trip(log: Log) -> None:
    """The log that load() returns has the same segments and the same start."""
    loaded = LogState.of(log).load()
    assert [*loaded] == [*log]
    assert (loaded.start, loaded.active) == (log.start, log.active)
    assert LogState.of(loaded) == LogState.of(log)


def test_log_that_is_copied() -> None:
    """The state does not change when the log does."""
    log = Log([Segment(0, 3)])
    state = LogState.of(log)
    log.seal(10)
    log.append(Segment(10, 4))
    assert [*state.load()] == [Segment(0, 3)]


def changed(**values: object) -> bytes:
    """Return the encoded state with `values` in place of its own."""
    return json.dumps({**json.loads(encode(make_state())), **values}).encode()


def without(name: str) -> bytes:
    """Return the encoded state without the field `name`."""
    fields = json.loads(encode(make_state()))
    del fields[name]
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    "versions", [(FORMAT + 1, worker_channel.VERSION), (FORMAT, worker_channel.VERSION + 1), (0, 0)]
)
def test_another_format(versions: tuple[int, int]) -> None:
    """A state with another format or message version is refused, and the error gives both."""
    with pytest.raises(StateError) as caught:
        decode(changed(format=versions[0], messages=versions[1]))
    assert str(versions) in str(caught.value)
    assert str((FORMAT, worker_channel.VERSION)) in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"junk", b"\xff\xfe", b"null", b"7", b"[]", b"{}", b'"format"',
        encode(make_state())[:-1],
        json.dumps({"format": FORMAT, "messages": worker_channel.VERSION}).encode(),
        changed(slots=None),
        changed(slots=[7]),
        changed(slots=[{"listeners": []}]),
        changed(dance=True),
        changed(log=7),
        changed(log={"segments": []}),
        changed(roll={"number": 1}),
        changed(roll={**asdict(ROLL), "dance": True}),
        without("control"),
        without("ends"),
        without("state_lock"),
        without("log"),
        without("roll"),
    ],
)  # fmt: skip
def test_junk(data: bytes) -> None:
    """Anything that is no state raises StateError."""
    with pytest.raises(StateError):
        decode(data)


@given(st.binary(max_size=100))
def test_any_bytes_at_all(data: bytes) -> None:
    """Random bytes raise StateError and nothing else."""
    with pytest.raises(StateError):
        decode(data)
