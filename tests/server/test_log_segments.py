"""Offsets across segments, deleted and truncated segments, and which processes hold them open."""

import os
import shutil
import signal
import socket
from itertools import accumulate
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.processes import stop
from support.rotation import (
    MOVED,
    ROLLED,
    deleted_files,
    held_files,
    replace,
    rotate,
    rotated,
)
from support.server import HURRIED, Serve, Server, hurried
from support.sockets import LINE_LENGTH, expect, expect_eof, outcome, recv_all, recv_exactly, reset
from support.status import await_protected, ready_workers, worker_pids
from support.tools import NOT_INSTALLED
from support.waiting import eventually

pytestmark = pytest.mark.slow

OLD, NEW, MORE = random_bytes(300_000, 1), random_bytes(200_000, 2), random_bytes(7_000, 3)
BIG = random_bytes(20_000_000)
# The segments of a log. The smallest has one byte.
SEGMENTS = [random_bytes(count, count) for count in (300_000, 1, 70_000, 5_000)]
BASES = [*accumulate(map(len, SEGMENTS), initial=0)]
LOG = b"".join(SEGMENTS)


@pytest.fixture
def server(serve: Serve, path: Path) -> Server:
    """Start a server of OLD with --follow-name and two workers."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", "-w", "2", "-v", program=HURRIED)
    server.workers(2)
    return server


@pytest.fixture
def segmented(serve: Serve, path: Path) -> Server:
    """Start a server, and rotate its file, so that the log has SEGMENTS."""
    path.write_bytes(SEGMENTS[0])
    server = serve(path, "--follow-name", "-w", "2", "-v", program=HURRIED)
    server.workers(2)
    for number, data in enumerate(SEGMENTS[1:], 1):
        rotate(path, data)
        rotated(server, number)
    await_end(server, len(LOG))
    return server


def recv_line(sock: socket.socket) -> tuple[int, int]:
    """Return the two offsets of the `?` line."""
    start, end = recv_exactly(sock, LINE_LENGTH).split()
    return int(start), int(end)


def await_end(server: Server, end: int) -> None:
    """Wait until all workers tell that `end`: one of them may roll a moment after the others."""

    def tells() -> bool:
        sock = server.connect(b"?-0\n")
        line = recv_line(sock)
        reset(sock)
        return line == (end, end)

    # Each connection gets to a worker at random.
    eventually(lambda: all(tells() for _ in range(16)))


# Offsets


@pytest.mark.parametrize("way", ["", "killed", "upgraded"])
def test_offsets(segmented: Server, path: Path, way: str) -> None:
    """Streams begin at any offset of the log, also in the successors of the workers."""
    if way == "killed":
        for pid in (pids := segmented.workers(2)):
            os.kill(pid, signal.SIGKILL)
        ready_workers(segmented, besides=pids)
    elif way == "upgraded":
        segmented.signal(signal.SIGHUP)
        segmented.logged("upgraded: ")
    offsets = sorted({max(0, base + by) for base in BASES for by in (-1, 0, 1)} | {1000})
    clients: dict[socket.socket, tuple[int, int | None]] = {}
    for offset in offsets:
        clients[segmented.connect(b"%d\n" % offset)] = offset, None
        clients[segmented.connect(b"?%d\n" % offset)] = offset, len(LOG)
    for count in (*offsets, len(LOG) + 1000):
        start = max(0, len(LOG) - count)
        clients[segmented.connect(b"-%d\n" % count)] = start, None
        clients[segmented.connect(b"?-%d\n" % count)] = start, len(LOG)
    for client, (start, end) in clients.items():
        if end is not None:
            assert recv_line(client) == (start, end)
        expect(client, LOG[start:])
        segmented.streaming(client)
    await_protected(segmented, len(clients))
    # The active segment grows, and the next one follows.
    append(path, MORE)
    rotate(path, NEW)
    for client, (start, _) in clients.items():
        expect(client, (LOG + MORE + NEW)[max(start, len(LOG)) :])


def test_offset_beyond_the_end(server: Server, path: Path) -> None:
    """A client that asks for an offset beyond the end gets it after rolls."""
    end = len(OLD + NEW)
    clients = {server.connect(b"%d\n" % (end + by)): by for by in (-1, 0, 1, 1000)}
    for client in clients:
        server.streaming(client)
    early = server.connect(b"?%d\n" % (end + 1000))
    assert recv_line(early) == (end + 1000, len(OLD))
    rotate(path, NEW)
    rotated(server, 1)
    rotate(path, MORE)
    for client, by in clients.items():
        expect(client, (NEW + MORE)[len(NEW) + by :])
    expect(early, MORE[1000:])


def test_line_of_a_client_between_two_files(server: Server, path: Path) -> None:
    """The end that `?` tells includes what is appended before the roll."""
    early = server.connect(b"-0\n")
    server.streaming(early)
    old = rotate(path)
    server.logged(MOVED)
    append(old, MORE)
    expect(early, MORE)
    end = len(OLD + MORE)
    await_end(server, end)
    client = server.connect(b"?-0\n")
    assert recv_line(client) == (end, end)
    append(path, NEW)
    expect(client, NEW)
    assert rotated(server, 1) == end


# Sealed segments


def test_renamed_again(server: Server, path: Path) -> None:
    """Segments are served under whatever names they have, or lost and got again."""
    folder = path.with_name("archive")
    folder.mkdir()
    rotate(path, NEW)
    rotated(server, 1)
    old = path.with_name(f"{path.name}.1").rename(folder / "log.2")
    rotate(path, MORE)
    rotated(server, 2)
    old.rename(folder / "log.3")
    expect(server.connect(b"0\n"), OLD + NEW + MORE)
    expect(server.connect(b"%d\n" % (len(OLD) - 1)), (OLD + NEW + MORE)[len(OLD) - 1 :])


def processes(server: Server) -> list[int]:
    """Return the pids of the supervisor and the workers."""
    return [server.pid, *worker_pids(server)]


def nothing_deleted_is_open(server: Server, path: Path) -> bool:
    """Tell whether no process of the server has a deleted file of this name open."""
    return not any(name.endswith(" (deleted)") for name in held_files(processes(server), path))


def test_deleted_while_a_client_reads_it(serve: Serve, path: Path) -> None:
    """A slow reader gets a segment that was deleted. After that, no process has it open."""
    path.write_bytes(BIG)
    server = serve(path, "--follow-name", "-w", "2", "-v", program=HURRIED)
    server.workers(2)
    slow = [server.connect(b"0\n", receive_buffer=4096) for _ in range(4)]
    for client in slow:
        server.streaming(client)
    rotate(path, NEW).unlink()
    base = rotated(server, 1)
    server.logged("log begins later, segments were deleted: ", f"start={base}")
    # Streams that begin now have no part of it.
    await_end(server, base + len(NEW))
    later = server.connect(b"?0\n")
    assert recv_line(later) == (base, base + len(NEW))
    expect(later, NEW)
    assert not nothing_deleted_is_open(server, path)
    for client in slow[1:]:
        expect(client, BIG + NEW)
    # There is one reader left.
    assert not nothing_deleted_is_open(server, path)
    expect(slow[0], BIG + NEW)
    eventually(lambda: nothing_deleted_is_open(server, path))
    append(path, MORE)
    for client in (*slow, later):
        expect(client, MORE)


@pytest.mark.parametrize("way", ["disconnected", "killed", "upgraded"])
def test_the_last_reader_of_a_deleted_segment_leaves(serve: Serve, path: Path, way: str) -> None:
    """A deleted segment is closed when its last reader leaves, also in a successor."""
    path.write_bytes(BIG)
    server = serve(path, "--follow-name", "-w", "2", "-v", program=HURRIED)
    pids = server.workers(2)
    slow = server.connect(b"0\n", receive_buffer=4096)
    await_protected(server, 1)
    rotate(path, NEW).unlink()
    server.logged("log begins later")
    if way == "killed":
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        ready_workers(server, besides=pids)
    elif way == "upgraded":
        server.signal(signal.SIGHUP)
        server.logged("upgraded: ")
    expect(slow, BIG[:1_000_000])
    assert not nothing_deleted_is_open(server, path)
    if way == "killed":
        expect(slow, BIG[1_000_000:] + NEW)
    else:
        slow.close()
    eventually(lambda: nothing_deleted_is_open(server, path))


def test_deleted_without_readers(segmented: Server, path: Path) -> None:
    """Segments are closed when they are deleted, one after another, and their offsets refused."""
    client = segmented.connect(b"-1\n")
    expect(client, LOG[-1:])
    numbers = range(1, len(SEGMENTS))
    for number in numbers:
        path.with_name(f"{path.name}.{number}").unlink()
        base = BASES[number]
        segmented.logged("log begins later, segments were deleted: ", f"start={base}")
        eventually(lambda: nothing_deleted_is_open(segmented, path))
        expect(segmented.connect(b"0\n"), LOG[base:])
        expect(segmented.connect(b"-1000000\n"), LOG[base:])
        expect(segmented.connect(b"%d\n" % base), LOG[base:])
        expect_eof(segmented.connect(b"%d\n" % (base - 1)))
        expect_eof(segmented.connect(b"?1\n"))
        segmented.logged("client refused: ", f"no longer exists, the log begins at {base}", count=2)
    # The supervisor and two workers have one file each.
    assert held_files(processes(segmented), path) == [str(path)] * 3
    append(path, MORE)
    expect(client, MORE)


def test_deleted_during_an_upgrade(segmented: Server, path: Path) -> None:
    """A segment that is deleted while no process waits for that is closed all the same."""
    segmented.signal(signal.SIGHUP)
    segmented.logged("upgrade: old=")
    for old in path.parent.glob(f"{path.name}.*"):
        old.unlink()
    segmented.logged("log begins later, segments were deleted: ", f"start={BASES[-2]}")
    eventually(lambda: nothing_deleted_is_open(segmented, path))


def test_hole(segmented: Server, path: Path) -> None:
    """If a segment in the middle is deleted, no stream begins before its end."""
    early = segmented.connect(b"0\n")
    expect(early, LOG)
    path.with_name(f"{path.name}.2").unlink()
    segmented.logged("log begins later", f"start={BASES[2]}")
    expect(segmented.connect(b"0\n"), LOG[BASES[2] :])
    for offset in (1, BASES[1], BASES[2] - 1):
        expect_eof(segmented.connect(b"%d\n" % offset))
    expect(segmented.connect(b"%d\n" % BASES[2]), LOG[BASES[2] :])
    # The segment before the hole still has a name, but no stream can begin in it any more.
    eventually(lambda: f"{path}.1" not in held_files(processes(segmented), path))
    assert nothing_deleted_is_open(segmented, path)
    append(path, MORE)
    expect(early, MORE)


def test_replaced_segments_are_closed(server: Server, path: Path) -> None:
    """Segments that have no name from the beginning leave no descriptor."""
    client = server.connect(b"0\n")
    expect(client, OLD)
    for number in range(1, 6):
        replace(path, data := random_bytes(10_000, number))
        expect(client, data)
        rotated(server, number)
        eventually(lambda: nothing_deleted_is_open(server, path))
        assert held_files(processes(server), path) == [str(path)] * 3


@pytest.mark.skipif(shutil.which("lsof") is None, reason=f"{NOT_INSTALLED}lsof")
def test_lsof(server: Server, path: Path) -> None:
    """`lsof +L1`, which lists deleted files that are open, lists none of the server's."""
    client = server.connect(b"0\n")
    expect(client, OLD)
    with path.open("rb") as reader:
        replace(path, NEW)
        expect(client, NEW)
        # The program does list such files.
        assert f"{path} (deleted)" in deleted_files([os.getpid()], path)
        assert reader.read() == OLD
    eventually(lambda: not deleted_files(processes(server), path))


