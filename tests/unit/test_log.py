"""The log: one line an event, in a form that the journal and people can read, and never a reason to wait."""

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
    """Fields are told in the order given, and those that are None not at all."""
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
    """Return the lines on standard error of a process that logs as `code` says."""
    done = run_python(LINES + code, str(verbosity))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()


ALL_LEVELS = "logger.debug('d'); logger.info('i'); logger.warning('w'); logger.error('e'); logger.critical('c')"


@pytest.mark.parametrize(
    ("verbosity", "words"),
    [(-1, ["w", "e", "c"]), (0, ["i", "w", "e", "c"]), (1, ["d", "i", "w", "e", "c"])],
)
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


def test_full_pipe_does_not_block() -> None:
    """When nobody reads standard error the process goes on, and its lines are lost."""
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
    """A line that is longer than the room that poll(2) promises does not block either."""
    with pipe() as (reader, writer):
        fill_pipe(writer)
        os.read(reader, 4096)
        done = run_python(
            LINES + "logger.info('x' * 20_000); print('still here')", "0", stderr=writer
        )
        assert (done.returncode, done.stdout) == (0, "still here\n")


# Where nobody reads what is written, it may never be waited for, whatever it is.

HUNDRED = "for _ in range(100): logger.info('line ' + 100 * 'x')\nprint('still here')"


def log_to(stderr: int, code: str = HUNDRED, wrapper: Sequence[str] = ()) -> None:
    """Assert that a process logs as `code` says, and goes on, and that it leaves the flags of `stderr` as they are."""
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
    """Ctrl-S stops the output, not the process."""
    with terminal() as (_, slave):
        termios.tcflow(slave, termios.TCOOFF)
        log_to(slave)


@pytest.mark.parametrize("room", [0, 1, 2, 100, 200])
def test_terminal_that_nobody_reads(room: int) -> None:
    """A terminal with room for a part of a line takes what it has room for."""
    with terminal() as (_, slave):
        fill(slave, room)
        log_to(slave)


def test_terminal_that_is_read() -> None:
    """A terminal gets every line, each whole."""
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
    """Give both ends of a terminal or pipe of root's, which nobody else may open, as after su(1)."""
    if os.geteuid() != 0 or not runs(*AS_NOBODY, sys.executable, "-c", "import tailsrv.log"):
        pytest.skip("there must be two users, both of whom can run this")
    with terminal() if kind == "terminal" else pipe() as (reader, writer):
        os.fchmod(writer, 0o600)
        yield reader, writer


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_what_may_not_be_opened_again(kind: str) -> None:
    """A terminal or pipe of another user gets every line as well, and is not waited for."""
    with of_another_user(kind) as (reader, writer):
        log_to(writer, "for _ in range(2): logger.info('read')\nprint('still here')", AS_NOBODY)
        os.set_blocking(reader, False)
        lines = b""

        def look() -> bool:
            nonlocal lines
            with suppress(BlockingIOError):
                lines += os.read(reader, 4096)
            return lines.count(b"info: read") == 2

        eventually(look)
        log_to(writer, HUNDRED.replace("100)", "2000)"), AS_NOBODY)


@pytest.mark.thorough
def test_relay_ends_with_those_who_write() -> None:
    """The process that waits for another user's terminal holds nothing else open, and goes when all is written."""
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
    """A socket, such as the journal's, is written to until it is full."""
    reader, writer = socket.socketpair(socket.AF_UNIX, kind)
    with reader, writer:
        log_to(writer.fileno(), HUNDRED.replace("100)", "2000)"))
        assert b"info: line x" in reader.recv(200)


def test_pipe_that_others_fill() -> None:
    """Several processes that write to one full pipe do not wait either."""
    code = "import os\nfor _ in range(4): os.fork()\n" + HUNDRED.replace(
        "print('still here')", "os._exit(0)"
    )
    with pipe() as (_, writer):
        log_to(
            writer,
            f"import os\nif os.fork() == 0:\n{textwrap.indent(code, ' ')}\nos.wait()\nprint('still here')",
        )


def test_background_of_a_terminal_that_stops_it() -> None:
    """With `stty tostop`, a line from the background comes, and does not stop the process."""
    pid, master = pty.fork()
    # the terminal's foreground; what it starts is in the background
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
    said = b""
    # EIO: all who had the terminal are gone
    with suppress(OSError):
        while some := os.read(master, 4096):
            said += some
    os.close(master)
    assert os.waitpid(pid, 0)[1] == 0, said
    assert b"info: i" in said


