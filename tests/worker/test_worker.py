"""Tests of a worker's turns in this process: real connections and files, and a test clock."""

import errno
import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from setproctitle import getproctitle

from support.files import append, opened
from support.interpreter import run_program
from support.processes import as_root
from support.sockets import (
    readable,
    recv_all,
    recv_exactly,
    reset,
    tcp_pair,
    wait_for,
    wait_readable,
)
from support.waiting import DEADLINE
from support.worker_bench import WorkerBench, working
from tailsrv.addresses import endpoint
from tailsrv.config import ExitStatus
from tailsrv.linux.sockets import discard
from tailsrv.protocol import Start, offsets_line, parse_header
from tailsrv.worker.client import Client, ClientState
from tailsrv.worker_channel import MAX_PACKET, Drain, Ping, encode
from tailsrv.worker_context import Entry

# 4 MiB are more than the buffers on loopback can hold.
BIG = os.urandom(1 << 16) * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of ten bytes."""
    path = tmp_path / "log"
    path.write_bytes(b"0123456789")
    return path


@pytest.fixture
def bench(path: Path) -> Iterator[WorkerBench]:
    """Give a bench with a worker that serves that file."""
    with working(path) as bench:
        yield bench


# Headers.


@pytest.mark.parametrize(
    ("sent", "first"),
    [
        (b"0\n", b"0123456789"),
        (b"7\n", b"789"),
        (b"-2\n", b"89"),
        (b"-99\n", b"0123456789"),
        (b"-0\r\n", b""),
    ],
)
def test_stream(bench: WorkerBench, sent: bytes, first: bytes) -> None:
    """A client gets the file from the offset in its header, and then appends."""
    far, _ = bench.connect(sent)
    append(bench.path, b"more")
    assert bench.receive(far, len(first) + 4) == first + b"more"


def test_header_in_pieces(bench: WorkerBench) -> None:
    """A header may arrive byte by byte, and stays in the socket until it is complete."""
    far, client = bench.connect()
    for sent in range(1, 5):
        far.sendall(b" -3\n"[sent - 1 : sent])
        wait_readable(client.sock)
        if sent < 4:
            while len(client.sock.recv(10, socket.MSG_PEEK)) < sent:
                pass
        bench.settle()
        assert client.state is (ClientState.AWAITING_HEADER if sent < 4 else ClientState.STREAMING)
    assert bench.receive(far, 3) == b"789"


def test_junk_after_the_newline(bench: WorkerBench) -> None:
    """Bytes after the header are read and discarded, so that the sender never blocks."""
    far, client = bench.connect(b"8\njunk\n0\n")
    far.setblocking(False)
    left = 16 << 20
    while left > 0:
        if select.select([], [far], [], 0)[1]:
            left -= far.send(bytes(1 << 20))
        bench.worker.step(0)
    append(bench.path, b"more")
    assert bench.receive(far, 6) == b"89more"
    assert client.state is ClientState.STREAMING


@pytest.mark.parametrize("when", ["with the header", "later", "later, with junk"])
def test_half_close(bench: WorkerBench, when: str) -> None:
    """A client that half-closes its connection is still served, and causes no further events."""
    if when == "with the header":
        far, client = bench.connect()
        far.sendall(b"8\n")
        far.shutdown(socket.SHUT_WR)
        wait_for(client.sock, select.POLLRDHUP)
    else:
        far, client = bench.connect(b"8\n")
        if when == "later, with junk":
            far.sendall(b"junk")
        far.shutdown(socket.SHUT_WR)
        wait_for(client.sock, select.POLLRDHUP)
    assert bench.receive(far, 2) == b"89"
    bench.settle()
    assert not readable(bench.worker.loop.epoll.fileno())
    for _ in range(3):
        append(bench.path, b"more")
        assert bench.receive(far, 4) == b"more"


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"abc\n", "not a number"),
        (b"\n", "not a number"),
        (b"x" * 100, "too long"),
        (b"1_000\n0\n", "not a number"),
        (b"9" * 19 + b"\n", "64 bits"),
    ],
)
def test_bad_header(
    bench: WorkerBench, caplog: pytest.LogCaptureFixture, sent: bytes, reason: str
) -> None:
    """A bad header ends the connection without a byte, and the log gives peer and reason."""
    far, client = bench.connect(sent)
    bench.settle()
    assert recv_all(far) == b""
    assert client.state is ClientState.CLOSED
    assert client.sock.fileno() == -1
    [record] = caplog.records
    assert record.levelname.lower() == "warning"
    assert f"peer=127.0.0.1:{far.getsockname()[1]}" in record.getMessage()
    assert reason in record.getMessage()


@pytest.mark.parametrize("sent", [b"", b"5", b"-"])
def test_end_of_input_before_the_newline(
    bench: WorkerBench, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    """Input that ends before the newline ends the connection, even if it could be a number."""
    far, client = bench.connect()
    far.sendall(sent)
    far.shutdown(socket.SHUT_WR)
    bench.until(lambda: client.state is ClientState.CLOSED)
    bench.settle()
    assert recv_all(far) == b""
    assert "ended" in caplog.text


def test_header_timeout(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A connection without a header ends after its own timeout, and a stream never does."""
    with working(path, header_timeout=1000.0) as bench:
        streaming, _ = bench.connect(b"-0\n")
        early, first = bench.connect()
        bench.skew = 600.0
        late, second = bench.connect()
        late.sendall(b"5")
        bench.until(lambda: readable(second.sock))
        bench.skew = 990.0
        bench.worker.step(0)
        assert first.state is ClientState.AWAITING_HEADER
        bench.skew = 1010.0
        bench.until(lambda: first.state is ClientState.CLOSED)
        bench.settle()
        assert recv_all(early) == b""
        assert second.state is ClientState.AWAITING_HEADER
        bench.skew = 1590.0
        bench.worker.step(0)
        assert second.state is ClientState.AWAITING_HEADER
        bench.skew = 1610.0
        bench.until(lambda: second.state is ClientState.CLOSED)
        bench.settle()
        assert recv_all(late) == b""
        assert caplog.text.count("no header in 1000 s") == 2
        append(path, b"more")
        assert bench.receive(streaming, 4) == b"more"


