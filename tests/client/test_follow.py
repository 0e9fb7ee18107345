"""`follow` against servers that are killed, replaced or cut off: each byte once, or an error."""

import os
import select
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from support.commands import answering, closed_port, kill, restart
from support.cutter import Cutter
from support.fake_server import FakeServer, offsets_line
from support.files import append, random_bytes
from support.interpreter import run_python
from support.server import Serve, Server
from support.waiting import DEADLINE, eventually
from tailsrv.client import (
    Backoff,
    ConnectError,
    EndpointError,
    Follow,
    GoneError,
    OffsetError,
    OtherFileError,
    PlaceError,
    UnknownHostError,
    follow,
)  # fmt: skip
from tailsrv.client.connector import wait

DATA = random_bytes(300_000)
SHORT_BACKOFF = Backoff(0.01, 0.02)


def endpoint_of(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


def take(stream: Follow, count: int) -> bytes:
    """Return the next `count` bytes, exactly."""
    received = b""
    while len(received) < count:
        received += next(stream)
    assert len(received) == count
    return received


class EndOfTestError(Exception):
    """Raised by the reader's `wait` to end the stream."""


class Reader:
    """Follow on another thread; leaving the block makes `wait` end the stream."""

    def __init__(self, addresses: str | Sequence[str], offset: int | str, **options: Any) -> None:
        self.received = bytearray()
        self.reports: list[str] = []
        self.error: Exception | None = None
        # The number of pauses between two rounds of attempts to connect.
        self.pauses = 0
        self._end = os.eventfd(0)
        self.stream = follow(
            addresses,
            offset,
            backoff=SHORT_BACKOFF,
            report=self.reports.append,
            wait=self._wait,
            **options,
        )
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.eventfd_write(self._end, 1)
        self._thread.join(DEADLINE)
        os.close(self._end)

    def got(self, data: bytes) -> None:
        """Wait until exactly `data` has been received."""
        eventually(lambda: len(self.received) >= len(data) or self.error)
        assert self.received == data

    def _wait(self, fd: int, events: int, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        if fd >= 0:
            poll.register(fd, events)
        else:
            self.pauses += 1
        seen = dict(poll.poll(None if seconds is None else seconds * 1000))
        if self._end in seen:
            raise EndOfTestError
        return fd in seen

    def _read(self) -> None:
        with self.stream:
            try:
                for chunk in self.stream:
                    self.received += chunk
            except Exception as error:
                self.error = error


@pytest.mark.parametrize(
    ("offset", "start"), [(0, 0), (1000, 1000), ("+5", 5), (-1000, -1000), (-(1 << 40), 0)]
)
def test_file_from_an_offset(serve: Serve, path: Path, offset: int | str, start: int) -> None:
    """A stream is the file from its start plus appends, and its offset is known."""
    path.write_bytes(DATA)
    with follow(endpoint_of(serve(path)), offset) as stream:
        assert take(stream, len(DATA[start:])) == DATA[start:]
        append(path, b"new")
        assert next(stream) == b"new"
        assert (stream.offset, stream.end) == (len(DATA) + 3, len(DATA))


def test_only_what_is_new(serve: Serve, path: Path) -> None:
    """An offset of -0 yields only the data appended after the server has read the header."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    with Reader(endpoint_of(server), "-0") as reader:
        server.logged("client streams: ")
        append(path, b"new")
        reader.got(b"new")


@pytest.mark.parametrize("offset", [0, 12345, -200_000])
def test_cuts_at_random_bytes(serve: Serve, path: Path, offset: int) -> None:
    """Every byte arrives once however often the connection is closed or reset, at any byte."""
    path.write_bytes(DATA[:250_000])
    start = offset if offset >= 0 else 250_000 + offset
    cutter = Cutter(serve(path).port, cuts=30, longest=60_000)
    with cutter, follow(cutter.endpoints(5), offset, backoff=SHORT_BACKOFF) as stream:
        received = take(stream, 250_000 - start)
        append(path, DATA[250_000:])
        received += take(stream, 50_000)
    assert received == DATA[start:]


@pytest.mark.thorough
@pytest.mark.slow
def test_server_is_killed_and_restarted(serve: Serve, tmp_path: Path) -> None:
    """Data appended while the server is down arrives once, even on a stream without data so far."""
    starts: dict[str, tuple[int | str, bytes]] = {
        "known": (0, DATA),
        "end": (-1000, DATA),
        "nothing yet": ("-0", DATA),
        "periodic": (-1000, b"tick\n" * 1000),
    }
    # The cases run together because each of them waits for seconds.
    with ExitStack() as stack:
        cases = []
        for name, (offset, before) in starts.items():
            path = tmp_path / name
            path.write_bytes(before)
            server = serve(path, "-v")
            reader = stack.enter_context(Reader(endpoint_of(server), offset))
            server.logged("client streams: ")
            cases.append((path, server, reader, b"" if offset == "-0" else before[int(offset) :]))
        for path, server, reader, expected in cases:
            reader.got(expected)
            kill(server)
            append(path, b"one")
            eventually(lambda reader=reader: any("refused" in line for line in reader.reports))  # type: ignore[misc]
            append(path, b"two")
            restart(serve, server, path)
        for path, server, reader, expected in cases:
            reader.got(expected + b"onetwo")
            append(path, b"three")
            reader.got(expected + b"onetwothree")
            assert len(reader.reports) <= 4, (
                "one report for each reason, and one for the new connection"
            )
            assert reader.reports[-1] == f"connected to {endpoint_of(server)}"


@pytest.mark.slow
def test_much_is_appended_in_an_outage(serve: Serve, path: Path) -> None:
    """However much is appended during an outage, a stream from the end resumes exactly."""
    path.write_bytes(DATA)
    server = serve(path)
    with Reader(endpoint_of(server), -10_000) as reader:
        reader.got(DATA[-10_000:])
        kill(server)
        more = random_bytes(3_000_000, seed=2)
        append(path, more)
        restart(serve, server, path)
        reader.got(DATA[-10_000:] + more)


def test_whole_lines_through_cuts(serve: Serve, path: Path) -> None:
    """With `whole_lines`, a connection that is lost before the line of offsets is retried."""
    path.write_bytes(b"a line that is cut\n" * 100)
    with (
        Cutter(serve(path).port, cuts=4, longest=1) as cutter,
        Reader(cutter.endpoints(1), -50, whole_lines=True) as reader,
    ):
        reader.got(b"a line that is cut\n" * 2)
        assert (
            reader.reports[0]
            == f"{cutter.endpoints(1)[0]}: the server closed the connection; retrying"
        )


def test_wait_that_returns_too_early(serve: Serve, path: Path) -> None:
    """A `wait` that reports data too early costs one more turn and loses no byte."""
    path.write_bytes(DATA)
    turns = 0

    def wait_too_short(fd: int, events: int, _: float | None) -> bool:
        nonlocal turns
        if not wait(fd, events, 0.001):
            turns += 1
            if turns == 10:
                append(path, b"more")
        return True

    with follow(endpoint_of(serve(path)), wait=wait_too_short) as stream:
        assert take(stream, len(DATA) + 4) == DATA + b"more"
    assert turns >= 10
    turns, (out, into) = 0, os.pipe()
    with (
        open(out, "rb") as reader,
        open(into, "wb"),
        follow(
            endpoint_of(serve(path)), len(DATA), recall=lambda _: b"", wait=wait_too_short
        ) as stream,
    ):
        received = b""
        while len(received) < 8:
            received += reader.read(stream.splice(into, 1 << 16))
    assert received == b"moremore"


def test_address_that_cannot_be_reached() -> None:
    """An error that connect(2) returns at once is reported like one that arrives later."""
    with pytest.raises(
        ConnectError, match=r"^255.255.255.255:1: (Network is unreachable|Permission denied)$"
    ):
        next(follow("255.255.255.255:1", once=True))


@pytest.mark.thorough
@pytest.mark.slow
def test_whole_lines_of_an_empty_file(serve: Serve, path: Path) -> None:
    """The first line that is written to an empty file is delivered from its first byte."""
    path.write_bytes(b"")
    server = serve(path, "-v")
    with Reader(endpoint_of(server), "-0", whole_lines=True) as reader:
        server.logged("client streams: ")
        append(path, b"first\n")
        reader.got(b"first\n")


def test_slow_servers_get_more_time() -> None:
    """Each server given up on for its silence doubles the next wait, up to a limit."""
    stream = follow("127.0.0.1:1")

    def seconds(given_up: int) -> float:
        stream._given_up = given_up
        return stream._stuck()

    assert [seconds(given_up) for given_up in (0, 1, 2, 3, 4, 10_000)] == [2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("size", [len(DATA), len(DATA) - 1000])
def test_other_file_is_an_error(serve: Serve, path: Path, size: int) -> None:
    """A different file at the same address is an error, yields no byte and ends the iteration."""
    path.write_bytes(DATA)
    server = serve(path)
    with follow(endpoint_of(server), backoff=SHORT_BACKOFF) as stream:
        assert take(stream, len(DATA)) == DATA
        kill(server)
        path.write_bytes(bytes(size))
        restart(serve, server, path)
        with pytest.raises(OtherFileError):
            next(stream)
        assert stream.offset == len(DATA)
        with pytest.raises(StopIteration):
            next(stream)


@pytest.mark.thorough
@pytest.mark.slow
def test_shorter_file_is_reported_and_retried(serve: Serve, path: Path) -> None:
    """A server with a shorter file is reported and retried until its file has grown."""
    path.write_bytes(DATA)
    server = serve(path)
    with Reader(endpoint_of(server), 0) as reader:
        reader.got(DATA)
        kill(server)
        path.write_bytes(DATA[:1000])
        restart(serve, server, path)
        eventually(lambda: any("shorter" in line for line in reader.reports))
        append(path, DATA[1000:] + b"new")
        reader.got(DATA + b"new")


def test_next_address_is_tried(serve: Serve, path: Path) -> None:
    """A dead replica is skipped without a pause, at the start and after a lost connection."""
    path.write_bytes(DATA)
    first, second = serve(path), serve(path)
    dead = f"127.0.0.1:{closed_port()}"
    with follow([dead, endpoint_of(first), endpoint_of(second)], backoff=Backoff(60, 60)) as stream:
        assert take(stream, len(DATA)) == DATA
        kill(first)
        append(path, b"new")
        assert take(stream, 3) == b"new"


@pytest.mark.parametrize(
    "header", ["127.0.0.1:{}", ("127.0.0.1", 0), [("127.0.0.1", 0)], ["127.0.0.1:{}"]]
)
def test_ways_to_name_a_server(serve: Serve, path: Path, header: Any) -> None:
    """A server is named by a string or by a pair, and several by a list of either."""
    path.write_bytes(b"line\n")
    port = serve(path).port

    def named(one: Any) -> Any:
        return one.format(port) if isinstance(one, str) else (one[0], port)

    with follow(
        [named(one) for one in header] if isinstance(header, list) else named(header)
    ) as stream:
        assert next(stream) == b"line\n"


@pytest.mark.parametrize(
    "addresses", ["localhost", "a:0", [], ["a:1", "b"], ("a", 65536), [("a", -1)]]
)
def test_bad_address(addresses: Any) -> None:
    """A malformed address is an error before anything is connected."""
    with pytest.raises(EndpointError):
        follow(addresses)


def test_bad_offset() -> None:
    """A malformed offset is an error before anything is connected."""
    with pytest.raises(OffsetError):
        follow("localhost:1", "1e3")


def test_unknown_host() -> None:
    """A host name without an address is an error only if no other server is named."""
    with (
        follow("nosuch.invalid:1") as stream,
        pytest.raises(UnknownHostError, match=r"^nosuch\.invalid:1: "),
    ):
        next(stream)
    with (
        follow(["nosuch.invalid:1", "127.0.0.1:1"], once=True) as stream,
        pytest.raises(ConnectError, match=r"nosuch\..*, 127\.0\.0\.1:1: "),
    ):
        next(stream)


def test_once_without_a_server() -> None:
    """With `once`, each address is tried once, and then the iteration fails."""
    ports = closed_port(), closed_port()
    with (
        follow([f"127.0.0.1:{port}" for port in ports], once=True) as stream,
        pytest.raises(ConnectError, match=r"refused.*refused"),
    ):
        next(stream)


def test_once_ends_with_the_connection(serve: Serve, path: Path) -> None:
    """With `once`, the iteration ends with the first connection."""
    path.write_bytes(DATA)
    server = serve(path)
    with follow(endpoint_of(server), once=True) as stream:
        assert take(stream, len(DATA)) == DATA
        server.signal(signal.SIGTERM)
        assert list(stream) == []


def test_once_fails_if_the_connection_is_reset(serve: Serve, path: Path) -> None:
    """With `once`, a connection that is reset is an error."""
    path.write_bytes(DATA)
    with (
        Cutter(serve(path).port, cuts=1, longest=1, resets=True) as cutter,
        follow(cutter.endpoints(1), once=True) as stream,
        pytest.raises(ConnectError, match=r"^127\.0\.0\.1:\d+: Connection reset by peer"),
    ):
        list(stream)


def test_idle_ends_the_iteration(serve: Serve, path: Path) -> None:
    """The iteration ends when no byte has arrived for `idle` seconds."""
    path.write_bytes(DATA)
    with follow(endpoint_of(serve(path)), idle=0.2) as stream:
        assert b"".join(stream) == DATA
        assert list(stream) == []


@pytest.mark.parametrize("offset", [0, 1000, -1000, "-0"])
def test_idle_before_the_file_exists(serve: Serve, path: Path, offset: int | str) -> None:
    """The end of the idle time is no error if the server has no file yet: there is no data."""
    with follow(endpoint_of(serve(path)), offset, idle=0.2) as stream:
        assert list(stream) == []


def test_idle_without_a_server() -> None:
    """Without a server, the end of the idle time is an error: there may be unread data."""
    with (
        follow(f"127.0.0.1:{closed_port()}", idle=0.2, backoff=SHORT_BACKOFF) as stream,
        pytest.raises(ConnectError, match="refused"),
    ):
        list(stream)


def test_idle_before_a_shorter_file(serve: Serve, path: Path) -> None:
    """The end of the idle time is an error while the server's file is too short."""
    path.write_bytes(DATA[:100])
    with (
        follow(
            endpoint_of(serve(path)), 1000, idle=0.2, recall=lambda offset: DATA[:offset]
        ) as stream,
        pytest.raises(ConnectError, match="shorter"),
    ):
        list(stream)


@pytest.mark.thorough
def test_replica_that_is_behind_is_skipped(serve: Serve, path: Path, tmp_path: Path) -> None:
    """If one replica's file is too short, the next replica is used."""
    path.write_bytes(DATA)
    behind = tmp_path / "behind"
    behind.write_bytes(DATA[:100])
    with follow(
        [endpoint_of(serve(behind)), endpoint_of(serve(path))],
        1000,
        recall=lambda offset: DATA[:offset],
        backoff=Backoff(60, 60),
    ) as stream:
        assert take(stream, len(DATA) - 1000) == DATA[1000:]


def test_close_ends_the_iteration(serve: Serve, path: Path) -> None:
    """A closed stream yields nothing more, and the server drops the client."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    stream = follow(endpoint_of(server))
    next(stream)
    stream.close()
    assert list(stream) == []
    append(path, DATA)
    server.logged("client left: ")


def test_keepalive_is_on(serve: Serve, path: Path) -> None:
    """TCP keepalive is set, so that the loss of the server's machine is noticed."""
    path.write_bytes(DATA)
    with follow(endpoint_of(serve(path))) as stream:
        next(stream)
        assert stream._sock is not None
        assert stream._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert [stream._sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [
            60,
            15,
            4,
        ]


@pytest.mark.parametrize(
    ("failures", "least", "most"),
    [(1, 0.25, 0.5), (2, 0.5, 1), (3, 1, 2), (6, 5, 10), (10_000, 5, 10)],
)
def test_backoff(failures: int, least: float, most: float) -> None:
    """Pauses double up to a limit, and a random factor shortens each by up to a half."""
    assert (Backoff().pause(failures, 1), Backoff().pause(failures, 0)) == (least, most)


def loaded_by(module: str) -> set[str]:
    """Return the names of all modules that an interpreter has loaded after `import module`."""
    return set(run_python(f"import sys; import {module}; print(*sys.modules)").stdout.split())


@pytest.mark.parametrize("module", ["tailsrv.client.tscat", "tailsrv.client.tssync"])
def test_commands_do_not_import_the_server(module: str) -> None:
    """A client starts without the modules that only the server needs."""
    loaded = loaded_by(module)
    for unwanted in (
        "psutil",
        "inotify_simple",
        "setproctitle",
        "tailsrv.main",
        "tailsrv.supervisor",
        "tailsrv.worker",
        "tailsrv.listeners",
    ):
        assert find_spec(unwanted), "a module that does not exist is never imported"
        assert unwanted not in loaded


def test_server_does_not_import_the_clients() -> None:
    """The server starts without the modules that only clients need."""
    loaded = loaded_by("tailsrv.main")
    for unwanted in ("tailsrv.client", "tailsrv.health"):
        assert find_spec(unwanted), "a module that does not exist is never imported"
        assert unwanted not in loaded


def test_silent_log_that_grows_in_an_outage(serve: Serve, path: Path) -> None:
    """What is appended to an empty log while its server is down reaches a stream from -0."""
    path.write_bytes(b"")
    server = serve(path)
    with Reader(endpoint_of(server), "-0") as reader:
        # Without an offset, the stream would begin after the bytes that are appended.
        eventually(lambda: reader.stream.offset == 0)
        kill(server)
        append(path, DATA)
        restart(serve, server, path)
        reader.got(DATA)


@pytest.mark.parametrize(
    ("offset", "expected"), [(0, DATA), (1000, DATA[1000:]), (-10, DATA[-10:]), ("-0", b"")]
)
def test_until_end(serve: Serve, path: Path, offset: int | str, expected: bytes) -> None:
    """With `until_end`, the iteration ends where the log ended when the stream began."""
    path.write_bytes(DATA)
    with follow(endpoint_of(serve(path)), offset, until_end=True) as stream:
        received = b""
        for chunk in stream:
            # This arrives while the stream is still being read.
            append(path, b"late")
            received += chunk
    assert received == expected
    assert stream.offset == stream.end == len(DATA)


def test_until_end_beyond_the_end(serve: Serve, path: Path) -> None:
    """With `until_end`, an offset beyond the end of the log yields nothing."""
    path.write_bytes(DATA)
    assert list(follow(endpoint_of(serve(path)), len(DATA) + 5, until_end=True)) == []


def test_until_end_through_cuts(serve: Serve, path: Path) -> None:
    """With `until_end`, the end stays the one at the beginning, whatever is appended meanwhile."""
    path.write_bytes(DATA)
    cutter = Cutter(serve(path).port, cuts=30, longest=60_000)
    with cutter, follow(cutter.endpoints(5), until_end=True, backoff=SHORT_BACKOFF) as stream:
        received = next(stream)
        append(path, DATA)
        assert received + b"".join(stream) == DATA


def test_until_end_keeps_the_first_end() -> None:
    """With `until_end`, a line of offsets that arrives after a reconnect does not move the end."""
    with (
        FakeServer(DATA[:10]) as server,
        follow(server.endpoint, until_end=True, backoff=SHORT_BACKOFF) as stream,
    ):
        # The first connection breaks after 4 bytes, so that byte 0 is requested with `?` again.
        server.limit = 4
        assert next(stream) == DATA[:4]
        server.log, server.limit = DATA[:20], None
        server.hang_up()
        assert b"".join(stream) == DATA[4:10]


@pytest.mark.parametrize("options", [{"once": True}, {"idle": 0.2}], ids=["once", "idle"])
def test_until_end_is_not_reached(options: dict[str, Any]) -> None:
    """With `until_end`, a stream that is stopped before the end is an error."""

    def answer(sock: socket.socket) -> None:
        sock.sendall(offsets_line(0, 10) + b"abc")
        if "once" in options:
            sock.shutdown(socket.SHUT_WR)

    with answering(answer) as server, follow(server, until_end=True, **options) as stream:
        assert next(stream) == b"abc"
        with pytest.raises(ConnectError, match=r"closed the connection|did not send all bytes"):
            next(stream)


def test_until_end_of_a_server_that_does_not_answer() -> None:
    """With `until_end`, the end of the idle time is an error if the end was never known."""
    with (
        answering(lambda _: None) as server,
        follow(server, until_end=True, idle=0.2) as stream,
        pytest.raises(ConnectError, match="the server does not answer"),
    ):
        next(stream)


@pytest.mark.slow
def test_until_end_of_a_shorter_file(serve: Serve, path: Path) -> None:
    """With `until_end`, a server with fewer bytes than the caller is an error, not the end."""
    path.write_bytes(DATA[:100])
    server = endpoint_of(serve(path))
    with Reader(server, 1000, until_end=True, recall=lambda offset: DATA[:offset]) as reader:
        eventually(lambda: reader.error)
        assert isinstance(reader.error, ConnectError)
        assert "shorter than 1000 bytes" in str(reader.error)


@pytest.mark.parametrize("offset", [10, -100])
def test_old_server(offset: int) -> None:
    """A server that does not answer `?` is reported, and gets the header without it."""
    with FakeServer(DATA, old=True) as server, Reader(server.endpoint, offset) as reader:
        reader.got(DATA[offset:])
        result = "cannot" if offset < 0 else "can"
        assert reader.reports == [
            f"{server.endpoint}: this server does not tell offsets (tailsrv before 2.0): after a"
            f" lost connection, this stream {result} resume"
        ]
        assert reader.stream.offset == (None if offset < 0 else len(DATA))
        server.log += b"new"
        server.hang_up()
        if offset < 0:
            eventually(lambda: reader.error)
            assert isinstance(reader.error, PlaceError)
            assert "a stream from the end cannot resume" in str(reader.error)
        else:
            reader.got(DATA[offset:] + b"new")
            assert server.headers[-1] == b"%d\n" % (len(DATA) - 4096)


def test_old_server_with_once() -> None:
    """With `once`, the connection that shows that a server does not answer `?` does not count."""
    with FakeServer(DATA, old=True) as server, follow(server.endpoint, -5, once=True) as stream:
        assert next(stream) == DATA[-5:]
        server.hang_up()
        assert list(stream) == []


@pytest.mark.slow
def test_old_server_with_an_empty_log() -> None:
    """The time to find out that a server does not answer `?` does not count as idle."""
    with (
        FakeServer(b"", old=True) as server,
        follow(server.endpoint, idle=0.2, backoff=SHORT_BACKOFF) as stream,
    ):
        assert list(stream) == []
        assert server.headers[-1] == b"0\n"


@pytest.mark.parametrize(
    ("offset", "options", "hint"),
    [(0, {"until_end": True}, "--until-idle"), (-9, {"whole_lines": True}, "offset of 0 or more")],
)
def test_old_server_is_not_enough(offset: int, options: dict[str, Any], hint: str) -> None:
    """What needs the line of offsets is an error with a server that does not send it."""
    with (
        FakeServer(DATA, old=True) as server,
        follow(server.endpoint, offset, **options) as stream,
        pytest.raises(PlaceError, match=rf"does not tell offsets .* is unknown; use .*{hint}"),
    ):
        next(stream)


@pytest.mark.parametrize("refused", [1, 2, 3, 6])
def test_server_that_is_ending_is_not_an_old_one(refused: int) -> None:
    """A server that closes every connection for a while does not lose the stream its offset."""
    with FakeServer(DATA, refused=refused) as server, Reader(server.endpoint, -100) as reader:
        reader.got(DATA[-100:])
        assert reader.stream.offset == len(DATA)
        server.log += b"new"
        server.hang_up()
        reader.got(DATA[-100:] + b"new")


@pytest.mark.parametrize("offset", [10, 50_000])
def test_bytes_that_are_gone(offset: int) -> None:
    """A stream whose first bytes were deleted from the log fails instead of waiting for them."""
    with (
        FakeServer(DATA, first=50_001) as server,
        follow(server.endpoint, offset, backoff=SHORT_BACKOFF) as stream,
        pytest.raises(GoneError, match=f"from offset {offset} on no longer exist") as caught,
    ):
        next(stream)
    assert (caught.value.offset, caught.value.start) == (offset, 50_001)
    assert list(stream) == []


def test_bytes_that_are_gone_after_a_reconnect() -> None:
    """Bytes that are deleted while a stream is disconnected are an error."""
    with FakeServer(DATA) as server, Reader(server.endpoint, 0) as reader:
        reader.got(DATA)
        server.log += b"never received"
        server.first = len(DATA) + 5
        server.hang_up()
        eventually(lambda: reader.error)
    assert isinstance(reader.error, GoneError)
    assert reader.received == DATA


@pytest.mark.parametrize(
    ("first", "refused", "pauses"),
    [(len(DATA) - 100, 0, 1), (0, 1, 2)],
    ids=["compared bytes are gone", "nothing is gone"],
)
def test_closed_connection_that_can_resume(first: int, refused: int, pauses: int) -> None:
    """If only bytes that the stream has received were deleted, it reconnects without a pause."""
    with FakeServer(DATA) as server, Reader(server.endpoint, 0) as reader:
        reader.got(DATA)
        server.log += b"new"
        server.first, server.refused = first, refused
        server.hang_up()
        reader.got(DATA + b"new")
        assert reader.pauses == pauses


def test_earliest_byte_of_a_log() -> None:
    """Offset 0 is the earliest byte that there is, and the stream knows its offset."""
    with FakeServer(DATA, first=1000) as server, follow(server.endpoint, until_end=True) as stream:
        assert b"".join(stream) == DATA[1000:]
        assert stream.offset == len(DATA)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_replica_that_still_has_the_bytes(order: slice) -> None:
    """Bytes that one replica has deleted are fetched from another one."""
    with FakeServer(DATA, first=5000) as one, FakeServer(DATA, first=100) as other:
        addresses = [one.endpoint, other.endpoint][order]
        with follow(addresses, 1000, until_end=True, backoff=SHORT_BACKOFF) as stream:
            assert b"".join(stream) == DATA[1000:]


def test_no_replica_has_the_bytes() -> None:
    """Bytes that every replica has deleted are an error."""
    with (
        FakeServer(DATA, first=5000) as one,
        FakeServer(DATA, first=2000) as other,
        Reader([one.endpoint, other.endpoint], 1000) as reader,
    ):
        eventually(lambda: reader.error)
        assert isinstance(reader.error, GoneError)
        assert reader.error.start == 2000


@pytest.mark.slow
def test_server_that_does_not_answer() -> None:
    """A server that accepts the connection, but sends no line, is reported."""
    with answering(lambda _: None) as server, Reader(server, "-0") as reader:
        eventually(lambda: reader.reports)
        assert reader.reports == [
            f"{server}: the server does not answer: its file does not exist yet, or it has as many"
            " clients as it may have; waiting"
        ]


def test_answer_that_is_not_from_tailsrv() -> None:
    """A server with another protocol is an error."""
    with (
        answering(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 2)) as server,
        follow(server) as stream,
        pytest.raises(PlaceError, match="not a tailsrv"),
    ):
        next(stream)
