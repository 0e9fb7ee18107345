"""Tests of a worker whose log rolls: orders of the supervisor, real files and connections."""

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.files import append, opened, random_bytes
from support.sockets import readable, recv_all, recv_exactly, tcp_pair, wait_readable
from support.waiting import DEADLINE
from support.worker_bench import WorkerBench, working
from tailsrv.protocol import offsets_line
from tailsrv.segments import NO_FILE, Segment
from tailsrv.shared_counts import SharedCounts
from tailsrv.worker.client import Client, ClientState
from tailsrv.worker_channel import Agree, Drain, Freeze, Retire, Roll, Thaw, encode
from tailsrv.worker_context import Entry

# 4 MiB are more than the buffers on loopback can hold.
BIG = random_bytes(4 << 20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of ten bytes."""
    path = tmp_path / "log"
    path.write_bytes(b"0123456789")
    return path


@pytest.fixture
def ends() -> Iterator[SharedCounts]:
    """Give the shared end of one slot."""
    ends = SharedCounts(1)
    yield ends
    os.close(ends.fd)


@pytest.fixture
def bench(path: Path, ends: SharedCounts) -> Iterator[WorkerBench]:
    """Give a bench with a worker that follows the name of that file."""
    with working(path, ends=ends) as bench:
        yield bench


def rotate(bench: WorkerBench, data: bytes = b"") -> Path:
    """Rename the served file, write `data` to a new one, and return the old one."""
    count = len(list(bench.path.parent.iterdir()))
    old = bench.path.rename(bench.path.with_name(f"log.{count}"))
    bench.path.write_bytes(data)
    return old


def roll(bench: WorkerBench, data: bytes = b"") -> None:
    """Rotate, and order the worker to roll."""
    old = rotate(bench, data)
    bench.order(Freeze(1))
    bench.roll(bench.path, old.stat().st_size)


def behind(bench: WorkerBench, header: bytes) -> tuple[socket.socket, Client]:
    """Connect a client whose stream has begun, and that has been sent nothing."""
    far, client = bench.connect()
    far.sendall(header)
    wait_readable(client.sock)
    bench.worker.handle_client(client, select.EPOLLIN)
    bench.worker.start_streams()
    assert client in bench.worker.streams.behind
    return far, client


def frozen(bench: WorkerBench) -> list[int | None]:
    """Return the acknowledgements of orders to freeze, since the last call."""
    return [
        report.notices.frozen for report in bench.reports() if report.notices.frozen is not None
    ]


def truncated(bench: WorkerBench) -> list[int]:
    """Return the reported truncations since the last call."""
    return [
        report.notices.truncated
        for report in bench.reports()
        if report.notices.truncated is not None
    ]


def needs(bench: WorkerBench) -> list[int]:
    """Run one turn, and return what segments the worker has reported to need since the last call.

    Each number is the end of the segments that it does not need.
    """
    bench.worker.step(0)
    return [report.notices.needs for report in bench.reports() if report.notices.needs is not None]


def open_files(path: Path) -> int:
    """Return how many descriptors this process has of a file, or of all files in a folder.

    Others are not counted, because garbage of other tests may hold some. A deleted file counts
    under its last name.
    """
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = Path(os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)"))
            count += path in (name, name.parent)
        except FileNotFoundError:
            # This was the descriptor of the folder that is being listed.
            pass
    return count


# Freezing.


def test_frozen(bench: WorkerBench) -> None:
    """Between Freeze and Roll, appends are not sent, and then come before the next segment."""
    follower, _ = bench.connect(b"-0\n")
    bench.settle()
    bench.order(Freeze(7))
    bench.until(lambda: frozen(bench) == [7])
    append(bench.path, b"late")
    bench.settle()
    from_the_end, _ = bench.connect(b"-1\n")
    assert bench.receive(from_the_end, 1) == b"9"
    bench.worker.file_monitor.poll_file()
    bench.settle()
    assert not readable(follower)
    assert bench.ends is not None
    assert bench.ends[0] == 10
    rotate(bench, b"next")
    bench.roll(bench.path, 14)
    assert bench.receive(follower, 8) == b"latenext"
    assert bench.receive(from_the_end, 8) == b"latenext"
    append(bench.path, b"more")
    assert bench.receive(follower, 4) == b"more"
    assert bench.ends[0] == 22


def test_each_freeze_is_acknowledged(bench: WorkerBench) -> None:
    """A worker that is frozen acknowledges the next order to freeze, too."""
    bench.order(Freeze(1))
    bench.until(lambda: frozen(bench) == [1])
    bench.order(Freeze(2))
    bench.until(lambda: frozen(bench) == [2])


def test_thaw(bench: WorkerBench) -> None:
    """After Thaw, what was appended meanwhile is sent at once."""
    far, _ = bench.connect(b"-0\n")
    bench.order(Freeze(1))
    append(bench.path, b"late")
    bench.settle()
    assert not readable(far)
    bench.order(Thaw())
    assert recv_exactly(far, 4) == b"late"
    append(bench.path, b"more")
    assert bench.receive(far, 4) == b"more"


def test_appends_after_the_sealed_size(bench: WorkerBench) -> None:
    """Bytes that the old file gets after its sealed size was read are not sent."""
    caught_up, _ = bench.connect(b"-0\n")
    late, _ = behind(bench, b"8\n")
    bench.order(Freeze(1))
    append(bench.path, b"end")
    old = rotate(bench, b"next")
    append(old, b"too late")
    bench.roll(bench.path, 13)
    append(old, b"too late")
    assert bench.receive(caught_up, 7) == b"endnext"
    assert bench.receive(late, 9) == b"89endnext"
    bench.settle()
    assert not readable(caught_up)


def test_drain_while_frozen(bench: WorkerBench) -> None:
    """A worker that is ordered to drain before it has rolled sends what the old file has."""
    far, _ = bench.connect(b"-0\n")
    bench.order(Freeze(1))
    append(bench.path, b"late")
    bench.settle()
    bench.order(Drain(bench.config.grace))
    assert bench.receive_to_the_end(far) == [b"late"]


# Rolling without an order.


def agree(bench: WorkerBench, next_data: bytes = b"") -> Path:
    """Rotate, and let the worker roll by itself when the active segment has ten bytes."""
    old = rotate(bench, next_data)
    bench.order(Freeze(1))
    bench.order_with_file(Agree(10), bench.path)
    return old


@pytest.mark.parametrize("count", [5, 2 << 20])
def test_first_byte_after_an_agreement(bench: WorkerBench, ends: SharedCounts, count: int) -> None:
    """The worker rolls when the next file has a byte, and ignores the order that comes later."""
    far, _ = bench.connect(b"0\n")
    assert bench.receive(far, 10) == b"0123456789"
    old = agree(bench)
    bench.settle()
    assert open_files(bench.path) == 1
    append(bench.path, BIG[:count])
    assert bench.receive(far, count) == BIG[:count]
    assert ends[0] == 10 + count
    append(old, b"late")
    # The supervisor does not know yet who has rolled, and lets the workers freeze anew.
    bench.order(Freeze(2))
    append(bench.path, b"more")
    bench.settle()
    assert not readable(far)
    bench.order_with_file(Roll(0, 10, lost=False), bench.path)
    assert bench.receive(far, 4) == b"more"
    assert open_files(bench.path) == 1
    roll(bench, b"third")
    assert bench.receive(far, 5) == b"third"
    late, _ = bench.connect(b"9\n")
    assert bench.receive(late, count + 10) == b"9" + BIG[:count] + b"morethird"


def test_next_file_has_a_byte_already(bench: WorkerBench) -> None:
    """The worker rolls at once."""
    far, _ = bench.connect(b"-0\n")
    agree(bench, b"next")
    assert bench.receive(far, 4) == b"next"


def test_active_segment_grows_after_an_agreement(bench: WorkerBench) -> None:
    """The worker does not roll by itself, because the supervisor has to decide the sealed size."""
    far, _ = bench.connect(b"-0\n")
    old = agree(bench)
    append(old, b"late")
    append(bench.path, b"next")
    bench.settle()
    assert not readable(far)
    bench.order(Freeze(2))
    assert open_files(bench.path) == 0
    bench.roll(bench.path, 14)
    assert bench.receive(far, 8) == b"latenext"


@pytest.mark.parametrize("order", [Freeze(2), Thaw()])
def test_agreement_is_withdrawn(bench: WorkerBench, order: Freeze | Thaw) -> None:
    """The worker closes the next file, and does not roll."""
    far, _ = bench.connect(b"-0\n")
    old = agree(bench)
    assert open_files(bench.path) == 1
    bench.order(order)
    assert open_files(bench.path) == 0
    append(bench.path, b"next")
    append(old, b"more")
    bench.settle()
    assert readable(far) == isinstance(order, Thaw)
    bench.order(Thaw())
    assert bench.receive(far, 4) == b"more"


def test_orphan_without_clients(bench: WorkerBench) -> None:
    """An orphan without clients notices that the file is truncated before it grows again."""
    bench.settle()
    bench.channel.close()
    bench.worker.step(DEADLINE)
    assert bench.worker.orphaned
    os.truncate(bench.path, 0)
    bench.worker.step(DEADLINE)
    append(bench.path, b"more than before")
    far, _ = bench.connect(b"?-0\n")
    assert bench.receive(far, 40) == b"%019d %019d\n" % (10, 10)
    bench.settle()
    assert not readable(far)


def test_truncation_that_another_worker_could_notice(path: Path) -> None:
    """A worker that has seen less of the file than another one notices that it is truncated."""
    ends = SharedCounts(2)
    with working(path, ends=ends) as bench:
        bench.settle()
        # The worker of the other slot has seen 50 bytes.
        ends[1] = 50
        append(path, b"new")
        far, _ = bench.connect(b"?-0\n")
        assert bench.receive(far, 40) == b"%019d %019d\n" % (50, 50)
        assert truncated(bench) == [13]
    os.close(ends.fd)


def test_agreement_without_clients_or_descriptor(bench: WorkerBench) -> None:
    """A worker without clients does not compete with the others: it waits for the order."""
    agree(bench)
    # It keeps the file for the next supervisor.
    assert open_files(bench.path) == 1
    bench.order(Agree(10))
    append(bench.path, b"next")
    far, _ = bench.connect(b"8\n")
    assert bench.receive(far, 2) == b"89"
    bench.settle()
    assert not readable(far)
    bench.roll(bench.path, 10)
    assert bench.receive(far, 4) == b"next"


@pytest.mark.parametrize("data", [b"", b"next"])
@pytest.mark.parametrize("freeze", [False, True])
def test_drain_after_an_agreement(bench: WorkerBench, data: bytes, freeze: bool) -> None:
    """The streams end at the agreed size, or in the next file: other workers may be there."""
    far, _ = bench.connect(b"-0\n")
    old = agree(bench)
    if data:
        append(bench.path, data)
    else:
        append(old, b"late")
    if freeze:
        bench.order(Freeze(2))
    bench.order(Drain(bench.config.grace))
    received = b"".join(bench.receive_to_the_end(far))
    assert received == (b"" if freeze else data)


def test_successor_after_an_agreement(path: Path, ends: SharedCounts) -> None:
    """A worker that starts then is frozen at the agreed size."""
    append(path, b"late")
    with working(path, ends=ends, agreed=10) as bench:
        bench.worker.file_monitor.begin()
        far, _ = bench.connect(b"?8\n")
        line = offsets_line(8, 10)
        assert bench.receive(far, len(line) + 2) == line + b"89"
        bench.settle()
        assert not readable(far)
        bench.order(Freeze(3))
        bench.until(lambda: frozen(bench) == [3])
        rotate(bench)
        bench.order_with_file(Agree(14), bench.path)
        append(bench.path, b"next")
        assert bench.receive(far, 8) == b"latenext"


# Rolling.


@pytest.mark.parametrize("size", [0, 5, 2 << 20])
@pytest.mark.parametrize("following", [0, 5, 2 << 20])
def test_every_client_gets_every_byte(path: Path, size: int, following: int) -> None:
    """Wherever a client is when the log rolls, it gets the rest, and then the next segment."""
    old, new = b"0123456789" + BIG[:size], BIG[-following:] if following else b""
    append(path, BIG[:size])
    with ExitStack() as stack:
        bench = stack.enter_context(working(path))
        whole = old + new + b"more"
        clients = {
            start: bench.connect(b"%d\n" % start)[0]
            for start in (len(old), len(old) + 3, len(old) + len(new), len(whole) - 1)
        }
        slow, stalled = bench.connect(b"1\n", receive=4096)
        behind_far, _ = behind(bench, b"0\n")
        at_the_end, _ = bench.connect(b"-0\n")
        line, _ = behind(bench, b"?2\n")
        line_at_the_end, _ = behind(bench, b"?-0\n")
        if size > 1 << 20:
            bench.until(lambda: stalled.fd in bench.worker.streams.blocked)
        roll(bench, new)
        append(path, b"more")
        clients |= {0: behind_far, 1: slow}
        for start, far in clients.items():
            assert bench.receive(far, len(whole) - start) == whole[start:], start
        assert bench.receive(at_the_end, len(whole) - len(old)) == whole[len(old) :]
        expected = offsets_line(2, len(old)) + whole[2:]
        assert bench.receive(line, len(expected)) == expected
        expected = offsets_line(len(old), len(old)) + whole[len(old) :]
        assert bench.receive(line_at_the_end, len(expected)) == expected
        bench.settle()
        for far in (*clients.values(), at_the_end, line, line_at_the_end):
            assert not readable(far)


SIZES = [(10, 5, 7), (10, (2 << 20) + 1, 3), ((1 << 20) + 7, 0, 3 << 20), (10, 0, 1)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("empty", [0, 2])
def test_three_segments(path: Path, sizes: tuple[int, int, int], empty: int) -> None:
    """A client that sleeps through several rolls gets all segments, and so do later clients."""
    parts = [random_bytes(size, seed=seed) for seed, size in enumerate(sizes)]
    whole = b"".join(parts) + b"more"
    path.write_bytes(parts[0])
    with working(path) as bench:
        sleeping, _ = behind(bench, b"0\n") if parts[0] else bench.connect(b"0\n")
        caught_up, _ = bench.connect(b"-0\n")
        for part in parts[1:]:
            for _ in range(empty):
                roll(bench)
            roll(bench, part)
        append(path, b"more")
        assert bench.receive(sleeping, len(whole)) == whole
        rest = whole[len(parts[0]) :]
        assert bench.receive(caught_up, len(rest)) == rest
        # In each segment, before and at each border, and beyond the end.
        borders = [len(parts[0]), len(parts[0]) + len(parts[1]), len(whole) - 4, len(whole)]
        for start in {0, *borders, *(border - 1 for border in borders)}:
            far, _ = bench.connect(b"%d\n" % start)
            assert bench.receive(far, len(whole) - start) == whole[start:], start
        far, _ = bench.connect(b"?-%d\n" % (len(whole) - 2))
        expected = offsets_line(2, len(whole)) + whole[2:]
        assert bench.receive(far, len(expected)) == expected


@pytest.mark.parametrize("empty", [0, 3])
def test_files_that_are_kept_open(bench: WorkerBench, empty: int) -> None:
    """Each segment that has a byte keeps one descriptor, and an empty one keeps none."""
    for _ in range(empty):
        roll(bench)
    roll(bench, b"a")
    for _ in range(empty):
        roll(bench)
    roll(bench, b"b")
    assert open_files(bench.path.parent) == 3
    assert [segment.size for segment in bench.log] == [10, 1, None]


def test_adopted_in_sealed_segments(path: Path) -> None:
    """A successor continues streams anywhere in the log that it inherits."""
    sealed_path = path.with_name("log.1")
    old = b"a sealed segment"
    sealed_path.write_bytes(old)
    whole = old + b"0123456789"
    with ExitStack() as stack:
        pairs = [stack.enter_context(tcp_pair()) for _ in range(5)]
        entries = {}
        # The end of the log is not that of the active file.
        for number, ((near, _), sent) in enumerate(zip(pairs, (0, 3, 10, 16, 18), strict=True)):
            near.send(whole[:sent] or b"")
            entries[number] = Entry(near.dup().detach(), 0)
        sealed = Segment(0, os.open(sealed_path, os.O_RDONLY), len(old))
        bench = stack.enter_context(working(path, sealed=[sealed], clients=entries))
        append(path, b"more")
        for _, far in pairs:
            assert bench.receive(far, len(whole) + 4) == whole + b"more"


def test_appends_after_a_roll_are_sent_at_once(bench: WorkerBench) -> None:
    """The caught-up clients get appends to a later segment without a turn, and exactly."""
    far, _ = bench.connect(b"-0\n")
    roll(bench, BIG[:1000])
    assert bench.receive(far, 1000) == BIG[:1000]
    bench.settle()
    append(bench.path, b"more")
    bench.worker.file_monitor.deliver_appends()
    assert recv_exactly(far, 4) == b"more"
    roll(bench, b"next")
    assert bench.receive(far, 4) == b"next"


def test_roll_without_a_descriptor(bench: WorkerBench) -> None:
    """A worker that had no descriptor left for the next file ends, and keeps its clients."""
    far, client = bench.connect(b"-0\n")
    bench.order(Roll(0, 10, lost=False))
    assert bench.worker.ended
    assert client.state is ClientState.STREAMING
    assert not readable(far)


def test_path_is_checked_after_a_roll(bench: WorkerBench) -> None:
    """The worker watches the next file, and reports when that is gone."""
    far, _ = bench.connect(b"-0\n")
    roll(bench, b"next")
    assert bench.receive(far, 4) == b"next"
    bench.settle()
    assert not bench.worker.file_monitor.gone
    bench.reports()
    rotate(bench)
    bench.until(lambda: any(report.notices.gone for report in bench.reports()))


def test_appends_after_a_roll_do_not_wake_a_worker_without_clients(bench: WorkerBench) -> None:
    """A worker without clients is not woken by appends to the next file."""
    roll(bench, b"next")
    bench.settle()
    append(bench.path, b"more")
    assert not readable(bench.worker.loop.epoll.fileno())
    far, _ = bench.connect(b"10\n")
    assert bench.receive(far, 8) == b"nextmore"


# Truncation.


def test_truncation(bench: WorkerBench, caplog: pytest.LogCaptureFixture) -> None:
    """After a truncation a client that had everything continues, and others are disconnected."""
    caught_up, _ = bench.connect(b"-0\n")
    ahead, _ = bench.connect(b"11\n")
    far_ahead, _ = bench.connect(b"1000\n")
    append(bench.path, BIG)
    end = 10 + len(BIG)
    assert bench.receive(caught_up, len(BIG)) == BIG
    slow, stalled = bench.connect(b"0\n", receive=4096)
    beyond, _ = bench.connect(b"%d\n" % (end + 1))
    bench.until(lambda: stalled.fd in bench.worker.streams.blocked)
    for far, start in ((ahead, 11), (far_ahead, 1000)):
        assert bench.receive(far, end - start) == BIG[start - 10 :]
    bench.reports()
    os.truncate(bench.path, 0)
    bench.until(lambda: truncated(bench) == [0])
    append(bench.path, b"new")
    bench.settle()
    # The worker does not look at the size any more, and reports the truncation once.
    assert truncated(bench) == []
    assert bench.ends is not None
    assert bench.ends[0] == end
    assert not readable(caught_up)
    bench.roll(bench.path, end, lost=True)
    for far in (caught_up, ahead, far_ahead):
        assert bench.receive(far, 3) == b"new"
    assert bench.receive(beyond, 2) == b"ew"
    far, _ = bench.connect(b"0\n")
    assert bench.receive(far, 3) == b"new"
    # The slow client wakes the worker when it reads.
    got = b""
    while stalled.state is not ClientState.CLOSED:
        if readable(slow):
            got += slow.recv(1 << 20)
        bench.worker.step(0.01)
    bench.settle()
    got += recv_all(slow)
    assert (b"0123456789" + BIG).startswith(got)
    assert len(got) < end
    assert "its next bytes no longer exist" in caplog.text
    assert bench.ends[0] == end + 3


def test_truncation_before_all_was_sent(
    bench: WorkerBench, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that has all that this worker knew, but not what another one sent, is disconnected.

    The log goes on after the bytes that the other worker's clients have.
    """
    far, client = bench.connect(b"-0\n")
    os.truncate(bench.path, 0)
    bench.roll(bench.path, 14, lost=True)
    bench.until(lambda: client.state is ClientState.CLOSED)
    bench.settle()
    assert recv_all(far) == b""
    assert "its next bytes no longer exist" in caplog.text


@pytest.mark.parametrize("header", [b"-0\n", b"?-0\n", b"12\n", b"?12\n", b"?10\n"])
def test_client_that_comes_between_a_truncation_and_the_roll(
    bench: WorkerBench, header: bytes
) -> None:
    """A client that asks for nothing from before the truncation continues with the new content."""
    bench.connect(b"0\n")
    os.truncate(bench.path, 0)
    bench.until(lambda: truncated(bench) == [0])
    far, _ = bench.connect(header)
    bench.settle()
    append(bench.path, b"news")
    bench.order(Freeze(1))
    bench.roll(bench.path, 10, lost=True)
    start = 2 if b"12" in header else 0
    line = offsets_line(10 + start, 10) if b"?" in header else b""
    assert bench.receive(far, len(line) + 4 - start) == line + b"news"[start:]


def test_truncated_file_is_closed(bench: WorkerBench) -> None:
    """A segment whose bytes no longer exist keeps no descriptor."""
    os.truncate(bench.path, 0)
    bench.roll(bench.path, 10, lost=True)
    assert open_files(bench.path) == 1
    assert [*bench.log] == [Segment(10, bench.log.active.file)]


def test_bytes_after_a_truncation_are_not_the_old_ones(bench: WorkerBench) -> None:
    """A client that was behind gets no byte of the new content at an old offset."""
    far, client = behind(bench, b"2\n")
    bench.path.write_bytes(b"abcd")
    bench.worker.file_monitor.deliver_appends()
    bench.until(lambda: truncated(bench) == [4])
    bench.settle()
    bench.roll(bench.path, 10, lost=True)
    bench.until(lambda: client.state is ClientState.CLOSED)
    bench.settle()
    assert recv_all(far) == b""


def test_successor_finds_the_truncation(path: Path, ends: SharedCounts) -> None:
    """A worker whose predecessor has acted on a larger size reports that the file was truncated."""
    ends[0] = 10
    path.write_bytes(b"new")
    with ExitStack() as stack:
        pairs = [stack.enter_context(tcp_pair()) for _ in range(3)]
        starts = (10, 7, 3)
        entries = {
            start: Entry(near.dup().detach(), start)
            for start, (near, _) in zip(starts, pairs, strict=True)
        }
        bench = stack.enter_context(working(path, ends=ends, clients=entries))
        for near, _ in pairs:
            near.close()
        bench.worker.file_monitor.begin()
        bench.until(lambda: truncated(bench) == [3])
        bench.roll(path, 10, lost=True)
        assert bench.receive(pairs[0][1], 3) == b"new"
        bench.until(lambda: len(bench.worker.clients) == 1)
        bench.settle()
        for _, far in pairs[1:]:
            assert recv_all(far) == b""


def test_successor_sends_no_bytes_of_a_truncated_file(path: Path, ends: SharedCounts) -> None:
    """A client that a successor adopts gets no byte of the new content at an old offset."""
    ends[0] = 10
    path.write_bytes(b"new")
    with ExitStack() as stack:
        near, far = stack.enter_context(tcp_pair())
        clients = {1: Entry(near.dup().detach(), 1)}
        bench = stack.enter_context(working(path, ends=ends, clients=clients))
        near.close()
        bench.worker.file_monitor.begin()
        bench.until(lambda: truncated(bench) == [3])
        bench.settle()
        bench.roll(path, 10, lost=True)
        bench.until(lambda: not bench.worker.clients)
        bench.settle()
        assert recv_all(far) == b""


def test_end_that_is_not_shared(path: Path) -> None:
    """Without --follow-name, a truncation does not freeze the worker."""
    with working(path) as bench:
        far, _ = bench.connect(b"-0\n")
        os.truncate(path, 3)
        bench.until(lambda: truncated(bench) == [3])
        append(path, b"34567890ab")
        assert bench.receive(far, 3) == b"0ab"


def test_sealed_file_that_is_truncated(
    bench: WorkerBench, caplog: pytest.LogCaptureFixture
) -> None:
    """A client whose next bytes were cut off a sealed file is disconnected, and no other."""
    follower, _ = bench.connect(b"-0\n")
    far, client = behind(bench, b"5\n")
    old = rotate(bench, b"next")
    bench.roll(bench.path, 10)
    os.truncate(old, 2)
    bench.until(lambda: client.state is ClientState.CLOSED)
    bench.settle()
    assert recv_all(far) == b""
    assert "its next bytes no longer exist" in caplog.text
    assert bench.receive(follower, 4) == b"next"


# Deleted segments.


def test_deleted_segment(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A deleted segment is closed after its last reader has left it, and no new one begins."""
    append(path, BIG)
    size = 10 + len(BIG)
    with working(path) as bench:
        slow, stalled = bench.connect(b"0\n", receive=4096)
        bench.until(lambda: stalled.fd in bench.worker.streams.blocked)
        old = rotate(bench, b"next")
        bench.roll(path, size)
        old.unlink()
        bench.reports()
        bench.order(Retire(size))
        assert needs(bench) == [0]
        for header in (b"1\n", b"%d\n" % (size - 1), b"?1\n"):
            far, client = bench.connect(header)
            bench.settle()
            assert client.state is ClientState.CLOSED
            assert recv_all(far) == b""
        assert f"the log begins at {size}" in caplog.text
        for header in (b"0\n", b"-1000\n", b"-4\n", b"%d\n" % size):
            far, _ = bench.connect(header)
            assert bench.receive(far, 4) == b"next", header
        far, _ = bench.connect(b"?0\n")
        assert bench.receive(far, 44) == offsets_line(size, size + 4) + b"next"
        assert open_files(old) == 1
        bench.skew += 2.0
        bench.until(lambda: needs(bench) == [0])
        assert open_files(old) == 1
        whole = b"0123456789" + BIG + b"next"
        assert bench.receive(slow, len(whole)) == whole
        bench.skew += 2.0
        bench.until(lambda: open_files(old) == 0)
        assert needs(bench)[-1:] == [size]
        assert bench.worker.close_unneeded not in bench.worker.loop.timers
        assert [*bench.log] == [Segment(size, bench.log.active.file)]


def test_deleted_segment_without_readers(bench: WorkerBench) -> None:
    """A deleted segment that no client reads is closed at once, and others are kept."""
    bench.connect()
    bench.connect(b"-0\n")
    roll(bench, b"a")
    roll(bench, b"b")
    first, second = list(bench.log)[:2]
    bench.settle()
    bench.reports()
    bench.order(Retire(10))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first.file)
    assert os.fstat(second.file).st_size == 1
    assert needs(bench) == [10]
    far, _ = bench.connect(b"0\n")
    assert bench.receive(far, 2) == b"ab"


def test_reader_that_disconnects(bench: WorkerBench) -> None:
    """A deleted segment is closed after its last reader has disconnected."""
    far, client = behind(bench, b"0\n")
    old = rotate(bench, b"next")
    bench.roll(bench.path, 10)
    old.unlink()
    bench.order(Retire(10))
    assert open_files(old) == 1
    bench.worker.departures.add(client)
    bench.settle()
    bench.skew += 2.0
    bench.until(lambda: open_files(old) == 0)
    assert recv_all(far) == b""


@pytest.mark.parametrize("header", [b"0\n", b"5\n", b"-3\n"])
def test_segment_that_is_deleted_between_header_and_start(
    bench: WorkerBench, header: bytes
) -> None:
    """A segment that is retired before a client's stream begins is kept open for that client."""
    far, client = bench.connect()
    far.sendall(header)
    wait_readable(client.sock)
    bench.worker.handle_client(client, select.EPOLLIN)
    ((_, start, _),) = bench.worker.reporter.starting
    old = rotate(bench, b"next")
    bench.roll(bench.path, 10)
    old.unlink()
    bench.order(Retire(10))
    assert needs(bench)[-1:] == [0]
    whole = b"0123456789next"[start:]
    assert bench.receive(far, len(whole)) == whole
    bench.skew += 2.0
    bench.until(lambda: open_files(old) == 0)


def test_roll_after_a_segment_was_retired(bench: WorkerBench) -> None:
    """Retiring and rolling do not disturb each other: a reader goes on through all segments."""
    far, _ = behind(bench, b"0\n")
    roll(bench, b"a")
    bench.order(Retire(10))
    roll(bench, b"b")
    bench.order(Retire(11))
    roll(bench, b"c")
    assert bench.log.first == 0
    assert bench.receive(far, 13) == b"0123456789abc"
    bench.skew += 2.0
    bench.until(lambda: bench.log.first == 11)


def test_worker_of_a_log_with_deleted_segments(path: Path) -> None:
    """A successor without readers of deleted segments closes them when it starts, and says so."""
    with opened(path) as file, working(path, sealed=[Segment(0, os.dup(file), 10)]) as bench:
        bench.log.retire(10)
        bench.channel.sendall(encode(Drain(bench.config.grace)))
        bench.worker.run()
        assert needs(bench) == [10]
        assert len(bench.log) == 1


def test_lost_segment_is_not_needed(bench: WorkerBench) -> None:
    """A roll of a truncated file retires all that is before it, and the worker reports that."""
    roll(bench, b"next")
    bench.settle()
    bench.reports()
    os.truncate(bench.path, 0)
    bench.roll(bench.path, 4, lost=True)
    assert needs(bench) == [14]
    assert [segment.base for segment in bench.log] == [14]
    assert all(segment.file != NO_FILE for segment in bench.log)
