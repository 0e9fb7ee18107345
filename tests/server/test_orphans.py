"""Workers outlive their supervisor, and the next supervisor takes over from them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.files import append, random_bytes
from support.load import loaded
from support.processes import (
    NO_CORE,
    as_root,
    descriptors,
    gone,
    memory_cgroup,
    open_descriptors,
    session,
    stop,
)
from support.rotation import move_away, rotate
from support.server import TAILSRV, Serve, Server, hurried, run_tailsrv, wrapper_without_rights
from support.sockets import connect, expect, expect_eof, outcome, recv_all, recv_exactly
from support.status import ask, await_clients, ready_workers, status, worker_pids
from support.strace import needs_strace
from support.takeover import (
    TOOK_OVER,
    await_lines,
    orphan,
    start_successor,
    take_over,
    workers_of,
)
from support.waiting import DEADLINE, eventually
from tailsrv.control_socket import CLIENTS

pytestmark = pytest.mark.slow

DATA = random_bytes(12 << 20)
SMALL = DATA[:1000]
NOT_TAKEN_OVER = "supervisor has not taken over, clients are served on: "
DRAINED = "clients of an orphaned worker cannot be taken over, it drains them: "
KILLED = "orphaned worker does not answer, killing it, its clients are lost: "


def listing(server: Server) -> list[dict[str, Any]]:
    """Return what the server tells about each client, in the order of their addresses."""
    answer, _ = ask(f"*:{server.port}{CLIENTS}")
    clients: list[dict[str, Any]] = json.loads(answer)["clients"]
    return sorted(clients, key=lambda client: str(client["peer"]))


# Orphans


def test_orphans_serve(serve: Serve, path: Path) -> None:
    """Orphaned workers deliver appends and accept clients, and their titles say what they are."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    clients = [server.connect(b"0\n") for _ in range(4)]
    for client in clients:
        expect(client, SMALL)
    orphans = orphan(server)
    append(path, b"later")
    for client in clients:
        expect(client, b"later")
    clients += [server.connect(b"?-5\n") for _ in range(4)]
    for client in clients[4:]:
        expect(client, b"%019d %019d\nlater" % (len(SMALL), len(SMALL) + 5))

    def counts() -> list[int]:
        titles = [server.title(pid) for pid in orphans]
        assert all(f": worker {slot} *:" in text for slot, text in enumerate(titles))
        return [int(text.split()[-2]) for text in titles if "[orphaned, " in text]

    eventually(lambda: len(counts()) == 2 and sum(counts()) == 8)
    server = take_over(serve, server, path)
    append(path, b"more")
    for client in clients:
        expect(client, b"more")


def test_orphans_end_in_time(serve: Serve, path: Path) -> None:
    """Without a successor, orphans drain, and the port becomes free."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", "--orphan-timeout", "0.2")
    server.workers(2)
    clients = [server.connect(b"0\n", receive_buffer=4096) for _ in range(6)]
    orphan(server)
    await_lines(server, "draining: ", "reason='no supervisor has taken over'", count=2)
    for client in clients:
        assert recv_all(client) == DATA
    server.wait()
    expect(serve(path, "-p", str(server.port)).connect(b"-10\n"), DATA[-10:])


def test_orphan_drains_on_sigterm(serve: Serve, path: Path) -> None:
    """SIGTERM to an orphan ends it in good order, because it has no successor."""
    path.write_bytes(SMALL)
    server = serve(path)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    (worker,) = orphan(server)
    os.kill(worker, signal.SIGTERM)
    expect_eof(client)
    server.wait()


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_orphans_ignore_other_signals(serve: Serve, path: Path, number: signal.Signals) -> None:
    """Ctrl-C, a closed terminal and stray signals do not end an orphan, as they end no worker."""
    path.write_bytes(SMALL)
    server = serve(path)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    (worker,) = orphan(server)
    os.kill(worker, number)
    append(path, b"more")
    expect(client, b"more")
    take_over(serve, server, path)
    append(path, b"even more")
    expect(client, b"even more")


def test_drain_outlives_the_supervisor(serve: Serve, path: Path) -> None:
    """Workers that drain already complete that when the supervisor is killed."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", "--grace", "60")
    clients = [server.connect(b"0\n", receive_buffer=4096) for _ in range(4)]
    await_clients(server, 4)
    server.signal(signal.SIGTERM)
    eventually(lambda: all("[draining" in server.title(pid) for pid in workers_of(server)))
    server.kill_supervisor()
    for client in clients:
        assert recv_all(client) == DATA
    server.wait()


