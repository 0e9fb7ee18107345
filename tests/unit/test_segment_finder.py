"""Tests of the search for the files of the log, with real files."""

import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.checkout import ROOT
from support.files import append, opened
from support.logrotate import logrotate, needs_logrotate
from support.processes import as_root
from support.strace import needs_strace
from support.waiting import DEADLINE
from tailsrv.segments import Log, Segment
from tailsrv.supervisor.segment_chain import Chain, File, Identity, following
from tailsrv.supervisor.segment_finder import (
    MAX_SEGMENTS,
    FilesRenamedError,
    Found,
    find_next,
    find_segments,
    open_recent,
    search,
)
from tailsrv.supervisor.state_file import SavedSegment, StateFileError, describe, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the served file, which does not exist yet."""
    return tmp_path / "app.log"


@pytest.fixture(autouse=True)
def _no_open_descriptors() -> Iterator[None]:
    """Every test ends with the descriptors that it began with."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def save(*paths: Path, base: int = 0) -> list[SavedSegment]:
    """Return what the state file says if these files are the log; the last one is active."""
    saved = []
    for path in paths:
        size = None if path == paths[-1] else path.stat().st_size
        with opened(path) as file:
            saved.append(describe(Segment(base, file, size), str(path)))
        base = saved[-1].end
    return saved


def identity(path: Path) -> Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def close(found: Found) -> list[tuple[int, bytes]]:
    """Close the files, and return the base offset and the bytes of each segment."""
    content = []
    for segment in found.segments:
        with open(segment.file, "rb") as file:
            data = file.read(-1 if segment.size is None else segment.size)
            content.append((segment.base, data))
    return content


def joined(content: list[tuple[int, bytes]]) -> bytes:
    """Return the bytes of all segments, which have no gap between them."""
    whole = b""
    for base, data in content:
        assert base == content[0][0] + len(whole)
        whole += data
    return whole


def names(found: Found) -> list[str]:
    return [os.path.basename(segment.name) for segment in found.segments]


def rotate(path: Path, data: bytes, keep: int = 9) -> None:
    """Rename the files as logrotate does, and begin the next one with `data`."""
    path.with_name(f"{path.name}.{keep}").unlink(missing_ok=True)
    for number in range(keep - 1, 0, -1):
        old = path.with_name(f"{path.name}.{number}")
        if old.exists():
            old.rename(path.with_name(f"{path.name}.{number + 1}"))
    path.rename(path.with_name(f"{path.name}.1"))
    path.write_bytes(data)


@pytest.mark.parametrize("rotations", [0, 1, 3])
def test_rotations_while_down(path: Path, rotations: int) -> None:
    """All files are found in order, with the bytes that were appended while the server was down."""
    path.write_bytes(b"first\n")
    rotate(path, b"second\n")
    saved = save(path.with_name("app.log.1"), path)
    append(path, b"later\n")
    whole = b"first\nsecond\nlater\n"
    for number in range(rotations):
        rotate(path, data := b"new %d\n" % number)
        whole += data
    found = find_segments(str(path), saved)
    Log(Segment(segment.base, segment.file, segment.size) for segment in found.segments)
    assert names(found)[-1] == "app.log"
    assert found.segments[-1].size is None
    content = close(found)
    assert joined(content) == whole
    assert len(content) == 2 + rotations
    assert found.warnings == []


def test_symbolic_link(tmp_path: Path) -> None:
    """rotatelogs gives each file a name of its own, and a symbolic link names the newest."""
    link, folder = tmp_path / "link", tmp_path / "files"
    folder.mkdir()
    files = [folder / f"log.{number}" for number in (1700000000, 1700003600, 1700007200)]
    files[0].write_bytes(b"1\n")
    link.symlink_to(files[0])
    saved = save(link)
    for file in files[1:]:
        file.write_bytes(b"new\n")
    link.unlink()
    link.symlink_to(files[-1])
    found = find_segments(str(link), saved)
    assert names(found) == [file.name for file in files]
    assert close(found) == [(0, b"1\n"), (2, b"new\n"), (6, b"new\n")]


