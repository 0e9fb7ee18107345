"""File systems that fail, invent inode numbers, hide the file, or have no visible mount."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.fusefs import Fuse
from support.interpreter import run_program
from support.processes import runs, switches
from support.rotation import HOUR, MOVED, ROLLED, replace
from support.server import HELD, Serve, Server, hurried
from support.sockets import expect, expect_eof
from support.status import status
from support.waiting import DEADLINE, eventually

pytestmark = pytest.mark.slow


OLD, NEW, MORE = random_bytes(5000, 1), random_bytes(9000, 2), random_bytes(3000, 3)


@pytest.fixture
def polling(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Return a server program that polls the file twenty times as often."""
    (hold := tmp_path / "hold").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILSRV_TEST_HOLD", str(hold))
        yield HELD


@pytest.fixture
def fuse(tmp_path: Path) -> Fuse:
    """Return a file system with one file, which contains OLD, that follows the test's orders."""
    fuse = Fuse(tmp_path / "fuse")
    fuse.write(OLD)
    if not runs(*fuse.wrapper, "true"):
        pytest.skip("a FUSE file system cannot be mounted in a namespace of its own")
    return fuse


def rotate(fuse: Fuse, client: socket.socket, **orders: object) -> bytes:
    """Put another file at the path, to which `client` must get; return its content."""
    node = int(fuse.orders["node"]) + 1
    data = random_bytes(1000, node)
    fuse.write(data, node)
    fuse.order(node=node, **orders)
    expect(client, data)
    fuse.order(fail={})
    return data


