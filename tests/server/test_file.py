"""Changes of the served file (append, truncate, move, delete, replace) and their effect."""

import fcntl
import json
import os
import signal
import socket
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.processes import cpu_seconds, runs
from support.rotation import ROLLED
from support.server import HURRIED, Serve, run_tailsrv, wrapper_without_rights
from support.sockets import expect, expect_eof, recv_exactly
from support.status import ask
from support.waiting import DEADLINE

DATA = random_bytes(1000)
APPENDED = b"appended at the end"

NO_INOTIFY = (
    "unshare",
    "--user",
    "--map-root-user",
    "sh",
    "-c",
    'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"',
    "sh",
)


def refused(port: int) -> bool:
    """Return whether connections to `port` are refused."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


# It does not exist at the start


@pytest.mark.slow
def test_appears_later(serve: Serve, path: Path) -> None:
    """Clients that connect before the file exists wait, and are served when it exists."""
    server = serve(path, "-w", "2", program=HURRIED)
    server.logged("info: waiting for file: ", f"path={path}")
    clients = [server.connect(b"%d\n" % start) for start in range(0, 1000, 100)]
    silent = server.connect()
    path.write_bytes(DATA)
    for start, client in zip(range(0, 1000, 100), clients, strict=True):
        expect(client, DATA[start:])
    silent.sendall(b"-0\n")
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)
    assert len(server.lines("waiting for file")) == 1


@pytest.mark.slow
def test_appears_later_as_the_target_of_a_link(serve: Serve, path: Path, tmp_path: Path) -> None:
    """A dangling link to a folder that does not exist is a file that does not exist yet."""
    target = tmp_path / "folder" / "target"
    path.symlink_to(target)
    server = serve(path, program=HURRIED)
    client = server.connect(b"0\n")
    server.logged("waiting for file")
    target.parent.mkdir()
    target.write_bytes(DATA)
    expect(client, DATA)


# It is not a regular file, or not readable


def make_odd(path: Path, kind: str) -> None:
    """Create something at `path` that is not a regular file."""
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to(os.devnull)
        case "socket":
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))


ODD_KINDS = ["folder", "fifo", "device", "socket"]


@pytest.mark.parametrize("kind", ODD_KINDS)
def test_not_a_regular_file(path: Path, kind: str) -> None:
    """If the path is not a regular file, the server exits with status 1 and one line."""
    make_odd(path, kind)
    ended = run_tailsrv("-p", "0", path)
    (line,) = ended.stderr.splitlines()
    assert line.endswith(f"critical: cannot serve: path={path} reason='not a regular file'")
    assert (ended.returncode, ended.stdout) == (1, "")


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ODD_KINDS)
def test_appears_later_and_is_not_a_regular_file(serve: Serve, path: Path, kind: str) -> None:
    """If what appears at the path is not a regular file, the waiting server exits: status 1."""
    server = serve(path, status=1, program=HURRIED)
    client = server.connect(b"0\n")
    server.logged("waiting for file")
    make_odd(path, kind)
    server.wait()
    assert (
        len(server.lines(f"critical: cannot serve: path={path} reason='not a regular file'")) == 1
    )
    # The client was still in the accept queue, so the kernel resets it.
    with pytest.raises(ConnectionResetError):
        client.recv(1)


@pytest.mark.thorough
@pytest.mark.slow
def test_unreadable(open_folder: Path) -> None:
    """If the file is not readable, the server exits with status 1 and one line."""
    wrapper, path = wrapper_without_rights(), open_folder / "file.log"
    path.write_bytes(DATA)
    path.chmod(0)
    ended = run_tailsrv("-p", "0", path, wrapper=wrapper)
    (line,) = ended.stderr.splitlines()
    assert (
        f"critical: cannot serve: path={path} reason='Permission denied; "
        "it has mode 0000, user 0 and group 0, and tailsrv runs as " in line
    )
    assert (ended.returncode, ended.stdout) == (1, "")


@pytest.mark.thorough
@pytest.mark.slow
def test_appears_later_and_is_unreadable(serve: Serve, open_folder: Path) -> None:
    """If the file that appears is not readable, the waiting server exits with status 1."""
    path, hidden = open_folder / "file.log", open_folder / "hidden"
    server = serve(path, status=1, wrapper=wrapper_without_rights(), program=HURRIED)
    server.logged("waiting for file")
    hidden.touch()
    hidden.chmod(0)
    hidden.rename(path)
    server.wait()
    assert (
        len(
            server.lines(
                f"critical: cannot serve: path={path} reason='Permission denied; it has mode 0000, "
            )
        )
        == 1
    )


# Another program has a lease on it


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """Hold a lease on a file, as Samba does: open(2) then fails with EWOULDBLOCK."""
    # The kernel asks with SIGIO to give up the lease.
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with path.open("rb+") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            yield
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        signal.signal(signal.SIGIO, before)


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", [(), ("--follow-name",)])
def test_lease_at_start(serve: Serve, path: Path, options: tuple[str, ...]) -> None:
    """A server waits for a file that is leased at the start, and logs that once."""
    path.write_bytes(DATA)
    with leased(path):
        server = serve(path, *options, program=HURRIED)
        server.logged("warning: another program has a lease on the file", f"path={path}")
        client = server.connect(b"0\n")
        server.logged("waiting for file")
    expect(client, DATA)
    assert len(server.lines("has a lease")) == 1


def test_lease_on_the_next_file(serve: Serve, path: Path) -> None:
    """A server waits for a leased next file as well, without an error in the status."""
    path.write_bytes(DATA)
    server = serve(path, "--follow-name", program=HURRIED)
    expect(client := server.connect(b"0\n"), DATA)
    (fresh := path.with_suffix(".new")).write_bytes(APPENDED)
    with leased(fresh):
        fresh.rename(path)
        server.logged("warning: another program has a lease on the file")
        assert json.loads(ask(f"*:{server.port}")[0])["file"]["error"] is None
        expect(server.connect(b"0\n"), DATA)
        assert not server.lines(ROLLED)
    expect(client, APPENDED)
    assert not server.lines("cannot serve")


# It grows


def test_grows(serve: Serve, path: Path) -> None:
    """Every caught-up client gets each append, whatever its size."""
    path.touch()
    server = serve(path, "-w", "2")
    clients = [server.connect(b"0\n") for _ in range(20)]
    for turn, size in enumerate(
        [1, 10, 100, 4095, 4096, 4097, 65536, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20, 1]
    ):
        append(path, data := random_bytes(size, turn))
        for client in clients:
            expect(client, data)


def test_written_in_other_ways(serve: Serve, path: Path) -> None:
    """Growth by truncate(2), a write beyond the end or fallocate(2) is sent; holes are zeros."""
    path.write_bytes(DATA)
    server = serve(path)
    client = server.connect(b"0\n")
    expect(client, DATA)
    os.truncate(path, 1500)
    expect(client, bytes(500))
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"beyond the end", 2000)
        expect(client, bytes(500) + b"beyond the end")
        os.posix_fallocate(file.fileno(), 2014, 86)
        expect(client, bytes(86))


def test_changed_in_the_middle(serve: Serve, path: Path) -> None:
    """A change before a client's position sends nothing; the client gets the next append."""
    path.write_bytes(DATA)
    server = serve(path)
    client = server.connect(b"0\n")
    expect(client, DATA)
    with path.open("r+b", buffering=0) as file:
        file.write(b"changed")
        expect(server.connect(b"0\n"), b"changed" + DATA[7:])
    append(path, APPENDED)
    expect(client, APPENDED)


