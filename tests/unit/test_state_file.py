"""Tests of the file that keeps the segments of the log while the server does not run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.checkout import ROOT
from support.files import append, opened
from support.processes import as_root
from support.strace import needs_strace
from support.waiting import DEADLINE
from tailsrv.segments import Segment
from tailsrv.supervisor.state_file import (
    HEAD,
    Fingerprint,
    SavedSegment,
    StateFileError,
    decode,
    default_path,
    describe,
    encode,
    lock,
    read,
    write,
)

LOG = "/var/log/app.log"
SEGMENTS = [
    SavedSegment(100, 50, True, 20, 1, Fingerprint.of(b"first"), "/var/log/app.log.2"),
    SavedSegment(150, 0, True, 21, 2, Fingerprint.of(b""), "/var/log/app.log.1"),
    SavedSegment(150, 7, False, 22, 3, Fingerprint.of(b"active\n"), LOG),
]


@given(st.binary(max_size=3 * HEAD), st.binary(max_size=HEAD))
def test_fingerprint_of_a_growing_file(head: bytes, more: bytes) -> None:
    """A file still matches after it has grown; one with another byte in its head does not."""
    fingerprint = Fingerprint.of(head)
    assert fingerprint.count == min(len(head), HEAD)
    assert fingerprint.matches(head)
    assert fingerprint.matches((head + more)[:HEAD])
    if head:
        assert not fingerprint.matches(bytes([head[0] ^ 1]) + head[1:])
        assert not fingerprint.matches(head[: fingerprint.count - 1])


def test_describe(tmp_path: Path) -> None:
    """A segment is saved with its sealed size, or else with the present size of its file."""
    path = tmp_path / "log"
    path.write_bytes(b"x" * 5000)
    status = path.stat()
    with opened(path) as file:
        saved = describe(Segment(7, file), os.path.relpath(path))
        sealed = describe(Segment(7, file, 10), str(path))
    assert saved == SavedSegment(
        7, 5000, False, status.st_ino, status.st_mtime_ns, Fingerprint.of(b"x" * HEAD), str(path)
    )
    assert (saved.end, sealed.end, sealed.sealed) == (5007, 17, True)
    # Bytes after the sealed size do not belong to the segment.
    assert sealed.fingerprint == Fingerprint.of(b"x" * 10)


def test_encode_and_decode() -> None:
    """What was encoded is decoded, also if a path is not UTF-8."""
    odd = os.fsdecode(b"/var/log/\xff\n.log")
    for path in (LOG, odd):
        segments = [replace(segment, name=path) for segment in SEGMENTS]
        assert decode(encode(path, segments), path) == segments


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a state file after `change` of its content."""
    content = json.loads(encode(LOG, SEGMENTS))
    change(content)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "damaged or not a state file"),
        (b"\xff\xfe\x00", "damaged or not a state file"),
        (encode(LOG, SEGMENTS)[:-10], "damaged or not a state file"),
        (b"[" * 100_000, "damaged or not a state file"),
        (b"9" * 10_000, "damaged or not a state file"),
        (b"[1, 2]", "not a state file of tailsrv"),
        (b'{"format": 1, "segments": []}', "not a state file of tailsrv"),
        (changed(lambda content: content.update(format=2)), "it has format 2"),
        (changed(lambda content: content.pop("format")), "it has format None"),
        (changed(lambda content: content.update(path="/b")), "belongs to the served file '/b'"),
        (changed(lambda content: content.pop("segments")), "list of segments is damaged"),
        (changed(lambda content: content.update(segments=None)), "list of segments is damaged"),
        (changed(lambda content: content["segments"].clear()), "there is none"),
        (changed(lambda content: content["segments"].pop()), "the last one is active"),
        (changed(lambda content: content["segments"][0].pop("inode")), "inode"),
        (changed(lambda content: content["segments"][0].update(new=1)), "new"),
        (changed(lambda content: content["segments"][0].update(size="50")), "number is wrong"),
        (changed(lambda content: content["segments"][0].update(size=50.0)), "number is wrong"),
        (changed(lambda content: content["segments"][0].update(base=True)), "number is wrong"),
        (changed(lambda content: content["segments"][0].update(base=-1)), "number is wrong"),
        (changed(lambda content: content["segments"][0].update(size=49)), "begins at 149"),
        (changed(lambda content: content["segments"][0].update(sealed=1)), "wrong type"),
        (changed(lambda content: content["segments"][0].update(name=None)), "wrong type"),
        (changed(lambda content: content["segments"][0].update(fingerprint=3)), "damaged"),
        (changed(lambda content: content["segments"].append(7)), "damaged"),
    ],
)
def test_foreign_content(data: bytes, reason: str) -> None:
    """Content that this version did not write for this served file is an error with its reason."""
    with pytest.raises(StateFileError, match=reason) as caught:
        decode(data, LOG)
    assert "\n" not in str(caught.value)


