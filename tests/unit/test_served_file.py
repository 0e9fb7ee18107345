"""Tests of the served file: opening, refusals, and whether a path still names it."""

import os
import stat
import time
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from support.files import is_gone, opened
from support.interpreter import run_program
from support.processes import as_root
from tailsrv.segments import NO_FILE, Log, Segment
from tailsrv.served_file import CannotServeError, ServedFile, open_file
from tailsrv.status_schema import LogStatus


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of four bytes."""
    path = tmp_path / "log"
    path.write_bytes(b"four")
    return path


# Deletion and replacement.


def test_is_gone(path: Path) -> None:
    """A file is gone if its path names nothing, or another file."""
    with opened(path) as file:
        assert not is_gone(file, str(path))
        assert not is_gone(file, f"{path.parent}/./{path.name}")
        assert is_gone(file, str(path.parent))
        assert is_gone(file, f"{path}/below")
        path.unlink()
        assert is_gone(file, str(path))


def test_is_gone_compares_device_and_inode(path: Path) -> None:
    """A copy with the same contents is another file."""
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    with opened(path) as file:
        assert is_gone(file, str(copy))


def test_is_gone_for_paths_that_cannot_be_followed(path: Path) -> None:
    """A link loop counts as gone, and for a path that cannot be checked the result is None."""
    path.with_name("loop").symlink_to("loop")
    with opened(path) as file:
        assert is_gone(file, str(path.with_name("loop"))) is True
        assert is_gone(file, str(path.with_name("x" * 300))) is None


# Opening.


def test_open_file(path: Path) -> None:
    """A regular file is opened, even if empty, and is not inherited by other programs."""
    for data in (b"four", b""):
        path.write_bytes(data)
        file = open_file(str(path))
        assert file is not None
        try:
            assert os.pread(file, 10, 0) == data
            assert stat.S_ISREG(os.fstat(file).st_mode)
            assert not os.get_inheritable(file)
        finally:
            os.close(file)


def test_open_file_that_does_not_exist(tmp_path: Path) -> None:
    """A missing file, a missing folder and a dangling link are no error, and give None."""
    (tmp_path / "link").symlink_to("nothing")
    assert [open_file(str(tmp_path / name)) for name in ("log", "no/log", "link")] == [
        None,
        None,
        None,
    ]


def refusal(path: Path | str) -> str:
    """Return why `path` cannot be served, and check that no descriptor stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CannotServeError) as caught:
        open_file(str(path))
    assert len(os.listdir("/proc/self/fd")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_open_file_refuses_special_files(tmp_path: Path) -> None:
    """A folder, a FIFO, a socket and a device are refused without waiting."""
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "socket", Path("/dev/null")):
        assert refusal(path) == "not a regular file"


def test_open_file_refuses_a_path_through_a_file(path: Path) -> None:
    """A path through a file that is no folder is refused with the kernel's reason."""
    assert refusal(path / "below") == "Not a directory"


def test_open_file_refuses_a_loop(tmp_path: Path) -> None:
    """A symbolic link to itself is refused."""
    (tmp_path / "loop").symlink_to("loop")
    assert "symbolic links" in refusal(tmp_path / "loop")


@pytest.mark.skipif(as_root, reason="root may read everything")
def test_open_file_refuses_an_unreadable_file(path: Path) -> None:
    """A file without read permission is refused."""
    path.chmod(0)
    assert refusal(path).startswith("Permission denied; it has mode 0000, ")


@pytest.mark.skipif(not as_root, reason="only root can become another user")
def test_open_file_refuses_an_unreadable_file_to_others(path: Path) -> None:
    """A file that only root may read is refused for other users."""
    path.chmod(0o600)
    path.parent.chmod(0o755)
    done = run_program("open_as_nobody", str(path.parent))
    assert done.returncode == 0
    assert done.stdout.startswith(
        "Permission denied; it has mode 0600, user 0 and group 0, "
        "and tailsrv runs as user 65534 with groups "
    )


