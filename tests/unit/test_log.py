"""Tests of the log: one line for each event, readable, and written without blocking."""

import fcntl
import os
import pty
import re
import socket
import subprocess
import sys
import termios
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tailsrv
from support.checkout import ROOT
from support.interpreter import program, run_program, run_python
from support.processes import AS_NOBODY, gone, runs, title
from support.terminals import fill, fill_pipe, terminal
from support.waiting import DEADLINE, eventually
from tailsrv.linux.sockets import accept_queue
from tailsrv.log import RateLimit, describe_error, fields, printable


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
    """Fields are written in the order given, and those that are None are left out."""
    assert (
        fields(slot=2, peer=None, reason="not a number", size=0)
        == "slot=2 reason='not a number' size=0"
    )
    assert fields() == ""


LINES = """
import logging, sys
from tailsrv.log import RateLimited, logger, set_up
set_up(int(sys.argv[1]))
"""


def log(code: str, verbosity: int = 0) -> list[str]:
    """Return the lines on standard error of a process that runs `code`."""
    done = run_python(LINES + code, str(verbosity))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()


ALL_LEVELS = (
    "logger.debug('d'); logger.info('i'); logger.warning('w'); logger.error('e'); "
    "logger.critical('c')"
)


@pytest.mark.parametrize(
    ("verbosity", "words"),
    [(-1, ["w", "e", "c"]), (0, ["i", "w", "e", "c"]), (1, ["d", "i", "w", "e", "c"])],
)
def test_verbosity(verbosity: int, words: list[str]) -> None:
    """Quiet shows warnings and errors only, and verbose shows everything."""
    assert words == [line.split()[-1] for line in log(ALL_LEVELS, verbosity)]


def test_line_for_a_terminal_or_file() -> None:
    """On a terminal or in a file, a line has the time, the process and the level in lower case."""
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
    """Return an environment that declares `writer` the journal's socket, as in systemd.exec(5)."""
    status = os.fstat(writer)
    return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


def test_journal_gets_priorities() -> None:
    """For the journal a line starts with its priority, and has neither time nor process."""
    with pipe() as (reader, writer):
        assert (
            run_python(LINES + ALL_LEVELS, "1", env=journal_of(writer), stderr=writer).returncode
            == 0
        )
        assert os.read(reader, 4096).decode().splitlines() == [
            "<7>d",
            "<6>i",
            "<4>w",
            "<3>e",
            "<2>c",
        ]


def test_journal_gets_one_line_per_event() -> None:
    """A traceback is one line for the journal, which makes an event of each line."""
    code = LINES + "try: 1 / 0\nexcept ZeroDivisionError: logger.exception('a fault')"
    with pipe() as (reader, writer):
        assert run_python(code, "0", env=journal_of(writer), stderr=writer).returncode == 0
        line = os.read(reader, 4096).decode()
    assert line.startswith("<3>a fault | Traceback")
    assert line.endswith("ZeroDivisionError: division by zero\n")
    assert line.count("\n") == 1


def test_foreign_journal_stream_is_ignored() -> None:
    """$JOURNAL_STREAM is ignored if it does not name standard error."""
    done = run_python(LINES + "logger.info('i')", "0", env={"JOURNAL_STREAM": "1:1"})
    assert "info: i" in done.stderr
    assert "<6>" not in done.stderr


def test_full_pipe_does_not_block() -> None:
    """A full pipe that is not read does not block the process, and its lines are lost."""
    with pipe() as (reader, writer):
        fill_pipe(writer)
        done = run_python(
            LINES + "for _ in range(1000): logger.info('lost')\nprint('still here')",
            "0",
            stderr=writer,
        )
        assert (done.returncode, done.stdout) == (0, "still here\n")
        os.set_blocking(reader, False)
        assert not os.read(reader, 1 << 20).strip(b"\0")


def test_pipe_with_room_for_a_page_does_not_block() -> None:
    """A line longer than the space that poll(2) guarantees does not block."""
    with pipe() as (reader, writer):
        fill_pipe(writer)
        os.read(reader, 4096)
        done = run_python(
            LINES + "logger.info('x' * 20_000); print('still here')", "0", stderr=writer
        )
        assert (done.returncode, done.stdout) == (0, "still here\n")


# A process must not wait for its standard error to be read, whatever kind of file that is.

HUNDRED = "for _ in range(100): logger.info('line ' + 100 * 'x')\nprint('still here')"


