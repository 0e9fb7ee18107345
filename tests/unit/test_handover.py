"""Tests of the messages between an orphaned worker and the next supervisor."""

import json
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.sockets import closing_all
from support.waiting import DEADLINE
from tailsrv.handover import (
    COMMIT,
    FORMAT,
    MAX_FILES,
    MAX_PACKET,
    REVOKED,
    Greeting,
    HandedClient,
    HandedNext,
    HandedSegment,
    Handover,
    HandoverError,
    Request,
    commit,
)

GREETING = Greeting("2.0.0", FORMAT, 17, 2, "/var/log/a b\n\udcff", 35, 29.5)
OFFSETS = st.integers(0, 2**63 - 1)
FILES = st.integers(3, 1 << 20)
HANDOVERS = st.builds(
    Handover,
    st.lists(FILES, max_size=600),
    st.lists(st.builds(HandedClient, FILES, st.none() | OFFSETS, st.none() | OFFSETS)),
    st.lists(st.builds(HandedSegment, OFFSETS, st.none() | OFFSETS, st.none() | FILES)),
    OFFSETS,
    OFFSETS,
    st.booleans(),
    OFFSETS,
    st.none() | FILES,
    st.none() | st.builds(HandedNext, FILES, OFFSETS),
)


@given(HANDOVERS)
def test_handover(handover: Handover) -> None:
    """Packets keep within the kernel's limits, and give the same handover at the other end."""
    received, last = Handover(), False
    for packet, files in handover.packets():
        assert len(files) <= MAX_FILES
        assert len(packet) <= MAX_PACKET
        assert not last
        last = received.add(packet, files)
    assert last
    assert received == handover
    assert sorted(received.files()) == sorted(handover.files())


def test_largest_packet() -> None:
    """A full packet with the largest numbers fits."""
    largest = 2**63 - 1
    clients = [HandedClient(number, largest, largest) for number in range(1000)]
    packets = list(Handover(clients=clients, start=largest, end=largest).packets())
    assert len(packets) == 4
    assert max(len(packet) for packet, _ in packets) <= MAX_PACKET


def test_lost_files() -> None:
    """A handover of which the kernel has left out descriptors is refused."""
    ((packet, files),) = Handover(listeners=[3, 4]).packets()
    with pytest.raises(HandoverError, match="out of file descriptors"):
        Handover().add(packet, files[:1])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        json.dumps({"items": [], "last": 1, "more": 2}).encode()[:-1],
        json.dumps({"items": [["client", False, 1, None]], "last": True}).encode(),
        json.dumps({"items": [["segment", False, "1", None]], "last": True}).encode(),
        json.dumps({"items": [["new", False]], "last": True}).encode(),
        json.dumps({"items": [[]], "last": True}).encode(),
        json.dumps({"items": 7, "last": True}).encode(),
        b"[" * 100_000,
    ],
)
def test_malformed(content: bytes) -> None:
    """Whatever arrives in place of a message is a HandoverError."""
    with pytest.raises(HandoverError):
        Handover().add(content, [])
    with pytest.raises(HandoverError):
        Greeting.decode(content)
    with pytest.raises(HandoverError):
        Request.decode(content)


def test_greeting() -> None:
    """A greeting is decoded to the same; other versions may add fields."""
    assert Greeting.decode(GREETING.encode()) == GREETING
    extended = {**json.loads(GREETING.encode()), "further": 1}
    assert Greeting.decode(json.dumps(extended).encode()) == GREETING


@pytest.mark.parametrize("clients", [True, False])
def test_request(clients: bool) -> None:
    """A request is decoded to the same."""
    assert Request.decode(Request(clients).encode()) == Request(clients)


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Return three pairs of sockets, each of an orphan and of the process that takes over."""
    made = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    with closing_all([sock for pair in made for sock in pair]):
        yield made


Pairs = list[tuple[socket.socket, socket.socket]]


def test_commit(pairs: Pairs) -> None:
    """Every orphan that lives is told, and the connections are closed."""
    pairs[1][0].close()
    assert commit([ours for _, ours in pairs])
    for theirs in (pairs[0][0], pairs[2][0]):
        theirs.settimeout(DEADLINE)
        assert theirs.recv(100) == COMMIT
        assert theirs.recv(100) == b""
    assert all(ours.fileno() == -1 for _, ours in pairs)


def test_revoked(pairs: Pairs) -> None:
    """If one orphan has revoked its handover, no other one ends."""
    pairs[2][0].shutdown(socket.SHUT_RD)
    pairs[2][0].send(REVOKED)
    assert not commit([ours for _, ours in pairs])
    for theirs, _ in pairs[:2]:
        with pytest.raises(BlockingIOError):
            theirs.recv(100, socket.MSG_DONTWAIT)


def test_about_to_revoke(pairs: Pairs) -> None:
    """An orphan that has shut its socket, and has not sent REVOKED yet, is waited for."""
    orphan, ours = pairs[0]
    orphan.shutdown(socket.SHUT_RD)
    answer: list[bool] = []
    thread = threading.Thread(target=lambda: answer.append(commit([ours])))
    thread.start()
    orphan.send(REVOKED)
    thread.join()
    assert answer == [False]


def test_committed_first(pairs: Pairs) -> None:
    """A COMMIT that was sent before the orphan has shut its socket is not lost."""
    orphan, ours = pairs[0]
    assert commit([ours])
    orphan.shutdown(socket.SHUT_RD)
    assert orphan.recv(100) == COMMIT
