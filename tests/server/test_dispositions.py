"""What each signal does to the supervisor and its workers, and which signals end them."""

import os
import signal
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.interpreter import program
from support.processes import children
from support.server import Serve, Server
from support.sockets import expect, recv_all
from support.waiting import eventually
from tailsrv.linux.signals import STRAY, name_of
from tailsrv.stray_signals import StraySignals

DATA, MORE = random_bytes(1000), b"more"


# Starts a program without core files, which some of these signals would leave.
NO_CORES = ("sh", "-c", 'ulimit -c 0; exec "$@"', "sh")

# The disposition of each signal in supervisor and worker. See signal(7) for `default`.
INSTALLED = {
    "SIGHUP": ("caught", "ignored"),
    "SIGINT": ("caught", "ignored"),
    "SIGQUIT": ("caught", "default"),
    "SIGILL": ("default", "default"),
    "SIGTRAP": ("default", "default"),
    "SIGABRT": ("default", "default"),
    "SIGBUS": ("default", "default"),
    "SIGFPE": ("default", "default"),
    "SIGKILL": ("default", "default"),
    "SIGUSR1": ("caught", "caught"),
    "SIGSEGV": ("default", "default"),
    "SIGUSR2": ("caught", "caught"),
    "SIGPIPE": ("ignored", "ignored"),
    "SIGALRM": ("caught", "caught"),
    "SIGTERM": ("caught", "caught"),
    "SIGSTKFLT": ("caught", "caught"),
    "SIGCHLD": ("caught", "default"),
    "SIGCONT": ("default", "default"),
    "SIGSTOP": ("default", "default"),
    "SIGTSTP": ("default", "default"),
    "SIGTTIN": ("caught", "caught"),
    "SIGTTOU": ("ignored", "ignored"),
    "SIGURG": ("default", "default"),
    "SIGXCPU": ("default", "default"),
    "SIGXFSZ": ("ignored", "ignored"),
    "SIGVTALRM": ("caught", "caught"),
    "SIGPROF": ("caught", "caught"),
    "SIGWINCH": ("default", "default"),
    "SIGIO": ("caught", "caught"),
    "SIGPWR": ("caught", "ignored"),
    "SIGSYS": ("default", "default"),
}
FATAL = (
    "SIGILL",
    "SIGTRAP",
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGKILL",
    "SIGSEGV",
    "SIGXCPU",
    "SIGSYS",
)
NOT_LOGGED = ("SIGPIPE", "SIGCHLD", "SIGCONT", "SIGTTOU", "SIGURG", "SIGXFSZ", "SIGWINCH")


def installed(number: int) -> tuple[str, str]:
    """Return a signal's entry of the table; all real-time signals have the same."""
    return ("caught", "caught") if number >= signal.SIGRTMIN else INSTALLED[name_of(number)]


def disposition(pid: int, number: int) -> str:
    """Return the disposition of a signal in the process `pid`: see proc_pid_status(5)."""
    text = Path(f"/proc/{pid}/status").read_text()
    for key, word in (("SigCgt", "caught"), ("SigIgn", "ignored")):
        if int(text.partition(f"{key}:")[2].split()[0], 16) >> number - 1 & 1:
            return word
    return "default"


@pytest.fixture(autouse=True)
def file(path: Path) -> None:
    """Write the data to the served file."""
    path.write_bytes(DATA)


@pytest.fixture
def server(serve: Serve, path: Path) -> Server:
    """Start a server with one worker."""
    return serve(path)


@pytest.fixture
def client(server: Server) -> socket.socket:
    """Return a client that is caught up."""
    client = server.connect(b"0\n")
    expect(client, DATA)
    return client


def send(pids: Iterable[int], numbers: Iterable[int]) -> None:
    """Send each of the signals to each of the processes that still exist."""
    for pid, number in product(pids, numbers):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def test_every_signal_is_in_the_table(server: Server) -> None:
    """For each signal of this system, supervisor and worker have the table's disposition."""
    pids = (server.pid, *server.workers(1))
    numbers = signal.valid_signals()
    seen = {name_of(number): tuple(disposition(pid, number) for pid in pids) for number in numbers}
    assert seen == {name_of(number): installed(number) for number in numbers}


def test_stray_signals_are_ignored_and_logged(
    server: Server, client: socket.socket, path: Path
) -> None:
    """Supervisor and worker ignore stray signals, and log which signals to use instead."""
    (worker,) = server.workers(1)
    send((server.pid, worker), STRAY)
    for number in STRAY:
        server.logged(
            "warning: ignored a signal ", f" signal={name_of(number)} hint=", "HUP upgrades"
        )
        server.logged("warning: ignored a signal ", f" signal={name_of(number)} slot=0 hint=")
    append(path, MORE)
    expect(client, MORE)
    assert server.workers(1) == [worker]


