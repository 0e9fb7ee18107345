"""Upgrade in place: the program is replaced under the same pid, and no client is disturbed."""

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
APPENDED = b"appended later"


class Installed:
    """A private installation of tailsrv in a folder, which the test can replace."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "tailsrv"
        self.package.mkdir(parents=True)
        self.install(tailsrv.__version__)
        # `python -m` searches the working directory first, where the tests' own package is.
        environment = ("env", "-C", str(folder), "PYTHONDONTWRITEBYTECODE=1")
        self.program, self.hurried = (*environment, *TAILSRV), (*environment, *HURRIED)

    def install(self, version: str) -> None:
        """Install `version` over the present one, file by file as an installer does."""
        package = Path(tailsrv.__file__).parent
        for module in package.rglob("*.py"):
            target = self.package / module.relative_to(package)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(module, self.package / "new")
            (self.package / "new").rename(target)
        self.edit("__init__.py", f'"{tailsrv.__version__}"', f'"{version}"')

    def edit(self, module: str, old: str, new: str) -> None:
        """Replace `old` by `new` in a module, atomically."""
        text = (self.package / module).read_text()
        assert old in text
        (self.package / "new").write_text(text.replace(old, new))
        (self.package / "new").rename(self.package / module)


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    """Install the program in a private folder."""
    return Installed(tmp_path / "installed")


def upgrade(server: Server, count: int = 1) -> None:
    """Request an upgrade and wait until the `count`th upgrade is complete."""
    server.signal(signal.SIGHUP)
    server.logged("upgraded: version=", count=count)


@contextmanager
def connecting_repeatedly(server: Server, data: bytes) -> Iterator[list[int]]:
    """Connect repeatedly in a thread, read `data` and disconnect.

    The yielded list gets an entry for each connection.
    """
    connections: list[int] = []
    faults: list[str] = []
    stopped = threading.Event()
    port = server.port

    def connect_and_read() -> None:
        while not stopped.is_set():
            start = len(connections) % len(data)
            try:
                with connect(port, b"%d\n" % start) as sock:
                    if (got := recv_exactly(sock, len(data) - start)) != data[start:]:
                        faults.append(
                            f"connection {len(connections)}: {len(got)} bytes"
                            f" of {len(data) - start}"
                        )
            except OSError as error:
                faults.append(f"connection {len(connections)}: {error}")
            connections.append(start)

    thread = threading.Thread(target=connect_and_read)
    thread.start()
    try:
        yield connections
    finally:
        stopped.set()
        thread.join()
    assert faults == []


@pytest.mark.parametrize("upgrades", [4, pytest.param(20, marks=pytest.mark.thorough)])
def test_upgrades_under_load(serve: Serve, path: Path, upgrades: int) -> None:
    """Upgrades under load keep the pid, replace all workers, and lose or leak nothing."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2")
    workers = ready_workers(server)
    with loaded(server, path, seed=20) as load:
        before = open_descriptors(server.pid)
        for count in range(1, upgrades + 1):
            server.signal(signal.SIGHUP)
            load.run_until(lambda count=count: len(server.lines("upgraded: version=")) == count)  # type: ignore[misc]
            workers = ready_workers(server, besides=workers)
        eventually(lambda: open_descriptors(server.pid) == before)
    assert find_pid(server) == server.pid
    assert sum(worker["restarts"] for worker in status(server)["workers"]) == 0
    assert not server.lines("warning")


def find_pid(server: Server) -> int:
    """Return the pid that the status gives."""
    return int(status(server)["pid"])


@pytest.mark.parametrize("upgrades", [2, pytest.param(8, marks=pytest.mark.thorough)])
def test_connections_during_upgrades(serve: Serve, path: Path, upgrades: int) -> None:
    """A client that connects at any moment of an upgrade is served."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    ready_workers(server)
    with connecting_repeatedly(server, SMALL) as connections:
        for count in range(1, upgrades + 1):
            upgrade(server, count)
    assert len(connections) > 10 * upgrades


@pytest.mark.thorough
def test_hung_worker_is_killed(serve: Serve, path: Path) -> None:
    """A hung worker is killed when an upgrade replaces it, and its clients stay connected."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    workers = ready_workers(server)
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, SMALL)
    stop(workers[1])
    upgrade(server)
    ready_workers(server, besides=workers)
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)


