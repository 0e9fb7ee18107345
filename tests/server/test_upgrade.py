"""Upgrade in place: the program is replaced under its own pid, and no client notices."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import tailsrv
from support.files import append, random_bytes
from support.load import loaded
from support.processes import forked_children, gone, open_descriptors, stop
from support.server import HURRIED, TAILSRV, Serve, Server
from support.sockets import connect, expect, expect_eof, recv_exactly
from support.status import await_clients, ready_workers, status
from support.strace import needs_strace, strace
from support.waiting import DEADLINE, eventually

pytestmark = pytest.mark.slow

DATA = random_bytes(12 << 20)
SMALL = DATA[:1000]
NEWS = b"appended later, by somebody else"


class Installed:
    """A tailsrv of its own, installed in a folder, for the test to replace."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "tailsrv"
        self.package.mkdir(parents=True)
        self.install(tailsrv.__version__)
        # The folder of the tests is the current one, and `python -m` would find the package beside it first.
        here = ("env", "-C", str(folder), "PYTHONDONTWRITEBYTECODE=1")
        self.program, self.hurried = (*here, *TAILSRV), (*here, *HURRIED)

    def install(self, version: str) -> None:
        """Install `version`, over what was there, as an installer does: file by file."""
        package = Path(tailsrv.__file__).parent
        for source in package.rglob("*.py"):
            place = self.package / source.relative_to(package)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(source, self.package / "new")
            (self.package / "new").rename(place)
        self.edit("__init__.py", f'"{tailsrv.__version__}"', f'"{version}"')

    def edit(self, module: str, old: str, new: str) -> None:
        """Replace `old` by `new` in a module, in one step."""
        source = (self.package / module).read_text()
        assert old in source
        (self.package / "new").write_text(source.replace(old, new))
        (self.package / "new").rename(self.package / module)


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    """Install the program in a folder of its own."""
    return Installed(tmp_path / "installed")


def upgrade(server: Server, count: int = 1) -> None:
    """Ask for an upgrade and wait until the `count`th is over."""
    server.signal(signal.SIGHUP)
    server.logged("upgraded: version=", count=count)


@contextmanager
def visited(server: Server, data: bytes) -> Iterator[list[int]]:
    """Have a visitor connect all the while, read `data`, and leave; its list has an entry for each visit."""
    visits: list[int] = []
    faults: list[str] = []
    enough = threading.Event()
    port = server.port

    def visit() -> None:
        while not enough.is_set():
            start = len(visits) % len(data)
            try:
                with connect(port, b"%d\n" % start) as sock:
                    if (got := recv_exactly(sock, len(data) - start)) != data[start:]:
                        faults.append(
                            f"visit {len(visits)}: {len(got)} bytes of {len(data) - start}"
                        )
            except OSError as error:
                faults.append(f"visit {len(visits)}: {error}")
            visits.append(start)

    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        yield visits
    finally:
        enough.set()
        visitor.join()
    assert faults == []


@pytest.mark.parametrize("upgrades", [4, pytest.param(20, marks=pytest.mark.thorough)])
def test_upgrades_under_load(serve: Serve, path: Path, upgrades: int) -> None:
    """Fifty clients of all paces go through many upgrades: the same pid, other workers each time, nothing lost or leaked."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2")
    living = ready_workers(server)
    with loaded(server, path, seed=20) as load:
        before = open_descriptors(server.pid)
        for count in range(1, upgrades + 1):
            server.signal(signal.SIGHUP)
            load.run_until(lambda count=count: len(server.lines("upgraded: version=")) == count)  # type: ignore[misc]
            living = ready_workers(server, besides=living)
        eventually(lambda: open_descriptors(server.pid) == before)
    assert find_pid(server) == server.pid
    assert sum(worker["restarts"] for worker in status(server)["workers"]) == 0
    assert not server.lines("warning")


def find_pid(server: Server) -> int:
    """Return the pid that the control socket says."""
    return int(status(server)["pid"])


@pytest.mark.parametrize("upgrades", [2, pytest.param(8, marks=pytest.mark.thorough)])
def test_visitors_during_upgrades(serve: Serve, path: Path, upgrades: int) -> None:
    """Whoever connects during an upgrade, at any moment, is served."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    ready_workers(server)
    with visited(server, SMALL) as visits:
        for count in range(1, upgrades + 1):
            upgrade(server, count)
    assert len(visits) > 10 * upgrades