def test_other_files(path: Path) -> None:
    """A folder, a FIFO, a symbolic link, a second name and a compressed copy are no segments."""
    path.write_bytes(b"first\n")
    saved = save(path)
    rotate(path, b"second\n")
    path.with_name("app.log.2").mkdir()
    os.mkfifo(path.with_name("app.log.3"))
    path.with_name("other").write_bytes(b"other")
    path.with_name("app.log.4").symlink_to("other")
    os.link(path.with_name("app.log.1"), path.with_name("app.log.5"))
    os.link(path, path.with_name("app.log.6"))
    path.with_name("app.log.state").write_bytes(b"other")
    # logrotate compresses a file, and deletes it afterwards.
    path.with_name("app.log.1.gz").write_bytes(b"half")
    found = find_segments(str(path), saved)
    assert close(found) == [(0, b"first\n"), (6, b"second\n")]
    assert found.warnings == []


@pytest.mark.parametrize("make", ["missing", "folder"])
def test_nothing_is_left(path: Path, make: str) -> None:
    """If no file is left, the next one will begin at the last known end."""
    path.write_bytes(b"first\n")
    saved = save(path, base=100)
    path.unlink()
    if make == "folder":
        path.parent.rmdir()
    found = find_segments(str(path), saved)
    assert (found.segments, found.end) == ([], 106)
    assert [warning[:20] for warning in found.warnings] == [
        "offsets from 100 to ",
        "offsets from 106 on ",
    ]


