"""A log whose supervisor has died: what the next one must know about its files."""

import os
import signal
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.processes import gone
from support.rotation import MOVED, rotate, rotated
from support.server import Serve, Server, hurried
from support.sockets import LINE_LENGTH, expect, recv_exactly
from support.status import await_clients, ready_workers, status
from support.waiting import eventually

pytestmark = pytest.mark.slow

OLD, NEW, MORE = random_bytes(50_000, 1), random_bytes(20_000, 2), random_bytes(7_000, 3)
QUICK = hurried(settle=0.05)


def take_over(serve: Serve, server: Server, path: Path, *options: str) -> Server:
    """Start another supervisor in place of the one that has died, and wait until it serves."""
    taker = serve(path, "-p", str(server.port), "--follow-name", *options, program=QUICK)
    taker.take_clients(server)
    taker.logged("took over: ")
    ready_workers(taker)
    return taker


def place(server: Server, header: bytes) -> tuple[int, int]:
    """Return the two numbers of the `?` line for `header`."""
    start, end = recv_exactly(server.connect(b"?" + header), LINE_LENGTH).split()
    return int(start), int(end)


def test_offset_while_waiting(serve: Serve, path: Path) -> None:
    """A server that waits for its file keeps the offset at which the log continues."""
    path.write_bytes(OLD)
    state = ("--state-file", str(path.with_name("state")), "-w", "1")
    first = serve(path, "--follow-name", *state, program=QUICK)
    first.workers(1)
    first.finish()
    path.unlink()
    second = serve(path, "--follow-name", *state, program=QUICK)
    second.logged("waiting for file: ")
    ready_workers(second)
    second.kill_supervisor()
    third = take_over(serve, second, path, *state)
    path.write_bytes(NEW)
    third.logged("serving: ")
    assert place(third, b"0\n") == (len(OLD), len(OLD + NEW))


def test_file_that_left_the_log(serve: Serve, path: Path) -> None:
    """A file that the log had before a truncation does not come again."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", "-w", "1", program=QUICK)
    server.workers(1)
    sock = server.connect(b"0\n")
    expect(sock, OLD)
    rotate(path, NEW)
    expect(sock, NEW)
    os.truncate(path, 0)
    end = rotated(server, 2)
    append(path, MORE)
    expect(sock, MORE)
    server.kill_supervisor()
    taker = take_over(serve, server, path)
    rotate(path, OLD[::-1])
    expect(sock, OLD[::-1])
    assert place(taker, b"0\n") == (end, end + len(MORE + OLD))


def test_worker_that_dies_after_it_has_rolled(serve: Serve, path: Path) -> None:
    """A worker may roll by itself at the agreed size, and die before the handover."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", "-w", "2", program=QUICK)
    workers = server.workers(2)
    sock = server.connect(b"0\n")
    expect(sock, OLD)
    await_clients(server, 1)
    owner = next(worker["pid"] for worker in status(server)["workers"] if worker["clients"])
    old = rotate(path)
    server.logged(MOVED)
    eventually(lambda: path_is_open(workers, path))
    server.kill_supervisor()
    append(path, NEW)
    expect(sock, NEW)
    append(old, b"late")
    os.kill(owner, signal.SIGKILL)
    eventually(lambda: gone(owner))
    taker = take_over(serve, server, path)
    eventually(lambda: status(taker)["log"]["end"] == len(OLD + NEW))
    assert place(taker, b"0\n") == (0, len(OLD + NEW))
    expect(taker.connect(b"0\n"), OLD + NEW)


def path_is_open(pids: list[int], path: Path) -> bool:
    """Tell whether one of the processes has the file open that `path` names."""
    names = [
        os.readlink(link)
        for pid in pids
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.exists()
    ]
    return str(path) in names


def test_truncation_that_only_one_worker_has_noticed(serve: Serve, path: Path) -> None:
    """A worker without clients has not seen the last appends, but notices the truncation."""
    server = serve(path, "--follow-name", "-w", "2", program=QUICK)
    path.write_bytes(b"x" * 100)
    server.workers(2)
    server.logged("serving: ")
    sock = server.connect(b"0\n")
    expect(sock, b"x" * 100)
    append(path, OLD)
    expect(sock, OLD)
    end = 100 + len(OLD)
    server.kill_supervisor()
    os.truncate(path, 0)
    append(path, MORE)
    # By the port, the kernel distributes the clients to both workers.
    places = {place(server, b"-0\n") for _ in range(16)}
    assert places == {(end, end)}
    taker = take_over(serve, server, path)
    expect(sock, MORE)
    assert place(taker, b"-0\n") == (end + len(MORE), end + len(MORE))


def test_listeners_do_not_multiply(serve: Serve, path: Path) -> None:
    """However often the supervisor dies, each listening socket is handed over once."""
    path.write_bytes(OLD)
    server = serve(path, "--follow-name", "-w", "3", program=QUICK)
    server.workers(3)
    counts = []
    for _ in range(3):
        server.kill_supervisor()
        server = take_over(serve, server, path, "-w", "2")
        counts.append(len(status(server)["listeners"]))
    assert len(set(counts)) == 1, counts