@pytest.mark.thorough
def test_a_worker_that_does_not_end(serve: Serve, path: Path) -> None:
    """A worker that is stuck is killed when its turn to be replaced has come; its clients go on."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    living = ready_workers(server)
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, SMALL)
    stop(living[1])
    upgrade(server)
    ready_workers(server, besides=living)
    append(path, NEWS)
    for client in clients:
        expect(client, NEWS)


@pytest.mark.thorough
def test_upgrade_while_slot_is_empty(serve: Serve, path: Path) -> None:
    """An upgrade is over when every slot has a worker again, also one that was in backoff."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, SMALL)
    ready_workers(server)
    while not server.lines("respawning after a delay: ", "seconds=0.8"):
        for pid in forked_children(server.pid)[:1]:
            # killed in the last round, reaped in this
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    upgrade(server)
    assert all(worker["pid"] for worker in status(server)["workers"])
    append(path, NEWS)
    for client in clients:
        expect(client, NEWS)


def test_timing_survives(serve: Serve, path: Path) -> None:
    """A server that a test has started with other waits is run again by the same command, and so keeps them."""
    path.write_bytes(SMALL)
    server = serve(path, program=HURRIED)
    ready_workers(server)
    before = status(server)["command"]
    assert before[: len(HURRIED)] == list(HURRIED)
    upgrade(server)
    assert status(server)["command"] == before


# Another program


def test_another_version(serve: Serve, path: Path, installed: Installed) -> None:
    """The installed version goes on where the old one was, in the supervisor and in the workers."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", program=installed.program)
    ready_workers(server)
    with loaded(server, path, seed=7, count=20) as load:
        load.run(0.2)
        started = status(server)["started"]
        installed.install("99.0")
        installed.edit(
            "worker/worker.py",
            'isEnabledFor(logging.DEBUG):\n            logger.debug("client streams: ',
            'isEnabledFor(logging.WARNING):\n            logger.warning("client of the new worker streams: ',
        )
        server.signal(signal.SIGHUP)
        load.run_until(lambda: server.lines("upgraded: version=99.0 clients=20"))
        server.logged(f"upgrade: old={tailsrv.__version__} new=99.0")
        assert (status(server)["version"], status(server)["pid"], status(server)["started"]) == (
            "99.0",
            server.pid,
            started,
        )
        load.run(0.2)
    for _ in range(4):
        expect(server.connect(b"0\n"), DATA[:1000])
    assert len(server.lines("client of the new worker streams: ")) >= 4
    installed.install("98.0")
    upgrade(server, 2)
    assert status(server)["version"] == "98.0"


def check_nothing_changed(
    server: Server, path: Path, client: socket.socket, living: list[int], reason: str
) -> None:
    """Ask for an upgrade that must fail, and assert that nothing but one line in the log has come of it."""
    connected = connect(server.port)
    await_clients(server, 2)
    before = status(server)
    server.signal(signal.SIGHUP)
    line = server.logged("upgrade failed, the running version continues to serve: reason=")
    assert re.search(reason, line)
    assert status(server) == before
    assert before["version"] == tailsrv.__version__
    assert [worker["pid"] for worker in before["workers"]] == living
    assert "Traceback" not in server.log
    append(path, NEWS)
    expect(client, NEWS)
    with connected:
        connected.sendall(b"0\n")
        expect(connected, SMALL + NEWS)


def told_to_end(pid: int) -> bool:
    """Tell whether SIGTERM waits for the process `pid` to go on."""
    [pending] = re.findall(
        r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
    )
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


def test_end_in_an_upgrade(serve: Serve, path: Path) -> None:
    """A worker that is being replaced when the server is told to end leaves its clients, and those in its queue, to one who serves them."""
    path.write_bytes(DATA)
    server = serve(path)
    [worker] = ready_workers(server)
    client = server.connect(b"0\n", receive_buffer=4096)
    expect(client, DATA[:1000])
    stop(worker)
    server.signal(signal.SIGHUP)
    eventually(lambda: told_to_end(worker))
    queued = server.connect(b"7\n")
    server.signal(signal.SIGTERM)
    server.logged("draining: ")
    os.kill(worker, signal.SIGKILL)
    expect(queued, DATA[7:])
    expect_eof(queued)
    expect(client, DATA[1000:])
    expect_eof(client)
    server.wait()


def test_end_between_two_replacements(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path
) -> None:
    """A worker whose turn to be replaced has not come when the server is told to end drains like any other, and is not killed."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", "-v", "--grace", "60", program=installed.program)
    living = ready_workers(server)
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, SMALL)
    (hold := tmp_path / "hold").touch()
    ready = "        self.reporter.add_notice(ready=True)\n"
    installed.edit(
        "worker/worker.py",
        ready,
        f"        while os.path.exists({str(hold)!r}):\n            time.sleep(0.01)\n{ready}",
    )
    server.signal(signal.SIGHUP)
    server.logged("worker ended: slot=0")
    server.logged("worker spawned: slot=0", count=2)
    server.signal(signal.SIGTERM)
    server.logged("draining: ")
    hold.unlink()
    for client in clients:
        expect_eof(client)
    server.wait()
    assert not server.lines("signal=SIGKILL")
    assert len(server.lines("worker spawned")) == len(living) + 1


