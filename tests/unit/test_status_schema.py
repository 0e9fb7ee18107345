"""Tests of the status as JSON: what is written, and what the strict reader accepts."""

import json
from dataclasses import fields
from typing import Annotated, Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv.status_schema import (
    MAX_INTEGER,
    MAX_LISTED_SEGMENTS,
    MAX_TEXT,
    AnswerError,
    ClientStatus,
    FileStatus,
    ListenerStatus,
    Listing,
    LogStatus,
    OrphanStatus,
    SegmentStatus,
    ServerState,
    ServerStatus,
    SlotStatus,
    decode_greeting,
    decode_listing,
    decode_status,
    encode,
)

PATH = "/var/log/l\xf6g \udcff"
STATUS = ServerStatus(
    version="1.0.0",
    command=("/opt/tailsrv/bin/tailsrv", PATH),
    pid=4711,
    ticks=163118,
    state=ServerState.STARTING,
    started=1767225600.123456,
    endpoints=("*:4321", "[::1]:4321"),
    file=FileStatus(
        PATH, 1000, gone=True, error="Permission denied: \xe4", follow_name=True, missing=9.875
    ),
    log=LogStatus(60, 1350, segments=2, size=1300, retired=0, retired_size=0),
    clients=137,
    unprotected=1,
    max_clients=3,
    workers=(
        SlotStatus(0, 4712, 164712, True, 0, 0, 0, None, 0.0),
        SlotStatus(1, 4713, 164713, False, 5, 1, 1, 67.025, 0.625),
        SlotStatus(2, None, None, False, 1, 1, 2, 0.125, 0.0),
    ),
    listeners=(
        ListenerStatus(None, "0.0.0.0:4321", 0, 4096),
        ListenerStatus(1, "[::]:4321", 7, 4096),
    ),
)
LISTING = Listing(
    pid=4711,
    end=1350,
    segments=(
        SegmentStatus(0, 50, True, 0, None, True),
        SegmentStatus(350, 1000, False, 3, PATH, False),
    ),
    clients=(
        ClientStatus(1, "[::1]:1", 0, 1693311),
        ClientStatus(1, None, None, None),
    ),
)

# Other programs read these texts. They must not change within 1.x, not even by a space.
STATUS_TEXT = (
    rb'{"version": "1.0.0", "command": ["/opt/tailsrv/bin/tailsrv", "/var/log/l\u00f6g \udcff"],'
    rb' "pid": 4711, "ticks": 163118, "state": "starting", "started": 1767225600.123456,'
    rb' "endpoints": ["*:4321", "[::1]:4321"], "file": {"path": "/var/log/l\u00f6g \udcff",'
    rb' "gone": true, "missing": 9.875, "error": "Permission denied: \u00e4", "size": 1000,'
    rb' "follow_name": true}, "log": {"start": 60, "end": 1350, "segments": 2, "size": 1300,'
    rb' "retired": 0, "retired_size": 0}, "clients": 137, "unprotected": 1, "max_clients": 3,'
    rb' "workers": [{"slot": 0, "pid": 4712, "ticks": 164712, "ready": true, "clients": 0,'
    rb' "unprotected": 0, "restarts": 0, "restarted": null, "silent": 0.0}, {"slot": 1,'
    rb' "pid": 4713, "ticks": 164713, "ready": false, "clients": 5, "unprotected": 1,'
    rb' "restarts": 1, "restarted": 67.025, "silent": 0.625}, {"slot": 2, "pid": null,'
    rb' "ticks": null, "ready": false, "clients": 1, "unprotected": 1, "restarts": 2,'
    rb' "restarted": 0.125, "silent": 0.0}], "listeners": [{"slot": null,'
    rb' "endpoint": "0.0.0.0:4321", "queued": 0, "backlog": 4096}, {"slot": 1,'
    rb' "endpoint": "[::]:4321", "queued": 7, "backlog": 4096}]}'
    b"\n"
)
LISTING_TEXT = (
    rb'{"pid": 4711, "end": 1350, "segments": [{"base": 0, "size": 50, "sealed": true,'
    rb' "clients": 0, "path": null, "deleted": true}, {"base": 350, "size": 1000,'
    rb' "sealed": false, "clients": 3, "path": "/var/log/l\u00f6g \udcff", "deleted": false}],'
    rb' "clients": [{"slot": 1, "peer": "[::1]:1", "start": 0, "position": 1693311}, {"slot": 1,'
    rb' "peer": null, "start": null, "position": null}]}'
    b"\n"
)
GREETING = {"version": "1.0.0", "slot": 3, "path": "/log", "clients": 9, "seconds": 29.5}


def test_text() -> None:
    """The text of an answer is always the same, and is read as the same values."""
    assert (encode(STATUS), encode(LISTING)) == (STATUS_TEXT, LISTING_TEXT)
    assert (decode_status(STATUS_TEXT), decode_listing(LISTING_TEXT)) == (STATUS, LISTING)
    assert decode_greeting(json.dumps(GREETING).encode()) == OrphanStatus(
        "1.0.0", 3, "/log", 9, 29.5
    )


def values(kind: Any, *bounds: int) -> st.SearchStrategy[Any]:
    """Return a strategy for the values that a field of this type can have."""
    if get_origin(kind) is Annotated:
        return values(*get_args(kind))
    if type(None) in get_args(kind):
        return st.none() | values(get_args(kind)[0])
    if get_origin(kind) is tuple:
        return st.lists(values(get_args(kind)[0]), max_size=2).map(tuple)
    if kind is int:
        return st.integers(*bounds or (0, MAX_INTEGER))
    if kind is float:
        return st.floats(-9e18, 9e18)
    if kind in (str, bool):
        return st.from_type(kind)
    return st.builds(kind, **{field.name: values(field.type) for field in fields(kind)})


