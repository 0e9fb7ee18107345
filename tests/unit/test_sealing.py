"""Tests of the decision when to roll, and of the time since when a file is quiet."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.files import append, opened
from tailsrv.config import Timing
from tailsrv.supervisor.sealing import QuietTime, quiet_at, seal_time

TIMING = Timing(settle=1.0, seal_limit=5.0)


@pytest.mark.parametrize(
    ("quiet_since", "gone_since", "writers", "when"),
    [
        # It is certain that nothing is appended any more.
        (0.0, 99.0, False, 99.0),
        (200.0, 99.0, False, 99.0),
        # It is not known whether a process has the file open.
        (99.5, 0.0, None, 100.5),
        (99.5, 99.9, None, 100.5),
        (99.5, 98.0, None, 100.5),
        # A process has the file open: in addition, it gets a second to reopen its log.
        (99.5, 98.0, True, 100.5),
        (99.5, 99.9, True, 100.9),
        (0.0, 99.9, True, 100.9),
    ],
)
def test_quiet_at(quiet_since: float, gone_since: float, writers: bool | None, when: float) -> None:
    """A segment counts as complete without writers, or when it has not changed for a second."""
    assert quiet_at(quiet_since, gone_since, writers, TIMING) == pytest.approx(when)


@pytest.mark.parametrize(
    ("first_byte", "quiet", "when"),
    [
        (100.0, 0.0, 100.0),
        (100.0, 100.0, 100.0),
        (100.0, 103.0, 103.0),
        (100.0, 105.0, 105.0),
        (100.0, 106.0, 105.0),
        (100.0, 1e9, 105.0),
    ],
)
def test_seal_time(first_byte: float, quiet: float, when: float) -> None:
    """A segment is sealed when it is complete, from the first byte of the next on, with a limit."""
    assert seal_time(first_byte, quiet, TIMING) == pytest.approx(when)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of four bytes."""
    path = tmp_path / "log"
    path.write_bytes(b"four")
    return path


@pytest.fixture
def file(path: Path) -> Iterator[int]:
    """Give a descriptor of that file."""
    with opened(path) as file:
        yield file


def set_age(path: Path, seconds: float) -> None:
    """Set the modification time of the file to `seconds` ago."""
    modified = time.time() - seconds
    os.utime(path, (modified, modified))


def near(seconds: float) -> object:
    """Return an object that is equal to about that many seconds."""
    return pytest.approx(seconds, abs=30.0)


@pytest.mark.parametrize("age", [0.0, 1000.0, 1e6])
def test_the_modification_time_tells_about_the_past(path: Path, file: int, age: float) -> None:
    """At the first look, the modification time says since when the file is quiet."""
    set_age(path, age)
    quiet = QuietTime(file)
    assert quiet.since(5000.0) == near(5000.0 - age)
    first = quiet.since(5000.0)
    # That does not depend on the time of a later look.
    assert quiet.since(9000.0) == first


def test_a_modification_time_in_the_future(path: Path, file: int) -> None:
    """A file that was changed in the future counts as changed now, not later."""
    set_age(path, -1000.0)
    quiet = QuietTime(file)
    assert quiet.since(5000.0) == 5000.0
    assert quiet.since(6000.0) == 5000.0


def test_later_changes(path: Path, file: int) -> None:
    """An append and a truncation end the quiet time."""
    set_age(path, 1000.0)
    quiet = QuietTime(file)
    assert quiet.since(5000.0) == near(4000.0)
    append(path, b"more")
    assert quiet.since(6000.0) == near(6000.0)
    os.truncate(path, 0)
    assert quiet.since(7000.0) == near(7000.0)
    assert quiet.since(8000.0) == near(7000.0)


def test_change_of_the_same_size(path: Path, file: int) -> None:
    """A change that leaves the size as it is ends the quiet time, too."""
    set_age(path, 1000.0)
    quiet = QuietTime(file)
    quiet.since(5000.0)
    with open(path, "r+b") as writer:
        writer.write(b"FOUR")
    assert quiet.since(6000.0) == near(6000.0)


@pytest.mark.parametrize("age", [1000.0, 1e6])
def test_change_that_leaves_the_modification_time(path: Path, file: int, age: float) -> None:
    """A change that only the size shows counts as made after the last look at the file."""
    set_age(path, age)
    before = os.stat(path)
    quiet = QuietTime(file)
    assert quiet.since(5000.0) == near(5000.0 - age)
    quiet.since(5500.0)
    append(path, b"more")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert quiet.since(6000.0) == 5500.0
    assert quiet.since(7000.0) == 5500.0


def test_clock_of_another_machine(path: Path, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system, a file counts as changed at the first look that shows it."""
    monkeypatch.setattr("tailsrv.supervisor.sealing.is_local", lambda _: False)
    set_age(path, 1000.0)
    quiet = QuietTime(file)
    assert quiet.since(5000.0) == 5000.0
    assert quiet.since(5100.0) == 5000.0
    append(path, b"more")
    set_age(path, 1e6)
    assert quiet.since(6000.0) == 6000.0


def test_file_that_cannot_be_examined(path: Path) -> None:
    """A file whose server does not answer any more counts as changed, but only once."""
    with opened(path) as file:
        quiet = QuietTime(file)
        assert quiet.since(5000.0) <= 5000.0
    assert quiet.since(8000.0) == 8000.0
    assert quiet.since(9000.0) == 8000.0