# It is gone


def delete(path: Path) -> None:
    path.unlink()


def move_away(path: Path) -> None:
    path.rename(path.with_suffix(".old"))


def replace(path: Path) -> None:
    (new := path.with_suffix(".new")).write_bytes(b"another file")
    new.rename(path)


def move_away_and_create(path: Path) -> None:
    move_away(path)
    path.write_bytes(b"another file")


def keep_a_hard_link_and_delete(path: Path) -> None:
    path.with_suffix(".kept").hardlink_to(path)
    path.unlink()


def retarget_link(path: Path) -> None:
    (other := path.with_suffix(".other")).write_bytes(b"another file")
    (new := path.with_suffix(".new")).symlink_to(other)
    new.rename(path)


def delete_link(path: Path) -> None:
    path.unlink()


def move_target(path: Path) -> None:
    target = path.resolve()
    target.rename(target.with_suffix(".old"))


def move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_suffix(".old"))


Action = Callable[[Path], None]
REMOVALS: list[Action] = [
    delete,
    move_away,
    replace,
    move_away_and_create,
    keep_a_hard_link_and_delete,
    move_folder,
]
LINK_REMOVALS: list[Action] = [retarget_link, delete_link, move_target]


@pytest.fixture(params=[*REMOVALS, *LINK_REMOVALS], ids=lambda action: action.__name__)
def remove(request: pytest.FixtureRequest) -> Action:
    """Return a function after which the path does not name the served file."""
    action: Action = request.param
    return action