@pytest.mark.thorough
def test_upgrade_while_slot_is_empty(serve: Serve, path: Path) -> None:
    """An upgrade completes when every slot has a worker, also one that was in backoff."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, SMALL)
    ready_workers(server)
    while not server.lines("respawning after a delay: ", "seconds=0.8"):
        for pid in forked_children(server.pid)[:1]:
            # The process may have been killed in the last round and reaped in this one.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    upgrade(server)
    assert all(worker["pid"] for worker in status(server)["workers"])
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)


def test_same_command_after_an_upgrade(serve: Serve, path: Path) -> None:
    """An upgrade uses the same command, so a test's shortened timeouts stay in effect."""
    path.write_bytes(SMALL)
    server = serve(path, program=HURRIED)
    ready_workers(server)
    before = status(server)["command"]
    assert before[: len(HURRIED)] == list(HURRIED)
    upgrade(server)
    assert status(server)["command"] == before


# Another program


def test_another_version(serve: Serve, path: Path, installed: Installed) -> None:
    """After an upgrade, both the supervisor and the workers run the installed version."""
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
            "isEnabledFor(logging.WARNING):\n"
            '            logger.warning("client of the new worker streams: ',
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
    server: Server, path: Path, client: socket.socket, workers: list[int], reason: str
) -> None:
    """Request an upgrade that must fail, and check that it causes only one log line."""
    connected = connect(server.port)
    await_clients(server, 2)
    before = status(server)
    server.signal(signal.SIGHUP)
    line = server.logged("upgrade failed, the running version continues to serve: reason=")
    assert re.search(reason, line)
    assert status(server) == before
    assert before["version"] == tailsrv.__version__
    assert [worker["pid"] for worker in before["workers"]] == workers
    assert "Traceback" not in server.log
    append(path, APPENDED)
    expect(client, APPENDED)
    with connected:
        connected.sendall(b"0\n")
        expect(connected, SMALL + APPENDED)


def sigterm_is_pending(pid: int) -> bool:
    """Return whether SIGTERM is pending for the process `pid`."""
    [pending] = re.findall(
        r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
    )
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


def test_sigterm_while_a_worker_is_replaced(serve: Serve, path: Path) -> None:
    """If the server ends while a worker is being replaced, a successor serves its clients.

    The same is true for the connections in its accept queue.
    """
    path.write_bytes(DATA)
    server = serve(path)
    [worker] = ready_workers(server)
    client = server.connect(b"0\n", receive_buffer=4096)
    expect(client, DATA[:1000])
    stop(worker)
    server.signal(signal.SIGHUP)
    eventually(lambda: sigterm_is_pending(worker))
    queued = server.connect(b"7\n")
    server.signal(signal.SIGTERM)
    server.logged("draining: ")
    os.kill(worker, signal.SIGKILL)
    expect(queued, DATA[7:])
    expect_eof(queued)
    expect(client, DATA[1000:])
    expect_eof(client)
    server.wait()