def test_signals_of_the_kernel_are_ignored_and_not_logged(
    server: Server, client: socket.socket, path: Path
) -> None:
    """Signals that the kernel sends on its own are ignored and not logged."""
    (worker,) = server.workers(1)
    send((server.pid, worker), [signal.Signals[name] for name in NOT_LOGGED])
    send((server.pid, worker), [signal.SIGUSR1])
    server.logged(" signal=SIGUSR1 hint=")
    server.logged(" signal=SIGUSR1 slot=0 ")
    append(path, MORE)
    expect(client, MORE)
    assert server.workers(1) == [worker]
    assert len(server.lines("warning")) == 2


def test_only_some_of_a_flood_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each signal is logged once in ten seconds, however often it arrives."""
    stray = StraySignals(slot=3)
    for number in (
        signal.SIGUSR1,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGUSR1,
        signal.SIGRTMIN + 3,
    ):
        stray.note(number)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" signal=")[2].split(" hint=")[0] for message in messages] == [
        "SIGUSR1 slot=3", "SIGUSR2 slot=3", "SIGRTMIN+3 slot=3",
    ]  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", FATAL)
def test_signals_that_end_the_supervisor(serve: Serve, path: Path, name: str) -> None:
    """A fault, the limit on CPU time, ABRT and KILL end the supervisor and its workers."""
    server = serve(path, "--orphan-timeout", "0", status=-signal.Signals[name], wrapper=NO_CORES)
    server.workers(1)
    server.signal(signal.Signals[name])
    server.wait()


@pytest.mark.slow
def test_signals_that_end_a_worker(serve: Serve, path: Path) -> None:
    """The same signals, TERM and QUIT end a worker; it is respawned and keeps its clients."""
    names = (*FATAL, "SIGTERM", "SIGQUIT")
    server = serve(path, "-w", str(len(names)), wrapper=NO_CORES)
    workers = server.workers(len(names))
    clients = [server.connect(b"0\n") for _ in range(3 * len(names))]
    for client in clients:
        expect(client, DATA)
    for worker, name in zip(workers, names, strict=True):
        os.kill(worker, signal.Signals[name])
        server.logged("warning: worker ", f" pid={worker} ")
    server.logged("worker ready: ", count=2 * len(names))
    append(path, MORE)
    for client in clients:
        expect(client, MORE)
    assert not set(workers) & set(server.workers(len(names)))


def test_power_failure_drains(server: Server, client: socket.socket, path: Path) -> None:
    """PWR, which lxc-stop(1) sends, starts a drain, and TERM after it does not shorten that."""
    append(path, MORE)
    server.signal(signal.SIGPWR)
    server.logged("draining: signal=SIGPWR grace=5 reason=")
    server.signal(signal.SIGPWR)
    server.signal(signal.SIGTERM)
    assert recv_all(client) == MORE
    server.wait()
    assert len(server.lines("draining: signal=SIGPWR grace=5 reason=")) == 1


# Signals to short-lived children


@pytest.mark.slow
def test_signals_to_the_group_during_the_check_of_an_upgrade(
    serve: Serve, path: Path, tmp_path: Path
) -> None:
    """A signal to all processes of the service does not make the check of an upgrade fail."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    server = serve(
        path,
        wrapper=("env", f"TAILSRV_TEST_GATE={gate}"),
        program=(sys.executable, program("check_at_gate")),
    )
    (worker,) = server.workers(1)
    server.signal(signal.SIGHUP)
    opened = eventually(lambda: open_gate(gate))
    (proof,) = [pid for pid in children(server.pid) if pid != worker]
    send([proof], (*STRAY, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPWR))
    assert opened
    os.close(opened)
    server.logged("upgraded: ")
    assert not server.lines("upgrade failed")


def open_gate(path: Path) -> int | None:
    """Return a descriptor that writes to a named pipe, or None while the pipe has no reader."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def test_stray_signals_during_an_upgrade(server: Server, client: socket.socket, path: Path) -> None:
    """USR1 to all processes, sent throughout an upgrade, ends none of them."""
    server.workers(1)
    server.signal(signal.SIGHUP)

    def upgraded() -> list[str]:
        send((server.pid, *children(server.pid)), [signal.SIGUSR1])
        return server.lines("upgraded: ")

    eventually(upgraded)
    append(path, MORE)
    expect(client, MORE)
    assert not server.lines("upgrade failed")
    assert not server.lines("worker was killed")
