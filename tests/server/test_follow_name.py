"""--follow-name: the streams of a file that is gone end, and the next file is served."""

import os
import select
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.processes import children, open_descriptors, stop, title
from support.server import HURRIED, TAILSRV, Serve, Server, wrapper_without_rights
from support.sockets import expect, expect_eof, recv_all
from support.status import status
from support.tools import NOT_INSTALLED
from support.waiting import DEADLINE, eventually

BIG = random_bytes(20_000_000)
OLD, LATE, NEW, MORE = (
    random_bytes(300_000, 1),
    random_bytes(5_000, 2),
    random_bytes(200_000, 3),
    random_bytes(7_000, 4),
)


@pytest.fixture
def server(serve: Serve, path: Path, request: pytest.FixtureRequest) -> Server:
    """Start a server of an existing file with --follow-name; HURRIED unless a test sets another."""
    path.write_bytes(OLD)
    server = serve(
        path, "--follow-name", "-w", "2", "-v", program=getattr(request, "param", HURRIED)
    )
    server.workers(2)
    return server


# For tests that act while the server waits for the old file to settle.
without_hurry = pytest.mark.parametrize("server", [TAILSRV], indirect=True, ids=["without hurry"])


def rotate(path: Path, data: bytes = b"") -> Path:
    """Rename the file as logrotate does, create the next one, and return the old one's path."""
    old = path.with_suffix(".1")
    path.rename(old)
    path.write_bytes(data)
    return old


def test_rotation(server: Server, path: Path) -> None:
    """Streams get the rest of the old file and EOF; later clients get the next file."""
    streams = [server.connect(b"0\n") for _ in range(10)]
    for stream in streams:
        expect(stream, OLD)
    before = server.workers(2)
    rotate(path, NEW)
    for stream in streams:
        expect_eof(stream)
    later = server.connect(b"0\n")
    expect(later, NEW)
    append(path, MORE)
    expect(later, MORE)
    assert not set(before) & set(children(server.pid))


@without_hurry
def test_late_appends(server: Server, path: Path) -> None:
    """Streams include what is appended to the old file until its writer opens the next one."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    old = rotate(path)
    server.logged("switching to the next file")
    append(old, LATE)
    expect(stream, LATE)
    append(old, MORE)
    expect(stream, MORE)
    expect_eof(stream)


@pytest.mark.thorough
def test_clients_wait_between_two_files(server: Server, path: Path) -> None:
    """Clients wait for the next file, with or without a header, before and after the rotation."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    early = [server.connect() for _ in range(8)]
    eventually(lambda: "9 clients" in server.title())
    path.unlink()
    server.logged("switching to the next file")
    meanwhile = [server.connect(b"0\n") for _ in range(8)]
    expect_eof(stream)
    server.logged("waiting for file")
    eventually(lambda: server.title().endswith("[waiting for file]"))
    waiting = [server.connect(b"0\n") for _ in range(8)]
    for sock in early[::2]:
        sock.sendall(b"0\n")
    path.write_bytes(NEW)
    for sock in early[1::2]:
        sock.sendall(b"0\n")
    for sock in [*early, *meanwhile, *waiting]:
        expect(sock, NEW)


@pytest.mark.parametrize("times", [5])
def test_several_rotations(server: Server, path: Path, times: int) -> None:
    """Each of several files is streamed to its end, and no descriptor of older ones is left."""
    held = 0
    for number in range(times):
        data = random_bytes(100_000, number)
        rotate(path, data)
        server.logged("serving: ", f"size={len(data)} ", count=number + 1)
        stream = server.connect(b"0\n")
        expect(stream, data)
        eventually(lambda: status(server)["clients"] == 1)
        # From now on the supervisor keeps the previous file open, for a minute.
        if number == 1:
            held = open_descriptors(server.pid)
        append(path, LATE)
        expect(stream, LATE)
    eventually(lambda: open_descriptors(server.pid) == held)