def test_too_many_files(path: Path) -> None:
    """Only the newest files are opened; a warning says which offsets are gone."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * MAX_SEGMENTS, limits[1]), limits[1]))
    path.write_bytes(b"a")
    saved = save(path)
    path.rename(path.with_name(f"app.log.{MAX_SEGMENTS + 2}"))
    for number in range(MAX_SEGMENTS + 1, 0, -1):
        path.with_name(f"app.log.{number}").write_bytes(b"b")
    path.write_bytes(b"c")
    try:
        found = find_segments(str(path), saved)
        assert len(found.segments) == MAX_SEGMENTS
        assert found.segments[0].base == 3
        assert found.segments[-1].base == MAX_SEGMENTS + 2
        close(found)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("offsets before 3 are gone")


def test_out_of_descriptors(path: Path) -> None:
    """Without a descriptor for each file the search fails, and no offset is lost."""
    path.write_bytes(b"0")
    saved = save(path)
    for number in range(5):
        rotate(path, b"%d" % number)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened(path) as free:
        pass
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 3, limits[1]))
    try:
        with pytest.raises(StateFileError, match="Too many open files"):
            find_segments(str(path), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(as_root, reason="root can read every file")
def test_no_permission(path: Path) -> None:
    """A file or folder that may not be read costs the older offsets, and a warning says why."""
    path.write_bytes(b"first\n")
    saved = save(path)
    rotate(path, b"second\n")
    path.with_name("app.log.1").chmod(0)
    found = find_segments(str(path), saved)
    assert close(found) == [(6, b"second\n")]
    assert "Permission denied" in found.warnings[0]
    path.parent.chmod(0o300)
    try:
        found = find_segments(str(path), saved)
    finally:
        path.parent.chmod(0o700)
    assert close(found) == [(6, b"second\n")]
    assert found.warnings[0].startswith("rotated files cannot be found")


# The real logrotate

# The directives for a rotation with this number. logrotate does not make a second file of the same
# name, so the number is in the date.
MODES: dict[str, Callable[[int], list[str]]] = {
    "create": lambda _: ["create"],
    "dateext": lambda number: ["create", "dateext", f"dateformat -%Y%m%d-10{number}"],
    "extension": lambda _: ["create", "extension .log"],
    "dateext with extension": lambda number: [
        "create",
        "extension .log",
        "dateext",
        f"dateformat .%Y-%m-%d-%s{number}",
    ],
    "copytruncate": lambda _: ["copytruncate"],
    "copytruncate with dateext": lambda number: [
        "copytruncate",
        "dateext",
        f"dateformat -%Y%m%d-10{number}",
    ],
}


@needs_logrotate
@pytest.mark.slow
@pytest.mark.parametrize("rotations", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("killed", [False, True])
def test_logrotate(path: Path, mode: str, rotations: int, killed: bool) -> None:
    """The log is whole after rotations by logrotate, also if the server was killed.

    When it was killed, the state file has the size that the active file had at its beginning.
    """
    path.write_bytes(b"first\n")
    saved = save(path)
    append(path, b"more\n" * 2000)
    if not killed:
        saved = save(path)
    append(path, b"while down\n")
    for number in range(rotations):
        logrotate(path, *MODES[mode](number))
        append(path, b"new %d\n" % number)
    found = find_segments(str(path), saved)
    assert found.warnings == []
    content = close(found)
    assert len(content) == 1 + rotations
    assert joined(content) == b"".join(
        [b"first\n", b"more\n" * 2000, b"while down\n"]
        + [b"new %d\n" % number for number in range(rotations)]
    )


@needs_logrotate
@pytest.mark.slow
def test_logrotate_deletes_the_oldest(path: Path) -> None:
    """Of the known files, logrotate deletes first the sealed one, then the one that was active."""
    path.write_bytes(b"first\n")
    logrotate(path, "create")
    append(path, b"second\n")
    saved = save(path.with_name("app.log.1"), path)
    whole = b"first\nsecond\n"
    for number, start in enumerate((0, 0, 6, 13)):
        logrotate(path, "create")
        append(path, b"new %d\n" % number)
        whole += b"new %d\n" % number
        found = find_segments(str(path), saved)
        content = close(found)
        assert content[0][0] == start
        assert joined(content) == whole[start:]
        gone = [f"offsets from 0 to {start} are gone"] if start else []
        unknown = ["offsets from 13 on may name other bytes"] if start == 13 else []
        for warning, begin in zip(found.warnings, gone + unknown, strict=True):
            assert warning.startswith(begin)


@needs_logrotate
@pytest.mark.slow
@pytest.mark.parametrize("delay", [True, False])
def test_logrotate_compress(path: Path, delay: bool) -> None:
    """With delaycompress, one rotation costs nothing. Compressed files are skipped with a warning.

    Here the active file and the next one have been compressed when the server starts again.
    """
    directives = ["create", "compress", *(["delaycompress"] if delay else [])]
    path.write_bytes(b"first\n")
    saved = save(path)
    logrotate(path, *directives)
    append(path, b"second\n")
    found = find_segments(str(path), saved)
    if delay:
        assert close(found) == [(0, b"first\n"), (6, b"second\n")]
        assert found.warnings == []
    else:
        assert close(found) == [(6, b"second\n")]
        assert found.warnings[0].startswith("offsets from 0 to 6 are gone: ")
    for data in (b"third\n", b"fourth\n"):
        logrotate(path, *directives)
        append(path, data)
    found = find_segments(str(path), saved)
    assert close(found) == ([(6, b"third\n"), (12, b"fourth\n")] if delay else [(6, b"fourth\n")])
    assert found.warnings[0].startswith("offsets from 0 to 6 are gone: ")
    assert found.warnings[1].startswith("offsets from 6 on may name other bytes")
    assert "compressed files at offset 6," in found.warnings[2]
    assert len(found.warnings) == 3


# While the server runs


def test_find_next(path: Path) -> None:
    """While the server runs, the files between and the present one are found in order."""
    path.write_bytes(b"sealed\n")
    rotate(path, b"active\n")
    sealed, active, since = path.with_name("app.log.1"), identity(path), path.stat().st_mtime_ns
    known = [identity(sealed), active]
    found = find_next(str(path), known, [active], since, 14)
    assert (found.segments, found.end) == ([], 14)
    for data in (b"a\n", b"", b"b\n"):
        rotate(path, data)
    # Writers append to files after they were renamed.
    append(path.with_name("app.log.3"), b"late\n")
    append(path.with_name("app.log.4"), b"late\n")
    found = find_next(str(path), known, [active], since, 14)
    assert names(found) == ["app.log.2", "app.log.1", "app.log"]
    assert [segment.size for segment in found.segments] == [2, 0, None]
    assert close(found) == [(14, b"a\n"), (16, b""), (16, b"b\n")]
    assert found.warnings == []
    # The active file was deleted, and another file is absent for a moment.
    path.with_name("app.log.3").unlink()
    path.rename(path.with_name("app.log.0"))
    found = find_next(str(path), known, [active], since, 14)
    assert names(found) == ["app.log.2", "app.log.1", "app.log.0"]
    close(found)


def test_open_recent(path: Path) -> None:
    """The rotated files that were changed lately are opened, but not compressed or other files."""
    path.write_bytes(b"0")
    for number in range(1, 4):
        rotate(path, b"%d" % number)
    os.utime(path.with_name("app.log.3"), (1, 1))
    for name in ("app.log.4.gz", "other.log.1"):
        path.with_name(name).write_bytes(b"no")
    opened = open_recent(str(path), 2 * 1_000_000_000)
    found = sorted(Path(os.readlink(f"/proc/self/fd/{file}")).name for file in opened)
    for file in opened:
        os.close(file)
    assert found == ["app.log.1", "app.log.2"]
    assert open_recent("/no/such/folder/file", 0) == []


@pytest.mark.parametrize(("times", "attempts"), [(1, 5), (4, 5), (5, 5), (20, 50)])
def test_rotations_during_the_search(path: Path, times: int, attempts: int) -> None:
    """Rotations between listing and opening do not make files appear twice, or be missed.

    If there is one each time, then nothing is found.
    """
    path.write_bytes(b"0 ")
    active, since = identity(path), path.stat().st_mtime_ns
    rotate(path, b"1 ")
    calls = itertools.count(2)

    def decision(files: list[File], present: File | None) -> Chain:
        chain = following(files, present, {active}, [active], since, 2)
        if (number := next(calls)) < 2 + times:
            rotate(path, b"%d " % number, keep=30)
        return chain

    if times >= attempts:
        with pytest.raises(FilesRenamedError, match="are renamed all the time"):
            search(str(path), decision, attempts)
        return
    found = search(str(path), decision, attempts, 0.001)
    content = close(found)
    assert joined(content) == b"".join(b"%d " % number for number in range(1, 2 + times))
    assert found.warnings == []


# Faults

FINDER = """
import os, sys
from tailsrv.supervisor.segment_finder import find_segments
from tailsrv.supervisor.state_file import StateFileError, read
saved = read(sys.argv[1], sys.argv[2])
before = len(os.listdir("/proc/self/fd"))
try:
    found = find_segments(sys.argv[2], saved)
    print([segment.base for segment in found.segments], *found.warnings)
    opened = len(found.segments)