# Truncation


TRUNCATED = "warning: file was truncated: clients that had all of it continue with its new content"


@pytest.mark.parametrize("size", [0, 1000])
def test_truncated(server: Server, path: Path, size: int) -> None:
    """Streams that had everything go on with the new content, from its first byte."""
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, OLD)
    beyond = server.connect(b"%d\n" % (len(OLD) + size + 10))
    server.streaming(beyond)
    os.truncate(path, size)
    server.logged(TRUNCATED)
    assert rotated(server, 1) == len(OLD)
    append(path, NEW)
    for client in clients:
        expect(client, OLD[:size] + NEW)
    expect(beyond, NEW[10:])
    await_end(server, len(OLD) + size + len(NEW))
    later = server.connect(b"?0\n")
    # The bytes before no longer exist.
    assert recv_line(later) == (len(OLD), len(OLD) + size + len(NEW))
    expect(later, OLD[:size] + NEW)
    expect_eof(server.connect(b"1\n"))
    expect(server.connect(b"-1000000\n"), OLD[:size] + NEW)
    assert len(server.lines(ROLLED)) == 1


def test_a_truncation_is_logged_once(server: Server, path: Path) -> None:
    """A truncation that all workers report is logged once."""
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, OLD)
    for number in (1, 2):
        path.write_bytes(MORE[:-number])
        for client in clients:
            expect(client, MORE[:-number])
        rotated(server, number)
    assert len(server.lines(TRUNCATED)) == 2


