"""--follow-name: a rotation is no event for a client. Which file is the next, and when to roll."""

import os
import shutil
import signal
import socket
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.processes import as_root, stop
from support.rotation import (
    HOUR,
    LATE_BYTES,
    MOVED,
    ROLLED,
    await_gone,
    held_files,
    move_away,
    replace,
    rotate,
    rotated,
    sealed_sizes,
)
from support.server import HURRIED, Serve, Server, hurried, timed, wrapper_without_rights
from support.sockets import expect, expect_eof, readable
from support.status import status
from support.waiting import eventually
from tailsrv.linux.files import has_writers

OLD, LATE, NEW, MORE = (
    random_bytes(300_000, 1),
    random_bytes(5_000, 2),
    random_bytes(200_000, 3),
    random_bytes(7_000, 4),
)


@pytest.fixture
def server(serve: Serve, path: Path, request: pytest.FixtureRequest) -> Server:
    """Start a server of OLD with --follow-name; HURRIED unless a test sets another."""
    path.write_bytes(OLD)
    server = serve(
        path, "--follow-name", "-w", "2", "-v", program=getattr(request, "param", HURRIED)
    )
    server.workers(2)
    return server


def with_timing(**timing: float) -> pytest.MarkDecorator:
    """Mark a test whose server has this timing."""
    name = " ".join(f"{name}={seconds:g}" for name, seconds in timing.items())
    return pytest.mark.parametrize("server", [hurried(**timing)], indirect=True, ids=[name])


# Only a lease can tell such a server when to roll: it does not wait for a file to be quiet.
only_by_lease = with_timing(settle=HOUR, seal_limit=HOUR)

# A file that a process has open for writing is sealed soon after the next one has a byte.
only_by_limit = with_timing(settle=HOUR, seal_limit=0.5)


@pytest.fixture
def needs_leases(path: Path) -> None:
    """Skip a test where the file system of `path` has no leases."""
    with path.with_name("other").open("wb") as writer, open(writer.name, "rb") as reader:
        if has_writers(reader.fileno()) is None:
            pytest.skip("no leases here")


def expect_each(streams: list[socket.socket], data: bytes) -> None:
    """Assert that each of `streams` continues with `data`."""
    for stream in streams:
        expect(stream, data)


# The ways in which a file gets its successor


def by_name(path: Path, data: bytes) -> None:
    """Rename the file, then create the next one, as logrotate does."""
    rotate(path, data)


def by_link(path: Path, data: bytes) -> None:
    """Make the path, which may be a link already, a link to another file."""
    number = len(list(path.parent.glob("target-*")))
    (target := path.with_name(f"target-{number}")).write_bytes(data)
    (link := path.with_name("link")).symlink_to(target)
    link.rename(path)


def by_folder(path: Path, data: bytes) -> None:
    """Move the folder away, and make another one."""
    number = len(list(path.parent.parent.iterdir()))
    path.parent.rename(path.parent.with_name(f"folder-{number}"))
    path.parent.mkdir()
    path.write_bytes(data)


def by_deletion(path: Path, data: bytes) -> None:
    """Delete the file, and create another one."""
    path.unlink()
    path.write_bytes(data)


def empty_first(path: Path, data: bytes) -> None:
    """Rename the file, create the next one without a byte, and write to it later."""
    rotate(path)
    append(path, data)


@pytest.mark.parametrize("way", [by_name, by_link, by_folder, by_deletion, replace, empty_first])
def test_rotation(serve: Serve, path: Path, way: Callable[[Path, bytes], None]) -> None:
    """Streams go on with the next file, in the same workers, however it gets its name."""
    (folder := path.with_name("folder")).mkdir()
    path = folder / path.name
    way(path, OLD) if way is by_link else path.write_bytes(OLD)
    server = serve(path, "--follow-name", "-w", "2", "-v", program=HURRIED)
    workers = server.workers(2)
    streams = [server.connect(b"0\n") for _ in range(10)]
    expect_each(streams, OLD)
    for number in range(1, 4):
        data = random_bytes(100_000, number)
        way(path, data)
        expect_each(streams, data)
        rotated(server, number)
        append(path, MORE)
        expect_each(streams, MORE)
    assert server.workers(2) == workers
    assert status(server)["clients"] == 10


def test_next_file_without_a_byte(server: Server, path: Path) -> None:
    """As long as the next file is empty, the old one stays active. The first byte rolls."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    old = rotate(path)
    server.logged(MOVED)
    for data in (LATE, MORE):
        append(old, data)
        expect(stream, data)
    expect(server.connect(b"0\n"), OLD + LATE + MORE)
    assert not server.lines(ROLLED)
    append(path, NEW[:1])
    expect(stream, NEW[:1])
    append(path, NEW[1:])
    expect(stream, NEW[1:])


def test_change_that_is_noticed_late(serve: Serve, path: Path) -> None:
    """An append to the old file arrives also if it is noticed when the file is quiet again."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", "-v", program=hurried(settle=0.0))
    expect(stream := server.connect(b"0\n"), OLD)
    old = rotate(path)
    server.logged(MOVED)
    for data in (LATE, MORE):
        append(old, data)
        expect(stream, data)
    assert not server.lines(ROLLED)