# How a supervisor may die


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_killed(serve: Serve, path: Path, number: signal.Signals) -> None:
    """No signal that ends a supervisor by force ends a stream."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", status=-number, wrapper=NO_CORE)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    server.signal(number)
    server.process.wait(DEADLINE)
    take_over(serve, server, path, "-w", "2")
    append(path, b"more")
    expect(client, b"more")


@pytest.mark.sample(1)
@pytest.mark.parametrize("error", ["OSError(28, 'No space')", "MemoryError()", "KeyError('x')"])
def test_fails(serve: Serve, path: Path, error: str) -> None:
    """An exception in the supervisor's loop ends no stream. Exit status and log tell of it."""
    path.write_bytes(SMALL)
    code = (
        "import sys; from tailsrv import main; from tailsrv.supervisor import supervisor\n"
        "def fail(self): raise " + error + "\n"
        "supervisor.Supervisor.handle_signals = fail\n"
        "sys.exit(main.main())"
    )
    server = serve(path, "-w", "2", status=1, program=(sys.executable, "-c", code))
    server.traceback_expected = True
    client = server.connect(b"0\n")
    expect(client, SMALL)
    server.signal(signal.SIGUSR1)
    server.process.wait(DEADLINE)
    assert server.lines("critical: supervisor failed: ") or server.lines("report this bug")
    take_over(serve, server, path, "-w", "2")
    append(path, b"more")
    expect(client, b"more")


def test_out_of_memory(serve: Serve, path: Path) -> None:
    """A supervisor that the kernel kills because memory is short ends no stream."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", status=-signal.SIGKILL)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    ready_workers(server)
    with memory_cgroup(4096) as move:
        move(server.pid)

        def killed() -> bool:
            # Each client needs some memory in the supervisor.
            expect(server.connect(b"-10\n"), path.read_bytes()[-10:])
            return server.process.poll() is not None

        eventually(killed)
        assert not [pid for pid in workers_of(server) if gone(pid)]
    take_over(serve, server, path, "-w", "2")
    append(path, b"more")
    expect(client, b"more")


@pytest.mark.parametrize("unread", [True, False])
def test_closed_standard_error(serve: Serve, path: Path, unread: bool) -> None:
    """A supervisor whose log cannot be written any more serves on, and can be taken over."""
    path.write_bytes(SMALL)
    reader, writer = os.pipe()
    with open(writer, "wb") as pipe:
        process = subprocess.Popen(
            [*TAILSRV, "-v", "-p", "0", "-w", "2", path], stderr=pipe, start_new_session=True
        )
    try:
        port = int(os.read(reader, 4096).decode().partition(" port=")[2].split()[0])
        if not unread:
            os.close(reader)
        with connect(port, b"0\n") as client:
            expect(client, SMALL)
            # More than the pipe holds.
            for _ in range(1000 if unread else 10):
                with connect(port, b"junk\n") as junk:
                    expect_eof(junk)
            process.kill()
            process.wait()
            successor = serve(path, "-p", str(port))
            successor.logged(TOOK_OVER)
            append(path, b"more")
            expect(client, b"more")
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)


# Taking over


@pytest.mark.sample(2)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 3), (3, 1), (4, 3), (2, 4)])
def test_take_over(serve: Serve, path: Path, before: int, after: int) -> None:
    """Clients of all kinds lose nothing in a takeover, however many workers there are."""
    path.write_bytes(DATA)
    server = serve(path, "-w", str(before))
    with loaded(server, path, seed=before) as load:
        load.run(0.2)
        orphan(server)
        load.run(0.1)
        load.server = successor = start_successor(serve, server, path, "-w", str(after))
        load.run_until(lambda: successor.lines(TOOK_OVER))
        assert len(ready_workers(successor)) == after
        # All listeners are served.
        load.streams += [load.join("fast") for _ in range(20)]
        await_clients(successor, 70)
        load.catch_up()
        for stream in load.streams[50:]:
            load.selector.unregister(stream.sock)
            stream.sock.close()
        del load.streams[50:]
        append(path, b"x")
        load.data += b"x"
    assert not session(server.pid)


def test_what_is_handed_over(serve: Serve, path: Path) -> None:
    """The status tells the same about each client as before the death of the supervisor."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2")
    headers = [b"0\n", b"?0\n", b"-5\n", b"?-5\n", b"%d\n" % (len(DATA) + 5), b"", b"12"]
    clients = [server.connect(header, receive_buffer=4096) for header in headers * 2]
    await_clients(server, len(clients))
    eventually(lambda: sum(each["start"] is not None for each in listing(server)) == 10)

    def settled() -> list[dict[str, Any]]:
        before = [{**each, "slot": None} for each in listing(server)]
        time.sleep(0.02)
        return before if before == [{**each, "slot": None} for each in listing(server)] else []

    before = eventually(settled)
    orphan(server)
    server = take_over(serve, server, path, "-w", "3")
    assert [{**each, "slot": None} for each in listing(server)] == before
    line = b"%019d %019d\n" % (0, len(DATA))
    for client in clients[:2] + clients[7:9]:
        expect(client, (line if clients.index(client) % 7 else b"") + DATA)


