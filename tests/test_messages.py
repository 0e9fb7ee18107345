"""The channel's words: what one side says the other understands, and nothing else passes for it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv.messages import MAX_MESSAGE, VERSION, Drain, Message, MessageError, Report, decode, encode


@pytest.mark.parametrize("message", [Report(), Report(True, 7, True, 4096, "no inotify: 'ünï'"), Report(clients=0, truncated=0), Drain()])
def test_round_trip(message: Message) -> None:
    """A message comes out as it went in, and fits a packet."""
    packet = encode(message)
    assert message == decode(packet)
    assert len(packet) <= MAX_MESSAGE


@pytest.mark.parametrize(
    "packet",
    [
        b"", b"junk", b"\xff\x00", b"null", b"[]", b"7", b"{}", b'"drain"', encode(Drain())[:-1],
        json.dumps({"v": VERSION}).encode(),
        json.dumps({"v": VERSION, "kind": "dance"}).encode(),
        json.dumps({"v": VERSION, "kind": ["drain"]}).encode(),
        json.dumps({"v": VERSION, "kind": "drain", "tempo": 3}).encode(),
        json.dumps({"v": VERSION + 1, "kind": "drain"}).encode(),
        json.dumps({"kind": "drain"}).encode(),
    ],
)  # fmt: skip
def test_junk(packet: bytes) -> None:
    """What encode() cannot have made is a MessageError and no other."""
    with pytest.raises(MessageError):
        decode(packet)


@given(st.binary(max_size=100))
def test_any_bytes_at_all(packet: bytes) -> None:
    """Bytes that are no message never raise anything but MessageError."""
    with pytest.raises(MessageError):
        decode(packet)
