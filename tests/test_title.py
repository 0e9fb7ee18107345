"""Process titles: their words, and how often they change."""

import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers import TAILSRV, Serve, activated, append, eventually, expect, run_tailsrv, title
from setproctitle import getproctitle, setproctitle
from unit import run_python

from tailsrv.config import MAX_CLIENTS, MAX_WORKERS
from tailsrv.formatting import counted
from tailsrv.linux.event_loop import Timers
from tailsrv.linux.process_title import Title
from tailsrv.titles import longest_title, service_status, supervisor_title, worker_title


@pytest.mark.parametrize(("number", "words"), [(0, "0 clients"), (1, "1 client"), (2, "2 clients"), (1000, "1000 clients")])
def test_counted(number: int, words: str) -> None:
    """One is singular, and nothing else is."""
    assert words == counted(number, "client")


@pytest.mark.parametrize(
    ("endpoints", "path", "state", "workers", "clients", "title"),
    [
        (["*:4321"], "/log", "", 4, 137, "tailsrv: supervisor *:4321 /log [4 workers, 137 clients]"),
        (["*:4321"], "/log", "", 1, 1, "tailsrv: supervisor *:4321 /log [1 worker, 1 client]"),
        (["*:4321"], "/log", "starting", 1, 0, "tailsrv: supervisor *:4321 /log [starting]"),
        (["*:4321"], "/log", "waiting for file", 0, 0, "tailsrv: supervisor *:4321 /log [waiting for file]"),
        (["*:4321"], "/log", "draining", 2, 1, "tailsrv: supervisor *:4321 /log [draining, 2 workers, 1 client]"),
        (["127.0.0.1:1", "[::1]:1"], "/log", "", 1, 0, "tailsrv: supervisor 127.0.0.1:1,[::1]:1 /log [1 worker, 0 clients]"),
        (["*:1"], "a b", "", 1, 0, "tailsrv: supervisor *:1 a b [1 worker, 0 clients]"),
        (["*:1"], "a\nb", "", 1, 0, "tailsrv: supervisor *:1 'a\\nb' [1 worker, 0 clients]"),
        (["*:1"], "a\udcff", "", 1, 0, "tailsrv: supervisor *:1 'a\\udcff' [1 worker, 0 clients]"),
        (["*:1"], "/lög", "", 1, 0, "tailsrv: supervisor *:1 /lög [1 worker, 0 clients]"),
    ],
)
def test_supervisor_title(endpoints: list[str], path: str, state: str, workers: int, clients: int, title: str) -> None:
    """The supervisor's title says where, what and how it does, on one line that can be encoded."""
    assert title == supervisor_title(endpoints, path, state, workers, clients)
    assert title.encode().decode().isprintable()


@pytest.mark.parametrize(
    ("slot", "state", "clients", "title"),
    [
        (2, "", 35, "tailsrv: worker 2 *:4321 [35 clients]"),
        (0, "", 1, "tailsrv: worker 0 *:4321 [1 client]"),
        (0, "starting", 0, "tailsrv: worker 0 *:4321 [starting]"),
        (1, "draining", 3, "tailsrv: worker 1 *:4321 [draining, 3 clients]"),
    ],
)
def test_worker_title(slot: int, state: str, clients: int, title: str) -> None:
    """A worker's title names its slot and its clients."""
    assert title == worker_title(slot, ["*:4321"], state, clients)


class Process:
    """What a Title shows: the state is set by the test."""

    def __init__(self) -> None:
        self.timers = Timers()
        self.text = "one"
        self.title = Title(self.timers, self.render)

    def render(self) -> str:
        return f"tailsrv: test {self.text}"

    def change(self, text: str, now: float) -> None:
        """Have something new to show at that time, as a loop does that runs its timers afterwards."""
        self.text = text
        self.title.changed(now)
        self.timers.run(now)


@pytest.fixture
def process() -> Iterator[Process]:
    """Give a process with a title, and have the title of this one back afterwards."""
    before = getproctitle()
    yield Process()
    setproctitle(before)


def test_first_title_at_once(process: Process) -> None:
    """The first title is there at once, and nothing is planned while nothing changes."""
    process.change("one", 100.0)
    assert getproctitle() == "tailsrv: test one"
    assert process.timers.timeout(100.0) is None


def test_at_most_one_a_second(process: Process) -> None:
    """Changes within a second show once, when it is over, and as they are by then."""
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
    """A change just after a delayed title waits for a second of its own."""
    process.change("one", 100.0)
    process.change("two", 100.5)
    process.timers.run(101.0)
    process.change("three", 101.5)
    assert getproctitle() == "tailsrv: test two"
    assert pytest.approx(process.timers.timeout(101.5)) == 0.5
    process.timers.run(102.0)
    assert getproctitle() == "tailsrv: test three"


def test_nothing_new_is_not_set(process: Process) -> None:
    """A title that would be the same again is not set, and no later look at it is planned."""
    process.change("one", 100.0)
    setproctitle("tailsrv: set by somebody else")
    process.change("one", 200.0)
    assert getproctitle() == "tailsrv: set by somebody else"
    process.change("one", 200.5)
    assert process.timers.timeout(200.5) is None