def test_truncated_again_and_again(server: Server, path: Path) -> None:
    """Each truncation rolls."""
    client = server.connect(b"0\n")
    expect(client, OLD)
    base = len(OLD)
    for number in range(1, 6):
        os.truncate(path, 0)
        data = random_bytes(1000 * number, number)
        assert rotated(server, number) == base
        append(path, data)
        base += len(data)
        expect(client, data)
    # A rotation after that rolls as usual, and the segment before it can be read.
    rotate(path, MORE)
    expect(client, MORE)
    await_end(server, base + len(MORE))
    later = server.connect(b"?0\n")
    assert recv_line(later) == (base - len(data), base + len(MORE))
    expect(later, data + MORE)


def test_truncated_and_written_at_once(server: Server, path: Path) -> None:
    """If the file grows again before a worker looks, but not as far, nothing of that is lost."""
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, OLD)
    path.write_bytes(NEW)
    for client in clients:
        expect(client, NEW)
    assert rotated(server, 1) == len(OLD)


@pytest.mark.parametrize("supervisor", [True, False])
def test_truncated_while_processes_are_stopped(
    server: Server, path: Path, supervisor: bool
) -> None:
    """A truncation that workers, or also the supervisor, notice late rolls all the same."""
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, OLD)
    pids = [*server.workers(2), *([server.pid] if supervisor else [])]
    for pid in pids:
        stop(pid)
    os.truncate(path, 0)
    append(path, NEW)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    for client in clients:
        expect(client, NEW)
    assert rotated(server, 1) == len(OLD)