@given(values(ServerStatus), values(Listing))
def test_round_trip(status: ServerStatus, listing: Listing) -> None:
    """The reader returns what was written, whatever the values are."""
    assert (decode_status(encode(status)), decode_listing(encode(listing))) == (status, listing)


def test_a_state_of_another_version() -> None:
    """A state that is not known is read as it is."""
    data = json.loads(STATUS_TEXT)
    assert decode_status(json.dumps(data | {"state": "rotating"}).encode()).state == "rotating"


def test_further_fields() -> None:
    """Fields that another version may add are ignored, in each object."""
    data = json.loads(STATUS_TEXT, object_hook=lambda part: part | {"more": [1]})
    assert decode_status(json.dumps(data).encode()) == STATUS


def objects(data: Any) -> list[dict[str, Any]]:
    """Return all objects in `data`."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return [data] * isinstance(data, dict) + [found for part in parts for found in objects(part)]


def test_each_field_is_required() -> None:
    """An answer without one field of one object is refused, and the error names the field."""
    for decode, text in ((decode_status, STATUS_TEXT), (decode_listing, LISTING_TEXT)):
        data = json.loads(text)
        for part in objects(data):
            for name in list(part):
                value = part.pop(name)
                with pytest.raises(AnswerError, match=f"^field '{name}' is missing$"):
                    decode(json.dumps(data).encode())
                part[name] = value


INTEGER = f"not an integer from 0 to {MAX_INTEGER}: "
PID = f"not an integer from 1 to {1 << 22}: "
NUMBER, STRING = "not a number, or out of range: ", "not a string, or too long: "
BOOL, LIST = "neither true nor false: ", "not a list, or too long: "
SLOT, LISTENER = json.loads(STATUS_TEXT)["workers"][0], json.loads(STATUS_TEXT)["listeners"][0]
SEGMENT = json.loads(LISTING_TEXT)["segments"][0]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"clients": -1}, INTEGER),
        ({"clients": MAX_INTEGER + 1}, INTEGER),
        ({"clients": True}, INTEGER),
        ({"clients": 1.0}, INTEGER),
        ({"clients": "1"}, INTEGER),
        ({"clients": None}, INTEGER),
        ({"pid": 0}, PID),
        ({"pid": (1 << 22) + 1}, PID),
        ({"pid": True}, PID),
        ({"workers": [SLOT | {"pid": 0}]}, PID),
        ({"workers": [SLOT | {"ready": 1}]}, BOOL),
        ({"workers": [SLOT | {"restarted": "1"}]}, NUMBER),
        ({"workers": [SLOT] * 1025}, LIST),
        ({"workers": {}}, LIST),
        ({"workers": None}, LIST),
        ({"listeners": [LISTENER | {"slot": -1}]}, INTEGER),
        ({"started": None}, NUMBER),
        ({"started": True}, NUMBER),
        ({"started": MAX_INTEGER + 1}, NUMBER),
        ({"started": float("nan")}, NUMBER),
        ({"started": float("-inf")}, NUMBER),
        ({"version": None}, STRING),
        ({"version": "x" * (MAX_TEXT + 1)}, STRING),
        ({"command": ["x" * ((1 << 21) + 1)]}, STRING),
        ({"endpoints": "*:1"}, LIST),
        ({"log": []}, "list indices must be integers"),
        ({"file": None}, "not subscriptable"),
    ],
)
def test_invalid_status(changes: dict[str, Any], error: str) -> None:
    """A status with one value of the wrong type, or out of bounds, is refused."""
    with pytest.raises(AnswerError) as caught:
        decode_status(json.dumps(json.loads(STATUS_TEXT) | changes).encode())
    assert error in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"segments": [SEGMENT] * (MAX_LISTED_SEGMENTS + 1)}, LIST),
        ({"segments": [SEGMENT | {"path": 1}]}, STRING),
        ({"end": -1}, INTEGER),
        ({"pid": 1 << 40}, PID),
        ({"clients": None}, LIST),
    ],
)
def test_invalid_listing(changes: dict[str, Any], error: str) -> None:
    """A list with one value of the wrong type, or out of bounds, is refused."""
    with pytest.raises(AnswerError) as caught:
        decode_listing(json.dumps(json.loads(LISTING_TEXT) | changes).encode())
    assert error in str(caught.value)


def test_largest_values() -> None:
    """The largest values and the longest lists are accepted."""
    changes = {
        "pid": 1 << 22,
        "clients": MAX_INTEGER,
        "started": -MAX_INTEGER,
        "version": "x" * MAX_TEXT,
        "command": ["x" * (1 << 21)],
        "workers": [SLOT] * 1024,
        "listeners": [LISTENER] * 3000,
    }
    status = decode_status(json.dumps(json.loads(STATUS_TEXT) | changes).encode())
    assert (status.pid, status.clients, len(status.listeners)) == (1 << 22, MAX_INTEGER, 3000)
    assert isinstance(status.started, float)
    changes = {"segments": [SEGMENT] * MAX_LISTED_SEGMENTS}
    listing = decode_listing(json.dumps(json.loads(LISTING_TEXT) | changes).encode())
    assert len(listing.segments) == MAX_LISTED_SEGMENTS