def test_open_file_refuses_what_cannot_be_sent() -> None:
    """A file in /proc, whose contents sendfile(2) cannot send, is refused."""
    assert "sendfile(2)" in refusal("/proc/self/mem")


# The status.


def missing(served: ServedFile, later: float = 0.0) -> object:
    """Return `missing` of the status, as it is `later` seconds from now."""
    return served.describe(time.monotonic() + later, follow_name=True).missing


def test_missing(path: Path) -> None:
    """The next file is missing from the first look that does not find it until one finds it."""
    served = ServedFile(str(path))
    assert served.open()
    served.gone = True
    assert missing(served) is None
    path.rename(path.with_name("old"))
    before = time.monotonic()
    assert served.open_next() is None
    first = missing(served, 100.0)
    assert isinstance(first, float)
    assert 100.0 <= first <= 100.0 + time.monotonic() - before
    assert served.open_next() is None
    assert first <= missing(served, 100.0)  # type: ignore[operator]
    path.touch()
    file = served.open_next()
    assert file is not None
    os.close(file)
    assert missing(served, 100.0) is None
    path.unlink()
    path.mkdir()
    with pytest.raises(CannotServeError):
        served.open_next()
    assert missing(served, 100.0) is None
    assert served.file is not None
    os.close(served.file)


def test_first_file_is_not_missing(tmp_path: Path) -> None:
    """While a server waits for its first file, no next file is missing."""
    served = ServedFile(str(tmp_path / "log"))
    assert not served.open()
    assert missing(served) is None


def test_not_missing_any_more(path: Path) -> None:
    """No file is missing after the path names the open one again, nor after a roll."""
    served = ServedFile(str(path))
    assert served.open()
    served.gone = True
    path.rename(path.with_name("old"))
    assert served.open_next() is None
    path.with_name("old").rename(path)
    assert served.has_gone(0.0) is False
    assert missing(served) is None
    path.rename(path.with_name("old"))
    assert served.open_next() is None
    assert missing(served) is not None
    assert served.log is not None
    files = [segment.file for segment in served.log]
    with opened(path.with_name("old")) as file:
        served.roll(4, lost=False, file=file)
    served.gone = True
    assert missing(served) is None
    for file in files:
        os.close(file)


def segment_fields(
    served: ServedFile, *positions: int, most: int = 100
) -> list[tuple[object, ...]]:
    """Return the fields of each segment in the status."""
    return [astuple(segment) for segment in served.describe_segments(positions, most)]


def test_describe_log(tmp_path: Path) -> None:
    """Each segment has its path now, or is deleted; each client counts where its next byte is."""
    served = ServedFile("/log")
    assert served.describe_log() is None
    assert not segment_fields(served)
    paths = [tmp_path / name for name in ("deleted", "moved", "linked", "log (deleted)")]
    files = []
    for path in paths:
        path.write_bytes(b"four")
        files.append(os.open(path, os.O_RDONLY))
    deleted, moved, linked, active = files
    served.log = Log(
        [
            Segment(100, NO_FILE, 3),
            Segment(103, deleted, 4),
            Segment(107, moved, 3),
            Segment(110, linked, 2),
            Segment(112, active),
        ]
    )
    served.log.retire(107)
    paths[0].unlink()
    paths[1].rename(tmp_path / "moved (deleted)")
    os.link(paths[2], tmp_path / "other")
    paths[2].unlink()
    assert segment_fields(served, 0, 100, 102, 106, 107, 107, 112, 116, 1000) == [
        (100, 3, True, 3, None, True),
        (103, 4, True, 1, None, True),
        (107, 3, True, 2, str(tmp_path / "moved (deleted)"), False),
        (110, 2, True, 0, None, False),
        (112, 4, False, 3, str(paths[3]), False),
    ]
    assert [fields[0] for fields in segment_fields(served, most=2)] == [110, 112]
    log = LogStatus(start=107, end=116, segments=4, size=13, retired=1, retired_size=4)
    assert served.describe_log() == log
    for file in files:
        os.close(file)
    assert served.describe_log() == replace(log, end=None, size=None)
    assert segment_fields(served)[-1] == (112, None, False, 0, None, False)