BREAKS = {
    "syntax": ("worker/worker.py", "import gc", "import gc gc", "SyntaxError"),
    "import": (
        "worker/streams.py",
        "import heapq",
        "import heapq, no_such_module",
        "no_such_module",
    ),
    "early end": (
        "main.py",
        "    return config, args.verbose",
        "    sys.exit(0)\n    return config, args.verbose",
        "NameError",
    ),
    "silence": ("supervisor/upgrade.py", "    sys.stdout.write(", "    str(", "did not answer"),
    "option gone": ("arguments.py", '"-w", "--workers"', '"--workers"', "unrecognized arguments"),
    "crash": (
        "supervisor/upgrade.py",
        "    sys.stdout.write(",
        "    os.abort()\n    str(",
        "did not answer",
    ),
    "state": (
        "supervisor/upgrade_state.py",
        "FORMAT = 2",
        "FORMAT = 1000",
        r"format \(2, \d+\).*\(1000, \d+\)",
    ),
    "channel": (
        "worker_channel.py",
        "VERSION = 2",
        "VERSION = 100",
        r"format \(\d+, 2\).*\(\d+, 100\)",
    ),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("which", BREAKS)
def test_a_program_that_cannot_take_over(
    serve: Serve, path: Path, installed: Installed, which: str
) -> None:
    """Where the installed program does not start, or does not understand our state, all stays as it is and the log says why."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", program=installed.program, wrapper=("prlimit", "--core=0:0"))
    living = ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    await_clients(server, 1)
    before = open_descriptors(server.pid)
    *edit, reason = BREAKS[which]
    installed.edit(*edit)
    check_nothing_changed(server, path, client, living, reason)
    # the client that came last
    eventually(lambda: open_descriptors(server.pid) <= before + 1)
    installed.install("2.0")
    upgrade(server)
    assert status(server)["version"] == "2.0"
    append(path, SMALL)
    expect(client, SMALL)


def test_no_program_at_all(serve: Serve, path: Path, installed: Installed) -> None:
    """Where the program has been removed, all stays as it is and the log says why."""
    path.write_bytes(SMALL)
    script = installed.package.with_name("serve.py")
    script.write_text("import sys; from tailsrv.main import main; sys.exit(main())\n")
    server = serve(path, program=(sys.executable, "-B", str(script)))
    living = ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    script.unlink()
    check_nothing_changed(server, path, client, living, "can't open file")


@pytest.mark.thorough
@pytest.mark.slow
def test_workers_that_do_not_start(serve: Serve, path: Path, installed: Installed) -> None:
    """A version whose workers fail replaces none but the first, costs no client, and gives way to the next."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", program=installed.hurried)
    server.traceback_expected = True
    living = ready_workers(server)
    clients = [server.connect(b"0\n") for _ in range(20)]
    for client in clients:
        expect(client, SMALL)
    await_clients(server, 20)
    installed.edit(
        "worker/worker.py",
        "    try:\n        wakeup =",
        '    raise RuntimeError("no worker")\n    try:\n        wakeup =',
    )
    server.signal(signal.SIGHUP)
    server.logged("workers of this version do not start", "slot=0", count=2)
    assert [worker["pid"] for worker in status(server)["workers"]][1] == living[1]
    assert status(server)["clients"] == 20
    installed.install("98.0")
    upgrade(server)
    append(path, NEWS)
    for client in clients:
        expect(client, NEWS)


