"""Rotations by the real logrotate, and a hundred of them in the stream of a plain netcat."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.logrotate import logrotate, needs_logrotate
from support.rotation import MOVED, ROLLED, rotate_all, rotated
from support.server import HURRIED, Serve, Server
from support.sockets import expect
from support.status import await_clients
from support.tools import missing
from support.waiting import DEADLINE, eventually

pytestmark = pytest.mark.slow

OLD, NEW, MORE = random_bytes(300_000, 1), random_bytes(200_000, 2), random_bytes(7_000, 3)


@pytest.fixture
def server(serve: Serve, path: Path) -> Server:
    """Start a server of OLD with --follow-name and two workers."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", "-w", "2", "-v", program=HURRIED)
    server.workers(2)
    return server


@needs_logrotate
@pytest.mark.parametrize("names", ["", "dateext"])
def test_create(server: Server, path: Path, names: str) -> None:
    """With `create`, a stream has every byte of every file, under whatever names they are kept."""
    directives = ["create", "rotate 10", names, "dateformat -%Y%m%d-%s" if names else ""]
    stream = server.connect(b"0\n")
    log = OLD
    expect(stream, OLD)
    for number in range(1, 4):
        # logrotate would skip a file whose name with the date is taken, one second long.
        eventually(lambda: not list(path.parent.glob(f"*-{int(time.time())}")))
        logrotate(path, *directives)
        server.logged(MOVED, count=number)
        data = random_bytes(50_000, number)
        append(path, data)
        expect(stream, data)
        log += data
        rotated(server, number)
    assert len(list(path.parent.glob(f"{path.name}[.-]*"))) == 3
    expect(server.connect(b"0\n"), log)


@needs_logrotate
def test_retention(server: Server, path: Path) -> None:
    """The files that logrotate deletes are not served to new clients, and all others are."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    kept = [OLD]
    for number in range(1, 6):
        logrotate(path, "create", "rotate 2")
        kept.append(random_bytes(50_000, number))
        append(path, kept[-1])
        expect(stream, kept[-1])
    # logrotate keeps two of the sealed segments.
    start = len(b"".join(kept[:-3]))
    server.logged("log begins later, segments were deleted: ", f"start={start}")
    expect(server.connect(b"0\n"), b"".join(kept[-3:]))


@needs_logrotate
def test_nocreate(server: Server, path: Path) -> None:
    """With `nocreate`, the old file is served until the writer has created the next one."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    logrotate(path, "nocreate", "rotate 3")
    server.logged(MOVED)
    expect(later := server.connect(b"0\n"), OLD)
    append(path.with_name(f"{path.name}.1"), MORE)
    for client in (stream, later):
        expect(client, MORE)
    append(path, NEW)
    for client in (stream, later):
        expect(client, NEW)


@needs_logrotate
def test_copytruncate(server: Server, path: Path) -> None:
    """With `copytruncate`, a stream that had everything continues with the new content."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    logrotate(path, "copytruncate", "rotate 3")
    server.logged("warning: file was truncated: ", "size=0 ")
    append(path, NEW)
    expect(stream, NEW)
    assert rotated(server, 1) == len(OLD)
    expect(server.connect(b"0\n"), NEW)


# A plain netcat

NETCAT = "nc.openbsd"


@contextmanager
def netcat(server: Server, output: Path) -> Iterator[None]:
    """Run netcat with the whole log as its output, until the server ends."""
    with (
        output.open("wb") as file,
        subprocess.Popen(
            [NETCAT, "127.0.0.1", str(server.port)], stdin=subprocess.PIPE, stdout=file
        ) as process,
    ):
        assert process.stdin is not None
        process.stdin.write(b"0\n")
        process.stdin.flush()
        try:
            yield
            process.stdin.close()
            process.wait(DEADLINE)
        finally:
            process.kill()


@pytest.mark.skipif(bool(missing(NETCAT)), reason=missing(NETCAT))
@pytest.mark.parametrize("awaited", [True, False], ids=["one by one", "at once"])
def test_a_hundred_rotations(serve: Serve, path: Path, awaited: bool) -> None:
    """A plain netcat that was started before the first rotation has the log, byte for byte."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", "-w", "2", "-v", program=HURRIED)
    output, expected = path.with_name("output"), OLD
    with netcat(server, output):
        await_clients(server, 1)
        for number in range(1, 101):
            data = random_bytes(1000 + number, number)
            if number % 2:
                # The writer reopens its log later.
                old = rotate_all(path)
                append(old, MORE)
                append(path, data)
                expected += MORE + data
            else:
                rotate_all(path, data)
                expected += data
            if awaited:
                rotated(server, number)
        rotated(server, 100)
        append(path, NEW)
        expected += NEW
        eventually(lambda: output.stat().st_size >= len(expected))
        server.signal(signal.SIGTERM)
    assert output.read_bytes() == expected
    assert len(server.lines(ROLLED)) == 100
