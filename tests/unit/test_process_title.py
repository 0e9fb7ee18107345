"""Tests of process titles: how often they change, and the space for them."""

import sys
from collections.abc import Iterator

import pytest
from setproctitle import getproctitle, setproctitle

from support.interpreter import run_program
from tailsrv.linux.event_loop import Timers
from tailsrv.linux.process_title import ProcessTitle


class Process:
    """A process with a title, whose text is set by the test."""

    def __init__(self) -> None:
        self.timers = Timers()
        self.text = "one"
        self.title = ProcessTitle(self.timers, self.render)

    def render(self) -> str:
        return f"tailsrv: test {self.text}"

    def change(self, text: str, now: float) -> None:
        """Change the text at this time, and run the timers as a loop does."""
        self.text = text
        self.title.changed(now)
        self.timers.run(now)


@pytest.fixture
def process() -> Iterator[Process]:
    """Give a process with a title, and restore the title of this process afterwards."""
    before = getproctitle()
    yield Process()
    setproctitle(before)


def test_first_title_at_once(process: Process) -> None:
    """The first title is set at once, and no timer runs while nothing changes."""
    process.change("one", 100.0)
    assert getproctitle() == "tailsrv: test one"
    assert process.timers.timeout(100.0) is None


def test_at_most_one_a_second(process: Process) -> None:
    """Changes within a second are shown once at its end, with the latest text."""
    process.change("one", 100.0)
    for number in range(50):
        process.change(f"number {number}", 100.1 + number / 100)
    assert getproctitle() == "tailsrv: test one"
    assert pytest.approx(process.timers.timeout(100.0)) == 1.0
    process.timers.run(100.99)
    assert getproctitle() == "tailsrv: test one"
    process.timers.run(101.0)
    assert getproctitle() == "tailsrv: test number 49"
    assert process.timers.timeout(101.0) is None


def test_the_interval_counts_from_the_last_one_shown(process: Process) -> None:
    """The next second starts when a delayed title is shown."""
    process.change("one", 100.0)
    process.change("two", 100.5)
    process.timers.run(101.0)
    process.change("three", 101.5)
    assert getproctitle() == "tailsrv: test two"
    assert pytest.approx(process.timers.timeout(101.5)) == 0.5
    process.timers.run(102.0)
    assert getproctitle() == "tailsrv: test three"


def test_unchanged_title_is_not_set(process: Process) -> None:
    """An unchanged title is not set again, and sets no timer."""
    process.change("one", 100.0)
    setproctitle("tailsrv: set by another program")
    process.change("one", 200.0)
    assert getproctitle() == "tailsrv: set by another program"
    process.change("one", 200.5)
    assert process.timers.timeout(200.5) is None


def test_after_a_quiet_time_at_once(process: Process) -> None:
    """A change after more than a second without one is shown at once."""
    process.change("one", 100.0)
    process.change("two", 105.0)
    assert getproctitle() == "tailsrv: test two"


def test_title_space_is_not_inherited() -> None:
    """Programs that are started later do not get the variable that makes space for the title."""
    # coverage.py's variables would change what execve(2) gets.
    done = run_program(
        "room_for_title",
        sys.executable,
        env={"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "PATH=" in done.stdout
    assert "TAILSRV_TITLE_ROOM" not in done.stdout
    assert int(done.stdout.splitlines()[-1]) == 100_000


def test_no_space_for_the_title() -> None:
    """If the program cannot be executed again, it runs with a shortened title."""
    done = run_program("room_for_title", "/nonexistent")
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.splitlines()[-1]) < 100_000
