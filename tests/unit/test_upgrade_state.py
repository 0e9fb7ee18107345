"""Tests of the state that a supervisor passes to its successor in an upgrade."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv import worker_channel
from tailsrv.supervisor.upgrade_state import (
    FORMAT,
    SlotState,
    StateError,
    UpgradeState,
    decode,
    encode,
)

SLOTS = [
    SlotState(
        listeners=[10, 11],
        shared=False,
        pid=4711,
        channel=12,
        spawned=17.25,
        ready=True,
        adopted=True,
        restarts=3,
        restarted=18.5,
        failures=[1, 0, 1],
        clients=[[0, 20, None], [5, 21, 0], [7, 22, 2**62]],
        unprotected=[6, 9],
    ),
    SlotState(
        listeners=[13],
        shared=True,
        pid=None,
        channel=None,
        spawned=0.0,
        ready=False,
        adopted=False,
        restarts=0,
        restarted=None,
        failures=[0, 0, 0],
        clients=[],
        unprotected=[],
    ),
]


def make_state(file: int | None = 30, polling: str | None = "no inotify: 'ünï'") -> UpgradeState:
    """Return a state in which every field has a value."""
    return UpgradeState(
        version="1.0.0",
        endpoints=["*:4321", "[::1]:4321"],
        started=1.5,
        file=file,
        file_gone=True,
        polling=polling,
        control=[31, 32],
        quota=[33],
        slots=SLOTS,
    )


@pytest.mark.parametrize("state", [make_state(), make_state(file=None, polling=None)])
def test_round_trip(state: UpgradeState) -> None:
    """decode() returns the state that encode() was given."""
    assert state == decode(encode(state))


def test_descriptors() -> None:
    """Each descriptor that the successor needs is listed once."""
    found = make_state().descriptors()
    assert sorted(found) == [10, 11, 12, 13, 20, 21, 22, 30, 31, 32, 33]


def test_descriptors_while_waiting_for_the_file() -> None:
    """Without an open file, its descriptor is not in the list."""
    assert sorted(make_state(file=None).descriptors()) == [10, 11, 12, 13, 20, 21, 22, 31, 32, 33]


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
        without("control"),
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