def test_write_and_read(tmp_path: Path) -> None:
    """What was written is read, the file is private, and nothing else stays in the folder."""
    file = tmp_path / "state"
    assert read(str(file), LOG) is None
    # What a crash has left of an earlier write.
    (tmp_path / "state.new").write_text("half")
    for segments in (SEGMENTS[2:], SEGMENTS):
        write(str(file), LOG, segments)
        assert read(str(file), LOG) == segments
        assert file.stat().st_mode & 0o777 == 0o600
        assert os.listdir(tmp_path) == ["state"]


def test_relative_and_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The served file may be given with a relative path at one start and not at the next."""
    monkeypatch.chdir(tmp_path)
    write("state", "log", SEGMENTS)
    assert read(str(tmp_path / "state"), str(tmp_path / "log")) == SEGMENTS
    with pytest.raises(StateFileError, match="belongs to the served file"):
        read("state", "log.1")


def test_symbolic_link(tmp_path: Path) -> None:
    """A state file that is a symbolic link stays one; the file behind it is replaced."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/state")
    write(str(tmp_path / "link"), LOG, SEGMENTS)
    assert (tmp_path / "link").is_symlink()
    assert read(str(tmp_path / "folder" / "state"), LOG) == SEGMENTS


def test_link_in_place_of_the_temporary_file(tmp_path: Path) -> None:
    """A symbolic link with the name of the temporary file is not followed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "state.new").symlink_to(victim)
    write(str(tmp_path / "state"), LOG, SEGMENTS)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "state").is_symlink()


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def folder(path: Path) -> None:
    path.mkdir()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path)


def in_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("")


def unreadable(path: Path) -> None:
    path.write_bytes(encode(LOG, SEGMENTS))
    path.chmod(0)


def truncated(path: Path) -> None:
    path.write_bytes(encode(LOG, SEGMENTS)[:100])


@pytest.mark.parametrize("make", [folder, fifo, loop, in_a_file, unreadable, truncated])
def test_unusable_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """What cannot be read is an error of one line that names the file and says what to do."""
    if make is unreadable and as_root:
        pytest.skip("root can read every file")
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "state"
    make(path)
    before = descriptors()
    with pytest.raises(StateFileError) as caught:
        read(str(path), LOG)
    assert descriptors() == before
    message = str(caught.value)
    assert str(path) in message
    assert "--state-file" in message
    assert ("not a regular file" in message) == (make in (folder, fifo))
    assert "\n" not in message


@pytest.mark.parametrize("make", [folder, in_a_file])
def test_no_place_for_the_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """What cannot be written or locked is such an error too, and leaves no temporary file."""
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "state"
    make(path)
    before = descriptors()
    with pytest.raises(StateFileError, match=r"cannot be written: .*--state-file"):
        write(str(path), LOG, SEGMENTS)
    assert descriptors() == before
    assert not os.path.exists(f"{path}.new")
    if make is in_a_file:
        with pytest.raises(StateFileError, match="cannot be opened: Not a directory"):
            lock(str(path))


# A program that writes the second state over the first.
WRITER = """
import sys
from tailsrv.supervisor.state_file import Fingerprint, SavedSegment, StateFileError, write
try:
    write(sys.argv[1], sys.argv[2], [SavedSegment(9, 0, False, 1, 2, Fingerprint.of(b""), "new")])
except StateFileError as error:
    sys.exit(str(error))
