"""Tests of the count of bytes that are appended to a segment after it has been sealed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.files import append
from tailsrv.config import Timing
from tailsrv.linux.event_loop import EventLoop
from tailsrv.served_file import ServedFile
from tailsrv.supervisor.late_appends import LateAppends

TIMING = Timing()


class LateBench:
    """Sealed segments, and a clock that the test sets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.time = 100.0
        self.loop = EventLoop(lambda: self.time)
        self.path = folder / "log"
        self.path.touch()
        self.served_file = ServedFile(str(self.path))
        assert self.served_file.open()
        self.late = LateAppends(self.loop, self.served_file, TIMING)
        self.segments: list[int] = []

    def seal(self) -> Path:
        """Seal a segment of three bytes, and return its file."""
        path = self.folder / str(len(self.segments))
        path.write_bytes(b"old")
        self.segments.append(os.open(path, os.O_RDONLY))
        self.late.begin(self.segments[-1], 3, owned=False)
        return path

    def leave(self, path: Path, data: bytes = b"") -> int:
        """Let the log leave a file of `data` that is not in it, and return its descriptor."""
        path.write_bytes(data)
        file = os.open(path, os.O_RDONLY)
        self.late.begin(file, len(data), owned=True)
        return file

    def run(self, seconds: float) -> None:
        """Advance the clock, and run the timers that are due."""
        end = self.time + seconds
        while (left := self.loop.timeout()) is not None and self.time + left <= end:
            self.time += left
            self.loop.now = self.time
            self.loop.timers.run(self.time)
        self.time = self.loop.now = end

    def close(self) -> None:
        """Close the files."""
        assert self.served_file.file is not None
        for file in (*self.segments, self.served_file.file):
            os.close(file)
        self.loop.epoll.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[LateBench]:
    """Give a bench without a segment."""
    bench = LateBench(tmp_path)
    yield bench
    bench.close()