@pytest.fixture
def served(tmp_path: Path, remove: Action) -> Path:
    """Return a path to serve that suits `remove`."""
    (folder := tmp_path / "folder").mkdir()
    path = folder / "file.log"
    if remove in LINK_REMOVALS:
        (folder / "target").touch()
        path.symlink_to("target")
    return path


@pytest.mark.sample(2)
@pytest.mark.slow
def test_gone(serve: Serve, served: Path, remove: Action) -> None:
    """If the file is gone, every client gets the rest of it, and the server ends: status 0."""
    data = random_bytes(8 << 20)
    served.write_bytes(data)
    server = serve(served, "-w", "2", "--grace", "60")
    caught_up, behind = (
        server.connect(b"%d\n" % (len(data) - 10)),
        server.connect(b"0\n", receive_buffer=4096),
    )
    headerless = server.connect()
    expect(caught_up, data[-10:])
    expect(behind, data[:10])
    append(served, APPENDED)
    remove(served)
    expect(caught_up, APPENDED)
    expect_eof(caught_up)
    expect_eof(headerless)
    expect(behind, data[10:] + APPENDED)
    expect_eof(behind)
    server.wait()
    assert len(server.lines("warning: file is gone, draining: ")) == 1
    assert refused(server.port)


@pytest.mark.sample(3)
def test_gone_without_clients(serve: Serve, served: Path, remove: Action) -> None:
    """A server without clients also notices that its file is gone, and ends."""
    served.write_bytes(DATA)
    server = serve(served)
    server.workers(1)
    remove(served)
    server.wait()


@pytest.mark.sample(3)
@pytest.mark.slow
def test_linger(serve: Serve, served: Path, remove: Action) -> None:
    """With --linger-after-file-is-gone, old and new clients are served from the open file."""
    served.write_bytes(DATA)
    server = serve(served, "-w", "2", "--linger-after-file-is-gone")
    server.workers(2)
    client = server.connect(b"0\n")
    expect(client, DATA)
    with served.open("ab", buffering=0) as writer:
        remove(served)
        server.logged("warning: file is gone, continuing to serve the open file: ")
        late = server.connect(b"0\n")
        expect(late, DATA)
        writer.write(APPENDED)
        expect(client, APPENDED)
        expect(late, APPENDED)
    server.process.terminate()
    expect_eof(client)
    expect_eof(late)
    server.wait()
    assert len(server.lines("file is gone")) == 1


def add_hard_link(path: Path) -> None:
    path.with_suffix(".link").hardlink_to(path)


def add_and_remove_hard_link(path: Path) -> None:
    add_hard_link(path)
    path.with_suffix(".link").unlink()


def change_mode(path: Path) -> None:
    path.chmod(0o600)


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def make_other_files(path: Path) -> None:
    (other := path.with_suffix(".other")).write_bytes(b"another file")
    other.rename(path.with_suffix(".moved"))
    path.with_suffix(".moved").unlink()


def replace_by_link_to_same_inode(path: Path) -> None:
    (kept := path.with_suffix(".kept")).hardlink_to(path)
    (link := path.with_suffix(".link")).symlink_to(kept)
    link.rename(path)


HARMLESS: list[Action] = [
    add_hard_link,
    add_and_remove_hard_link,
    change_mode,
    touch,
    make_other_files,
    replace_by_link_to_same_inode,
]


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize("action", HARMLESS, ids=lambda action: str(action.__name__))
def test_not_gone(serve: Serve, path: Path, action: Action) -> None:
    """A change after which the path names the same inode does not make the file gone."""
    path.write_bytes(DATA)
    server = serve(path)
    (worker,) = server.workers(1)
    client = server.connect(b"0\n")
    expect(client, DATA)
    action(path)
    append(path, APPENDED)
    expect(client, APPENDED)
    late = server.connect(b"-%d\n" % len(APPENDED))
    expect(late, APPENDED)
    append(path, APPENDED)
    expect(late, APPENDED)
    # By now the worker would have reported that the file is gone.
    assert json.loads(ask(f"*:{server.port}")[0])["file"]["gone"] is False
    assert server.lines("file is gone") == []
    assert server.workers(1) == [worker]
    path.resolve().unlink()
    expect(client, APPENDED)
    expect_eof(client)
    server.wait()


# It is truncated