def test_next_file_without_a_byte_is_moved_away(server: Server, path: Path) -> None:
    """If there is no file after an empty one, the one that comes at last is served."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    rotate(path)
    server.logged(MOVED)
    move_away(path)
    eventually(lambda: status(server)["file"]["missing"] is not None)
    path.write_bytes(NEW)
    expect(stream, NEW)


@with_timing(settle=HOUR, seal_limit=HOUR)
def test_next_files_are_opened_while_the_writer_is_awaited(server: Server, path: Path) -> None:
    """Each next file is opened at once: it may be compressed before the log gets to it."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    with path.open("ab", buffering=0) as writer:
        rotate(path, NEW)
        for data in (MORE, LATE):
            eventually(lambda: str(path) in held_files([server.pid], path))
            move_away(path)
            # The second answer comes after the supervisor has noticed the move.
            status(server)
            status(server)
            path.write_bytes(data)
        eventually(lambda: str(path) in held_files([server.pid], path))
        writer.write(LATE)
        expect(stream, LATE)
    expect(stream, NEW + MORE + LATE)


def test_no_next_file(server: Server, path: Path) -> None:
    """As long as there is no next file, the old one is served, also to new clients."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    with path.open("ab", buffering=0) as writer:
        path.unlink()
        server.logged(MOVED)
        writer.write(LATE)
        expect(stream, LATE)
        expect(later := server.connect(b"0\n"), OLD + LATE)
        from_end = server.connect(b"-0\n")
        server.streaming(from_end)
        writer.write(MORE)
        expect_each([stream, later, from_end], MORE)
    assert not server.lines(ROLLED)
    path.write_bytes(NEW)
    expect_each([stream, later, from_end], NEW)


def test_no_folder(serve: Serve, path: Path) -> None:
    """If the working directory is removed with the file in it, its content is served."""
    (folder := path.with_name("folder")).mkdir()
    (folder / "log").write_bytes(OLD)
    server = serve("log", "--follow-name", wrapper=("env", "-C", str(folder)), program=HURRIED)
    expect(server.connect(b"0\n"), OLD)
    shutil.rmtree(folder)
    server.logged(MOVED)
    expect(server.connect(b"0\n"), OLD)


def test_moved_away_and_back(server: Server, path: Path) -> None:
    """If the file is moved away and back, nothing happens, and a later rotation rolls."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    away = path.rename(path.with_suffix(".away"))
    server.logged(MOVED)
    append(away, LATE)
    expect(stream, LATE)
    away.rename(path)
    await_gone(server, gone=False)
    append(path, MORE)
    expect(stream, MORE)
    assert not server.lines(ROLLED)
    rotate(path, NEW)
    expect(stream, NEW)
    server.logged(MOVED, count=2)


def test_moved_back_over_the_next_file(server: Server, path: Path) -> None:
    """If the file replaces a successor without a byte, that one is not served."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    with path.open("ab", buffering=0) as writer:
        old = rotate(path)
        server.logged(MOVED)
        old.rename(path)
        await_gone(server, gone=False)
        writer.write(LATE)
        expect(stream, LATE)
    assert not server.lines(ROLLED)
    rotate(path, NEW)
    expect(stream, NEW)
    rotated(server, 1)


def test_link_moved_away_and_back(serve: Serve, path: Path) -> None:
    """If a link is removed and restored, nothing happens, and the link's next target rolls."""
    by_link(path, OLD)
    server = serve(path, "--follow-name", "-v", program=HURRIED)
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    target = path.readlink()
    path.unlink()
    await_gone(server, gone=True)
    path.symlink_to(target)
    await_gone(server, gone=False)
    append(target, LATE)
    expect(stream, LATE)
    assert not server.lines(ROLLED)
    by_link(path, NEW)
    expect(stream, NEW)


def test_link_restored_before_the_supervisor_looks(serve: Serve, path: Path) -> None:
    """If only a worker has seen that a link was gone, the link's next target still rolls."""
    by_link(path, OLD)
    server = serve(path, "--follow-name", "-v", program=HURRIED)
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    target = path.readlink()
    stop(server.pid)
    path.unlink()
    for _ in range(2):
        # The second one is delivered after the worker has looked at the path.
        append(target, LATE)
        expect(stream, LATE)
    path.symlink_to(target)
    server.signal(signal.SIGCONT)
    append(target, MORE)
    expect(stream, MORE)
    # The first answer may come in the middle of the supervisor's turn.
    for _ in range(2):
        assert status(server)["file"]["gone"] is False
    by_link(path, NEW)
    expect(stream, NEW)


