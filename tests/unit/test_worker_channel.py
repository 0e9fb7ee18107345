"""Tests of the messages between worker and supervisor."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv.worker_channel import (
    MAX_PACKET,
    MAX_REPORTED_CLIENTS,
    MAX_REPORTED_SOCKETS,
    VERSION,
    Agree,
    Drain,
    Freeze,
    Message,
    MessageError,
    Notices,
    Order,
    Ping,
    Retire,
    Roll,
    Thaw,
    WorkerReport,
    decode,
    encode,
)

NONE = Notices()
numbers = st.integers(0, 2**63 - 1)
notices = st.builds(
    Notices,
    ready=st.booleans(),
    gone=st.booleans(),
    truncated=st.none() | numbers,
    frozen=st.none() | numbers,
    needs=st.none() | numbers,
    polling=st.none() | st.text(max_size=100),
)
reports = st.builds(
    WorkerReport,
    joined=st.lists(numbers, max_size=20),
    started=st.lists(st.tuples(numbers, numbers, st.none() | numbers), max_size=20),
    left=st.lists(numbers, max_size=20),
    notices=notices,
)


@pytest.mark.parametrize(
    "message",
    [
        WorkerReport(),
        WorkerReport(
            [7],
            [(7, 4096, None), (8, 0, 0), (9, 5, 2**63 - 1)],
            [8, 9],
            Notices(True, True, 0, 1, 0, "no inotify: 'ünï'", True, True),
        ),
        WorkerReport(notices=Notices(truncated=0)),
        WorkerReport(notices=Notices(frozen=0)),
        WorkerReport(notices=Notices(needs=2**63 - 1)),
        WorkerReport(left=[2**63 - 1]),
        Drain(0.0),
        Drain(5.25),
        Freeze(0),
        Freeze(2**40),
        Thaw(),
        Agree(2**40),
        Roll(0, 0, lost=False),
        Roll(2**62, 2**63 - 1, lost=True),
        Retire(2**63 - 1),
        Ping(),
    ],
)
def test_round_trip(message: Message) -> None:
    """decode() returns the message that was encoded, and a report without notices has no JSON."""
    packet = encode(message)
    assert message == decode(packet)
    assert (b"{" in packet) == (isinstance(message, WorkerReport) and message.notices != NONE)


@pytest.mark.thorough
@given(reports)
def test_any_report(report: WorkerReport) -> None:
    """decode() returns every report that encode() was given."""
    assert report == decode(encode(report))


def test_the_largest_report_fits() -> None:
    """A packet has room for the largest number of clients of each kind, and for notices."""
    report = WorkerReport(
        joined=list(range(MAX_REPORTED_SOCKETS)),
        started=[(client, 2**62, 2**62) for client in range(MAX_REPORTED_CLIENTS)],
        left=list(range(MAX_REPORTED_CLIENTS)),
        notices=Notices(True, True, 2**62, 2**62, 2**62, "\N{PILE OF POO}" * 100, True, True),
    )
    packet = encode(report)
    assert len(packet) <= MAX_PACKET
    assert report == decode(packet)


HEAD = struct.Struct("=B4sHHH")


@pytest.mark.parametrize(
    "packet",
    [
        b"", b"junk", b"\xff\x00", b"{}", bytes(5), bytes(100),
        bytes([VERSION]),
        bytes([VERSION]) + b"danc",
        bytes([VERSION]) + b"rept",
        bytes([VERSION]) + b"drai",
        encode(Drain(1.0)) + b"\0",
        encode(Ping()) + b"\0",
        encode(Roll(5, 7, True))[:-1],
        encode(Freeze(7)) + b"\0",
        encode(Retire(7))[:-8],
        bytes([VERSION + 1]) + encode(Ping())[1:],
        HEAD.pack(VERSION + 1, b"rept", 0, 0, 0),
        HEAD.pack(VERSION, b"rept", 1, 0, 0),
        HEAD.pack(VERSION, b"rept", 65535, 65535, 65535) + bytes(100),
        encode(WorkerReport()) + b"{",
        encode(WorkerReport()) + b"[]",
        encode(WorkerReport()) + b"7",
        encode(WorkerReport()) + b"\xff",
        encode(WorkerReport()) + b'{"dance": true}',
    ],
)  # fmt: skip
def test_junk(packet: bytes) -> None:
    """A packet that encode() cannot produce raises MessageError."""
    with pytest.raises(MessageError):
        decode(packet)


@pytest.mark.parametrize(
    "message",
    [
        Drain(1.0),
        Freeze(12),
        Roll(5, 12, lost=True),
        Ping(),
        WorkerReport([1], [(1, 2, None)], [3]),
        WorkerReport([1], [], [], Notices(ready=True)),
    ],
)
def test_truncated_packet(message: Message) -> None:
    """A truncated packet raises MessageError, unless exactly its notices are missing."""
    packet = encode(message)
    is_report = isinstance(message, WorkerReport)
    whole = packet.find(b"{") if is_report and b"{" in packet else len(packet)
    for length in range(len(packet)):
        if length != whole:
            with pytest.raises(MessageError):
                decode(packet[:length])


@pytest.mark.parametrize("message", [Drain(1.0), WorkerReport([1], [(1, 2, None)], [3])])
def test_another_version(message: Message) -> None:
    """A packet of another version is refused, and the error names the expected version."""
    packet = encode(message)
    with pytest.raises(MessageError, match=f"version {VERSION}"):
        decode(bytes([VERSION + 1]) + packet[1:])


@given(st.binary(max_size=100))
def test_any_bytes_at_all(packet: bytes) -> None:
    """Random bytes raise MessageError and nothing else."""
    with pytest.raises(MessageError):
        decode(packet)


@given(
    st.binary(max_size=100),
    st.sampled_from([b"rept", b"drai", b"frez", b"agre", b"thaw", b"roll", b"reti", b"ping"]),
)
def test_any_bytes_after_a_valid_start(rest: bytes, kind: bytes) -> None:
    """Random bytes after a valid version and kind are a message, or raise MessageError."""
    try:
        message = decode(bytes([VERSION]) + kind + rest)
    except MessageError:
        return
    assert isinstance(message, WorkerReport | Order)