@pytest.mark.slow
def test_worker_that_finds_no_room_in_an_upgrade(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path
) -> None:
    """A shortage in the new program's first worker costs a server nothing that waits for its file: another one is tried."""
    server = serve(path, "-w", "2", program=installed.hurried)
    living = ready_workers(server)
    client = server.connect(b"0\n")
    await_clients(server, 1)
    short, old = tmp_path / "short", "    try:\n        wakeup ="
    short.touch()
    refused = f"    if os.access({str(short)!r}, os.F_OK):\n        os.unlink({str(short)!r})\n        return os.EX_TEMPFAIL\n"
    installed.edit("worker/worker.py", old, refused + old)
    upgrade(server)
    assert not short.exists()
    ready_workers(server, besides=living)
    path.write_bytes(SMALL)
    expect(client, SMALL)


@pytest.mark.slow
def test_workers_that_do_not_start_after_an_upgrade(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path
) -> None:
    """When an upgrade is over, workers that cannot start end the server as they would have without it."""
    path.write_bytes(SMALL)
    broken = tmp_path / "broken"
    old = "    try:\n        wakeup ="
    installed.edit(
        "worker/worker.py",
        old,
        f"    if os.access({str(broken)!r}, os.F_OK):\n        return ExitStatus.CANNOT_BOOT\n{old}",
    )
    server = serve(path, "-w", "2", status=3, program=installed.hurried)
    ready_workers(server)
    upgrade(server)
    broken.touch()
    os.kill(ready_workers(server)[0], signal.SIGKILL)
    server.logged("workers cannot start: slot=0 status=3")
    server.wait()