def test_restored_while_the_supervisor_is_stopped(server: Server, path: Path) -> None:
    """A file that is back before the supervisor looks is not gone, and can be gone later."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    stop(server.pid)
    away = path.rename(path.with_suffix(".away"))
    append(away, LATE)
    expect(stream, LATE)
    away.rename(path)
    server.signal(signal.SIGCONT)
    append(path, MORE)
    expect(stream, MORE)
    assert status(server)["file"]["gone"] is False
    assert not server.lines(ROLLED)
    rotate(path, NEW)
    expect(stream, NEW)


# When to seal


@only_by_lease
@pytest.mark.usefixtures("needs_leases")
def test_lease(server: Server, path: Path) -> None:
    """A file that no process can write to any more is sealed at once."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    append(path, LATE)
    old = rotate(path, NEW)
    expect(stream, LATE + NEW)
    assert rotated(server, 1) == old.stat().st_size


@only_by_lease
@pytest.mark.usefixtures("needs_leases")
def test_lease_while_the_writer_has_the_old_file(server: Server, path: Path) -> None:
    """A file that a process has open for writing is not sealed before it is closed."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    with path.open("ab", buffering=0) as writer:
        rotate(path, NEW)
        server.logged(MOVED)
        # The answer comes after the supervisor has decided whether to roll.
        assert status(server)["file"]["gone"]
        for data in (LATE, MORE):
            writer.write(data)
            expect(stream, data)
        assert not server.lines(ROLLED)
    expect(stream, NEW)


@pytest.mark.parametrize("settles", [True, False])
def test_without_a_lease(serve: Serve, open_folder: Path, settles: bool) -> None:
    """Without the right to take a lease, the file is sealed when it has been quiet for a time."""
    if not as_root:
        pytest.skip("the owner of the file may take a lease")
    (path := open_folder / "file.log").write_bytes(OLD)
    path.chmod(0o644)
    server = serve(
        path,
        "--follow-name",
        "-v",
        wrapper=(
            *timed(settle=0.4 if settles else HOUR, seal_limit=HOUR),
            *wrapper_without_rights(),
        ),
        program=HURRIED,
    )
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    append(path, LATE)
    old = rotate(path, NEW)
    expect(stream, LATE)
    if settles:
        expect(stream, NEW)
    else:
        server.logged(MOVED)
        assert status(server)["file"]["gone"]
        append(old, MORE)
        expect(stream, MORE)
        assert not server.lines(ROLLED)


@only_by_limit
def test_busy_old_files(server: Server, path: Path) -> None:
    """A file that is appended to without end is sealed after a time; its late bytes are logged."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    expected, late = bytearray(), []
    for number in (1, 2):
        with path.open("ab", buffering=0) as writer:
            old = rotate(path, NEW)

            def write(writer: FileIO = writer, number: int = number) -> bool:
                writer.write(LATE)
                return len(server.lines(ROLLED)) == number

            eventually(write)
            # This is the last change of the old file.
            writer.write(MORE)
        sealed = sealed_sizes(server)[-1]
        expected += old.read_bytes()[:sealed]
        late.append(old.stat().st_size - sealed)
        line = server.logged(f"warning: {LATE_BYTES}", count=number)
        assert f" bytes={late[-1]} " in line
    expect(stream, bytes(expected)[len(OLD) :] + NEW)
    assert late[0] >= len(MORE)
    assert len(server.lines(LATE_BYTES)) == 2
    # The late bytes of neither file follow.
    append(path, LATE)
    expect(stream, LATE)


@with_timing(settle=0.1, seal_limit=HOUR)
def test_quiet_old_file_with_a_writer(server: Server, path: Path) -> None:
    """A file that a process has open for writing is sealed when it has been quiet for a time."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    with path.open("ab", buffering=0) as writer:
        writer.write(LATE)
        rotate(path, NEW)
        expect(stream, LATE + NEW)
        writer.write(MORE)
        server.logged(f"warning: {LATE_BYTES}", f" bytes={len(MORE)} ")
    append(path, LATE)
    expect(stream, LATE)


@with_timing(late_patience=0.2, late_interval=0.05)
def test_no_late_bytes(server: Server, path: Path) -> None:
    """Without late bytes, there is no warning."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    old = rotate(path, NEW)
    expect(stream, NEW)
    rotate(path, MORE)
    expect(stream, MORE)
    # After this append to the second file, the first one has been polled for long enough.
    append(path.with_name(path.name + ".2"), LATE)
    server.logged(LATE_BYTES, f" bytes={len(LATE)} ")
    assert len(server.lines(LATE_BYTES)) == 1
    assert old.read_bytes() == OLD


