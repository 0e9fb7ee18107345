"""Messages to the service manager: WATCHDOG=1 while every worker answers, and the status."""

import os
import signal
from pathlib import Path

import pytest

from support.files import random_bytes
from support.processes import children, gone, stop
from support.server import HURRIED, Serve
from support.service_manager import ServiceManager
from support.sockets import expect

DATA, APPENDED = random_bytes(1000), b"more"


@pytest.fixture(autouse=True)
def file(path: Path) -> None:
    """Create the served file."""
    path.write_bytes(DATA)


def test_all_workers_answer(serve: Serve, path: Path, manager: ServiceManager) -> None:
    """WATCHDOG=1 is sent repeatedly, with the file, without it, and after an upgrade."""
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
def test_hung_worker_is_replaced(
    serve: Serve, path: Path, manager: ServiceManager, count: int
) -> None:
    """Hung workers are killed, their clients stay connected, and WATCHDOG=1 is sent again."""
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
        file.write(APPENDED)
    for client in clients:
        expect(client, APPENDED)
    assert all(gone(worker) for worker in workers[:count])
    assert set(workers[count:]) <= set(children(server.pid))


@pytest.mark.thorough
def test_worker_hung_before_it_was_ready(serve: Serve, path: Path, manager: ServiceManager) -> None:
    """A worker that never becomes ready counts as hung."""
    server = serve(path, wrapper=manager.wrapper("WATCHDOG_USEC=900000"))
    (worker,) = server.workers(1)
    # Stop the worker by SIGSTOP: a worker that was just forked still has the supervisor's signal
    # handlers, and SIGSTOP does not depend on them.
    for _ in range(2):
        os.kill(worker, signal.SIGKILL)
        server.logged("worker was killed: ", f"pid={worker} ")
        worker = next_child(server.pid, worker)
        stop(worker)
        server.logged("error: worker does not answer, killing it: ", f"pid={worker} ")
        worker = next_child(server.pid, worker)
    manager.until("WATCHDOG=1")


def next_child(pid: int, before: int) -> int:
    """Wait until `pid` has a child other than `before`, and return its pid."""
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
def test_watchdog_of_another_process_or_none(
    serve: Serve, path: Path, manager: ServiceManager, variables: tuple[str, ...]
) -> None:
    """Without a watchdog, or with one for another process, no WATCHDOG=1 and no ping is sent."""
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
    """STATUS= follows the state; READY=1 is sent once clients can connect, STOPPING=1 at exit."""
    path.unlink()
    server = serve(path, "-w", "2", wrapper=manager.wrapper(), program=HURRIED)
    messages = manager.until("READY=1")
    path.write_bytes(DATA)
    messages += manager.until("STATUS=2 workers, 0 clients")
    client = server.connect(b"0\n")
    expect(client, DATA)
    messages += manager.until("STATUS=2 workers, 1 client")
    assert "STATUS=waiting for file" in messages
    server.signal(signal.SIGTERM)
    manager.until("STOPPING=1")


def test_ended_before_it_was_ready(serve: Serve, path: Path, manager: ServiceManager) -> None:
    """A server that receives SIGTERM while it starts does not send READY=1 after STOPPING=1."""
    server = serve(path, "-w", "8", wrapper=manager.wrapper())
    server.logged("serving: ")
    server.signal(signal.SIGTERM)
    messages = manager.until("STOPPING=1")
    server.wait()
    manager.sock.setblocking(False)
    while True:
        try:
            messages += manager.sock.recv(4096).decode().split("\n")
        except BlockingIOError:
            break
    assert "READY=1" not in messages[messages.index("STOPPING=1") :]


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all", "@nobody", "vsock:2:1234"])
def test_unreachable_service_manager(serve: Serve, path: Path, address: str) -> None:
    """An absent service manager, or an unusable address of it, changes nothing."""
    server = serve(path, wrapper=("env", f"NOTIFY_SOCKET={address}", "WATCHDOG_USEC=300000"))
    expect(server.connect(b"0\n"), DATA)