def test_sigterm_between_two_replacements(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path
) -> None:
    """If the server ends during an upgrade, a worker not yet replaced drains and is not killed."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", "-v", "--grace", "60", program=installed.program)
    workers = ready_workers(server)
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, SMALL)
    (hold := tmp_path / "hold").touch()
    # The worker of the check has no listeners.
    ready = "        self.reporter.add_notice(ready=True)\n"
    installed.edit(
        "worker/worker.py",
        ready,
        f"        while self.acceptor.listeners and os.path.exists({str(hold)!r}):\n"
        f"            time.sleep(0.01)\n{ready}",
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
    assert len(server.lines("worker spawned")) == len(workers) + 1


# The beginning of a worker's work.
WORKER_BEGINS = "    try:\n        wakeup ="

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
    "silence": ("upgrade_check.py", "    sys.stdout.write(", "    str(", "did not answer"),
    "option gone": ("arguments.py", '"-w", "--workers"', '"--workers"', "unrecognized arguments"),
    "crash": (
        "upgrade_check.py",
        "    sys.stdout.write(",
        "    os.abort()\n    str(",
        "did not answer",
    ),
    "state": (
        "supervisor/upgrade_state.py",
        "FORMAT = 5",
        "FORMAT = 1000",
        r"format \(5, \d+\).*\(1000, \d+\)",
    ),
    "channel": (
        "worker_channel.py",
        "VERSION = 4",
        "VERSION = 100",
        r"format \(\d+, 4\).*\(\d+, 100\)",
    ),
    "worker raises": (
        "worker/worker.py",
        WORKER_BEGINS,
        f'    raise RuntimeError("no worker")\n{WORKER_BEGINS}',
        "its workers do not start: RuntimeError: no worker",
    ),
    "worker cannot boot": (
        "worker/worker.py",
        WORKER_BEGINS,
        f"    return ExitStatus.CANNOT_BOOT\n{WORKER_BEGINS}",
        "its workers do not start: status=3",
    ),
    "worker crashes": (
        "worker/worker.py",
        WORKER_BEGINS,
        f"    os.abort()\n{WORKER_BEGINS}",
        "its workers do not start: signal=SIGABRT",
    ),
    "worker cannot adopt": (
        "worker/worker.py",
        "        for number, entry in entries.items():\n",
        "        for number, entry in entries:\n",
        "its workers do not start: TypeError: ",
    ),
    "worker has no epoll": (
        "linux/event_loop.py",
        "        self.epoll = select.epoll()",
        '        raise OSError(24, "no more")',
        "its workers do not start: worker cannot boot: slot=0 .*no more",
    ),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("which", BREAKS)
def test_program_that_cannot_take_over(
    serve: Serve, path: Path, installed: Installed, which: str
) -> None:
    """If the installed program cannot start or read the state, nothing changes but one log line."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", program=installed.program, wrapper=("prlimit", "--core=0:0"))
    workers = ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    await_clients(server, 1)
    before = open_descriptors(server.pid)
    *edit, reason = BREAKS[which]
    installed.edit(*edit)
    check_nothing_changed(server, path, client, workers, reason)
    # The additional descriptor is the duplicate of the socket of the client that connected last.
    eventually(lambda: open_descriptors(server.pid) <= before + 1)
    installed.install("2.0")
    upgrade(server)
    assert status(server)["version"] == "2.0"
    append(path, SMALL)
    expect(client, SMALL)


def test_program_that_was_removed(serve: Serve, path: Path, installed: Installed) -> None:
    """If the program has been removed, nothing changes and the log says why."""
    path.write_bytes(SMALL)
    script = installed.package.with_name("serve.py")
    script.write_text("import sys; from tailsrv.main import main; sys.exit(main())\n")
    server = serve(path, program=(sys.executable, "-B", str(script)))
    workers = ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    script.unlink()
    check_nothing_changed(server, path, client, workers, "can't open file")


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["os.EX_TEMPFAIL", "ExitStatus.CANNOT_BOOT"])
def test_workers_that_do_not_start_after_the_check(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path, ends: str
) -> None:
    """If new workers fail after all, the old ones serve until there is one that does not."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", program=installed.hurried)
    workers = ready_workers(server)
    clients = [server.connect(b"0\n") for _ in range(20)]
    for client in clients:
        expect(client, SMALL)
    await_clients(server, 20)
    (broken := tmp_path / "broken").touch()
    # The worker of the check has no listeners.
    installed.edit(
        "worker/worker.py",
        WORKER_BEGINS,
        f"    if os.access({str(broken)!r}, os.F_OK) and context.listeners:\n"
        f"        return {ends}\n{WORKER_BEGINS}",
    )
    server.signal(signal.SIGHUP)
    server.logged("respawning after a delay: slot=0")
    assert server.workers(1) == workers[1:]
    broken.unlink()
    server.logged("upgraded: version=")
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)


@pytest.mark.slow
def test_upgrade_after_one_whose_workers_do_not_start(
    serve: Serve, path: Path, installed: Installed
) -> None:
    """If new workers fail after all, the next version can be installed and replaces them."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", program=installed.hurried)
    ready_workers(server)
    clients = [server.connect(b"0\n") for _ in range(20)]
    for client in clients:
        expect(client, SMALL)
    await_clients(server, 20)
    installed.edit(
        "worker/worker.py",
        WORKER_BEGINS,
        f"    if context.listeners:\n        return ExitStatus.CANNOT_BOOT\n{WORKER_BEGINS}",
    )
    server.signal(signal.SIGHUP)
    server.logged("respawning after a delay: slot=0")
    installed.install("98.0")
    upgrade(server)
    assert status(server)["version"] == "98.0"
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["os.EX_TEMPFAIL", "ExitStatus.CANNOT_BOOT"])
def test_workers_that_do_not_start_any_more(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path, ends: str
) -> None:
    """A server that has started goes on, although workers of one slot cannot start for a while."""
    path.write_bytes(SMALL)
    broken = tmp_path / "broken"
    installed.edit(
        "worker/worker.py",
        WORKER_BEGINS,
        f"    if os.access({str(broken)!r}, os.F_OK):\n        return {ends}\n{WORKER_BEGINS}",
    )
    server = serve(path, "-w", "2", program=installed.hurried)
    workers = ready_workers(server)
    clients = [server.connect(b"0\n") for _ in range(20)]
    for client in clients:
        expect(client, SMALL)
    await_clients(server, 20)
    broken.touch()
    os.kill(workers[0], signal.SIGKILL)
    server.logged("respawning after a delay: slot=0", count=6)
    broken.unlink()
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)


