"""Rare circumstances that must not end a worker, the server or a stream."""

import os
import signal
from pathlib import Path

import pytest

from support.checkout import ROOT
from support.files import append
from support.processes import stop
from support.server import TAILSRV, Serve, run_tailsrv
from support.sockets import expect
from support.status import await_clients, ready_workers, status
from support.waiting import eventually

DATA = b"0123456789\n"
APPENDED = b"appended\n"


@pytest.mark.slow
def test_timeouts_too_long_for_epoll(serve: Serve, path: Path) -> None:
    """Timeouts of more than 24 days, which epoll_wait(2) cannot express, work like others."""
    path.write_bytes(DATA)
    server = serve(path, "--header-timeout", "3000000", "--grace", "3000000")
    workers = server.workers(1)
    silent, client = server.connect(), server.connect(b"0\n")
    expect(client, DATA)
    # From here on, no timer of the worker is due within 24 days.
    eventually(lambda: server.title(server.workers(1)[0]).endswith("[2 clients]"))
    append(path, APPENDED)
    expect(client, APPENDED)
    silent.sendall(b"0\n")
    expect(silent, DATA + APPENDED)
    assert server.workers(1) == workers


def test_leading_zeros_of_a_number() -> None:
    """Leading zeros, however many, do not change the value of a number."""
    done = run_tailsrv("-p", "0" * 30 + "65536", "log")
    assert done.returncode == 2
    assert "argument -p/--port: must be from 0 to 65535, not 65536" in done.stderr


def test_working_folder_that_is_gone(serve: Serve, path: Path, tmp_path: Path) -> None:
    """A server of an absolute path keeps working after its working directory was removed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    server = serve(path, wrapper=("env", "-C", str(folder), f"PYTHONPATH={ROOT}"), program=TAILSRV)
    client = server.connect(b"0\n")
    server.logged("waiting for file")
    folder.rmdir()
    path.write_bytes(DATA)
    expect(client, DATA)
    append(path, APPENDED)
    expect(client, APPENDED)
    assert server.lines("warning") == []


def test_file_that_is_moved_back_and_then_removed(serve: Serve, path: Path) -> None:
    """A file that was moved away and back is still noticed when it is removed later."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    client = server.connect(b"0\n")
    expect(client, DATA)
    stop(server.pid)
    path.rename(path.with_name("away"))
    # The worker sends this after it has seen the move.
    append(path.with_name("away"), APPENDED)
    expect(client, APPENDED)
    path.with_name("away").rename(path)
    append(path, APPENDED)
    expect(client, APPENDED)
    os.kill(server.pid, signal.SIGCONT)
    append(path, APPENDED)
    expect(client, APPENDED)
    # By then the supervisor has read the worker's report and has checked the path.
    await_clients(server, 1)
    path.unlink()
    server.wait()


@pytest.mark.slow
def test_headerless_clients_do_not_use_up_protection(serve: Serve, path: Path) -> None:
    """Headerless connections give their entries in the client table to clients with a header."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", wrapper=("prlimit", "--nofile=200:200"))
    workers = server.workers(2)
    headerless = [server.connect() for _ in range(250)]
    eventually(lambda: status(server)["unprotected"] > 0)
    clients = [server.connect(b"0\n") for _ in range(8)]
    for client in clients:
        expect(client, DATA)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    ready_workers(server, workers)
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)
    assert len(headerless) == 250