def test_workers_are_killed_at_a_truncation(server: Server, path: Path) -> None:
    """The successors of workers that had sent everything know that the file was truncated."""
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, OLD)
    await_protected(server, 10)
    pids = server.workers(2)
    for pid in pids:
        stop(pid)
    path.write_bytes(NEW)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for client in clients:
        expect(client, NEW)
    assert rotated(server, 1) == len(OLD)


def test_truncated_before_a_client_had_everything(serve: Serve, path: Path) -> None:
    """A client that had not everything is disconnected, and has no wrong byte."""
    path.write_bytes(BIG)
    server = serve(path, "--follow-name", "-v", program=HURRIED)
    server.workers(1)
    slow = server.connect(b"0\n", receive_buffer=4096)
    server.streaming(slow)
    expect(quick := server.connect(b"0\n"), BIG)
    os.truncate(path, 0)
    rotated(server, 1)
    append(path, NEW)
    expect(quick, NEW)
    received = recv_all(slow)
    server.logged("error: client disconnected: its next bytes no longer exist: ")
    assert len(received) < len(BIG)
    assert BIG.startswith(received)


def test_truncated_in_a_rotation(server: Server, path: Path) -> None:
    """An old file truncated before the roll is lost, and the log continues with the next."""
    client = server.connect(b"0\n")
    expect(client, OLD)
    old = rotate(path)
    server.logged(MOVED)
    os.truncate(old, 0)
    append(path, NEW)
    expect(client, NEW)
    assert rotated(server, 1) == len(OLD)
    await_end(server, len(OLD + NEW))
    later = server.connect(b"?0\n")
    assert recv_line(later) == (len(OLD), len(OLD + NEW))
    expect(later, NEW)


def test_sealed_segment_is_truncated(server: Server, path: Path) -> None:
    """If a sealed segment is truncated, a client that needs its bytes is disconnected."""
    client = server.connect(b"0\n")
    expect(client, OLD)
    old = rotate(path, NEW)
    rotated(server, 1)
    os.truncate(old, 1000)
    assert outcome(server.connect(b"0\n")) == OLD[:1000]
    server.logged("error: client disconnected: its next bytes no longer exist: ", "offset=1000 ")
    assert outcome(server.connect(b"1001\n")) == b""
    expect(client, NEW)
    expect(server.connect(b"%d\n" % len(OLD)), NEW)


def test_restored_empty_files(serve: Serve, path: Path) -> None:
    """Empty files between two starts are no segments, and no process keeps them open."""
    options = ("--follow-name", "--state-file", str(path.with_name("state")))
    path.touch()
    first = serve(path, *options, program=HURRIED)
    first.workers(1)
    first.signal(signal.SIGTERM)
    first.wait()
    old = [rotate(path), rotate(path), rotate(path, NEW)]
    server = serve(path, *options, program=hurried(late_patience=0.2))
    expect(server.connect(b"0\n"), NEW)
    pids = [server.pid, *server.workers(1)]
    eventually(lambda: [file for file in old if held_files(pids, file)] == [])