def test_fault_of_ours_is_a_line_of_the_log() -> None:
    """An exception that nobody catches goes the way of all lines, with its traceback, and the status is as ever."""
    done = run_python(LINES + "1 / 0", "0")
    assert done.returncode == 1
    first, *_, last = done.stderr.splitlines()
    assert (
        "critical: internal error, the process exits: reason=\"ZeroDivisionError('division by zero')\""
        in first
    )
    assert last == "ZeroDivisionError: division by zero"


def test_fault_in_a_destructor_is_a_line_of_the_log() -> None:
    """The same for an exception in a destructor, which nobody can catch."""
    [line] = log("class Odd:\n    def __del__(self): 1 / 0\nOdd()")
    assert "error: internal error while an object was destroyed: " in line


def test_long_line_is_whole() -> None:
    """A line of many pages comes as it is where there is room for it."""
    [line] = log("logger.info('x' * 20_000 + 'end')")
    assert line.endswith(": " + "x" * 20_000 + "end")


def test_closed_standard_error() -> None:
    """Without a standard error, or with nobody at its other end, logging does nothing."""
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
    """Where there is no /proc, through which a pipe could be opened again, lines are written to it all the same."""
    if not runs(*NO_PROC, sys.executable, "-c", ""):
        pytest.skip("a mount namespace cannot be had")
    code = "from tailsrv.log import logger, set_up; set_up(0); logger.info('first'); logger.info('second')"
    command = [*NO_PROC, "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE
    )
    assert [line.rpartition(" ")[2] for line in done.stderr.splitlines()] == ["first", "second"]


def test_trouble_says_where() -> None:
    """What the kernel has refused is told with the place in our code, if there is one."""
    with socket.socket() as sock:
        pass
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        accept_queue(sock)
    assert re.fullmatch(
        r"reason='\[Errno 9\] Bad file descriptor' at=linux/sockets.py:\d+",
        describe_error(caught.value),
    )
    assert describe_error(MemoryError()) == "reason='out of memory'"


def test_trouble_says_where_in_a_package() -> None:
    """A place in a folder below that of our modules is one of ours, too; one beside it is not."""
    folder = os.path.dirname(tailsrv.__file__)
    for filename, said in (
        (f"{folder}/room/module.py", " at=room/module.py:1"),
        (f"{folder}-more/module.py", ""),
    ):
        with pytest.raises(OSError, match="refused") as caught:
            exec(compile("raise OSError('refused')", filename, "exec"))
        assert describe_error(caught.value) == f"reason=refused{said}"


def test_undecodable_bytes() -> None:
    """A path that is not UTF-8 does not keep its line from being written."""
    [line] = log("logger.info('path %s', 'a\\udcff')")
    assert line.endswith("path a\\udcff")


def test_limited() -> None:
    """What strangers cause is logged so many times an interval, below the level not even counted."""
    code = "say = RateLimited(logging.WARNING, burst=2, interval=3600)\nfor _ in range(5): say('refused', reason='not a number', peer=None)"
    assert [line.partition("warning: ")[2] for line in log(code)] == [
        "refused: reason='not a number'"
    ] * 2
    assert log("RateLimited(logging.DEBUG)('refused')") == []


def test_limited_tells_how_many_were_held_back() -> None:
    """The line after the interval says how many are missing before it."""
    done = run_program("limited_lines")
    assert [line.partition("warning: ")[2] for line in done.stderr.splitlines()] == [
        "refused: peer=x",
        "refused: peer=x suppressed=2",
        "refused: peer=x",
    ]


def test_allowance() -> None:
    """So many pass in an interval; the first that passes in a later one learns how many were held back."""
    allowance = RateLimit(burst=2, interval=10.0)
    assert [allowance.ask(now) for now in (100.0, 101.0, 102.0, 109.9)] == [0, 0, None, None]
    assert [allowance.ask(now) for now in (110.0, 110.0, 110.0)] == [2, 0, None]
    assert [allowance.ask(now) for now in (500.0, 600.0)] == [1, 0]


@given(st.integers(1, 5), st.lists(st.floats(0, 30), max_size=50))
def test_allowance_counts_everything(burst: int, pauses: list[float]) -> None:
    """Each is let through or told of as held back later, and never more than twice the burst pass in one interval."""
    allowance, now = RateLimit(burst, 10.0), 0.0
    passed, told, held = list[float](), 0, 0
    for pause in pauses:
        now += pause
        answer = allowance.ask(now)
        if answer is None:
            held += 1
        else:
            passed.append(now)
            told += answer
            assert held == told
    assert len(pauses) == len(passed) + held
    assert all(sum(then <= time < then + 10.0 for time in passed) <= 2 * burst for then in passed)