def run_in(
    fuse: Fuse, folder: Path, name: str, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    """Run a program of the test suite in `folder`, in a mount namespace with the file system."""
    return run_program(name, *arguments, wrapper=(*fuse.wrapper, "env", "-C", str(folder)))


# Calls that fail

CALLS = [
    # FLUSH is the request that close(2) causes.
    ("FLUSH", 0, 100),
    ("OPEN", 0, 1),
    ("GETATTR AFTER OPEN", 0, 1),
    ("READ", 0, 1),
    *(("LOOKUP", skip, 2) for skip in range(3)),
    *(("GETATTR", skip, 3) for skip in range(0, 9, 3)),
]


@pytest.mark.thorough
def test_calls_that_fail(serve: Serve, fuse: Fuse, polling: tuple[str, ...]) -> None:
    """Whichever call on the file fails during a rotation, the server serves the next file."""
    server = serve(fuse.path, "--follow-name", "-v", wrapper=fuse.wrapper, program=polling)
    server.workers(1)
    client = server.connect(b"0\n")
    expect(client, OLD)
    log = OLD
    for operation, skip, times in CALLS:
        log += rotate(fuse, client, fail={operation: ["EIO", skip, times]})
    expect(server.connect(b"-%d\n" % len(log)), log)
    for failure in ("supervisor failed", "internal error", "client disconnected"):
        assert failure not in server.log


def test_writers_on_other_machines(serve: Serve, fuse: Fuse) -> None:
    """A lease does not tell whether another machine has a file open, so it must be quiet."""
    server = serve(
        fuse.path,
        "--follow-name",
        "-v",
        wrapper=fuse.wrapper,
        program=hurried(settle=HOUR, seal_limit=HOUR),
    )
    expect(client := server.connect(b"0\n"), OLD)
    fuse.write(NEW, 3)
    fuse.order(node=3)
    server.logged(MOVED)
    # The answer comes after the supervisor has decided whether to roll.
    assert status(server)["file"]["gone"]
    fuse.write(OLD + MORE)
    expect(client, MORE)
    assert not server.lines(ROLLED)


# A file system that dies


@pytest.mark.parametrize("options", [(), ("--follow-name",)])
def test_file_system_of_the_open_file_dies(
    serve: Serve, fuse: Fuse, polling: tuple[str, ...], path: Path, options: tuple[str, ...]
) -> None:
    """A file whose file system has died is gone when the path names another, and not before."""
    path.symlink_to(fuse.path)
    server = serve(path, *options, wrapper=fuse.wrapper, program=polling)
    expect(old := server.connect(b"0\n"), OLD)
    fuse.kill()
    eventually(lambda: status(server)["file"]["size"] is None)
    assert not server.lines("file is gone")
    assert not server.lines(MOVED)
    (fresh := path.with_name("fresh")).write_bytes(NEW)
    fresh.rename(path)
    if options:
        expect(old, NEW)
        later = server.connect(b"-%d\n" % len(NEW))
        expect(later, NEW)
    else:
        server.logged("file is gone")
        expect_eof(old)
        server.wait()


# Inode numbers that change


@pytest.mark.parametrize("options", [(), ("--follow-name",)])
def test_inode_numbers_that_change(
    serve: Serve, fuse: Fuse, polling: tuple[str, ...], options: tuple[str, ...]
) -> None:
    """A file whose inode number changes at each stat is the same until another has its path."""
    fuse.order(unstable=True)
    server = serve(fuse.path, *options, "-v", wrapper=fuse.wrapper, program=polling)
    expect(client := server.connect(b"0\n"), OLD)
    for size in (len(MORE), 2 * len(MORE)):
        fuse.write(OLD + (MORE + MORE)[:size])
        expect(client, MORE)
    assert not server.lines("file is gone")
    assert not server.lines(MOVED)
    fuse.write(NEW, 3)
    fuse.order(node=3)
    if options:
        expect(client, NEW)
        expect(server.connect(b"0\n"), OLD + MORE + MORE + NEW)
    else:
        server.logged("file is gone")
        expect_eof(client)
        server.wait()


def test_other_signs_of_another_file(fuse: Fuse, tmp_path: Path) -> None:
    """Without reliable inode numbers, first bytes, last bytes and growth identify a file."""
    done = run_in(fuse, tmp_path, "other_number", str(fuse.folder))
    assert done.returncode == 0, done.stderr


def test_rotations_without_end(serve: Serve, path: Path) -> None:
    """If a file is replaced again and again, its last successor is served all the same."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name")
    expect(client := server.connect(b"0\n"), OLD)
    for _ in range(1000):
        replace(path, NEW)
    replace(path, MORE)
    received = b""
    # Files that were replaced between two looks cannot be found.
    while not received.endswith(MORE):
        received += client.recv(1 << 20)
    assert received == NEW * ((len(received) - len(MORE)) // len(NEW)) + MORE
    expect(server.connect(b"0\n"), MORE)


# A mount that is not listed in /proc


HIDDEN_REASON = (
    "inotify may not report every change: the mount is not in /proc/self/mountinfo, "
    "and the file system is of type 0x65735546 (see statfs(2))"
)


def test_hidden_mount(fuse: Fuse, tmp_path: Path) -> None:
    """In a chroot and without /proc, statfs(2) tells whether a file system is local."""
    (local := tmp_path / "local").touch()
    done = run_in(fuse, tmp_path, "hidden_mount", str(fuse.path), str(local))
    if "mount failed" in done.stderr:
        pytest.skip("/proc cannot be mounted here")
    assert done.returncode == 0, done.stderr
    listed, *others = done.stdout.splitlines()
    assert listed == "inotify does not report every change on fuse.odd"
    assert others[::2] == ["None"] * 3
    assert set(others[1::2]) == {HIDDEN_REASON}


# Mounts

IN_NAMESPACE = ("unshare", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")), "--mount")


def mount(server: Server, command: str) -> None:
    """Run a command in the mount namespace of a server."""
    subprocess.run(
        ["nsenter", f"--target={server.pid}", "--mount", "sh", "-ec", command],
        check=True,
        timeout=DEADLINE,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder whose file contains OLD, for a server in a separate mount namespace."""
    if not runs(*IN_NAMESPACE, "mount", "-t", "tmpfs", "none", str(tmp_path)) or os.geteuid() != 0:
        pytest.skip("requires root and a mount namespace")
    (folder := tmp_path / "folder").mkdir()
    (folder / "file.log").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    return folder


WAYS = {
    "over the folder": "mount -t tmpfs none {folder}; cp {folder}/../new {folder}/file.log",
    "over the file": "mount --bind {folder}/../new {folder}/file.log",
    "unmounted": "umount --lazy {folder}; cp {folder}/../new {folder}/file.log",
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("way", WAYS)
def test_mounted_over(serve: Serve, folder: Path, way: str) -> None:
    """A mount that covers the file, or an unmount that uncovers another, is noticed."""
    setup = (
        f"mount -t tmpfs none {folder}; cp {folder}/../old {folder}/file.log"
        if way == "unmounted"
        else "true"
    )
    (folder.parent / "old").write_bytes(OLD)
    path = folder / "file.log"
    server = serve(
        path, "--follow-name", wrapper=(*IN_NAMESPACE, "sh", "-ec", f'{setup}; exec "$@"', "sh")
    )
    expect(old := server.connect(b"0\n"), OLD)
    (other := folder.parent / "other").mkdir()
    # Make two changes in quick succession, because the supervisor pauses after it has noticed one.
    mount(server, f"mount -t tmpfs none {other}; {WAYS[way].format(folder=folder)}")
    expect(old, NEW)
    append(Path(f"/proc/{server.pid}/root{path}"), MORE)
    expect(old, MORE)


def test_mounts_elsewhere(serve: Serve, folder: Path) -> None:
    """Continual mounts elsewhere wake the supervisor about once a second, and no worker."""
    server = serve(folder / "file.log", wrapper=IN_NAMESPACE)
    (worker,) = server.workers(1)
    expect(client := server.connect(b"0\n"), OLD)
    (other := folder.parent / "other").mkdir()
    began, before = time.monotonic(), switches(server.pid)
    mount(server, f"for i in $(seq 100); do mount -t tmpfs none {other}; umount {other}; done")
    seconds = time.monotonic() - began
    assert switches(server.pid) - before <= 5 * (seconds + 2)
    assert not [
        fd for fd in Path(f"/proc/{worker}/fd").iterdir() if fd.readlink().name == "mountinfo"
    ]
    append(folder / "file.log", NEW)
    expect(client, NEW)
    assert not server.lines("file is gone")


def test_without_proc(serve: Serve, folder: Path) -> None:
    """A server without /proc serves appends, although it cannot notice mounts."""
    server = serve(
        folder / "file.log",
        wrapper=(*IN_NAMESPACE, "sh", "-ec", 'mount -t tmpfs none /proc; exec "$@"', "sh"),
    )
    expect(client := server.connect(b"0\n"), OLD)
    append(folder / "file.log", NEW)
    expect(client, NEW)


# Overlay

LAYERS = """
mount -t tmpfs none {folder}
mkdir {folder}/lower {folder}/upper {folder}/work {folder}/merged
cp {folder}/../new {folder}/lower/file.log
layers=lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work
mount -t overlay -o $layers none {folder}/merged
exec "$@"
"""


def test_overlay_copy_up(serve: Serve, folder: Path) -> None:
    """An append that copies a file up from the lower layer is served; the file is not gone."""
    layers = (*IN_NAMESPACE, "sh", "-ec", LAYERS.format(folder=folder), "sh")
    if not runs(*layers, "true"):
        pytest.skip("overlay cannot be mounted here")
    path = folder / "merged" / "file.log"
    server = serve(path, wrapper=layers)
    expect(client := server.connect(b"0\n"), NEW)
    there = Path(f"/proc/{server.pid}/root{path}")
    append(there, MORE)
    expect(client, MORE)
    append(there, MORE)
    expect(client, MORE)
    assert not server.lines("file is gone")
    assert not server.lines("polling the file once a second")
    there.unlink()
    expect_eof(client)
    server.wait()