def test_replaced_by_a_move(server: Server, path: Path) -> None:
    """A file that is renamed to the served path is the next file."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    other = path.with_suffix(".new")
    other.write_bytes(NEW)
    other.rename(path)
    expect_eof(stream)
    expect(server.connect(b"0\n"), NEW)


def test_moved_away_and_back(server: Server, path: Path) -> None:
    """If the same file is moved away and back, it is served as the next file."""
    away = path.rename(path.with_suffix(".away"))
    server.logged("waiting for file")
    away.rename(path)
    expect(server.connect(b"0\n"), OLD)


def test_a_client_that_does_not_read_is_closed_after_the_grace_period(
    serve: Serve, path: Path
) -> None:
    """A blocked client delays the next file for no longer than the grace period."""
    path.write_bytes(BIG)
    server = serve(path, "--follow-name", "--grace", "0.5", "-v")
    stalled = server.connect(b"0\n", receive_buffer=4096)
    server.streaming(stalled)
    rotate(path, NEW)
    server.logged("grace period over")
    expect(server.connect(b"0\n"), NEW)


@pytest.mark.thorough
def test_a_hung_worker_is_killed_after_the_grace_period(serve: Serve, path: Path) -> None:
    """A hung worker delays the next file only slightly longer than the grace period."""
    path.write_bytes(BIG)
    server = serve(path, "--follow-name", "--grace", "2", "-v", program=HURRIED)
    (worker,) = server.workers(1)
    # This client keeps the worker draining for the whole grace period.
    stalled = server.connect(b"0\n", receive_buffer=4096)
    server.streaming(stalled)
    rotate(path, NEW)
    server.logged("switching to the next file")
    stop(worker)
    expect(server.connect(b"0\n"), NEW)
    server.logged("worker was killed: ", f"pid={worker} ")


@without_hurry
def test_a_worker_is_killed_during_a_rotation(server: Server, path: Path) -> None:
    """If a worker dies in a rotation, its successor ends the streams at the exact byte."""
    streams = [server.connect(b"0\n") for _ in range(10)]
    for stream in streams:
        expect(stream, OLD)
    workers = server.workers(2)
    old = rotate(path, NEW)
    server.logged("switching to the next file")
    for worker in workers:
        # A worker without clients may have exited.
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    append(old, LATE)
    for stream in streams:
        # The successor checks the file at once: it may finish before the append.
        assert recv_all(stream) in (LATE, b"")
    expect(server.connect(b"0\n"), NEW)


@pytest.mark.thorough
def test_waiting_clients_are_not_served_the_old_file(serve: Serve, path: Path) -> None:
    """A worker respawned in a rotation does not serve the old file to waiting clients."""
    path.write_bytes(BIG)
    server = serve(path, "--follow-name", "--grace", "10", "-v")
    (worker,) = server.workers(1)
    early, stalled = server.connect(), server.connect(b"0\n", receive_buffer=4096)
    server.streaming(stalled)
    eventually(lambda: "2 clients" in server.title())
    rotate(path, NEW)
    server.logged("switching to the next file")
    early.sendall(b"0\n")
    os.kill(worker, signal.SIGKILL)
    server.logged("worker ready: ", count=2)
    expect(stalled, BIG)
    expect_eof(stalled)
    expect(early, NEW)


def test_waiting_clients_count_for_the_client_limit(serve: Serve, path: Path) -> None:
    """Clients that wait for the next file count for --max-clients."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", "--max-clients", "10", "-w", "4", program=HURRIED)
    server.workers(4)
    early = [server.connect() for _ in range(10)]
    eventually(lambda: "10 clients" in server.title())
    later = [server.connect(b"0\n") for _ in range(20)]
    server.logged("new clients have to wait")
    rotate(path, NEW)
    server.logged("worker ready: ", count=8)
    server.logged("new clients have to wait", count=2)
    assert status(server)["clients"] == 10
    for sock in early:
        sock.sendall(b"0\n")
        expect(sock, NEW)
    assert not select.select(later, [], [], 0)[0]