@with_timing(late_interval=0.05)
def test_late_bytes_around_an_upgrade(server: Server, path: Path) -> None:
    """Late bytes are counted through an upgrade, also those of a file that is not in the log."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    first = rotate(path, b"")
    # The second file is empty when it is sealed.
    second = rotate(path, NEW)
    expect(stream, NEW)
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    append(first, LATE)
    append(second, MORE)
    server.logged(LATE_BYTES, f" bytes={len(LATE)} ")
    server.logged(LATE_BYTES, f" bytes={len(MORE)} ")
    # The second file is not mistaken for a new one.
    rotate(path, b"next")
    expect(stream, b"next")
    assert len(server.lines(LATE_BYTES)) == 2


@pytest.mark.parametrize("late", [True, False])
def test_file_that_was_rotated_before_the_start(serve: Serve, path: Path, late: bool) -> None:
    """It never becomes part of the log, although it is changed after the first file of the log."""
    path.write_bytes(OLD)
    path.with_name(f"{path.name}.7").write_bytes(MORE)
    timing = {"late_interval": 0.05, "late_patience": HOUR if late else 3.0}
    server = serve(path, "--follow-name", program=hurried(**timing))
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    append(path.with_name(f"{path.name}.7"), LATE)
    server.logged(LATE_BYTES, f" bytes={len(LATE)} ")
    # It is kept open for a while, so that it is recognized, and later by its modification time.
    eventually(lambda: len(held_files([server.pid], path)) == (2 if late else 1))
    rotate(path, NEW)
    expect(stream, NEW)
    assert status(server)["log"]["end"] == len(OLD + NEW)


# The next file cannot be served


def folder_at(path: Path) -> None:
    """Make a folder at `path`."""
    path.mkdir()


@pytest.mark.parametrize("make", [folder_at, os.mkfifo])
def test_next_file_is_no_file(server: Server, path: Path, make: Callable[[Path], None]) -> None:
    """If the path names something else, the old file is served, and the log says so once."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    old = move_away(path)
    make(path)
    server.logged("error: cannot serve the next file yet, retrying: ", "not a regular file")
    assert status(server)["file"]["error"] == "not a regular file"
    append(old, LATE)
    expect(stream, LATE)
    path.rename(path.with_suffix(".odd"))
    path.write_bytes(NEW)
    expect(stream, NEW)
    assert len(server.lines("cannot serve the next file yet")) == 1
    assert status(server)["file"]["error"] is None


def test_next_file_cannot_be_read_yet(serve: Serve, open_folder: Path) -> None:
    """A next file that is not readable is polled until it is, and the log says so once."""
    (path := open_folder / "file.log").write_bytes(OLD)
    path.chmod(0o644)
    server = serve(path, "--follow-name", "-v", wrapper=wrapper_without_rights(), program=HURRIED)
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    (hidden := open_folder / "hidden").write_bytes(NEW)
    hidden.chmod(0o600)
    old = move_away(path)
    hidden.rename(path)
    line = server.logged("error: cannot serve the next file yet, retrying: ")
    assert "it has mode 0600" in line
    append(old, LATE)
    expect(stream, LATE)
    expect(later := server.connect(b"0\n"), OLD + LATE)
    path.chmod(0o644)
    expect_each([stream, later], NEW)
    assert len(server.lines("cannot serve the next file yet")) == 1


# The end


# So that the workers do not agree on the size before the old file grows.
@with_timing(settle=HOUR)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_end_before_a_roll(server: Server, path: Path, number: signal.Signals) -> None:
    """A signal ends a server that waits for the next file's first byte, with status 0."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    old = rotate(path)
    server.logged(MOVED)
    stop(server.pid)
    workers = server.workers(2)
    for worker in workers:
        stop(worker)
    append(old, LATE)
    server.signal(number)
    for pid in (*workers, server.pid):
        os.kill(pid, signal.SIGCONT)
    if number is signal.SIGTERM:
        expect(stream, LATE)
        expect_eof(stream)
    server.wait()


def test_client_limit(serve: Serve, path: Path) -> None:
    """--max-clients counts the same clients across rolls, and a later one gets the whole log."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", "--max-clients", "4", "-w", "2", program=HURRIED)
    server.workers(2)
    streams = [server.connect(b"0\n") for _ in range(4)]
    expect_each(streams, OLD)
    later = server.connect(b"0\n")
    server.logged("new clients have to wait")
    for _ in range(2):
        rotate(path, NEW)
        expect_each(streams, NEW)
    assert status(server)["clients"] == 4
    assert not readable(later)
    streams.pop().close()

    def admitted() -> bool:
        # A server notices a closed connection when it sends to it.
        append(path, b"x")
        return readable(later)

    eventually(admitted)
    expect(later, OLD + NEW + NEW)
