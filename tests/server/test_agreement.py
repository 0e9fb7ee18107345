"""Workers that roll by themselves: they agree on the size of the old file before the first byte."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from support.files import append, random_bytes
from support.processes import stop
from support.rotation import HOUR, MOVED, held_files, rotate, rotated, sealed_sizes
from support.server import Serve, Server, hurried
from support.sockets import expect, readable_within
from support.status import await_protected, ready_workers, status
from support.waiting import eventually

pytestmark = pytest.mark.slow

OLD, LATE, NEW, MORE = (
    random_bytes(300_000, 1),
    random_bytes(5_000, 2),
    random_bytes(200_000, 3),
    random_bytes(7_000, 4),
)
# Clients of each server: enough for every worker to have some.
COUNT = 24


def start(serve: Serve, path: Path, **timing: float) -> Server:
    """Start a server with a state file that goes to the next file soon."""
    options = ("--follow-name", "--state-file", str(path.with_name("state")), "-w", "2", "-v")
    server = serve(path, *options, program=hurried(settle=0.05, **timing))
    server.workers(2)
    return server


class Agreed:
    """A server whose workers may roll by themselves, and clients that have received OLD.

    Attributes:
        old: The path of the old file.

    """

    def __init__(self, server: Server, path: Path) -> None:
        self.server, self.path = server, path
        self.socks = [server.connect(b"0\n") for _ in range(COUNT)]
        self.receive(OLD)
        await_protected(server, COUNT)
        self.old = rotate(path)
        self.await_agreement()

    def receive(self, data: bytes) -> None:
        """Assert that each stream continues with `data`."""
        for sock in self.socks:
            expect(sock, data)

    def await_agreement(self) -> None:
        """Wait until all workers have the next file, which the log has not gone on to."""
        for pid in self.server.workers(2):
            eventually(lambda pid=pid: len(held_files([pid], self.path)) == 2)  # type: ignore[misc]


def saved(path: Path) -> list[Any]:
    """Return the base, the size and the state of each segment in the state file."""
    content = json.loads(path.with_name("state").read_text())
    return [(each["base"], each["size"], each["sealed"]) for each in content["segments"]]


@pytest.fixture
def agreed(serve: Serve, path: Path) -> Agreed:
    """Give a server whose workers may roll by themselves."""
    path.write_bytes(OLD)
    return Agreed(start(serve, path), path)


def test_first_byte_while_the_supervisor_is_stopped(agreed: Agreed, path: Path) -> None:
    """Clients get the next file without the supervisor, which seals the old one at that size."""
    stop(agreed.server.pid)
    append(path, NEW)
    agreed.receive(NEW)
    append(agreed.old, LATE)
    agreed.server.signal(signal.SIGCONT)
    assert rotated(agreed.server, 1) == len(OLD)
    append(path, MORE)
    agreed.receive(MORE)
    late = agreed.server.connect(b"%d\n" % (len(OLD) - 5))
    expect(late, OLD[-5:] + NEW + MORE)
    assert status(agreed.server)["log"]["end"] == len(OLD + NEW + MORE)


def test_worker_is_killed_after_it_has_rolled(agreed: Agreed, path: Path) -> None:
    """What a worker has sent before it was killed decides where the old file is sealed."""
    stop(agreed.server.pid)
    append(path, NEW)
    agreed.receive(NEW)
    append(agreed.old, LATE)
    pids = agreed.server.workers(2)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    agreed.server.signal(signal.SIGCONT)
    ready_workers(agreed.server, besides=pids)
    append(path, MORE)
    agreed.receive(MORE)
    assert rotated(agreed.server, 1) == len(OLD)


def test_one_worker_rolls_and_the_other_is_stopped(serve: Serve, path: Path) -> None:
    """The size at which the first worker has rolled counts, although the old file grows again."""
    path.write_bytes(OLD)
    agreed = Agreed(start(serve, path, freeze_patience=HOUR), path)
    first, second = agreed.server.workers(2)
    stop(agreed.server.pid)
    stop(second)
    append(path, NEW)
    eventually(lambda: len([sock for sock in agreed.socks if readable_within(sock, 0)]) > 0)
    append(agreed.old, LATE)
    os.kill(second, signal.SIGCONT)
    agreed.server.signal(signal.SIGCONT)
    agreed.receive(NEW)
    assert rotated(agreed.server, 1) == len(OLD)
    assert agreed.server.workers(2) == [first, second]


def test_old_file_grows_after_the_agreement(agreed: Agreed, path: Path) -> None:
    """Its bytes belong to the log as long as the next file is empty. Then there is another one."""
    for _ in range(3):
        append(agreed.old, LATE)
        agreed.receive(LATE)
        agreed.await_agreement()
    eventually(lambda: saved(path)[0] == (0, len(OLD + LATE * 3), True))
    append(path, NEW)
    agreed.receive(NEW)
    assert rotated(agreed.server, 1) == len(OLD + LATE * 3)


@pytest.mark.parametrize("late", [b"", LATE])
def test_all_processes_are_killed(serve: Serve, agreed: Agreed, path: Path, late: bytes) -> None:
    """What a client has received keeps its offset, although nobody could save that."""
    server = agreed.server
    assert saved(path) == [(0, len(OLD), True), (len(OLD), 0, False)]
    stop(server.pid)
    append(path, NEW)
    agreed.receive(NEW)
    append(agreed.old, late)
    server.kill_all()
    server.wait()
    server = start(serve, path)
    expect(server.connect(b"%d\n" % (len(OLD) - 5)), OLD[-5:] + NEW)
    assert status(server)["log"]["end"] == len(OLD + NEW)


def test_killed_before_the_first_byte(serve: Serve, agreed: Agreed, path: Path) -> None:
    """If no worker has rolled, the old file is still active after the next start."""
    server = agreed.server
    server.kill_all()
    server.wait()
    append(agreed.old, LATE)
    server = start(serve, path)
    stream = server.connect(b"%d\n" % len(OLD))
    expect(stream, LATE)
    append(path, NEW)
    expect(stream, NEW)
    assert rotated(server, 1) == len(OLD + LATE)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_end_after_the_agreement(
    serve: Serve, agreed: Agreed, path: Path, number: signal.Signals, stopped: bool
) -> None:
    """The end of the server keeps the offsets, whether a worker has rolled or not."""
    server = agreed.server
    if stopped:
        stop(server.pid)
        append(path, NEW)
        agreed.receive(NEW)
        append(agreed.old, LATE)
    server.signal(number)
    server.signal(signal.SIGCONT)
    server.wait()
    assert saved(path)[0][:2] == (0, len(OLD))
    server = start(serve, path)
    if not stopped:
        append(path, NEW)
    expect(server.connect(b"0\n"), OLD + NEW)


def test_upgrade_after_a_worker_has_rolled(agreed: Agreed, path: Path) -> None:
    """The next version of the supervisor finds out that a worker has rolled."""
    agreed.server.signal(signal.SIGHUP)
    agreed.server.logged("upgrade: old=")
    append(path, NEW)
    agreed.receive(NEW)
    append(agreed.old, LATE)
    agreed.server.logged("upgraded: ")
    append(path, MORE)
    agreed.receive(MORE)
    assert rotated(agreed.server, 1) == len(OLD)


def test_name_comes_back_after_the_agreement(agreed: Agreed, path: Path) -> None:
    """If the old file gets its name back, no worker rolls to the file that had it meanwhile."""
    other = path.rename(path.with_name("other"))
    agreed.old.rename(path)
    agreed.server.logged(MOVED)
    # The supervisor may have looked between the two renames, and then agrees once more.
    processes = [agreed.server.pid, *agreed.server.workers(2)]
    eventually(lambda: not held_files(processes, other))
    append(other, NEW)
    append(path, MORE)
    agreed.receive(MORE)
    assert not sealed_sizes(agreed.server)