def test_the_folder_is_removed(serve: Serve, path: Path) -> None:
    """If the working directory is removed with the file in it, the server waits for the file."""
    folder = path.parent / "folder"
    folder.mkdir()
    (folder / "log").write_bytes(OLD)
    server = serve("log", "--follow-name", wrapper=("env", "-C", str(folder)), program=HURRIED)
    expect(server.connect(b"0\n"), OLD)
    shutil.rmtree(folder)
    server.logged("waiting for file")
    server.signal(signal.SIGTERM)
    server.wait()


@pytest.mark.thorough
def test_next_file_cannot_be_read_yet(serve: Serve, open_folder: Path) -> None:
    """A next file that is not readable is polled until it is, and the log says so once."""
    path = open_folder / "file.log"
    path.write_bytes(OLD)
    path.chmod(0o644)
    server = serve(path, "--follow-name", wrapper=wrapper_without_rights(), program=HURRIED)
    server.workers(1)
    path.unlink()
    server.logged("waiting for file")
    hidden = open_folder / "hidden"
    hidden.write_bytes(NEW)
    hidden.chmod(0o600)
    hidden.rename(path)
    line = server.logged("error: cannot serve the new file yet, clients wait, retrying: ")
    assert "it has mode 0600" in line
    waiting = server.connect(b"0\n")
    path.chmod(0o644)
    expect(waiting, NEW)
    assert len(server.lines("cannot serve the new file yet")) == 1


@without_hurry
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_end_during_a_rotation(server: Server, path: Path, number: signal.Signals) -> None:
    """A signal to end during a rotation ends the server with status 0."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    rotate(path, NEW)
    server.logged("switching to the next file")
    server.signal(number)
    server.wait()


def test_end_while_waiting_for_the_next(server: Server, path: Path) -> None:
    """A server that waits for the next file ends with status 0 and closes waiting clients."""
    path.unlink()
    server.logged("waiting for file")
    waiting = server.connect(b"0\n")
    server.signal(signal.SIGTERM)
    server.wait()
    expect_eof(waiting)


@pytest.mark.thorough
@without_hurry
def test_upgrade_during_a_rotation(server: Server, path: Path) -> None:
    """A HUP during a rotation takes effect after the rotation."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    rotate(path, NEW)
    server.logged("switching to the next file")
    server.signal(signal.SIGHUP)
    expect_eof(stream)
    server.logged("upgraded: ")
    later = server.connect(b"0\n")
    expect(later, NEW)
    rotate(path, MORE)
    expect_eof(later)
    expect(server.connect(b"0\n"), MORE)


@pytest.mark.thorough
def test_rotation_while_upgrading(server: Server, path: Path) -> None:
    """A rotation during an upgrade delays the upgrade, and every client is served."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    server.signal(signal.SIGHUP)
    rotate(path, NEW)
    expect_eof(stream)
    server.logged("upgraded: ")
    expect(server.connect(b"0\n"), NEW)


@pytest.mark.thorough
def test_upgrade_while_waiting_for_the_next(server: Server, path: Path) -> None:
    """An upgrade between two files keeps the waiting clients, with or without a header."""
    early = server.connect()
    eventually(lambda: "1 client]" in server.title())
    path.unlink()
    server.logged("waiting for file")
    waiting = server.connect(b"0\n")
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    path.write_bytes(NEW)
    early.sendall(b"0\n")
    expect(early, NEW)
    expect(waiting, NEW)


@without_hurry
def test_title_during_a_rotation(server: Server, path: Path) -> None:
    """While streams of the old file are ending, the supervisor's title contains `rotating`."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    eventually(lambda: "1 client]" in title(server.pid))
    rotate(path, NEW)
    eventually(lambda: "[rotating, " in title(server.pid))


def point_to_new_file(path: Path, number: int) -> None:
    """Make `path` a symbolic link to a new file."""
    target = path.with_name(f"target-{number}")
    target.write_bytes(random_bytes(1000, number))
    link = path.with_name("link")
    link.symlink_to(target)
    link.rename(path)