"""
STEPS = {
    "open": ("openat", "state.new"),
    "write": ("write", "state.new"),
    "fsync": ("fsync", "state.new"),
    "rename": ("rename", "state.new"),
    "open folder": ("openat", ""),
    "fsync folder": ("fsync", ""),
}


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["error=EIO", "signal=KILL"])
@pytest.mark.parametrize("step", STEPS)
def test_fault_at_each_step(tmp_path: Path, step: str, fault: str) -> None:
    """After a failed call or a crash at any step the file has its old or its new content.

    The error is reported, and the next write succeeds and cleans up.
    """
    call, name = STEPS[step]
    state = tmp_path / "state"
    write(str(state), LOG, SEGMENTS)
    # strace makes only calls fail that have this path or a descriptor of it.
    only = ("-P", str(tmp_path / name) if name else str(tmp_path))
    inject = ("-e", f"trace={call}", "-e", f"inject={call}:{fault}:when=1")
    done = subprocess.run(
        ["strace", "-o", os.devnull, *only, *inject, sys.executable, "-c", WRITER, state, LOG],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode != 0
    killed = fault == "signal=KILL"
    assert killed or f"state file '{state}' cannot be written: Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
    segments = read(str(state), LOG)
    assert segments is not None
    # SIGKILL ends the process before the call that it is injected into, so the rename has been made
    # only if the call is one on the folder.
    assert ([segment.name for segment in segments] == ["new"]) == (name == "")
    assert killed or os.listdir(tmp_path) == ["state"]
    write(str(state), LOG, SEGMENTS)
    assert os.listdir(tmp_path) == ["state"]


LOCKER = """
import sys
from tailsrv.supervisor.state_file import StateFileError, lock
try:
    lock(sys.argv[1])
except StateFileError as error:
    sys.exit(str(error))
"""


def try_lock(path: Path) -> str:
    """Try to take the lock in another process; return the error, empty if there is none."""
    done = subprocess.run(
        [sys.executable, "-c", LOCKER, path],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE,
    )
    return done.stderr


@pytest.mark.slow
def test_lock(tmp_path: Path) -> None:
    """A second server is refused, also after a write and by another path, until the lock is free.

    A forked child that is still alive does not hold the lock.
    """
    state, link = tmp_path / "state", tmp_path / "link"
    link.symlink_to(state)
    fd = lock(str(state))
    write(str(state), LOG, SEGMENTS)
    expected = "another tailsrv uses it; give each server a --state-file of its own"
    assert expected in try_lock(state)
    assert f"state file '{link}': {expected}" in try_lock(link)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(fd)
    assert try_lock(state) == ""
    os.close(writer)
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(os.listdir(tmp_path)) == ["link", "state", "state.lock"]


def test_default_path() -> None:
    """The first folder of the service manager is used, with one file for each served file."""
    assert default_path({}, LOG) is None
    assert default_path({"STATE_DIRECTORY": ""}, LOG) is None
    found = default_path({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, LOG)
    assert found is not None
    assert os.path.dirname(found) == "/var/lib/a"
    assert os.path.basename(found).startswith("app.log-")
    assert found == default_path({"STATE_DIRECTORY": "/var/lib/a"}, "/var/log/../log/app.log")
    assert found != default_path({"STATE_DIRECTORY": "/var/lib/a"}, "/var/log/old/app.log")
    long = default_path({"STATE_DIRECTORY": "/s"}, "/" + "ü" * 127)
    assert long is not None
    assert len(os.fsencode(os.path.basename(long + ".lock"))) <= 255


def test_growing_file_is_recognized(tmp_path: Path) -> None:
    """The saved fingerprint of a short active file matches the file after appends."""
    path = tmp_path / "log"
    path.write_bytes(b"first line\n")
    with opened(path) as file:
        saved = describe(Segment(0, file), str(path))
    append(path, b"more" * 10_000)
    assert saved.fingerprint.matches(path.read_bytes()[:HEAD])
    path.write_bytes(b"other line\n")
    assert not saved.fingerprint.matches(path.read_bytes()[:HEAD])
    assert asdict(saved)["fingerprint"]["count"] == 11