@pytest.mark.slow
def test_truncated(serve: Serve, path: Path) -> None:
    """A client beyond the new end waits until the file is longer than its position again."""
    path.write_bytes(DATA)
    server = serve(path)
    beyond, far_beyond = server.connect(b"0\n"), server.connect(b"1400\n")
    expect(beyond, DATA)
    os.truncate(path, 400)
    server.logged("warning: file was truncated, ", f"path={path}", "size=400")
    before = server.connect(b"300\n")
    expect(before, DATA[300:400])
    grown = DATA[:400] + random_bytes(1600, 7)
    for end in (500, 999, 1000, 1001, 1500, 2000):
        append(path, data := grown[path.stat().st_size : end])
        expect(before, data)
    expect(beyond, grown[1000:])
    expect(far_beyond, grown[1400:])
    append(path, APPENDED)
    for client in (beyond, far_beyond, before):
        expect(client, APPENDED)


@pytest.mark.thorough
@pytest.mark.slow
def test_truncated_under_a_client_that_is_behind(serve: Serve, path: Path) -> None:
    """If a file shrinks while it is sent, the worker neither dies nor spins; the stream resumes."""
    old, new = random_bytes(16 << 20, 1), random_bytes(16 << 20, 2)
    path.write_bytes(old)
    server = serve(path)
    (worker,) = server.workers(1)
    behind = server.connect(b"0\n", receive_buffer=4096)
    expect(behind, old[:10])
    os.truncate(path, 0)
    server.logged("file was truncated, ", "size=0")
    received, busy = bytearray(old[:10]), cpu_seconds(worker)
    # The client gets what the kernel has buffered, and then nothing until the timeout.
    with suppress(TimeoutError):
        behind.settimeout(1)
        while some := behind.recv(1 << 20):
            received += some
    assert cpu_seconds(worker) - busy < 0.2
    before = server.connect(b"0\n")
    append(path, new)
    expect(before, new)
    behind.settimeout(DEADLINE)
    received += recv_exactly(behind, len(new) - len(received))
    switch = bisect_left(range(len(old)), True, key=lambda end: received[:end] != old[:end]) - 1
    assert received[switch:] == new[switch:]
    assert server.workers(1) == [worker]


@pytest.mark.slow
def test_truncated_and_refilled(serve: Serve, path: Path) -> None:
    """A truncation and a write at once, as by copytruncate, leave every client's position."""
    path.write_bytes(DATA)
    server = serve(path)
    client = server.connect(b"0\n")
    expect(client, DATA)
    with path.open("wb", buffering=0) as file:
        file.write(APPENDED)
    late = server.connect(b"0\n")
    expect(late, APPENDED)
    append(path, DATA)
    append(path, DATA)
    expect(client, (APPENDED + DATA + DATA)[1000:])
    expect(late, DATA + DATA)


# It is polled, or not


@pytest.mark.thorough
@pytest.mark.slow
def test_polls_where_inotify_instances_have_run_out(serve: Serve, path: Path) -> None:
    """Without inotify the file is polled, and the log names the setting to raise, once."""
    if not runs(*NO_INOTIFY, sys.executable, "-c", ""):
        pytest.skip("cannot create a user namespace without inotify instances")
    path.write_bytes(DATA)
    server = serve(path, "-w", "3", wrapper=NO_INOTIFY, program=HURRIED)
    server.workers(3)
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, DATA)
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)
    assert (
        len(
            server.lines(
                "warning: polling the file once a second, ", "fs.inotify.max_user_instances"
            )
        )
        == 1
    )
    append(path, DATA)
    path.unlink()
    for client in clients:
        expect(client, DATA)
        expect_eof(client)
    server.wait()
    assert len(server.lines("polling the file")) == 1


def test_polls_where_inotify_does_not_report(serve: Serve) -> None:
    """On a file system for which inotify is incomplete, the log says once that it is polled."""
    if not (path := Path("/sys/class/net/lo/mtu")).is_file():
        pytest.skip("no sysfs")
    server = serve(path, "-w", "2")
    server.workers(2)
    assert (
        len(
            server.lines(
                "warning: polling the file once a second, clients get appends later: "
                "reason='inotify does not report every change on sysfs'"
            )
        )
        == 1
    )


def test_does_not_poll_without_need(serve: Serve, path: Path) -> None:
    """An ordinary file is not polled."""
    path.write_bytes(DATA)
    server = serve(path)
    expect(server.connect(b"0\n"), DATA)
    assert server.lines("polling the file") == []