def test_header_timeout_of_a_client_that_connects_when_another_leaves(path: Path) -> None:
    """A client that connects in the turn in which the last one is refused has its time, too."""
    with working(path, header_timeout=1000.0) as bench, socket.socket() as second:
        first, _ = bench.connect()
        bench.skew += 1000
        second.settimeout(DEADLINE)
        second.connect(bench.address)
        bench.worker.step(None)
        assert not recv_all(first)
        bench.until(lambda: len(bench.worker.clients) == 1)
        bench.skew += 1000
        bench.until(lambda: not bench.worker.clients)
        assert not recv_all(second)


def test_no_header_timeout(bench: WorkerBench) -> None:
    """Without a header timeout a connection may be silent without limit, and no timer is set."""
    far, client = bench.connect()
    bench.skew = 1e8
    bench.worker.step(0)
    bench.worker.step(0)
    assert client.state is ClientState.AWAITING_HEADER
    far.sendall(b"8\n")
    assert bench.receive(far, 2) == b"89"


@pytest.mark.slow
def test_out_of_descriptors(path: Path) -> None:
    """Out of descriptors, the oldest connection without a header is closed, and no stream."""
    done = run_program(
        "worker_short_of_descriptors",
        str(path),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_out_of_descriptors_with_streams_only(path: Path) -> None:
    """Out of descriptors with streams only, the worker pauses accepting, and does not spin."""
    done = run_program(
        "worker_full_of_streams",
        str(path),
    )
    assert done.returncode == 0, done.stderr


# Streams.


def test_slow_reader_does_not_stall_a_fast_one(bench: WorkerBench) -> None:
    """A client that does not read does not delay another client."""
    append(bench.path, BIG)
    slow, stalled = bench.connect(b"0\n", receive=4096)
    fast, _ = bench.connect(b"0\n")
    assert bench.receive(fast, 10 + len(BIG)) == b"0123456789" + BIG
    for _ in range(10):
        append(bench.path, b"more\n")
        assert bench.receive(fast, 5) == b"more\n"
    assert stalled.fd in bench.worker.streams.blocked
    assert stalled.offset < len(BIG)
    assert bench.receive(slow, 10 + len(BIG) + 50) == b"0123456789" + BIG + b"more\n" * 10


def test_header_that_reads_the_size_serves_the_caught_up(bench: WorkerBench) -> None:
    """If a `-N` header makes the worker read the size, caught-up clients get the append once."""
    follower, _ = bench.connect(b"-0\n")
    far, client = bench.connect()
    bench.settle()
    append(bench.path, b"abc")
    far.sendall(b"-1\n")
    wait_readable(client.sock)
    bench.worker.handle_client(client, select.EPOLLIN)
    assert follower.recv(100) == b"abc"
    bench.settle()
    append(bench.path, b"def")
    assert bench.receive(follower, 3) == b"def"
    assert bench.receive(far, 4) == b"cdef"


@pytest.mark.parametrize("method", ["add_client", "drop"])
def test_caught_up_do_not_wait_for_the_end_of_a_burst(
    bench: WorkerBench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """An append in a turn that adds or drops many clients is sent after the next of them."""
    follower, _ = bench.connect(b"-0\n")
    bench.settle()
    served: list[bool] = []
    act = getattr(bench.worker, method)

    def act_late(client: Client, *error: Exception) -> object:
        served.append(readable(follower))
        if len(served) == 1:
            append(bench.path, b"abc")
        return act(client, *error)

    monkeypatch.setattr(bench.worker, method, act_late)
    fars = [bench.stack.enter_context(socket.create_connection(bench.address)) for _ in range(5)]
    if method == "drop":
        bench.until(lambda: len(bench.worker.clients) == 6)
        for far in fars:
            reset(far)
    bench.worker.step(0)
    assert served == [False, True, True, True, True]


@pytest.mark.parametrize("what", ["start", "speak", "are closed"])
def test_caught_up_do_not_wait_for_discarded_input(
    bench: WorkerBench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """An append in a turn that discards input of many clients is sent after the next of them."""
    follower, _ = bench.connect(b"-0\n")
    if what == "start":
        fars = [
            bench.stack.enter_context(socket.create_connection(bench.address)) for _ in range(5)
        ]
    else:
        fars = [bench.connect(b"-0\n")[0] for _ in range(5)]
    bench.settle()
    served: list[bool] = []

    def discard_late(sock: socket.socket) -> bool:
        served.append(readable(follower))
        if len(served) == 1:
            append(bench.path, b"abc")
        return discard(sock)

    monkeypatch.setattr("tailsrv.worker.worker.discard", discard_late)
    for far in fars:
        if what == "are closed":
            reset(far)
        else:
            far.sendall(b"-0\n")
    bench.worker.step(0)
    assert served == [False, True, True, True, True]


def test_file_that_was_shorter_for_a_moment(bench: WorkerBench) -> None:
    """A client that found the file empty gets its bytes when the file has its old size again."""
    far, client = bench.connect(b"99\n")
    bench.settle()
    os.truncate(bench.path, 0)
    bench.worker.streams.add(client, 0)
    bench.worker.streams.pump()
    assert bench.worker.streams.shrunk
    bench.path.write_bytes(b"9876543210")
    bench.worker.file_monitor.deliver_appends()
    assert bench.receive(far, 10) == b"9876543210"


def test_append_while_the_event_is_taken(
    bench: WorkerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An append between reading the size and reading its event is sent."""
    follower, _ = bench.connect(b"-0\n")
    bench.settle()
    read = bench.watch.read

    def read_late() -> bool:
        append(bench.path, b"def")
        return read()

    monkeypatch.setattr(bench.watch, "read", read_late)
    append(bench.path, b"abc")
    bench.worker.file_monitor.handle_inotify()
    assert not readable(bench.worker.loop.epoll.fileno())
    assert recv_exactly(follower, 6) == b"abcdef"


def test_file_that_shrank_unseen(bench: WorkerBench) -> None:
    """A send that finds the file shorter makes the worker read the size, and does not spin."""
    far, client = bench.connect(b"15\n")
    bench.settle()
    bench.reports()
    # Simulate a file that was 20 bytes long when its size was read.
    bench.worker.streams.set_end(20)
    assert client in bench.worker.streams.behind
    bench.worker.step(0)
    assert bench.worker.streams.end == 10
    bench.settle()
    assert [report.notices.truncated for report in bench.reports()] == [10]
    append(bench.path, b"abcdefghij")
    assert bench.receive(far, 5) == b"fghij"


def test_error_with_one_client_ends_that_client_only(
    bench: WorkerBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in one client's header ends that client with a log line, and no other."""

    def parse(received: bytes, ended: bool) -> Start | None:
        if received.startswith(b"7"):
            raise ZeroDivisionError("poison")
        return parse_header(received, ended)

    monkeypatch.setattr("tailsrv.worker.header_reader.parse_header", parse)
    before, _ = bench.connect(b"-0\n")
    poisoned, client = bench.connect(b"7\n")
    bench.settle()
    after, _ = bench.connect(b"-0\n")
    assert recv_all(poisoned) == b""
    assert client.state is ClientState.CLOSED
    [record] = caplog.records
    assert record.levelname.lower() == "error"
    assert "poison" in record.getMessage()
    append(bench.path, b"more")
    assert [bench.receive(far, 4) for far in (before, after)] == [b"more", b"more"]


def poison(*_: object) -> None:
    """Fail as only a bug can."""
    raise ZeroDivisionError("poison")


@pytest.mark.parametrize(
    "where", ["tailsrv.worker.worker.Client.forget_peer", "tailsrv.worker.streams.next_chunk"]
)
def test_error_with_one_stream_ends_that_client_only(
    bench: WorkerBench,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    """An exception when a stream starts or is sent to ends that client, and no other."""
    other, _ = bench.connect(b"-0\n")
    bench.settle()
    with monkeypatch.context() as patch:
        patch.setattr(where, poison)
        poisoned, client = bench.connect(b"0\n")
        bench.until(lambda: client.state is ClientState.CLOSED)
    assert recv_all(poisoned) == b""
    [record] = caplog.records
    assert "client disconnected after an error" in record.getMessage()
    assert "poison" in record.getMessage()
    append(bench.path, b"more")
    assert bench.receive(other, 4) == b"more"


def test_error_with_one_adopted_client_ends_that_client_only(
    bench: WorkerBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception for one adopted client ends that client, and no other."""
    with tcp_pair() as (near, far), tcp_pair() as (healthy, its_far):
        with monkeypatch.context() as patch:
            patch.setattr("tailsrv.worker.worker.bytes_streamed", poison)
            bench.worker.adopt({1: Entry(near.detach(), 0)})
        bench.worker.adopt({2: Entry(healthy.detach(), 0)})
        bench.until(lambda: not (bench.worker.departures or bench.worker.reporter.left))
        assert far.recv(1) == b""
        assert recv_exactly(its_far, 10) == b"0123456789"
    assert "poison" in caplog.records[0].getMessage()
    assert [number for report in bench.reports() for number in report.left] == [1]


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOBUFS, "no buffers")])
def test_shortage_while_adopting_ends_the_worker(
    bench: WorkerBench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A shortage of memory while adopting ends the worker, and its successor adopts the clients."""

    def refuse(_: object) -> int:
        raise error

    monkeypatch.setattr("tailsrv.worker.worker.bytes_streamed", refuse)
    with tcp_pair() as (near, far):
        with pytest.raises(type(error)):
            bench.worker.adopt({1: Entry(near.detach(), 0)})
        assert not readable(far)
        assert not bench.worker.reporter.left


@pytest.mark.parametrize("sent", [b"x", b"-0\n"])
def test_error_with_all_clients_ends_the_worker(
    bench: WorkerBench, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """If memory runs out for all clients, the worker ends, and its successor adopts them."""
    bench.connect(b"-0\n")
    far, client = bench.connect(b"" if sent.endswith(b"\n") else b"-0\n")
    bench.settle()
    far.sendall(sent)
    wait_readable(client.sock)
    # The file grows after the worker has read its size, and before it has read the header.
    if sent.endswith(b"\n"):
        parse = parse_header

        def parse_later(received: bytes, ended: bool) -> Start | None:
            append(bench.path, b"more")
            return parse(received, ended)

        monkeypatch.setattr("tailsrv.worker.header_reader.parse_header", parse_later)
    else:
        append(bench.path, b"more")

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("tailsrv.worker.streams.send_to_all", fail)
    with pytest.raises(MemoryError):
        bench.worker.handle_client(client, select.EPOLLIN)


def test_reset(bench: WorkerBench) -> None:
    """A client that resets its connection is dropped in every state, without an append."""
    waiting, first = bench.connect()
    caught_up, second = bench.connect(b"-0\n")
    ahead, third = bench.connect(b"1000\n")
    other, _ = bench.connect(b"-0\n")
    for far in (waiting, caught_up, ahead):
        reset(far)
    bench.until(lambda: len(bench.worker.clients) == 1)
    bench.settle()
    assert [client.sock.fileno() for client in (first, second, third)] == [-1, -1, -1]
    append(bench.path, b"more")
    assert bench.receive(other, 4) == b"more"


def test_adopted_client_that_has_gone(bench: WorkerBench) -> None:
    """An adopted client that is no connection, or has gone, is reported as left."""
    with tcp_pair() as (gone, peer), opened("/") as folder:
        reset(peer)
        wait_for(gone, select.POLLERR)
        with pytest.raises(OSError, match="reset"):
            gone.recv(1)
        bench.worker.adopt({7: Entry(folder), 8: Entry(gone.detach(), 0)})
        bench.until(lambda: not bench.worker.reporter.left)
    assert sorted(number for report in bench.reports() for number in report.left) == [7, 8]
    assert not bench.worker.clients


def test_name_of_a_client_that_has_gone(bench: WorkerBench) -> None:
    """A client whose address is not stored and whose connection was reset is named `unknown`."""
    far, client = bench.connect(b"-0\n")
    assert str(client) == endpoint(*far.getsockname())
    reset(far)
    wait_for(client.sock, select.POLLERR)
    with pytest.raises(OSError, match="reset"):
        client.sock.recv(1)
    assert str(client) == "unknown"


def test_dropped_client_causes_no_events_for_the_next(bench: WorkerBench) -> None:
    """A client that gets a dropped client's descriptor number gets none of its events.

    That holds although a duplicate keeps the dropped client's connection open.
    """
    far, client = bench.connect()
    # Create this socket now, so that the server's side gets the number that becomes free.
    other = bench.stack.enter_context(socket.socket())
    with client.sock.dup() as duplicate:
        bench.worker.drop(client)
        bench.settle()
        other.connect(bench.address)
        other.sendall(b"-0\n")
        bench.until(lambda: bench.worker.streams.caught_up)
        assert list(bench.worker.clients) == [client.fd]
        bench.settle()
        far.sendall(b"junk")
        wait_readable(duplicate)
        assert not readable(bench.worker.loop.epoll.fileno())
        reset(far)
        wait_for(duplicate, select.POLLERR)
        assert not readable(bench.worker.loop.epoll.fileno())
    append(bench.path, b"more")
    assert bench.receive(other, 4) == b"more"


def test_appends_do_not_wake_a_worker_without_clients(bench: WorkerBench) -> None:
    """A worker without clients is not woken by appends, and the next client gets the whole file."""
    append(bench.path, b"a")
    assert not readable(bench.worker.loop.epoll.fileno())
    far, _ = bench.connect(b"-3\n")
    assert bench.receive(far, 3) == b"89a"
    far.close()
    append(bench.path, b"b")
    bench.until(
        lambda: readable(bench.worker.loop.epoll.fileno()) or bench.worker.streams.end == 12
    )
    # The answer to this append is a reset, as the client has closed.
    append(bench.path, b"c")
    bench.until(lambda: not bench.worker.clients)
    bench.settle()
    append(bench.path, b"d")
    assert not readable(bench.worker.loop.epoll.fileno())
    again, _ = bench.connect(b"10\n")
    assert bench.receive(again, 4) == b"abcd"


@pytest.mark.parametrize("when", ["it connects", "the file grows", "it is adopted"])
def test_acknowledgements_are_waited_for(bench: WorkerBench, when: str) -> None:
    """30 s after bytes were sent to a client, the worker checks it once."""
    _, client = bench.connect(b"8\n" if when == "it connects" else b"-0\n")
    bench.until(lambda: client.state is ClientState.STREAMING)
    # Run the timer of the title first.
    bench.skew += 2.0
    if when == "the file grows":
        bench.until(lambda: bench.worker.loop.timeout() is None)
        append(bench.path, b"ab")
    elif when == "it is adopted":
        bench.until(lambda: bench.worker.loop.timeout() is None)
        bench.worker.adopt({99: Entry(client.sock.dup().detach(), 10)})
    bench.until(lambda: (bench.worker.loop.timeout() or 0) > 20)
    bench.skew += 30.0
    bench.until(lambda: bench.worker.loop.timeout() is None)
    assert client.state is ClientState.STREAMING


@pytest.mark.parametrize("sent", [0, 1, 20, 39, 40, 41, 45])
def test_adopted_in_the_offsets_line(bench: WorkerBench, sent: int) -> None:
    """A worker that died anywhere in or after a `?` line has a successor that sends the rest."""
    stream = offsets_line(4, 10) + b"456789"
    near, far = bench.stack.enter_context(tcp_pair())
    if sent:
        near.send(stream[:sent])
    bench.worker.adopt({1: Entry(near.dup().detach(), 4, 10)})
    append(bench.path, b"ab")
    assert bench.receive(far, 48) == stream + b"ab"


def test_truncation_is_reported(bench: WorkerBench) -> None:
    """A truncation is reported with the new size, and clients beyond it wait for their offset."""
    far, _ = bench.connect(b"-0\n")
    bench.settle()
    bench.reports()
    os.truncate(bench.path, 3)
    bench.until(lambda: bench.worker.streams.end == 3)
    assert [report.notices.truncated for report in bench.reports()] == [3]
    append(bench.path, b"abcdefghij")
    assert bench.receive(far, 3) == b"hij"


def test_file_that_is_gone_is_reported_at_each_check(bench: WorkerBench) -> None:
    """The supervisor is told at each check that the file is gone, and the clients are kept."""
    far, _ = bench.connect(b"-0\n")
    bench.settle()
    bench.reports()
    moved = bench.path.with_name("log.1")
    bench.path.rename(moved)
    bench.until(lambda: bench.worker.file_monitor.gone)
    moved.chmod(0o600)
    append(moved, b"more")
    assert bench.receive(far, 4) == b"more"
    assert [report.notices.gone for report in bench.reports()] == [True, True]
    bench.skew = 2.0
    bench.until(lambda: readable(bench.channel))
    assert [report.notices.gone for report in bench.reports()] == [True]


def test_path_that_cannot_be_checked(path: Path) -> None:
    """A path that cannot be checked is polled, and the file is not gone until that is certain."""
    link, fresh = path.with_name("link"), path.with_name("fresh")
    link.symlink_to(path)
    with working(link) as bench:
        fresh.symlink_to("x" * 300)
        fresh.rename(link)
        bench.settle()
        assert not bench.worker.file_monitor.gone
        assert bench.worker.file_monitor.recheck_path in bench.worker.loop.timers
        fresh.symlink_to(path)
        fresh.rename(link)
        bench.skew = 2.0
        bench.until(lambda: bench.worker.file_monitor.recheck_path not in bench.worker.loop.timers)
        assert not bench.worker.file_monitor.gone
        link.unlink()
        bench.until(lambda: bench.worker.file_monitor.gone)


def test_clients_are_reported(bench: WorkerBench) -> None:
    """The supervisor is told which clients joined, started and left, and the title counts them."""
    far, client = bench.connect(b"-4\n")
    bench.settle()
    reports = bench.reports()
    assert [number for report in reports for number in report.joined] == [client.number]
    assert [start for report in reports for start in report.started] == [(client.number, 6, None)]
    assert bench.receive(far, 4) == b"6789"
    bench.skew = 10.0
    bench.until(lambda: getproctitle() == "tailsrv: worker 0 127.0.0.1:0 [1 client]")
    reset(far)
    bench.until(lambda: not bench.worker.clients)
    bench.skew = 20.0
    bench.until(lambda: [report.left for report in bench.reports()][-1:] == [[client.number]])


def test_header_stays_in_the_socket_until_the_start_is_reported(bench: WorkerBench) -> None:
    """Without room for its report a stream does not start, and its header stays in the socket."""
    follower, _ = bench.connect(b"-0\n")
    bench.settle()
    bench.reports()
    packets = 0
    # Fill the channel until there is no room for one byte.
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while bench.worker.channel.send(bytes(size), socket.MSG_DONTWAIT):
                packets += 1
    far = bench.stack.enter_context(socket.create_connection(bench.address, timeout=DEADLINE))
    far.sendall(b"8\n")
    bench.until(lambda: bench.worker.reporter.starting)
    append(bench.path, b"ab")
    assert bench.receive(follower, 2) == b"ab"
    [(client, offset, _)] = bench.worker.reporter.starting
    assert offset == 8
    assert client.sock.recv(10, socket.MSG_PEEK) == b"8\n"
    assert not readable(far)
    assert not bench.worker.ended
    for _ in range(packets):
        assert not bench.channel.recv(MAX_PACKET).strip(b"\0")
    bench.skew = 10.0
    assert bench.receive(far, 4) == b"89ab"
    assert [start for report in bench.reports() for start in report.started] == [
        (client.number, 8, None)
    ]


@pytest.mark.slow
def test_no_inotify(path: Path) -> None:
    """Without inotify instances the worker gives the reason, and polls for appends."""
    if not as_root:
        pytest.skip("only root can use the inotify instances of another user")
    path.parent.chmod(0o777)
    path.chmod(0o666)
    done = run_program("worker_without_inotify", str(path.parent))
    assert done.returncode == 0, done.stderr


# Drain and exit.


def test_drain(bench: WorkerBench) -> None:
    """A draining worker sends each client, queued ones too, the file up to its end, and exits."""
    append(bench.path, BIG)
    whole = b"0123456789" + BIG
    replaying, _ = bench.connect(b"0\n")
    caught_up, _ = bench.connect(b"-0\n")
    chatty, _ = bench.connect(b"-5\n")
    silent, _ = bench.connect()
    ahead, _ = bench.connect(b"99999999\n")
    half_closed, _ = bench.connect(b"-2\n")
    half_closed.shutdown(socket.SHUT_WR)
    unread, client = bench.connect()
    unread.sendall(b"-3\n")
    wait_readable(client.sock)
    chatty.sendall(b"stray")
    queued = bench.stack.enter_context(socket.create_connection(bench.address, timeout=DEADLINE))
    queued.sendall(b"-4\n")
    wait_readable(bench.listeners[0][0])
    append(bench.path, b"last")
    bench.channel.sendall(encode(Drain(bench.config.grace)))
    # Handle the order before the turn that would accept and read the others.
    bench.worker.handle_channel()
    fars = (replaying, caught_up, chatty, silent, ahead, half_closed, unread, queued)
    whole += b"last"
    expected = [whole, b"last", whole[-9:], b"", b"", whole[-6:], whole[-3:], whole[-4:]]
    got = bench.receive_to_the_end(*fars)
    assert [len(part) for part in got] == [len(part) for part in expected]
    assert got == expected
    assert not bench.worker.clients


def test_drain_refuses_later_connections(bench: WorkerBench) -> None:
    """After the order to drain no connection is accepted, and no append is sent."""
    far, _ = bench.connect(b"8\n")
    bench.channel.sendall(encode(Drain(bench.config.grace)))
    bench.until(lambda: bench.worker.draining)
    append(bench.path, b"too late")
    with socket.socket() as late:
        assert late.connect_ex(bench.address) != 0
    assert bench.receive_to_the_end(far) == [b"89"]


def test_orders_that_arrive_together(bench: WorkerBench) -> None:
    """A SIGTERM that arrives with an order to drain does not end the worker before its clients."""
    far, _ = bench.connect(b"8\n")
    bench.settle()
    bench.channel.sendall(encode(Ping()))
    bench.channel.sendall(encode(Drain(bench.config.grace)))
    os.kill(os.getpid(), signal.SIGTERM)
    bench.worker.handle_signal()
    assert (bench.worker.draining, bench.worker.ended) == (True, False)
    assert bench.receive_to_the_end(far) == [b"89"]


def test_ping(bench: WorkerBench) -> None:
    """A ping is answered, also while draining."""
    bench.connect(b"8\n", receive=4096)
    for order in (Ping(), Drain(bench.config.grace), Ping()):
        bench.reports()
        bench.channel.sendall(encode(order))
        if isinstance(order, Ping):
            bench.until(lambda: any(report.notices.alive for report in bench.reports()))
        else:
            bench.until(lambda: bench.worker.draining)


def test_drain_without_clients(bench: WorkerBench) -> None:
    """A draining worker without clients ends at once."""
    bench.channel.sendall(encode(Drain(bench.config.grace)))
    bench.worker.step(DEADLINE)
    assert bench.worker.ended


def test_drain_waits_for_the_acknowledgement_and_not_for_a_close(bench: WorkerBench) -> None:
    """A draining client that does not close is done when it has acknowledged everything."""
    far, _ = bench.connect(b"0\n")
    bench.channel.sendall(encode(Drain(bench.config.grace)))
    bench.until(lambda: bench.worker.ended)
    assert recv_all(far) == b"0123456789"


def test_drain_waits_until_clients_have_everything(path: Path) -> None:
    """A draining client stays until it has all bytes, and what it sends does not cost it any."""
    path.write_bytes(BIG[: 1 << 16])
    with working(path) as bench:
        far, client = bench.connect(b"0\n", receive=4096)
        bench.channel.sendall(encode(Drain(bench.config.grace)))
        bench.until(lambda: client.state is ClientState.FINISHED)
        bench.worker.step(0)
        assert list(bench.worker.clients.values()) == [client]
        far.sendall(b"stray")
        assert bench.receive_to_the_end(far) == [BIG[: 1 << 16]]


def test_queued_bytes_survive_the_grace_period(path: Path) -> None:
    """After the grace period a client still gets its queued bytes, even if it sent unread input."""
    append(path, BIG)
    with working(path) as bench:
        far, client = bench.connect(b"0\n", receive=4096)
        bench.until(lambda: client.fd in bench.worker.streams.blocked)
        far.sendall(b"stray")
        wait_readable(client.sock)
        bench.worker.end_drain()
        bench.worker.drop_departures()
        assert recv_all(far) == (b"0123456789" + BIG)[: client.offset]


def test_grace(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client that does not read is dropped at the end of the grace period, and that is logged."""
    append(path, BIG)
    with working(path, grace=100.0) as bench:
        far, client = bench.connect(b"0\n", receive=4096)
        bench.until(lambda: client.fd in bench.worker.streams.blocked)
        bench.channel.sendall(encode(Drain(bench.config.grace)))
        bench.until(lambda: bench.worker.draining)
        bench.skew = 90.0
        bench.worker.step(0)
        assert not bench.worker.ended
        bench.skew = 110.0
        bench.until(lambda: bench.worker.ended)
        bench.settle()
        assert "grace period over" in caplog.text
        got = recv_all(far)
        assert 0 < len(got) < len(BIG)
        assert (b"0123456789" + BIG).startswith(got)


def test_term_without_drain_is_like_a_crash(bench: WorkerBench) -> None:
    """SIGTERM alone ends the worker and leaves its clients to the successor."""
    _, client = bench.connect(b"-0\n")
    signal.raise_signal(signal.SIGTERM)
    bench.worker.step(DEADLINE)
    assert bench.worker.ended
    assert client.state is ClientState.STREAMING
    assert client.sock.fileno() == client.fd


def test_term_after_drain(bench: WorkerBench) -> None:
    """SIGTERM after an order to drain drains, even if the signal is handled first."""
    far, _ = bench.connect(b"8\n")
    bench.settle()
    bench.channel.sendall(encode(Drain(bench.config.grace)))
    signal.raise_signal(signal.SIGTERM)
    bench.worker.handle_signal()
    assert bench.worker.draining
    assert not bench.worker.ended
    assert bench.receive_to_the_end(far) == [b"89"]


def test_link_that_is_gone_for_a_moment(path: Path) -> None:
    """A link that comes back before the path is checked is watched again."""
    link, fresh = path.with_name("link"), path.with_name("fresh")
    link.symlink_to(path)
    with working(link) as bench:
        bench.settle()
        link.unlink()
        # What the worker does after the event, with a pause between the two steps.
        bench.worker.file_monitor._watch.read()
        link.symlink_to(path)
        bench.worker.file_monitor.check_path()
        bench.skew = 2.0
        bench.until(lambda: bench.worker.file_monitor.recheck_path not in bench.worker.loop.timers)
        assert not bench.worker.file_monitor.gone
        fresh.symlink_to("x")
        fresh.rename(link)
        bench.until(lambda: bench.worker.file_monitor.gone)


@pytest.mark.parametrize("signal_first", [True, False])
def test_supervisor_dies_during_a_replacement(bench: WorkerBench, signal_first: bool) -> None:
    """A worker that was told to end serves on: there will be no successor."""
    bench.settle()
    bench.channel.close()
    signal.raise_signal(signal.SIGTERM)
    if signal_first:
        bench.worker.handle_signal()
    else:
        bench.worker.handle_channel()
        bench.worker.handle_signal()
    assert bench.worker.orphaned
    assert not bench.worker.draining
    assert not bench.worker.ended
    client, _ = bench.connect(b"0\n")
    assert bench.receive(client, 10) == b"0123456789"
    signal.raise_signal(signal.SIGTERM)
    bench.worker.handle_signal()
    assert bench.worker.draining


@pytest.mark.parametrize("reporting", [True, False])
def test_last_orders_of_a_supervisor(bench: WorkerBench, reporting: bool) -> None:
    """What the supervisor ordered before it died counts, although it has not read all reports."""
    bench.settle()
    bench.worker.reporter.add_notice(alive=True)
    bench.worker.report()
    bench.channel.sendall(encode(Drain(bench.config.grace)))
    bench.channel.close()
    if reporting:
        bench.worker.reporter.add_notice(alive=True)
        bench.worker.report()
    else:
        bench.worker.handle_channel()
    assert bench.worker.draining
    assert bench.worker.orphaned


def test_orphan(bench: WorkerBench) -> None:
    """A worker whose supervisor has gone serves on for --orphan-timeout seconds, then drains."""
    bench.settle()
    bench.channel.close()
    bench.worker.step(DEADLINE)
    far, _ = bench.connect(b"8\n")
    assert bench.receive(far, 2) == b"89"
    assert bench.worker.render_title().endswith(" [orphaned, 1 client]")
    append(bench.path, b"more")
    bench.skew = bench.config.orphan_timeout + 1.0
    bench.worker.step(DEADLINE)
    assert bench.worker.draining
    assert bench.receive_to_the_end(far) == [b"more"]


def test_run(bench: WorkerBench) -> None:
    """run() reports that the worker is ready, and returns the exit status after a drain."""
    bench.channel.sendall(encode(Drain(bench.config.grace)))
    assert bench.worker.run() == ExitStatus.DONE
    assert bench.reports()[0].notices.ready is True


def test_run_on_a_file_that_has_gone(bench: WorkerBench) -> None:
    """A file that was deleted before the worker's watch existed is reported at once."""
    bench.path.unlink()
    bench.channel.sendall(encode(Drain(bench.config.grace)))
    assert bench.worker.run() == ExitStatus.DONE
    assert bench.reports()[0].notices.gone is True