except StateFileError as error:
    print(error)
    opened = 0
assert len(os.listdir("/proc/self/fd")) == before + opened
"""
# The calls on the folder, or on the file that was active, and the warning if they are refused.
FAULTS = {
    "list": ("openat", "", "rotated files cannot be found: "),
    "read list": ("getdents64", "", "rotated files cannot be found: "),
    "examine": ("newfstatat,lstat", "app.log.1", ""),
    "open": ("openat", "app.log.1", "offsets before 6 are gone: "),
    "examine open": ("fstat,newfstatat", "app.log.1", ""),
    "read": ("pread64", "app.log.1", ""),
}


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("error", ["EIO", "ENOMEM", "EACCES", "ENOENT"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(path: Path, fault: str, error: str) -> None:
    """A call that fails causes an error or warnings, or the search succeeds at its next attempt.

    No descriptor stays open, and each message has one line. Only refused permissions and files that
    do not exist can cost offsets: any other failure may be temporary.
    """
    calls, name, warning = FAULTS[fault]
    folder, state, trace = path.parent, path.with_name("state"), path.with_name("trace")
    path.write_bytes(b"first\n")
    write(str(state), str(path), save(path))
    rotate(path, b"second\n")
    only = ("-P", str(path.with_name(name) if name else folder))
    for when in ("1", "2", "3", "1+"):
        inject = ("-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={when}")
        done = subprocess.run(
            ["strace", "-o", trace, *only, *inject, sys.executable, "-c", FINDER, state, path],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert (done.returncode, done.stderr) == (0, "")
        injected = "INJECTED" in trace.read_text()
        assert injected or when in "23"
        failed = done.stdout.startswith(f"cannot find the segments of the log '{path}': '{folder}")
        if not injected:
            assert done.stdout == "[0, 6]\n"
        elif not failed:
            assert error in ("EACCES", "ENOENT")
            assert done.stdout == "[0, 6]\n" or done.stdout.startswith("[6] ")
            assert done.stdout.count("\n") == 1
        if warning and error == "EACCES" and when == "1+":
            assert warning in done.stdout