def test_a_second_takeover(serve: Serve, path: Path) -> None:
    """A supervisor that has taken over can be killed like any other, again and again."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    client = server.connect(b"?0\n")
    expect(client, b"%019d %019d\n" % (0, len(SMALL)) + SMALL)
    counts = set()
    for number in range(5):
        server.kill_supervisor()
        server = take_over(serve, server, path, "-w", "2")
        expect(server.connect(b"-1\n"), path.read_bytes()[-1:])
        append(path, b"%d" % number)
        expect(client, b"%d" % number)
        ready_workers(server)
        await_clients(server, number + 2)
        # Each takeover has one more client than the one before.
        counts.add(open_descriptors(server.pid) - number)
    assert len(counts) == 1


def test_killed_worker_after_a_takeover(serve: Serve, path: Path) -> None:
    """Workers of the new supervisor are replaced as those of any other."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    client = server.connect(b"0\n")
    expect(client, SMALL)
    server.kill_supervisor()
    server = take_over(serve, server, path, "-w", "2")
    for pid in worker_pids(server):
        os.kill(pid, signal.SIGKILL)
    append(path, b"more")
    expect(client, b"more")


def test_upgrade_at_once(serve: Serve, path: Path) -> None:
    """A request for an upgrade that comes during a takeover is carried out after it."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    client = server.connect(b"0\n")
    expect(client, SMALL)
    server.kill_supervisor()
    server = start_successor(serve, server, path, "-w", "2")
    server.logged("listening: ")
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ", "clients=1")
    assert server.lines(TOOK_OVER)
    append(path, b"more")
    expect(client, b"more")


def test_killed_before_an_upgrade(serve: Serve, path: Path) -> None:
    """A supervisor that is killed while it checks the installed program costs nothing."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    clients = [server.connect(b"0\n") for _ in range(4)]
    for client in clients:
        expect(client, SMALL)
    server.signal(signal.SIGHUP)
    server.logged("upgrade: checking ")
    server.kill_supervisor()
    take_over(serve, server, path, "-w", "2")
    append(path, b"more")
    for client in clients:
        expect(client, b"more")


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_ended_at_once(serve: Serve, path: Path, number: signal.Signals) -> None:
    """A supervisor that is ended while it takes over ends the orphans as well."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    clients = [server.connect(b"0\n") for _ in range(4)]
    for client in clients:
        expect(client, SMALL)
    orphan(server)
    successor = start_successor(serve, server, path, "-w", "2")
    successor.logged("listening: ")
    successor.signal(number)
    successor.wait()
    for client in clients:
        assert not outcome(client)
    server.wait()


def test_nobody_is_refused(serve: Serve, path: Path) -> None:
    """While supervisors die, connect(2) succeeds at every moment, and every client is served."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    port, done, served = server.port, threading.Event(), list[bool]()

    def visit() -> None:
        while not done.is_set():
            with connect(port, b"-10\n") as sock:
                served.append(recv_exactly(sock, 10) == SMALL[-10:])

    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        for workers in ("2", "4", "1", "3"):
            server.kill_supervisor()
            server = take_over(serve, server, path, "-w", workers)
    finally:
        done.set()
        visitor.join()
    assert len(served) > 10
    assert all(served)


# A taker that dies