@pytest.mark.build
def test_another_version_installed_by_pip(serve: Serve, path: Path, tmp_path: Path) -> None:
    """Installing the next version with pip and sending HUP upgrades the server."""
    if not (project := Path(tailsrv.__file__).parent.parent / "pyproject.toml").exists():
        project = Path.cwd() / "pyproject.toml"
    checkout, home = tmp_path / "checkout", tmp_path / "venv"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "UNLICENSE"):
        shutil.copy(project.with_name(name), checkout)
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
    append(path, APPENDED)
    expect(client, APPENDED)


# Requests and signals at unusual moments


def hold_check(installed: Installed, flag: Path) -> None:
    """Make the installed program's check wait until the named pipe `flag` is opened for writing."""
    os.mkfifo(flag)
    installed.edit(
        "main.py",
        "    if is_check():\n",
        f"    if is_check():\n        open({str(flag)!r}).read()\n",
    )


def continue_check(flag: Path) -> None:
    """Let the check that waits at the pipe continue."""

    def opened() -> bool:
        try:
            os.close(os.open(flag, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            # The pipe has no reader yet.
            return False
        return True

    eventually(opened)


def await_check(server: Server, workers: list[int]) -> int:
    """Wait until the check of the installed program runs, and return its pid."""
    return eventually(lambda: [pid for pid in forked_children(server.pid) if pid not in workers])[0]


def test_requests_during_an_upgrade_cause_one_more(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path
) -> None:
    """Any number of requests during an upgrade cause exactly one more upgrade."""
    path.write_bytes(SMALL)
    server = serve(path, program=installed.program)
    workers = ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    hold_check(installed, tmp_path / "flag")
    server.signal(signal.SIGHUP)
    await_check(server, workers)
    for _ in range(5):
        before = status(server)
        server.signal(signal.SIGHUP)
        # The answer to a later request shows that the signal was handled.
        assert before == status(server)
    first, flag = await_check(server, workers), tmp_path / "flag"
    continue_check(flag)
    # The installed program may have changed since the check, so it is checked again.
    await_check(server, [*workers, first])
    continue_check(flag)
    server.logged("upgraded: version=")
    continue_check(flag)
    server.logged("upgraded: version=", count=2)
    ready_workers(server)
    server.signal(signal.SIGTERM)
    expect_eof(client)
    server.wait()
    assert len(server.lines("upgrade: checking whether the installed program starts")) == 3


@pytest.mark.thorough
def test_many_requests_in_a_row(serve: Serve, path: Path) -> None:
    """Hundreds of requests in a row end in an upgraded server with all its clients."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    client = server.connect(b"0\n")
    expect(client, SMALL)
    for count in range(1, 4):
        for _ in range(100):
            server.signal(signal.SIGHUP)
        server.logged("upgraded: version=", count=count)
    append(path, APPENDED)
    expect(client, APPENDED)


@pytest.mark.thorough
def test_while_waiting_for_the_file(serve: Serve, path: Path, installed: Installed) -> None:
    """A server that waits for its file can be upgraded, and then serves the waiting clients."""
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
    append(path, APPENDED)
    for client in waiting:
        expect(client, APPENDED)


def test_sigterm_during_the_check(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path
) -> None:
    """SIGTERM during the check drains and ends the server, and ends the checked program."""
    path.write_bytes(SMALL)
    server = serve(path, program=installed.program)
    workers = ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    hold_check(installed, tmp_path / "flag")
    server.signal(signal.SIGHUP)
    await_check(server, workers)
    append(path, APPENDED)
    server.signal(signal.SIGTERM)
    expect(client, APPENDED)
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
def test_sigterm_during_an_upgrade(serve: Serve, path: Path, attempt: int) -> None:
    """SIGTERM at any moment of an upgrade ends each stream with all that is in the file."""
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
    append(path, APPENDED)
    server.signal(signal.SIGTERM)
    expect(clients[0], DATA[10:] + APPENDED)
    expect(clients[1], APPENDED)
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
def test_signal_at_the_end_of_the_check(
    serve: Serve,
    path: Path,
    installed: Installed,
    tmp_path: Path,
    number: signal.Signals,
    line: str,
) -> None:
    """A signal that arrives together with the end of the check is handled, not lost in the exec."""
    path.write_bytes(SMALL)
    server = serve(path, program=installed.program)
    workers = ready_workers(server)
    hold_check(installed, tmp_path / "flag")
    server.signal(signal.SIGHUP)
    check = await_check(server, workers)
    stop(server.pid)
    continue_check(tmp_path / "flag")
    eventually(lambda: gone(check))
    before = len(server.lines(line))
    server.signal(number)
    server.signal(signal.SIGCONT)
    if number == signal.SIGHUP:
        await_check(server, workers)
        continue_check(tmp_path / "flag")
    server.logged(line, count=before + 1)
    if number != signal.SIGHUP:
        server.wait()
        assert not server.lines("upgraded: ")


@pytest.mark.thorough
@needs_strace
def test_signal_while_the_state_is_written(serve: Serve, path: Path) -> None:
    """A signal that arrives after the old program's last check for signals reaches the new one."""
    path.write_bytes(SMALL)
    server = serve(path)
    ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    # The check creates three memory files; the fourth holds the state.
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
def test_check_or_exec_refused_by_the_kernel(
    serve: Serve, path: Path, fault: str, reason: str
) -> None:
    """If the kernel refuses the check or the exec, nothing changes; a later request can succeed."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    workers = ready_workers(server)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    with strace(server.pid, fault):
        check_nothing_changed(server, path, client, workers, reason)
    upgrade(server)
    append(path, SMALL)
    expect(client, SMALL)


@pytest.mark.thorough
def test_worker_killed_during_the_check(
    serve: Serve, path: Path, installed: Installed, tmp_path: Path
) -> None:
    """A worker that is killed during the check is replaced at once, and again by the upgrade."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", program=installed.program)
    workers = ready_workers(server)
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, SMALL)
    hold_check(installed, tmp_path / "flag")
    server.signal(signal.SIGHUP)
    await_check(server, workers)
    os.kill(workers[0], signal.SIGKILL)
    successors = ready_workers(server, besides=workers[:1])
    continue_check(tmp_path / "flag")
    server.logged("upgraded: version=", " clients=10")
    ready_workers(server, besides=workers + successors)
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)


# The service manager


@pytest.mark.thorough
def test_service_manager_notifications(
    serve: Serve, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RELOADING=1 is sent at the request, and READY=1 when the upgrade completes or fails."""
    path.write_bytes(SMALL)
    installed = Installed(tmp_path / "installed")
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(DEADLINE)

        def receive() -> list[str]:
            return manager.recv(4096).decode().split("\n")

        def drop_status(word: str) -> list[str]:
            while (words := receive())[0].startswith("STATUS="):
                pass
            assert words[0] == word
            return words

        server = serve(path, "-w", "2", program=installed.program)
        drop_status("READY=1")
        workers = ready_workers(server)
        server.signal(signal.SIGHUP)
        words = drop_status("RELOADING=1")
        assert re.fullmatch(r"MONOTONIC_USEC=\d+", words[1])
        # The new program repeats the message, in case the first one was not received.
        drop_status("RELOADING=1")
        drop_status("READY=1")
        ready_workers(server, besides=workers)
        installed.edit("worker/worker.py", "import gc", "import gc gc")
        server.signal(signal.SIGHUP)
        drop_status("RELOADING=1")
        drop_status("READY=1")
        server.logged("upgrade failed")