def test_after_a_quiet_time_at_once(process: Process) -> None:
    """A change after more than a second of quiet shows at once."""
    process.change("one", 100.0)
    process.change("two", 105.0)
    assert getproctitle() == "tailsrv: test two"


@pytest.mark.parametrize(
    ("state", "workers", "clients", "status"),
    [
        ("", 4, 137, "4 workers, 137 clients"),
        ("waiting for file", 0, 0, "waiting for file"),
        ("rotating", 2, 1, "rotating, 2 workers, 1 client"),
    ],
)
def test_service_status(state: str, workers: int, clients: int, status: str) -> None:
    """The service manager shows what the title has in its brackets."""
    assert service_status(state, workers, clients) == status


# Room for it


@pytest.mark.parametrize("state", ["", "starting", "waiting for file", "rotating", "draining"])
@pytest.mark.parametrize("path", ["/log", "/l\xf6g", "a\nb", "a\udcff"])
def test_longest_title(state: str, path: str) -> None:
    """No title of a server, and of its workers, takes more bytes than there is room made for."""
    endpoints = ["127.0.0.1:65535", "[::1]:65535"]
    supervisor = supervisor_title(endpoints, path, state, MAX_WORKERS, MAX_CLIENTS)
    worker = worker_title(MAX_WORKERS - 1, endpoints, state, MAX_CLIENTS)
    assert max(len(supervisor.encode()), len(worker.encode())) <= longest_title(endpoints, path)


LONG = "\n" * 200  # a title writes it with twice as many bytes as the command line has for it
COMMAND = (str(Path(sys.executable).with_name("tailsrv")),)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "name", "variables"),
    [
        (TAILSRV, "log", []),
        (COMMAND, LONG, ["A=b"]),
        # Python sets LC_CTYPE to another value, which lies elsewhere than the first variable did.
        (TAILSRV, "log", ["LC_CTYPE=", "A=b"]),
        (COMMAND, LONG, []),
    ],
)
def test_titles_with_a_small_environment(serve: Serve, tmp_path: Path, program: Sequence[str], name: str, variables: list[str]) -> None:
    """All titles are whole though the environment has no room for them, also after an upgrade."""
    path = tmp_path / name
    path.write_bytes(b"first")
    server = serve(path, "-w", "2", "--bind", "127.0.0.1", wrapper=("env", "-i", *variables), program=program)
    endpoint, shown = f"127.0.0.1:{server.port}", str(path) if str(path).isprintable() else ascii(str(path))
    eventually(lambda: server.title() == f"tailsrv: supervisor {endpoint} {shown} [2 workers, 0 clients]")
    assert [title(pid) for pid in server.workers(2)] == [f"tailsrv: worker {slot} {endpoint} [0 clients]" for slot in (0, 1)]
    client = server.connect(b"0\n")
    expect(client, b"first")
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    append(path, b"second")
    expect(client, b"second")
    eventually(lambda: server.title() == f"tailsrv: supervisor {endpoint} {shown} [2 workers, 1 client]")


@pytest.mark.slow
def test_passed_sockets_live_through_making_room(serve: Serve, tmp_path: Path) -> None:
    """Passed sockets are taken though the program has executed itself to make room for titles."""
    path = tmp_path / LONG
    path.write_bytes(b"first")
    server = serve(path, "-p", "", wrapper=("env", "-i", *activated("tcp4")))
    expect(server.connect(b"0\n"), b"first")
    eventually(lambda: server.title() == f"tailsrv: supervisor 127.0.0.1:{server.port} {str(path)!a} [1 worker, 1 client]")


ROOM = """
import os, sys
from setproctitle import getproctitle, setproctitle
getproctitle()
from tailsrv.linux.process_title import make_room
make_room(100_000, {executable}, sys.orig_argv)
os.system("env")
setproctitle("y" * 100_000)
print(len(getproctitle()))
"""


def test_room_is_not_handed_on() -> None:
    """Programs that are started later do not get the variable that makes the room."""
    done = run_python(
        ROOM.format(executable="sys.executable"), env={"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}
    )  # it changes what execve(2) gets
    assert done.returncode == 0, done.stderr
    assert "PATH=" in done.stdout
    assert "TAILSRV_TITLE_ROOM" not in done.stdout
    assert int(done.stdout.splitlines()[-1]) == 100_000


def test_no_room_can_be_made() -> None:
    """Where the program cannot be executed again, it goes on, and its title is cut."""
    done = run_python(ROOM.format(executable="'/nonexistent'"))
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.splitlines()[-1]) < 100_000


@pytest.mark.parametrize("arguments", [("--version",), ("--no-such-option",)])
def test_what_needs_no_title(arguments: Sequence[str]) -> None:
    """A small environment changes nothing for a program that ends at once."""
    small, usual = run_tailsrv(*arguments, wrapper=("env", "-i", "COLUMNS=100")), run_tailsrv(*arguments, wrapper=("env", "COLUMNS=100"))
    assert (small.returncode, small.stdout, small.stderr) == (usual.returncode, usual.stdout, usual.stderr)