@pytest.mark.sample(2)
@needs_strace
@pytest.mark.parametrize("call", ["sendto", "recvmsg", "clone", "listen", "memfd_create"])
def test_taker_dies(serve: Serve, path: Path, call: str) -> None:
    """Two supervisors that die while they take over cost nothing."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2", "--follow-name")
    clients = [server.connect(b"0\n") for _ in range(4)]
    for client in clients:
        expect(client, SMALL)
    orphan(server)
    for _ in range(2):
        taker = start_successor(
            serve,
            server,
            path,
            "-w",
            "3",
            "--follow-name",
            wrapper=("strace", "-o", os.devnull, "-e", f"inject={call}:signal=SIGKILL:when=1"),
        )
        taker.process.wait(DEADLINE)
        taker.expected_status = taker.process.returncode
        server.take_clients(taker)
        append(path, b"more")
        for client in clients:
            expect(client, b"more")
    take_over(serve, server, path, "-w", "2", "--follow-name")
    append(path, b"more")
    for client in clients:
        expect(client, b"more")


def listening(port: int) -> int:
    """Return the number of sockets that listen at this port."""
    lines = Path("/proc/net/tcp").read_text().split("\n") + Path(
        "/proc/net/tcp6"
    ).read_text().split("\n")
    return sum(f":{port:04X} " in line and " 0A " in line for line in lines)


@needs_strace
@pytest.mark.parametrize("before", ["1", "2"])
def test_taker_dies_when_some_workers_have_started(serve: Serve, path: Path, before: str) -> None:
    """A listener that one orphan has with others does not end with that orphan."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "3")
    client = server.connect(b"0\n")
    expect(client, SMALL)
    orphan(server)
    # Now one worker has several listeners.
    server = take_over(serve, server, path, "-w", before)
    count = listening(server.port)
    assert count == 6
    workers = server.workers(int(before))
    orphan(server)
    # The first new worker takes over from the first orphan, and the second one does not exist.
    taker = start_successor(
        serve,
        server,
        path,
        "-w",
        "3",
        wrapper=("strace", "-o", os.devnull, "-e", "inject=clone:signal=SIGKILL:when=2"),
    )
    taker.process.wait(DEADLINE)
    taker.expected_status = taker.process.returncode
    server.take_clients(taker)
    eventually(lambda: not all(Path(f"/proc/{pid}").exists() for pid in workers))
    assert listening(server.port) == count
    for _ in range(20):
        with connect(server.port, b"0\n") as visitor:
            expect(visitor, SMALL)
    take_over(serve, server, path, "-w", "3")
    append(path, b"more")
    expect(client, b"more")