def logged_bytes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the numbers of bytes in the log."""
    return [
        word
        for record in caplog.records
        for word in record.getMessage().split()
        if word.startswith("bytes=")
    ]


def test_nothing_is_late(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """A segment that nothing is appended to is polled for a while, and not logged."""
    bench.seal()
    bench.run(TIMING.late_patience - TIMING.late_interval)
    assert bench.loop.timeout() is not None
    bench.run(2 * TIMING.late_interval)
    assert bench.loop.timeout() is None
    assert logged_bytes(caplog) == []


def test_late_bytes_that_stop(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """When the late bytes do not become more, their number is logged once, and polling ends."""
    path = bench.seal()
    for _ in range(3):
        append(path, b"late\n")
        bench.run(TIMING.late_interval)
        assert logged_bytes(caplog) == []
    bench.run(TIMING.late_interval)
    assert logged_bytes(caplog) == ["bytes=15"]
    assert bench.loop.timeout() is None
    append(path, b"later\n")
    bench.run(TIMING.late_patience)
    assert logged_bytes(caplog) == ["bytes=15"]


def test_late_bytes_without_end(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """A writer that never reopens its log causes one warning, when polling ends."""
    path = bench.seal()
    polls = 0
    while bench.loop.timeout() is not None:
        assert logged_bytes(caplog) == []
        append(path, b"late\n")
        polls += 1
        bench.run(TIMING.late_interval)
    assert polls == TIMING.late_patience / TIMING.late_interval
    assert logged_bytes(caplog) == [f"bytes={5 * polls}"]


def test_segment_that_is_closed(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """The late bytes of a segment that is closed are logged then, and it is not polled again."""
    path, other = bench.seal(), bench.seal()
    append(path, b"late\n")
    append(other, b"others\n")
    bench.late.end(bench.segments[0])
    assert logged_bytes(caplog) == ["bytes=5"]
    append(path, b"later\n")
    bench.run(TIMING.late_patience)
    assert logged_bytes(caplog) == ["bytes=5", "bytes=7"]


def test_unknown_segment(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """A segment that was sealed long ago, or became shorter, is closed without a warning."""
    path, other = bench.seal(), bench.seal()
    os.truncate(other, 0)
    bench.run(TIMING.late_patience)
    append(path, b"very late\n")
    for file in bench.segments:
        bench.late.end(file)
    assert logged_bytes(caplog) == []


def test_each_segment_has_its_own_time(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """Segments that were sealed one after another are polled for the same time each."""
    first = bench.seal()
    bench.run(TIMING.late_patience / 2)
    second = bench.seal()
    bench.run(TIMING.late_patience / 2)
    append(first, b"too late\n")
    append(second, b"late\n")
    bench.run(TIMING.late_patience)
    assert logged_bytes(caplog) == ["bytes=5"]
    assert bench.loop.timeout() is None


@pytest.mark.parametrize("data", [b"", b"data\n"])
@pytest.mark.parametrize("late", [b"", b"late\n"])
def test_file_that_is_not_in_the_log(
    bench: LateBench, caplog: pytest.LogCaptureFixture, data: bytes, late: bytes
) -> None:
    """It is closed when its time is over, and later files have later modification times."""
    path = bench.folder / "other"
    file = bench.leave(path, data)
    bench.run(TIMING.late_interval)
    append(path, late)
    while bench.loop.timeout() is not None:
        assert bench.late.owned == [file]
        assert os.fstat(file).st_size == len(data + late)
        bench.run(TIMING.late_interval)
    assert bench.late.owned == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    assert logged_bytes(caplog) == (["bytes=5"] if late else [])
    assert bench.late.since == path.stat().st_mtime_ns + 1


def test_file_that_is_not_in_the_log_during_a_rotation(bench: LateBench) -> None:
    """It stays open as long as there may be a next file: that one may have been changed before."""
    bench.path.rename(bench.folder / "log.1")
    file = bench.leave(bench.folder / "other", b"data\n")
    bench.run(2 * TIMING.late_patience)
    assert bench.late.owned == [file]
    assert bench.late.since == 0
    (bench.folder / "log.1").rename(bench.path)
    bench.run(TIMING.late_interval)
    assert bench.late.owned == []
    assert bench.late.since > 0


def test_upgrade(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """The next version of the program goes on to count, and logs no number twice."""
    first, second = bench.seal(), bench.seal()
    other = bench.folder / "other"
    file = bench.leave(other)
    append(first, b"late\n")
    append(other, b"other\n")
    bench.run(2 * TIMING.late_interval)
    append(second, b"later\n")
    saved = json.loads(json.dumps(bench.late.save()))
    bench.loop.epoll.close()
    bench.loop = EventLoop(lambda: bench.time)
    bench.loop.now = bench.time
    bench.late = LateAppends(bench.loop, bench.served_file, TIMING)
    bench.late.load(saved)
    assert bench.late.owned == [file]
    bench.run(TIMING.late_patience)
    assert logged_bytes(caplog) == ["bytes=5", "bytes=6", "bytes=6"]
    assert bench.late.owned == []


def test_empty_segment_that_is_deleted(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """The deleted file of an empty segment is closed soon, and its late bytes are logged."""
    path = bench.folder / "empty"
    file = bench.leave(path)
    append(path, b"late\n")
    path.unlink()
    bench.run(TIMING.late_interval)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    assert bench.loop.timeout() is None
    assert logged_bytes(caplog) == ["bytes=5"]


def test_close_in_child(bench: LateBench) -> None:
    """A child closes the files of empty segments only: the others belong to the log."""
    bench.seal()
    empty = bench.leave(bench.folder / "empty")
    bench.late.close_in_child()
    assert os.fstat(bench.segments[0]).st_size == 3
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(empty)


def test_rolls_in_quick_succession(bench: LateBench) -> None:
    """A segment is polled in time also if others are sealed more often than that."""
    path = bench.folder / "empty"
    bench.leave(path)
    for _ in range(int(2 * TIMING.late_patience / (TIMING.late_interval - 1))):
        bench.seal()
        bench.run(TIMING.late_interval - 1)
    # Another file may have got its descriptor.
    assert str(path) not in {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
