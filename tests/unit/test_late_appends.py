"""Tests of the count of bytes that are appended too late for the streams of a file."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.files import append
from tailsrv.config import Timing
from tailsrv.linux.event_loop import EventLoop
from tailsrv.supervisor.late_appends import LateAppends

TIMING = Timing()


class LateBench:
    """A file that has been rotated away, and a clock that the test sets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"old")
        self.time = 100.0
        self.loop = EventLoop(lambda: self.time)
        self.late = LateAppends(self.loop, "log", TIMING)

    def begin(self) -> None:
        """Rotate the file away."""
        file = os.open(self.path, os.O_RDONLY)
        self.late.begin(file, polling=False)
        os.close(file)

    def run(self, seconds: float) -> None:
        """Advance the clock, and run the timers that are due."""
        end = self.time + seconds
        while (left := self.loop.timeout()) is not None and self.time + left <= end:
            self.time += left
            self.loop.now = self.time
            self.loop.timers.run(self.time)
        self.time = self.loop.now = end


@pytest.fixture
def bench(path: Path) -> Iterator[LateBench]:
    """Give a bench with a file of three bytes."""
    bench = LateBench(path)
    yield bench
    bench.late.close()
    bench.loop.epoll.close()


def logged_bytes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the numbers of bytes in the log."""
    return [
        word
        for record in caplog.records
        for word in record.getMessage().split()
        if word.startswith("bytes=")
    ]


def test_nothing_is_late(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that are appended before the workers stop sending are not late, and not logged."""
    bench.begin()
    for _ in range(10):
        bench.run(0.9)
        append(bench.path, b"more")
    bench.run(2 * TIMING.late_patience)
    assert logged_bytes(caplog) == []
    assert bench.loop.timeout() is None


def test_late(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """The first late bytes are logged soon, and the total at the end."""
    bench.begin()
    bench.run(3)
    append(bench.path, b"late\n")
    bench.run(TIMING.late_interval)
    assert logged_bytes(caplog) == ["bytes=5"]
    for _ in range(3):
        append(bench.path, b"later\n")
        bench.run(TIMING.late_interval)
    assert logged_bytes(caplog) == ["bytes=5"]
    bench.run(TIMING.late_patience)
    assert logged_bytes(caplog) == ["bytes=5", "bytes=23"]
    assert bench.loop.timeout() is None


def test_streams_have_ended(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """After the last stream has ended, all appended bytes are late."""
    bench.begin()
    append(bench.path, b"more")
    bench.late.seal()
    append(bench.path, b"late\n")
    bench.run(TIMING.late_interval)
    assert logged_bytes(caplog) == ["bytes=5"]


def test_next_rotation(bench: LateBench, caplog: pytest.LogCaptureFixture) -> None:
    """The next rotation ends the count of the previous one, and leaves no descriptor open."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        bench.begin()
        bench.run(3)
        append(bench.path, b"late\n")
    bench.late.end()
    assert logged_bytes(caplog) == ["bytes=5"] * 3
    assert len(os.listdir("/proc/self/fd")) == before
