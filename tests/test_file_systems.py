"""File systems that fail, die, make up inode numbers, or are mounted over the file or out of sight."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fusefs import Fuse
from helpers import DEADLINE, Serve, Server, eventually, expect, expect_eof, random_bytes, runs
from survival import status
from unit import ROOT

pytestmark = pytest.mark.slow

HELD = Path(__file__).with_name("held.py")
OLD, NEW, MORE = random_bytes(5000, 1), random_bytes(9000, 2), random_bytes(3000, 3)


@pytest.fixture
def hurried(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Give a program to serve with that looks at the file twenty times as often."""
    (hold := tmp_path / "hold").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILSRV_TEST_HOLD", str(hold))
        yield (sys.executable, str(HELD))


@pytest.fixture
def fuse(tmp_path: Path) -> Fuse:
    """Give a file system of one file, which holds OLD, that behaves as ordered."""
    fuse = Fuse(tmp_path / "fuse")
    fuse.write(OLD)
    if not runs(*fuse.wrapper, "true"):
        pytest.skip("a FUSE file system cannot be mounted in a namespace of its own")
    return fuse


def rotate(fuse: Fuse, server: Server, data: bytes, **orders: object) -> None:
    """Have the name lead to another file; the streams of the old one end, and this one is served."""
    old = server.connect(b"-0\n")
    server.streaming(old)
    node = int(fuse.orders["node"]) + 1
    fuse.write(data, node)
    fuse.order(node=node, **orders)
    server.logged("serving: ", count=node - 1)
    expect_eof(old)
    fuse.order(fail={})
    expect(server.connect(b"0\n"), data)


# Calls that fail

CALLS = [
    ("FLUSH", 0, 100),  # of close(2)
    ("OPEN", 0, 1),
    ("GETATTR AFTER OPEN", 0, 1),
    ("READ", 0, 1),
    *(("LOOKUP", skip, 2) for skip in range(3)),
    *(("GETATTR", skip, 3) for skip in range(0, 9, 3)),
]


def test_calls_that_fail(serve: Serve, fuse: Fuse, hurried: tuple[str, ...]) -> None:
    """Whichever call on the file fails during a rotation, the server goes on with the next file."""
    server = serve(fuse.path, "--follow-name", "-v", wrapper=fuse.wrapper, program=hurried)
    server.workers(1)
    for operation, skip, times in CALLS:
        rotate(fuse, server, NEW, fail={operation: ["EIO", skip, times]})
    assert "cannot go on" not in server.log


# A file system that dies


@pytest.mark.parametrize("options", [(), ("--follow-name",)])
def test_held_file_is_dead(serve: Serve, fuse: Fuse, hurried: tuple[str, ...], path: Path, options: tuple[str, ...]) -> None:
    """A file that will never answer again is gone once the path names another one, and not before."""
    path.symlink_to(fuse.path)
    server = serve(path, *options, wrapper=fuse.wrapper, program=hurried)
    expect(old := server.connect(b"0\n"), OLD)
    fuse.kill()
    eventually(lambda: status(server)["file"]["size"] is None)
    assert not server.lines("file is gone")
    (fresh := path.with_name("fresh")).write_bytes(NEW)
    fresh.rename(path)
    server.logged("file is gone")
    expect_eof(old)
    if options:
        expect(server.connect(b"0\n"), NEW)
    else:
        server.wait()


# A mount that is out of sight

HIDDEN = """
import os, subprocess, sys
from tailsrv.file_system import why_poll
odd, local = (os.open(path, os.O_RDONLY) for path in sys.argv[1:3])
print(why_poll(odd), why_poll(local), sep="\\n")
os.makedirs("jail/proc"), os.makedirs("jail/empty")
subprocess.run(["mount", "-t", "proc", "proc", "jail/proc"], check=True)
os.chroot("jail")
print(why_poll(odd), why_poll(local), sep="\\n")
os.chroot("/empty")
print(why_poll(odd), why_poll(local), sep="\\n")
"""
HIDDEN_REASON = (
    "inotify may not report every change: its mount is not in /proc/self/mountinfo, the file system is of type 0x65735546, see statfs(2)"
)


def test_hidden_mount(fuse: Fuse, tmp_path: Path) -> None:
    """In a chroot, and without /proc, the kernel itself is asked whether a file system is local."""
    (local := tmp_path / "local").touch()
    command = [*fuse.wrapper, sys.executable, "-c", HIDDEN, str(fuse.path), str(local)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    if "mount failed" in done.stderr:
        pytest.skip("/proc cannot be mounted here")
    assert done.returncode == 0, done.stderr
    listed, *others = done.stdout.splitlines()
    assert listed == "inotify does not report every change on fuse.odd"
    assert others[::2] == ["None"] * 3
    assert set(others[1::2]) == {HIDDEN_REASON}