def log_to(stderr: int, code: str = HUNDRED, wrapper: Sequence[str] = ()) -> None:
    """Assert that a process logs without blocking, and leaves the flags of `stderr` unchanged."""
    flags = fcntl.fcntl(stderr, fcntl.F_GETFL)
    command = [*wrapper, sys.executable, "-W", "error", "-c", LINES + code, "0"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=DEADLINE,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (0, "still here\n")
    assert fcntl.fcntl(stderr, fcntl.F_GETFL) == flags


def test_terminal_that_is_stopped() -> None:
    """A terminal stopped with Ctrl-S does not block the process."""
    with terminal() as (_, slave):
        termios.tcflow(slave, termios.TCOOFF)
        log_to(slave)


@pytest.mark.parametrize("room", [0, 1, 2, 100, 200])
def test_terminal_that_is_not_read(room: int) -> None:
    """A full terminal that is not read does not block, whatever part of a line still fits."""
    with terminal() as (_, slave):
        fill(slave, room)
        log_to(slave)


def test_terminal_that_is_read() -> None:
    """A terminal that is read gets every line complete."""
    with terminal() as (master, slave):
        log_to(
            slave, "for number in range(10): logger.info('line %d', number)\nprint('still here')"
        )
        lines = os.read(master, 4096).decode().splitlines()
    assert [line.partition("info: ")[2] for line in lines] == [
        f"line {number}" for number in range(10)
    ]


@contextmanager
def of_another_user(kind: str) -> Iterator[tuple[int, int]]:
    """Give both ends of a terminal or pipe that only root may open, as after su(1)."""
    if os.geteuid() != 0 or not runs(*AS_NOBODY, sys.executable, "-c", "import tailsrv.log"):
        pytest.skip("requires root, and a second user that can run tailsrv")
    with terminal() if kind == "terminal" else pipe() as (reader, writer):
        os.fchmod(writer, 0o600)
        yield reader, writer


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_stderr_that_cannot_be_reopened(kind: str) -> None:
    """A terminal or pipe of another user gets every line, and does not block."""
    with of_another_user(kind) as (reader, writer):
        log_to(writer, "for _ in range(2): logger.info('read')\nprint('still here')", AS_NOBODY)
        os.set_blocking(reader, False)
        lines = b""

        def both_lines_arrived() -> bool:
            nonlocal lines
            with suppress(BlockingIOError):
                lines += os.read(reader, 4096)
            return lines.count(b"info: read") == 2

        eventually(both_lines_arrived)
        log_to(writer, HUNDRED.replace("100)", "2000)"), AS_NOBODY)


@pytest.mark.thorough
def test_relay_ends_with_its_writers() -> None:
    """The relay for another user's terminal holds nothing else open, and ends with its writers."""
    code = "import psutil; print(psutil.Process().children()[0].pid, flush=True); sys.stdin.read()"
    with of_another_user("terminal") as (_, slave):
        command = [*AS_NOBODY, sys.executable, "-c", LINES + code, "0"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=slave, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            relay = int(process.stdout.readline())
            eventually(lambda: sorted(os.listdir(f"/proc/{relay}/fd")) == ["0", "2"])
            assert title(relay) == "tailsrv: log"
        assert process.returncode == 0
        eventually(lambda: gone(relay))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_full_socket_does_not_block(kind: socket.SocketKind) -> None:
    """A socket, such as the journal's, is written to until it is full, and does not block."""
    reader, writer = socket.socketpair(socket.AF_UNIX, kind)
    with reader, writer:
        log_to(writer.fileno(), HUNDRED.replace("100)", "2000)"))
        assert b"info: line x" in reader.recv(200)


def test_pipe_that_others_fill() -> None:
    """Several processes that write to one full pipe do not block."""
    code = "import os\nfor _ in range(4): os.fork()\n" + HUNDRED.replace(
        "print('still here')", "os._exit(0)"
    )
    with pipe() as (_, writer):
        log_to(
            writer,
            f"import os\nif os.fork() == 0:\n{textwrap.indent(code, ' ')}\n"
            "os.wait()\nprint('still here')",
        )


def test_background_of_a_terminal_that_stops_it() -> None:
    """With `stty tostop`, a background process writes its line and is not stopped."""
    pid, master = pty.fork()
    # This process is in the foreground of the terminal; the program that it starts is in the
    # background.
    if pid == 0:
        os.execv(
            sys.executable,
            [
                sys.executable,
                program("background_of_stopping_terminal"),
                LINES + "logger.info('i')",
                "0",
            ],
        )
    output = b""
    # EIO: every process of this terminal has ended.
    with suppress(OSError):
        while chunk := os.read(master, 4096):
            output += chunk
    os.close(master)
    assert os.waitpid(pid, 0)[1] == 0, output
    assert b"info: i" in output


def test_uncaught_exception_is_logged() -> None:
    """An uncaught exception is logged with its traceback, and the exit status is 1."""
    done = run_python(LINES + "1 / 0", "0")
    assert done.returncode == 1
    first, *_, last = done.stderr.splitlines()
    assert (
        "critical: internal error, the process exits: "
        "reason=\"ZeroDivisionError('division by zero')\"" in first
    )
    assert last == "ZeroDivisionError: division by zero"


def test_exception_in_a_destructor_is_logged() -> None:
    """An exception in a destructor is logged as one line."""
    [line] = log("class Odd:\n    def __del__(self): 1 / 0\nOdd()")
    assert "error: internal error while an object was destroyed: " in line


def test_long_line_is_whole() -> None:
    """A line of many pages is written complete if there is space for it."""
    [line] = log("logger.info('x' * 20_000 + 'end')")
    assert line.endswith(": " + "x" * 20_000 + "end")


def test_closed_standard_error() -> None:
    """Logging does nothing if standard error is closed, or if its pipe has no reader."""
    done = run_python(
        LINES + "import os; os.close(2); logger.info('i'); print('still here')",
        "0",
        stderr=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (0, "still here\n")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run_python(LINES + "logger.info('i'); print('still here')", "0", stderr=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stdout) == (0, "still here\n")


NO_PROC = (
    "unshare",
    "--mount",
    "--map-root-user",
    "sh",
    "-c",
    'mount -t tmpfs none /proc && exec "$@"',
    "sh",
)


def test_pipe_without_proc() -> None:
    """Without /proc, through which a pipe is opened again, lines are still written to it."""
    if not runs(*NO_PROC, sys.executable, "-c", ""):
        pytest.skip("a mount namespace cannot be created")
    code = (
        "from tailsrv.log import logger, set_up; set_up(0); "
        "logger.info('first'); logger.info('second')"
    )
    command = [*NO_PROC, "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE
    )
    assert [line.rpartition(" ")[2] for line in done.stderr.splitlines()] == ["first", "second"]


def test_error_names_its_line() -> None:
    """An error from the kernel is described with the line of tailsrv's code, if there is one."""
    with socket.socket() as sock:
        pass
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        accept_queue(sock)
    assert re.fullmatch(
        r"reason='\[Errno 9\] Bad file descriptor' at=linux/sockets.py:\d+",
        describe_error(caught.value),
    )
    assert describe_error(MemoryError()) == "reason='out of memory'"


def test_error_names_its_line_in_a_subpackage() -> None:
    """The line may be in a subpackage of tailsrv, but not in a folder beside tailsrv."""
    folder = os.path.dirname(tailsrv.__file__)
    for filename, location in (
        (f"{folder}/package/module.py", " at=package/module.py:1"),
        (f"{folder}-more/module.py", ""),
    ):
        with pytest.raises(OSError, match="refused") as caught:
            exec(compile("raise OSError('refused')", filename, "exec"))
        assert describe_error(caught.value) == f"reason=refused{location}"


def test_undecodable_bytes() -> None:
    """A path that is not UTF-8 is logged with escapes."""
    [line] = log("logger.info('path %s', 'a\\udcff')")
    assert line.endswith("path a\\udcff")


def test_rate_limited() -> None:
    """Lines that untrusted clients cause are limited, and lines below the level are not counted."""
    code = (
        "warn = RateLimited(logging.WARNING, burst=2, interval=3600)\n"
        "for _ in range(5): warn('refused', reason='not a number', peer=None)"
    )
    assert [line.partition("warning: ")[2] for line in log(code)] == [
        "refused: reason='not a number'"
    ] * 2
    assert log("RateLimited(logging.DEBUG)('refused')") == []


def test_rate_limited_counts_suppressed_lines() -> None:
    """The first line of the next interval tells how many lines were suppressed."""
    done = run_program("limited_lines")
    assert [line.partition("warning: ")[2] for line in done.stderr.splitlines()] == [
        "refused: peer=x",
        "refused: peer=x suppressed=2",
        "refused: peer=x",
    ]


def test_rate_limit() -> None:
    """Each interval allows a burst; its first line gets the number suppressed before it."""
    limit = RateLimit(burst=2, interval=10.0)
    assert [limit.ask(now) for now in (100.0, 101.0, 102.0, 109.9)] == [0, 0, None, None]
    assert [limit.ask(now) for now in (110.0, 110.0, 110.0)] == [2, 0, None]
    assert [limit.ask(now) for now in (500.0, 600.0)] == [1, 0]


@given(st.integers(1, 5), st.lists(st.floats(0, 30), max_size=50))
def test_rate_limit_counts_everything(burst: int, pauses: list[float]) -> None:
    """Every line passes or is counted as suppressed, with at most two bursts in an interval."""
    limit, now = RateLimit(burst, 10.0), 0.0
    passed, reported, suppressed = list[float](), 0, 0
    for pause in pauses:
        now += pause
        answer = limit.ask(now)
        if answer is None:
            suppressed += 1
        else:
            passed.append(now)
            reported += answer
            assert suppressed == reported
    assert len(pauses) == len(passed) + suppressed
    assert all(sum(then <= time < then + 10.0 for time in passed) <= 2 * burst for then in passed)