def test_stopped_orphan(serve: Serve, path: Path) -> None:
    """An orphan that does not answer costs its own clients, and delays no others."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    clients = [server.connect(b"0\n") for _ in range(12)]
    for client in clients:
        expect(client, SMALL)
    stopped, _ = orphan(server)
    stop(stopped)
    successor = start_successor(
        serve, server, path, "-w", "2", program=hurried(takeover_patience=0.3)
    )
    successor.logged(KILLED, f"pid={stopped}")
    successor.logged(TOOK_OVER)
    append(path, b"more")
    lost = [client for client in clients if not outcome_is(client, b"more")]
    assert 0 < len(lost) < 12
    assert len(listing(successor)) == 12 - len(lost)
    expect(successor.connect(b"-4\n"), b"more")


def outcome_is(client: socket.socket, data: bytes) -> bool:
    """Tell whether `client` receives `data`, and not the end of the connection."""
    client.settimeout(DEADLINE)
    try:
        return recv_exactly(client, len(data)) == data
    except (OSError, AssertionError):
        return False


@needs_strace
def test_slow_taker(serve: Serve, path: Path) -> None:
    """An orphan waits for a bounded time. A worker that comes too late serves no client."""
    path.write_bytes(SMALL)
    # This time is longer than that for which orphans wait, which begins anew after it.
    patience = hurried(commit_patience=2.2)
    server = serve(path, "-w", "2", "--orphan-timeout", "2", program=patience)
    clients = [server.connect(b"0\n") for _ in range(4)]
    for client in clients:
        expect(client, SMALL)
    orphan(server)
    taker = start_successor(
        serve,
        server,
        path,
        "-w",
        "1",
        status=3,
        wrapper=("strace", "-o", os.devnull, "-e", "inject=clone:delay_enter=2800000"),
    )
    await_lines(server, NOT_TAKEN_OVER, count=2)
    append(path, b"more")
    for client in clients:
        expect(client, b"more")
    taker.logged("an orphaned worker has not waited for this one: ")
    taker.process.wait(DEADLINE)
    server.take_clients(taker)
    take_over(serve, server, path, "-w", "2")
    append(path, b"more")
    for client in clients:
        expect(client, b"more")


def test_workers_that_cannot_start(serve: Serve, path: Path) -> None:
    """If workers of the new supervisor do not start, the orphans serve on."""
    path.write_bytes(SMALL)
    code = (
        "import sys; from tailsrv import main; from tailsrv.worker import worker\n"
        "def fail(context): sys.exit(1)\n"
        "worker.commit = fail\n"
        "sys.exit(main.main())"
    )
    server = serve(path, "-w", "2")
    clients = [server.connect(b"0\n") for _ in range(4)]
    for client in clients:
        expect(client, SMALL)
    orphan(server)
    program = (sys.executable, "-c", code)
    taker = start_successor(serve, server, path, "-w", "2", status=3, program=program)
    taker.traceback_expected = True
    taker.process.wait(DEADLINE)
    await_lines(server, NOT_TAKEN_OVER, count=2)
    append(path, b"more")
    for client in clients:
        expect(client, b"more")
    server.take_clients(taker)
    take_over(serve, server, path, "-w", "2")
    append(path, b"more")
    for client in clients:
        expect(client, b"more")


# What cannot be taken over


def test_another_file(serve: Serve, path: Path) -> None:
    """A server for another file gets the port. The clients of the old one are drained."""
    path.write_bytes(DATA)
    (other := path.with_name("other")).write_bytes(b"another log")
    server = serve(path, "-w", "2")
    clients = [server.connect(b"0\n", receive_buffer=4096) for _ in range(4)]
    await_clients(server, 4)
    orphan(server)
    successor = start_successor(serve, server, other, "-w", "2")
    successor.logged(DRAINED, f"reason='they get another file: {path}'", count=2)
    successor.logged(TOOK_OVER, "clients=0")
    expect(successor.connect(b"0\n"), b"another log")
    for client in clients:
        assert recv_all(client) == DATA
    server.wait()
    expect(successor.connect(b"0\n"), b"another log")


def test_another_version(serve: Serve, path: Path) -> None:
    """Workers of a version with another format keep their clients, and drain them."""
    path.write_bytes(SMALL)
    code = (
        "import sys; from tailsrv import main; from tailsrv.worker import worker\n"
        "worker.FORMAT = 99\n"
        "sys.exit(main.main())"
    )
    server = serve(path, "-w", "2", program=(sys.executable, "-c", code))
    client = server.connect(b"0\n")
    expect(client, SMALL)
    orphan(server)
    successor = start_successor(serve, server, path, "-w", "2")
    successor.logged(DRAINED, "hands over in another format'", count=2)
    expect_eof(client)
    expect(successor.connect(b"0\n"), SMALL)


def test_another_program(path: Path) -> None:
    """A port that another program has is in use, as before."""
    path.write_bytes(SMALL)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        result = run_tailsrv("-p", str(port), path)
    assert result.returncode == 1
    assert "supervisor has died" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_another_address(serve: Serve, path: Path) -> None:
    """The error names the endpoint of the orphans that have the port."""
    path.write_bytes(SMALL)
    server = serve(path)
    orphan(server)
    result = run_tailsrv("-p", str(server.port), "--bind", "127.0.0.1", path)
    assert result.returncode == 1
    assert f"workers whose supervisor has died still serve *:{server.port}: " in result.stderr
    take_over(serve, server, path)


@pytest.mark.skipif(not as_root, reason="needs two users")
def test_another_user(serve: Serve, open_folder: Path) -> None:
    """Only the same user and root take over. The error of others says whose workers they are."""
    (path := open_folder / "log").write_bytes(SMALL)
    nobody = wrapper_without_rights()
    server = serve(path, "-w", "2")
    client = server.connect(b"0\n")
    expect(client, SMALL)
    orphan(server)
    result = run_tailsrv("-p", str(server.port), path, wrapper=nobody)
    assert result.returncode == 1
    assert "workers of user 0, whose supervisor has died, still serve it: " in result.stderr
    append(path, b"more")
    expect(client, b"more")
    take_over(serve, server, path, "-w", "2")
    append(path, b"more")
    expect(client, b"more")


@pytest.mark.sample(1)
@pytest.mark.skipif(not as_root, reason="needs two users")
@pytest.mark.parametrize("workers", ["1", "2", "4"])
def test_root_takes_over(serve: Serve, open_folder: Path, workers: str) -> None:
    """Root takes over from any user, although no socket of root can join that user's port."""
    (path := open_folder / "log").write_bytes(SMALL)
    server = serve(path, "-w", "2", wrapper=wrapper_without_rights())
    clients = [server.connect(b"0\n") for _ in range(4)]
    for client in clients:
        expect(client, SMALL)
    orphan(server)
    server = take_over(serve, server, path, "-w", workers)
    assert len(ready_workers(server)) == int(workers)
    clients += [server.connect(b"0\n") for _ in range(20)]
    for client in clients[4:]:
        expect(client, SMALL)
    append(path, b"more")
    for client in clients:
        expect(client, b"more")