def test_links(serve: Serve, path: Path) -> None:
    """If the served path is a link, pointing it to another file is a rotation."""
    point_to_new_file(path, 1)
    server = serve(path, "--follow-name", program=HURRIED)
    stream = server.connect(b"0\n")
    expect(stream, random_bytes(1000, 1))
    point_to_new_file(path, 2)
    expect_eof(stream)
    expect(server.connect(b"0\n"), random_bytes(1000, 2))


# It is gone, restored, and gone again


def await_reaction(path: Path, stream: socket.socket) -> None:
    """Wait until the worker has handled all changes so far: each append requires a turn."""
    for _ in range(5):
        append(path, LATE)
        expect(stream, LATE)


def test_gone_restored_and_gone(serve: Serve, path: Path) -> None:
    """A file that is restored before the supervisor checks, and gone again, counts as gone."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", program=HURRIED)
    (worker,) = server.workers(1)
    expect(stream := server.connect(b"0\n"), OLD)
    stop(server.pid)
    away = path.rename(path.with_suffix(".away"))
    await_reaction(away, stream)
    stop(worker)
    away.rename(path)
    server.signal(signal.SIGCONT)
    assert status(server)["file"]["gone"] is False
    path.rename(away)
    os.kill(worker, signal.SIGCONT)
    server.logged("file is gone")


def test_link_gone_restored_and_gone(serve: Serve, path: Path) -> None:
    """A link that is removed, restored and removed again counts as gone."""
    path.write_bytes(OLD)
    (link := path.with_name("link")).symlink_to(path)
    server = serve(link, "--follow-name", program=HURRIED)
    server.workers(1)
    expect(stream := server.connect(b"0\n"), OLD)
    stop(server.pid)
    link.unlink()
    await_reaction(path, stream)
    link.symlink_to(path)
    server.signal(signal.SIGCONT)
    assert status(server)["file"]["gone"] is False
    link.unlink()
    server.logged("file is gone")


# The real logrotate

LOGROTATE = shutil.which("logrotate") or "/usr/sbin/logrotate"
needs_logrotate = pytest.mark.skipif(
    not Path(LOGROTATE).exists(), reason=f"{NOT_INSTALLED}logrotate"
)


def logrotate(path: Path, *directives: str) -> None:
    """Rotate `path` with the real logrotate."""
    config, state = path.with_name("logrotate.conf"), path.with_name("logrotate.state")
    config.write_text(
        "\n".join(
            [
                f"{path} {{",
                "su root root" if os.getuid() == 0 else "",
                "rotate 3",
                *directives,
                "}",
                "",
            ]
        )
    )
    config.chmod(0o644)
    done = subprocess.run(
        [LOGROTATE, "--force", "--state", state, config],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
@needs_logrotate
def test_logrotate_create(server: Server, path: Path) -> None:
    """With `create`, every byte of every file arrives, also of the files that logrotate creates."""
    data = OLD
    for number in range(3):
        stream: socket.socket = server.connect(b"0\n")
        expect(stream, data)
        logrotate(path, "create")
        expect_eof(stream)
        data = random_bytes(50_000, 10 + number)
        append(path, data)


@needs_logrotate
def test_logrotate_nocreate(server: Server, path: Path) -> None:
    """With `nocreate`, clients wait until the writer has created the next file."""
    logrotate(path, "nocreate")
    server.logged("waiting for file")
    waiting = server.connect(b"0\n")
    append(path, NEW)
    expect(waiting, NEW)


@needs_logrotate
def test_logrotate_copytruncate(server: Server, path: Path) -> None:
    """With `copytruncate`, clients get nothing until the file is longer than their position."""
    stream = server.connect(b"0\n")
    expect(stream, OLD)
    logrotate(path, "copytruncate")
    server.logged("warning: file was truncated, ", "size=0")
    append(path, OLD[:1000])
    later = server.connect(b"0\n")
    expect(later, OLD[:1000])
    append(path, OLD[1000:] + MORE)
    expect(stream, MORE)
    assert not server.lines("switching to the next")