@pytest.mark.build
def test_another_version_installed_by_pip(serve: Serve, path: Path, tmp_path: Path) -> None:
    """What the manual says: install the next version over this one in its environment, and send HUP."""
    if not (source := Path(tailsrv.__file__).parent.parent / "pyproject.toml").exists():
        source = Path.cwd() / "pyproject.toml"
    checkout, home = tmp_path / "checkout", tmp_path / "venv"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "UNLICENSE"):
        shutil.copy(source.with_name(name), checkout)
    shutil.copytree(
        Path(tailsrv.__file__).parent,
        checkout / "tailsrv",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    pip = [str(home / "bin/python"), "-m", "pip", "install", "-q", str(checkout)]
    subprocess.run(pip, check=True)
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", program=(str(home / "bin/tailsrv"),))
    ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    before = checkout / "tailsrv/__init__.py"
    before.write_text(before.read_text().replace(tailsrv.__version__, "77.0"))
    subprocess.run(pip, check=True)
    upgrade(server)
    assert status(server)["version"] == "77.0"
    append(path, NEWS)
    expect(client, NEWS)


# Requests that come at odd moments


def slow_to_start(installed: Installed, flag: Path) -> None:
    """Make the installed program prove itself only once there is a line to read from the named pipe `flag`."""
    os.mkfifo(flag)
    installed.edit(
        "main.py",
        "    if is_check():\n",
        f"    if is_check():\n        open({str(flag)!r}).read()\n",
    )


def let_go(flag: Path) -> None:
    """Let the program that waits at the pipe go on."""

    def opened() -> bool:
        try:
            os.close(os.open(flag, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            # nobody reads yet
            return False
        return True

    eventually(opened)


def await_proof(server: Server, living: list[int]) -> int:
    """Return the pid of the program that is to prove itself, once it runs."""
    return eventually(lambda: [pid for pid in forked_children(server.pid) if pid not in living])[0]


def test_requests_during_an_upgrade_are_one_more(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path
) -> None:
    """However often one asks while an upgrade is under way, exactly one more follows: it may be for something newer."""
    path.write_bytes(SMALL)
    server = serve(path, program=installed.program)
    living = ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    slow_to_start(installed, tmp_path / "flag")
    server.signal(signal.SIGHUP)
    await_proof(server, living)
    for _ in range(5):
        before = status(server)
        server.signal(signal.SIGHUP)
        # asked after the signal: it has been taken
        assert before == status(server)
    first, flag = await_proof(server, living), tmp_path / "flag"
    let_go(flag)
    # what is installed may have changed since: it is asked anew
    await_proof(server, [*living, first])
    let_go(flag)
    server.logged("upgraded: version=")
    let_go(flag)
    server.logged("upgraded: version=", count=2)
    ready_workers(server)
    server.signal(signal.SIGTERM)
    expect_eof(client)
    server.wait()
    assert len(server.lines("upgrade: checking whether the installed program starts")) == 3


@pytest.mark.thorough
def test_a_request_right_after_a_request(serve: Serve, path: Path) -> None:
    """A storm of requests ends in an upgraded server, with every client."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    client = server.connect(b"0\n")
    expect(client, SMALL)
    for count in range(1, 4):
        for _ in range(100):
            server.signal(signal.SIGHUP)
        server.logged("upgraded: version=", count=count)
    append(path, NEWS)
    expect(client, NEWS)


@pytest.mark.thorough
def test_while_waiting_for_the_file(serve: Serve, path: Path, installed: Installed) -> None:
    """A server whose file is not there yet is upgraded too, and those who wait are served when it comes."""
    server = serve(path, "-w", "2", program=installed.hurried)
    server.logged("waiting for file")
    waiting = [server.connect(b"0\n") for _ in range(5)]
    for count, version in enumerate(("2.0", "3.0"), 1):
        installed.install(version)
        upgrade(server, count)
        assert (status(server)["version"], status(server)["state"]) == (version, "waiting for file")
    path.write_bytes(SMALL)
    for client in waiting:
        expect(client, SMALL)
    upgrade(server, 3)
    append(path, NEWS)
    for client in waiting:
        expect(client, NEWS)


def test_the_end_during_a_proof(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path
) -> None:
    """SIGTERM while the installed program proves itself: the server drains and ends, and the program with it."""
    path.write_bytes(SMALL)
    server = serve(path, program=installed.program)
    living = ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    slow_to_start(installed, tmp_path / "flag")
    server.signal(signal.SIGHUP)
    await_proof(server, living)
    append(path, NEWS)
    server.signal(signal.SIGTERM)
    expect(client, NEWS)
    expect_eof(client)
    server.wait()
    assert not server.lines("upgraded: ")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "attempt",
    [
        0,
        1,
        4,
        7,
        *(pytest.param(again, marks=pytest.mark.thorough) for again in (2, 3, 5, 6, 8, 9)),
    ],
)
def test_the_end_right_behind(serve: Serve, path: Path, attempt: int) -> None:
    """SIGTERM at whatever moment of an upgrade: the streams end in good order, with all that is in the file."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", "--grace", "20")
    ready_workers(server)
    clients = [server.connect(b"0\n", receive_buffer=4096), server.connect(b"-1000\n")]
    expect(clients[0], DATA[:10])
    expect(clients[1], DATA[-1000:])
    server.signal(signal.SIGHUP)
    match attempt:
        case 0:
            pass
        case 1 | 2 | 3:
            server.logged("upgrade: checking")
        case 4 | 5 | 6:
            server.logged("upgrade: old=")
        case _:
            server.logged("worker ready: ", count=3)
    append(path, NEWS)
    server.signal(signal.SIGTERM)
    expect(clients[0], DATA[10:] + NEWS)
    expect(clients[1], NEWS)
    for client in clients:
        expect_eof(client)
    server.wait()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGTERM, "draining: signal=SIGTERM"),
        (signal.SIGINT, "draining: signal=SIGINT"),
        (signal.SIGQUIT, "ended: status=0"),
        (signal.SIGHUP, "upgrade: checking whether the installed program starts"),
    ],
)
def test_a_signal_that_comes_with_the_end_of_the_check(
    serve: Serve,
    path: Path,
    installed: Installed,
    tmp_path: Path,
    number: signal.Signals,
    line: str,
) -> None:
    """A signal that the supervisor finds together with the end of the installed program's check is acted on, not lost in the exec."""
    path.write_bytes(SMALL)
    server = serve(path, program=installed.program)
    living = ready_workers(server)
    slow_to_start(installed, tmp_path / "flag")
    server.signal(signal.SIGHUP)
    check = await_proof(server, living)
    stop(server.pid)
    let_go(tmp_path / "flag")
    eventually(lambda: gone(check))
    before = len(server.lines(line))
    server.signal(number)
    server.signal(signal.SIGCONT)
    if number == signal.SIGHUP:
        await_proof(server, living)
        let_go(tmp_path / "flag")
    server.logged(line, count=before + 1)
    if number != signal.SIGHUP:
        server.wait()
        assert not server.lines("upgraded: ")