@pytest.mark.skipif(not as_root, reason="needs two users")
def test_names_of_another_user(serve: Serve, path: Path) -> None:
    """Sockets that another user has named like those of workers do not disturb a server."""
    path.write_bytes(SMALL)
    server = serve(path)
    port = server.port
    server.kill_all()
    server.wait()
    name = f"tailsrv:*:{port}/worker/1.0"
    code = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"s.bind(chr(0) + {name!r}); s.listen(); print(flush=True); input()"
    )
    command = [*wrapper_without_rights(), sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as squatter:
        assert squatter.stdout is not None
        squatter.stdout.readline()
        successor = serve(path, "-p", str(server.port))
        expect(successor.connect(b"0\n"), SMALL)
        squatter.communicate(b"\n")


def test_too_few_descriptors(serve: Serve, path: Path) -> None:
    """A supervisor with too few descriptors for the clients ends, and the orphans serve on."""
    path.write_bytes(SMALL)
    server = serve(path)
    clients = [server.connect(b"0\n") for _ in range(60)]
    for client in clients:
        expect(client, SMALL)
    orphan(server)
    few = ("prlimit", "--nofile=50:50")
    taker = start_successor(serve, server, path, status=1, wrapper=few)
    taker.process.wait(DEADLINE)
    assert "out of file descriptors" in taker.logged("critical: cannot serve: ")
    await_lines(server, NOT_TAKEN_OVER)
    server.take_clients(taker)
    take_over(serve, server, path)
    append(path, b"more")
    for client in clients:
        expect(client, b"more")


# The log


def test_rotation_meanwhile(serve: Serve, path: Path) -> None:
    """Orphans serve the old file. The next supervisor finds the files that came after it."""
    path.write_bytes(b"first\n")
    server = serve(path, "-w", "2", "--follow-name")
    client = server.connect(b"0\n")
    expect(client, b"first\n")
    orphan(server)
    old = move_away(path)
    append(old, b"late\n")
    expect(client, b"late\n")
    path.write_bytes(b"second\n")
    rotate(path, b"third\n")
    take_over(serve, server, path, "-w", "2", "--follow-name")
    expect(client, b"second\nthird\n")


def test_truncation_meanwhile(serve: Serve, path: Path) -> None:
    """A truncation that only orphans have seen is not forgotten when the file has grown again."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "1", "--follow-name")
    caught_up = server.connect(b"0\n")
    expect(caught_up, SMALL)
    orphan(server)
    with path.open("r+b") as file:
        file.truncate(0)
    # The orphan reports nothing. It has seen the truncation when it reads this header.
    expect(server.connect(b"?0\n"), b"%019d %019d\n" % (0, len(SMALL)))
    path.write_bytes(DATA[5000:8000])
    server = take_over(serve, server, path, "-w", "1", "--follow-name")
    expect(caught_up, DATA[5000:8000])
    expect(server.connect(b"%d\n" % (len(SMALL) + 10)), DATA[5010:8000])


def test_no_file_yet(serve: Serve, path: Path, tmp_path: Path) -> None:
    """Clients that wait for the file wait on, and offsets continue where the state file ends."""
    path.write_bytes(b"first")
    options = ("--follow-name", "--state-file", str(tmp_path / "state"))
    server = serve(path, *options)
    server.workers(1)
    server.finish()
    path.unlink()
    server = serve(path, "-w", "2", *options)
    clients = [server.connect(b"?0\n") for _ in range(4)]
    await_clients(server, 4)
    orphan(server)
    take_over(serve, server, path, "-w", "2", *options)
    path.write_bytes(b"second")
    for client in clients:
        expect(client, b"%019d %019d\nsecond" % (5, 11))


def test_file_comes_meanwhile(serve: Serve, path: Path) -> None:
    """A file that comes while there is no supervisor is found by the next one."""
    server = serve(path, "-w", "2")
    clients = [server.connect(b"0\n") for _ in range(4)]
    await_clients(server, 4)
    orphan(server)
    path.write_bytes(SMALL)
    take_over(serve, server, path, "-w", "1")
    for client in clients:
        expect(client, SMALL)


def test_settings_change(serve: Serve, path: Path) -> None:
    """A takeover may turn --follow-name on, and change limits."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    client = server.connect(b"0\n")
    expect(client, SMALL)
    server.kill_supervisor()
    server = take_over(serve, server, path, "-w", "2", "--follow-name", "--max-clients", "1")
    rotate(path, b"next")
    expect(client, b"next")
    assert status(server)["max_clients"] == 1


def test_state_file(serve: Serve, path: Path, tmp_path: Path) -> None:
    """The log's state is saved again after a takeover, and offsets outlast the next start."""
    path.write_bytes(b"first")
    options = ("--follow-name", "--state-file", str(tmp_path / "state"))
    server = serve(path, *options)
    client = server.connect(b"0\n")
    expect(client, b"first")
    orphan(server)
    rotate(path, b"second")
    server = take_over(serve, server, path, *options)
    expect(client, b"second")
    server.finish()
    server = serve(path, *options)
    expect(server.connect(b"3\n"), b"stsecond")


# Many deaths


def replaced(server: Server, pid: int) -> bool:
    """Tell whether the worker with this pid has a successor that is ready."""
    workers = status(server)["workers"]
    return all(worker["ready"] and worker["pid"] != pid for worker in workers)


def sockets(server: Server) -> int:
    """Return the number of sockets of the supervisor, which has some of them only for a moment."""
    return sum(name.startswith("socket:") for name in descriptors(server.pid))


@pytest.mark.parametrize("deaths", [12, pytest.param(200, marks=pytest.mark.thorough)])
def test_many_deaths(serve: Serve, path: Path, deaths: int) -> None:
    """Fifty clients lose nothing while supervisors die, workers die, and the log rolls."""
    path.write_bytes(DATA[: 4 << 20])
    dice = random.Random(deaths)
    options = ("-w", "3", "--follow-name", "--grace", "1")
    server = serve(path, *options, program=hurried())
    with loaded(server, path, seed=7) as load:
        for _ in range(deaths):
            load.run(dice.uniform(0, 0.1))
            server.kill_supervisor()
            # Every connection is accepted. Orphans may not know of the last rotation yet.
            with connect(server.port, b"-1\n") as visitor:
                assert recv_exactly(visitor, 1)
            load.run(dice.choice([0, 0, dice.random()]))
            options = ("-w", str(dice.randrange(1, 5)), "--follow-name", "--grace", "1")
            load.server = server = start_successor(serve, server, path, *options, program=hurried())
            if dice.random() < 0.2:
                load.run(dice.uniform(0.1, 0.3))
                continue
            load.run_until(lambda: load.server.lines(TOOK_OVER))
            match dice.randrange(4):
                case 0:
                    killed = dice.choice(worker_pids(server))
                    os.kill(killed, signal.SIGKILL)
                    # Without worker and supervisor, a client is lost.
                    load.run_until(partial(replaced, server, killed))
                case 1:
                    server.signal(signal.SIGHUP)
                    # Between the end of an old worker and the start of its successor, only the
                    # supervisor has the clients.
                    load.run_until(partial(server.lines, " upgraded: "))
                case 2:
                    rotate(path)
        before: list[int] = []
        for _ in range(4):
            load.run_until(lambda: load.server.lines(TOOK_OVER))
            server.kill_supervisor()
            options = ("-w", "4", "--follow-name", "--grace", "1")
            load.server = server = start_successor(serve, server, path, *options, program=hurried())
            load.run_until(partial(server.lines, TOOK_OVER))
            for _ in range(0 if before else 10):
                load.turn()
                before.append(sockets(server))
        # A socket that each takeover leaves open would be there three times.
        load.run_until(lambda: sockets(server) <= max(before))
