"""What a service manager is told: that all is well only while every worker answers, and how the service does."""

import os
import signal
from pathlib import Path

import pytest

from support.files import random_bytes
from support.processes import children, gone, stop
from support.server import HURRIED, Serve
from support.service_manager import ServiceManager
from support.sockets import expect

DATA, MORE = random_bytes(1000), b"more"


@pytest.fixture(autouse=True)
def file(path: Path) -> None:
    """Put the data where it is served from."""
    path.write_bytes(DATA)


def test_alive(serve: Serve, path: Path, manager: ServiceManager) -> None:
    """The service manager hears WATCHDOG=1 again and again, with the file, without it, and after an upgrade."""
    path.unlink()
    server = serve(path, "-w", "2", wrapper=manager.wrapper("WATCHDOG_USEC=900000"))
    for _ in range(3):
        manager.until("WATCHDOG=1")
    path.write_bytes(DATA)
    server.workers(2)
    for _ in range(3):
        manager.until("WATCHDOG=1")
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    for _ in range(3):
        manager.until("WATCHDOG=1")
    assert not server.lines("does not answer")


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_hangs_is_replaced(
    serve: Serve, path: Path, manager: ServiceManager, count: int
) -> None:
    """Workers that do not answer are killed; their clients stay, and the service manager hears WATCHDOG=1 again."""
    server = serve(path, "-w", "2", wrapper=manager.wrapper("WATCHDOG_USEC=900000"))
    workers = server.workers(2)
    clients = [server.connect(b"0\n") for _ in range(20)]
    for client in clients:
        expect(client, DATA)
    for worker in workers[:count]:
        stop(worker)
    for worker in workers[:count]:
        server.logged("error: worker does not answer, killing it: ", f"pid={worker} ")
    server.logged("worker ready: ", count=2 + count)
    manager.until("WATCHDOG=1")
    with path.open("ab") as file:
        file.write(MORE)
    for client in clients:
        expect(client, MORE)
    assert all(gone(worker) for worker in workers[:count])
    assert set(workers[count:]) <= set(children(server.pid))


@pytest.mark.thorough
def test_hung_before_it_was_ready(serve: Serve, path: Path, manager: ServiceManager) -> None:
    """A worker that never gets ready is one that does not answer."""
    server = serve(path, wrapper=manager.wrapper("WATCHDOG_USEC=900000"))
    (worker,) = server.workers(1)
    # a worker that is just forked has its parent's handlers, and SIGSTOP needs none
    for _ in range(2):
        os.kill(worker, signal.SIGKILL)
        server.logged("worker was killed: ", f"pid={worker} ")
        worker = next_child(server.pid, worker)
        stop(worker)
        server.logged("error: worker does not answer, killing it: ", f"pid={worker} ")
        worker = next_child(server.pid, worker)
    manager.until("WATCHDOG=1")


def next_child(pid: int, before: int) -> int:
    """Return the child of `pid` that is there after the one `before`."""
    while True:
        for child in children(pid):
            if child != before:
                return child


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "variables",
    [
        (),
        ("WATCHDOG_USEC=900000", "WATCHDOG_PID=1"),
        ("WATCHDOG_USEC=0",),
        ("WATCHDOG_USEC=abc",),
        ("WATCHDOG_USEC=" + "9" * 5000,),
    ],
)
def test_nobody_wants_to_know(
    serve: Serve, path: Path, manager: ServiceManager, variables: tuple[str, ...]
) -> None:
    """Where no watchdog is asked for, or it is for another process, nobody is told, and no worker is asked."""
    server = serve(path, wrapper=manager.wrapper(*variables))
    (worker,) = server.workers(1)
    stop(worker)
    manager.until("READY=1")
    server.signal(signal.SIGTERM)
    os.kill(worker, signal.SIGCONT)
    assert "WATCHDOG=1" not in manager.until("STOPPING=1")
    server.wait()


@pytest.mark.thorough
def test_status(serve: Serve, path: Path, manager: ServiceManager) -> None:
    """The status follows what the server does, and READY=1 comes once clients can connect, STOPPING=1 when it ends."""
    path.unlink()
    server = serve(path, "-w", "2", wrapper=manager.wrapper(), program=HURRIED)
    said = manager.until("READY=1")
    path.write_bytes(DATA)
    said += manager.until("STATUS=2 workers, 0 clients")
    client = server.connect(b"0\n")
    expect(client, DATA)
    said += manager.until("STATUS=2 workers, 1 client")
    assert "STATUS=waiting for file" in said
    server.signal(signal.SIGTERM)
    manager.until("STOPPING=1")


def test_ended_before_it_was_ready(serve: Serve, path: Path, manager: ServiceManager) -> None:
    """A server that is told to end while it starts does not say that it is ready after that."""
    server = serve(path, "-w", "8", wrapper=manager.wrapper())
    server.logged("serving: ")
    server.signal(signal.SIGTERM)
    said = manager.until("STOPPING=1")
    server.wait()
    manager.sock.setblocking(False)
    while True:
        try:
            said += manager.sock.recv(4096).decode().split("\n")
        except BlockingIOError:
            break
    assert "READY=1" not in said[said.index("STOPPING=1") :]


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all", "@nobody", "vsock:2:1234"])
def test_nobody_listens(serve: Serve, path: Path, address: str) -> None:
    """A service manager that is not there, or that has a strange address, changes nothing."""
    server = serve(path, wrapper=("env", f"NOTIFY_SOCKET={address}", "WATCHDOG_USEC=300000"))
    expect(server.connect(b"0\n"), DATA)