@pytest.mark.thorough
@needs_strace
def test_a_signal_while_the_state_is_written(serve: Serve, path: Path) -> None:
    """A signal that comes when the old program has looked for signals for the last time reaches the new one."""
    path.write_bytes(SMALL)
    server = serve(path)
    ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    # three are the proof's, the fourth is the state
    with strace(server.pid, "memfd_create:delay_enter=500000:when=4"):
        server.signal(signal.SIGHUP)
        server.logged("upgrade: old=")
        server.signal(signal.SIGTERM)
        expect_eof(client)
    server.wait()


@pytest.mark.sample(1)
@needs_strace
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("memfd_create:error=EMFILE:when=1", "Too many open files"),
        ("execve:error=ENOMEM:when=1", "Cannot allocate memory"),
    ],
)
def test_a_kernel_that_refuses(serve: Serve, path: Path, fault: str, reason: str) -> None:
    """Where the kernel refuses the proof, or the exec behind it, all stays as it is, and the next request may succeed."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    living = ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    with strace(server.pid, fault):
        check_nothing_changed(server, path, client, living, reason)
    upgrade(server)
    append(path, SMALL)
    expect(client, SMALL)


@pytest.mark.thorough
def test_a_worker_dies_during_an_upgrade(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path
) -> None:
    """A worker that is killed while the installed program proves itself has a successor at once, and both are replaced."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", program=installed.program)
    living = ready_workers(server)
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, SMALL)
    slow_to_start(installed, tmp_path / "flag")
    server.signal(signal.SIGHUP)
    await_proof(server, living)
    os.kill(living[0], signal.SIGKILL)
    successors = ready_workers(server, besides=living[:1])
    let_go(tmp_path / "flag")
    server.logged("upgraded: version=", " clients=10")
    ready_workers(server, besides=living + successors)
    append(path, NEWS)
    for client in clients:
        expect(client, NEWS)


# The service manager


@pytest.mark.thorough
def test_the_service_manager_is_told(
    serve: Serve, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RELOADING=1 comes with the request, READY=1 when all workers are new, or when nothing has changed after all."""
    path.write_bytes(SMALL)
    installed = Installed(tmp_path / "installed")
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(DEADLINE)

        def told() -> list[str]:
            return manager.recv(4096).decode().split("\n")

        def drop_status(word: str) -> list[str]:
            while (words := told())[0].startswith("STATUS="):
                pass
            assert words[0] == word
            return words

        server = serve(path, "-w", "2", program=installed.program)
        drop_status("READY=1")
        living = ready_workers(server)
        server.signal(signal.SIGHUP)
        words = drop_status("RELOADING=1")
        assert re.fullmatch(r"MONOTONIC_USEC=\d+", words[1])
        # of the new program, in case that the first was not taken
        drop_status("RELOADING=1")
        drop_status("READY=1")
        ready_workers(server, besides=living)
        installed.edit("worker/worker.py", "import gc", "import gc gc")
        server.signal(signal.SIGHUP)
        drop_status("RELOADING=1")
        drop_status("READY=1")
        server.logged("upgrade failed")
