"""Tests of the search for the next files, with real files that change during it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.files import append
from tailsrv.config import Timing
from tailsrv.linux.event_loop import EventLoop
from tailsrv.served_file import ServedFile
from tailsrv.shared_counts import SharedCounts
from tailsrv.supervisor.late_appends import LateAppends
from tailsrv.supervisor.next_files import NextFiles


class Changing(ServedFile):
    """A path with a file that changes after it was opened to be examined."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.change: Callable[[], object] = lambda: None

    def open_next(self) -> int | None:
        """Open the file, and change the path afterwards."""
        file = super().open_next()
        self.change()
        return file


# Made once, because its descriptors are never closed.
OPENED_AT = SharedCounts(1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the path of a file that is served."""
    path = tmp_path / "app.log"
    path.write_bytes(b"first")
    return path


@pytest.fixture
def served_file(path: Path) -> Iterator[Changing]:
    """Give the open file, and check that every other descriptor is closed again."""
    before = os.listdir("/proc/self/fd")
    served_file = Changing(path)
    assert served_file.open()
    yield served_file
    assert served_file.file is not None
    os.close(served_file.file)
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def next_files(served_file: Changing) -> Iterator[NextFiles]:
    """Give the files after it."""
    loop = EventLoop()
    next_files = NextFiles(served_file, LateAppends(loop, served_file, Timing()), OPENED_AT)
    next_files.begin([])
    yield next_files
    next_files.close()
    loop.epoll.close()


def contents(next_files: NextFiles) -> list[bytes]:
    """Return what is in each of the files."""
    return [os.pread(each.file, 100, 0) for each in next_files]


def replace(path: Path, data: bytes) -> None:
    """Give the path to another file. The file that had it has no name any more."""
    (fresh := path.with_name("fresh")).write_bytes(data)
    fresh.rename(path)


def rotate(path: Path, data: bytes) -> None:
    """Rename the files as logrotate does."""
    for number in range(8, 0, -1):
        if (old := path.with_name(f"app.log.{number}")).exists():
            old.rename(path.with_name(f"app.log.{number + 1}"))
    path.rename(path.with_name("app.log.1"))
    path.write_bytes(data)


@pytest.mark.parametrize("change", [replace, rotate])
def test_next_file_loses_its_name_when_it_was_opened(
    path: Path, served_file: Changing, next_files: NextFiles, change: Callable[[Path, bytes], None]
) -> None:
    """It is found although it has another name or none when the folder is searched."""
    rotate(path, b"second")
    rotate(path, b"third")
    served_file.change = lambda: change(path, b"fourth")
    next_files.find(1.0)
    served_file.change = lambda: None
    assert contents(next_files) == [b"second", b"third", b"fourth"]
    next_files.find(2.0)
    assert len(next_files) == 3


def test_next_file_is_deleted_when_it_was_opened(
    path: Path, served_file: Changing, next_files: NextFiles
) -> None:
    """It is served, because its writer may still have it."""
    rotate(path, b"second")
    served_file.change = path.unlink
    next_files.find(1.0)
    assert contents(next_files) == [b"second"]


def test_name_comes_back_when_the_next_file_was_opened(
    path: Path, served_file: Changing, next_files: NextFiles
) -> None:
    """The file is not the next one if the path names the active segment again."""
    rotate(path, b"second")

    def restore() -> None:
        path.rename(path.with_name("other"))
        path.with_name("app.log.1").rename(path)

    served_file.change = restore
    next_files.find(1.0)
    assert contents(next_files) == [b"second"]
    append(path, b"more")
    assert served_file.has_gone(2.0) is False


@pytest.mark.parametrize("data", [b"", b"second"])
def test_name_comes_back_before_the_search(path: Path, next_files: NextFiles, data: bytes) -> None:
    """The active segment is no next file, although it has got its name again after another one."""
    rotate(path, data)
    next_files.find(1.0)
    path.rename(path.with_name("other"))
    path.with_name("app.log.1").rename(path)
    append(path, b"more")
    next_files.find(2.0)
    assert contents(next_files) == [data]
