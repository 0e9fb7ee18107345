"""The log: one line an event, in a form that the journal and people can read, and never a reason to wait."""

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from unit import run_python

from tailsrv.log import fields, printable, trouble
from tailsrv.syscalls import accept_queue


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain", "plain"),
        ("/var/log/access.log", "/var/log/access.log"),
        ("[::1]:4321", "[::1]:4321"),
        ("lög", "lög"),
        ("", "''"),
        ("two words", "'two words'"),
        ("a=b", "'a=b'"),
        ("it's", '"it\'s"'),
        ('"', "'\"'"),
        ("line\nbreak", "'line\\nbreak'"),
        ("\x1b[2J", "'\\x1b[2J'"),
        ("\udcff", "'\\udcff'"),
        ("\u2028", "'\\u2028'"),
    ],
)
def test_printable(text: str, printed: str) -> None:
    """A value that could break the line, the fields or the terminal is quoted."""
    assert printed == printable(text)


def test_fields() -> None:
    """Fields are told in the order given, and those that are None not at all."""
    assert fields(slot=2, peer=None, reason="not a number", size=0) == "slot=2 reason='not a number' size=0"
    assert fields() == ""


LINES = """
import logging, sys
from tailsrv.log import Limited, logger, set_up
set_up(int(sys.argv[1]))
"""


def log(code: str, verbosity: int = 0) -> list[str]:
    """Return the lines on standard error of a process that logs as `code` says."""
    done = run_python(LINES + code, str(verbosity))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()


ALL_LEVELS = "logger.debug('d'); logger.info('i'); logger.warning('w'); logger.error('e'); logger.critical('c')"


@pytest.mark.parametrize(("verbosity", "words"), [(-1, ["w", "e", "c"]), (0, ["i", "w", "e", "c"]), (1, ["d", "i", "w", "e", "c"])])
def test_verbosity(verbosity: int, words: list[str]) -> None:
    """Quiet shows warnings and worse, and verbose shows everything."""
    assert words == [line.split()[-1] for line in log(ALL_LEVELS, verbosity)]


def test_line_for_people() -> None:
    """On a terminal or in a file, a line has time, process and level, in lower case."""
    [line] = log("logger.warning('file %s', 'gone')")
    assert " warning: file gone" in line
    assert "tailsrv[" in line
    assert line[:4].isdigit()


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Give both ends of a pipe."""
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def journal_of(writer: int) -> dict[str, str]:
    """Return the environment in which `writer` is the journal's socket, as far as systemd.exec(5) says how to tell."""
    status = os.fstat(writer)
    return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


def test_journal_gets_priorities() -> None:
    """The journal gets each line with its priority in front, and adds time and process itself."""
    with pipe() as (reader, writer):
        assert run_python(LINES + ALL_LEVELS, "1", env=journal_of(writer), stderr=writer).returncode == 0
        assert os.read(reader, 4096).decode().splitlines() == ["<7>d", "<6>i", "<4>w", "<3>e", "<2>c"]


def test_journal_gets_one_line_an_event() -> None:
    """A traceback is one line for the journal, which would make an event of each of its own."""
    code = LINES + "try: 1 / 0\nexcept ZeroDivisionError: logger.exception('a fault')"
    with pipe() as (reader, writer):
        assert run_python(code, "0", env=journal_of(writer), stderr=writer).returncode == 0
        line = os.read(reader, 4096).decode()
    assert line.startswith("<3>a fault | Traceback")
    assert line.endswith("ZeroDivisionError: division by zero\n")
    assert line.count("\n") == 1


def test_journal_stream_of_somebody_else() -> None:
    """An inherited $JOURNAL_STREAM that is not our standard error does not count."""
    done = run_python(LINES + "logger.info('i')", "0", env={"JOURNAL_STREAM": "1:1"})
    assert "info: i" in done.stderr
    assert "<6>" not in done.stderr


FILL = """
import os
os.set_blocking(2, False)
try:
    while True:
        os.write(2, bytes(4096))
except BlockingIOError:
    os.set_blocking(2, True)
"""


def test_full_pipe_does_not_block() -> None:
    """When nobody reads standard error the process goes on, and its lines are lost."""
    with pipe() as (reader, writer):
        done = run_python(LINES + FILL + "for _ in range(1000): logger.info('lost')\nprint('still here')", "0", stderr=writer)
        assert (done.returncode, done.stdout) == (0, "still here\n")
        os.set_blocking(reader, False)
        assert not os.read(reader, 1 << 20).strip(b"\0")


def test_pipe_with_room_for_a_page_does_not_block() -> None:
    """A line that is longer than the room that poll(2) promises does not block either."""
    code = LINES + FILL + "os.read(os.open('/proc/self/fd/2', os.O_RDONLY), 4096); logger.info('x' * 20_000); print('still here')"
    with pipe() as (_, writer):
        done = run_python(code, "0", stderr=writer)
        assert (done.returncode, done.stdout) == (0, "still here\n")


def test_long_line_is_whole() -> None:
    """A line of many pages comes as it is where there is room for it."""
    [line] = log("logger.info('x' * 20_000 + 'end')")
    assert line.endswith(": " + "x" * 20_000 + "end")


def test_closed_standard_error() -> None:
    """Without a standard error, or with nobody at its other end, logging does nothing."""
    done = run_python(LINES + "import os; os.close(2); logger.info('i'); print('still here')", "0", stderr=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "still here\n")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run_python(LINES + "logger.info('i'); print('still here')", "0", stderr=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stdout) == (0, "still here\n")


def test_trouble_says_where() -> None:
    """What the kernel has refused is told with the place in our code, if there is one."""
    with socket.socket() as sock:
        pass
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        accept_queue(sock)
    assert re.fullmatch(r"reason='\[Errno 9\] Bad file descriptor' at=syscalls.py:\d+", trouble(caught.value))
    assert trouble(MemoryError()) == "reason='out of memory'"


def test_undecodable_bytes() -> None:
    """A path that is not UTF-8 does not keep its line from being written."""
    [line] = log("logger.info('path %s', 'a\\udcff')")
    assert line.endswith("path a\\udcff")


def test_limited() -> None:
    """What strangers cause is logged so many times an interval, below the level not even counted."""
    code = "say = Limited(logging.WARNING, burst=2, interval=3600)\nfor _ in range(5): say('refused', reason='not a number', peer=None)"
    assert [line.partition("warning: ")[2] for line in log(code)] == ["refused: reason='not a number'"] * 2
    assert log("Limited(logging.DEBUG)('refused')") == []


def test_limited_tells_how_many_were_held_back() -> None:
    """The line after the interval says how many are missing before it."""
    code = """
from tailsrv import log
now = 0.0
log.time = type("Clock", (), {"monotonic": staticmethod(lambda: now)})
say = Limited(logging.WARNING, burst=1, interval=10.0)
for now in (0.0, 1.0, 2.0, 10.0, 20.0): say("refused", peer="x")
"""
    assert [line.partition("warning: ")[2] for line in log(code)] == ["refused: peer=x", "refused: peer=x suppressed=2", "refused: peer=x"]
