"""Odd circumstances that once ended a worker, the server or a stream that had done nothing wrong."""

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
NEWS = b"news\n"


@pytest.mark.slow
def test_time_that_epoll_cannot_count(serve: Serve, path: Path) -> None:
    """Times of more than 24 days are times like others."""
    path.write_bytes(DATA)
    server = serve(path, "--header-timeout", "3000000", "--grace", "3000000")
    living = server.workers(1)
    silent, client = server.connect(), server.connect(b"0\n")
    expect(client, DATA)
    # nothing nearer is planned any more
    eventually(lambda: server.title(server.workers(1)[0]).endswith("[2 clients]"))
    append(path, NEWS)
    expect(client, NEWS)
    silent.sendall(b"0\n")
    expect(silent, DATA + NEWS)
    assert server.workers(1) == living


def test_leading_zeros_of_a_number() -> None:
    """However many zeros stand before a number, it is that number."""
    done = run_tailsrv("-p", "0" * 30 + "65536", "log")
    assert done.returncode == 2
    assert "argument -p/--port: must be from 0 to 65535, not 65536" in done.stderr


def test_working_folder_that_is_gone(serve: Serve, path: Path, tmp_path: Path) -> None:
    """A server of an absolute path has no need of the folder that it was started in."""
    folder = tmp_path / "folder"
    folder.mkdir()
    server = serve(path, wrapper=("env", "-C", str(folder), f"PYTHONPATH={ROOT}"), program=TAILSRV)
    client = server.connect(b"0\n")
    server.logged("waiting for file")
    folder.rmdir()
    path.write_bytes(DATA)
    expect(client, DATA)
    append(path, NEWS)
    expect(client, NEWS)
    assert server.lines("warning") == []


def test_file_that_comes_back_and_goes_again(serve: Serve, path: Path) -> None:
    """A file that was back when the supervisor looked is missed when it goes for good."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    client = server.connect(b"0\n")
    expect(client, DATA)
    stop(server.pid)
    path.rename(path.with_name("away"))
    # sent after the worker has seen the move
    append(path.with_name("away"), NEWS)
    expect(client, NEWS)
    path.with_name("away").rename(path)
    append(path, NEWS)
    expect(client, NEWS)
    os.kill(server.pid, signal.SIGCONT)
    append(path, NEWS)
    expect(client, NEWS)
    # the supervisor has read the report and looked
    await_clients(server, 1)
    path.unlink()
    server.wait()


@pytest.mark.slow
def test_strangers_do_not_use_up_protection(serve: Serve, path: Path) -> None:
    """Connections without a header give their place in the roster to clients that have sent one."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", wrapper=("prlimit", "--nofile=200:200"))
    living = server.workers(2)
    strangers = [server.connect() for _ in range(250)]
    eventually(lambda: status(server)["unprotected"] > 0)
    clients = [server.connect(b"0\n") for _ in range(8)]
    for client in clients:
        expect(client, DATA)
    for worker in living:
        os.kill(worker, signal.SIGKILL)
    ready_workers(server, living)
    append(path, NEWS)
    for client in clients:
        expect(client, NEWS)
    assert len(strangers) == 250
