"""`tailsrv-health` and servers without a supervisor, whose workers serve on."""

import json
import os
import re
import signal
import socket
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sized
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.files import append
from support.health import ask, ask_json, health
from support.processes import AS_NOBODY, as_root, runs, stop
from support.server import Serve, Server
from support.sockets import expect
from support.status import await_clients
from support.waiting import eventually
from tailsrv.handover import FORMAT, Greeting
from tailsrv.health import (
    EndedError,
    InspectError,
    Level,
    NoSupervisorError,
    NotOursError,
    OrphanReport,
    find,
    inspect,
)
from tailsrv.health import Server as Found
from tailsrv.health.main import check

needs_nobody = pytest.mark.skipif(
    not runs(*AS_NOBODY, sys.executable, "-c", "import tailsrv"),
    reason="not root, or nobody cannot run this Python",
)
root_only = pytest.mark.skipif(not as_root, reason="only root can act as another user")

DATA = b"data"
# Seconds that a server waits for the next supervisor here. A check on a busy machine takes less.
TIMEOUT = 100
SECONDS = re.compile(r"for another ([0-9]+) seconds?")


def orphaned(server: Server, workers: int, clients: int) -> list[int]:
    """Kill the supervisor of `server` when it knows of `clients`, and return its workers' pids."""
    pids = server.workers(workers)
    for _ in range(clients):
        expect(server.connect(b"0\n"), DATA)
    if clients:
        await_clients(server, clients)
    server.kill_supervisor()
    eventually(lambda: len(server.lines("supervisor is gone")) == workers)
    return pids


def report_on(server: Server) -> OrphanReport:
    """Return the library's report on `server`, which has no supervisor."""
    [found] = find(port=server.port)
    with pytest.raises(NoSupervisorError) as caught:
        inspect(found)
    return caught.value.report


def without_seconds(line: str) -> str:
    """Return `line` with `S` for the seconds, which must be possible."""
    match = SECONDS.search(line)
    assert match
    assert 0 <= int(match[1]) <= TIMEOUT
    return SECONDS.sub("for another S seconds", line)


def test_killed_supervisor(serve: Serve, path: Path) -> None:
    """Orphans are CRITICAL with their number, clients and time; after a takeover, all is OK."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", "--orphan-timeout", str(TIMEOUT))
    port = server.port
    workers = orphaned(server, 2, clients=3)
    before = server.log
    done = health("-p", str(port))
    first, *lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (Level.CRITICAL, "")
    assert without_seconds(first) == (
        f"CRITICAL: tailsrv *:{port}: no supervisor, 2 orphaned workers serve 3 clients"
        " for another S seconds"
    )
    rows = [line.split() for line in lines]
    assert [int(row[2]) for row in rows if row[:1] == ["worker"]] == workers
    assert sum(int(row[-1]) for row in rows if row[:1] == ["worker"]) == 3
    assert f"file     {path}" in lines
    # The check was not taken for a supervisor.
    append(path, DATA)
    for client in server.clients:
        expect(client, DATA)
    assert server.log == before
    taker = serve(path, "-w", "2", "-p", str(port))
    taker.workers(2)
    assert ask(taker)[0] == Level.OK
    [found] = find(port=port)
    assert (found.pid, found.orphans) == (taker.pid, ())
    server.wait()


def test_formats(serve: Serve, path: Path) -> None:
    """JSON and Prometheus have the figures of orphans, and --pid selects them."""
    path.write_bytes(DATA)
    server = serve(path, "--orphan-timeout", str(TIMEOUT))
    [worker] = orphaned(server, 1, clients=1)
    entry = ask_json(server)
    report = entry["orphan_report"]
    assert (entry["level"], entry["pid"], entry["orphans"]) == ("CRITICAL", None, [worker])
    assert (entry["uid"], entry["ours"], entry["report"]) == (os.geteuid(), True, None)
    assert [without_seconds(reason) for reason in entry["reasons"]] == [
        "no supervisor, 1 orphaned worker serves 1 client for another S seconds"
    ]
    assert (report["path"], report["clients"]) == (str(path), 1)
    [entry] = report["workers"]
    assert (entry["pid"], entry["slot"], entry["clients"]) == (worker, 0, 1)
    assert 0 < entry["seconds"] <= TIMEOUT
    assert entry["seconds"] == report["seconds"]
    assert entry["process"]["pid"] == worker
    assert entry["process"]["pss"] > 1 << 20
    metrics = health("--pid", str(worker), "--format", "prometheus").stdout
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    name = f"*:{server.port}"
    assert samples["tailsrv_health_status", name] == Level.CRITICAL
    assert samples["tailsrv_state", name, "orphaned"] == 1
    assert samples["tailsrv_state", name, "serving"] == 0
    assert samples["tailsrv_clients", name] == 1
    assert samples["tailsrv_worker_clients", name, "0"] == 1
    assert samples["tailsrv_process_open_fds", name, "worker 0"] > 3
    assert samples["tailsrv_info", name, report["version"], str(path)] == 1
    server.kill_all()


@pytest.mark.slow
def test_stopped_workers(serve: Serve, path: Path) -> None:
    """Stopped workers are counted and named as silent. All of them get the same time to answer."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "3", "--orphan-timeout", str(TIMEOUT))
    workers = orphaned(server, 3, clients=0)
    for worker in workers[:2]:
        stop(worker)
    entry = ask_json(server)
    assert [without_seconds(reason) for reason in entry["reasons"]] == [
        "no supervisor, 3 orphaned workers serve 0 clients for another S seconds,"
        " 2 of them do not answer"
    ]
    first, *others = entry["orphan_report"]["workers"]
    assert (first["pid"], first["slot"], first["clients"]) == (workers[2], 2, 0)
    assert sorted(worker["pid"] for worker in others) == sorted(workers[:2])
    for worker in others:
        assert worker["slot"] is worker["clients"] is worker["seconds"] is None
        assert worker["process"]["state"] == "stopped"
    for worker in workers[:2]:
        os.kill(worker, signal.SIGCONT)
    assert "do not answer" not in ask(server)[1]
    server.kill_all()


def test_several_addresses(serve: Serve, path: Path) -> None:
    """Orphans that listen on two addresses are one server, beside a server with a supervisor."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", "--bind", "127.0.0.2", "--bind", "127.0.0.3")
    port = str(server.port)
    well = serve(path, "-w", "2", "-p", port, "--bind", "127.0.0.4")
    well.workers(2)
    workers = server.workers(2)
    client = server.connect(b"0\n", host="127.0.0.3")
    expect(client, DATA)
    server.kill_supervisor()
    one, two = find(port=server.port)
    assert one.endpoints == (f"127.0.0.2:{port}", f"127.0.0.3:{port}")
    assert (sorted(one.orphans), one.pid) == (sorted(workers), None)
    assert (two.pid, two.orphans) == (well.pid, ())
    done = health("-p", port)
    assert done.returncode == Level.CRITICAL
    assert done.stdout.startswith(
        f"CRITICAL: 1 of 2 servers: tailsrv 127.0.0.2:{port},127.0.0.3:{port}: "
        "no supervisor, 2 orphaned workers serve 1 client "
    )
    taker = serve(path, "-w", "2", "-p", port, "--bind", "127.0.0.2", "--bind", "127.0.0.3")
    taker.workers(2)
    assert ask(taker) == (Level.OK, "OK: 2 tailsrv servers serve 1 client")
    append(path, DATA)
    expect(client, DATA)
    assert "warning" not in taker.log


def test_several_servers(serve: Serve, path: Path) -> None:
    """Orphans of two servers are two servers."""
    path.write_bytes(DATA)
    one = serve(path, "--bind", "127.0.0.2")
    two = serve(path, "--bind", "127.0.0.3", "-p", str(one.port))
    workers = [orphaned(server, 1, clients=0)[0] for server in (one, two)]
    assert [(server.endpoints, server.orphans) for server in find(port=one.port)] == [
        ((f"127.0.0.{2 + index}:{one.port}",), (worker,)) for index, worker in enumerate(workers)
    ]
    assert [server.orphans for server in find(pid=workers[1])] == [(workers[1],)]
    one.kill_all()
    two.kill_all()


def test_ended_orphans(serve: Serve, path: Path) -> None:
    """Orphans that have ended since they were found raise EndedError, a takeover as well."""
    path.write_bytes(DATA)
    server = serve(path)
    orphaned(server, 1, clients=0)
    [found] = find(port=server.port)
    taker = serve(path, "-p", str(server.port))
    taker.workers()
    with pytest.raises(EndedError, match="another server has replaced it"):
        inspect(found)
    assert queued(taker) == 0
    taker.kill_supervisor()
    [found] = find(port=server.port)
    taker.kill_all()
    with pytest.raises(EndedError, match="the server has ended"):
        inspect(found)
    assert find(port=server.port) == []


def queued(server: Server) -> int:
    """Return how many connections are in the queues of the workers' sockets of `server`."""
    name = f" @tailsrv:*:{server.port}/worker/"
    lines = [line for line in Path("/proc/net/unix").read_text().splitlines() if name in line]
    # __SO_ACCEPTCON: the socket listens. The others are its connections.
    listeners = [line for line in lines if int(line.split()[3], 16) & 0x10000]
    assert listeners
    return len(lines) - len(listeners)


@needs_nobody
def test_orphans_of_another_user(serve: Serve, open_folder: Path) -> None:
    """Root sees the orphans of all users; another user sees only that they are not its own."""
    path = open_folder / "file.log"
    path.write_bytes(DATA)
    path.chmod(0o644)
    ours, theirs = serve(path), serve(path, wrapper=AS_NOBODY)
    for server in (ours, theirs):
        orphaned(server, 1, clients=0)
    sentence = "no supervisor, 1 orphaned worker serves 0 clients for another "
    assert f" *:{theirs.port} (user nobody): {sentence}" in ask(theirs)[1]
    done = health("-p", str(theirs.port), wrapper=AS_NOBODY)
    assert done.stdout.startswith(f"CRITICAL: tailsrv *:{theirs.port}: {sentence}")
    done = health("-p", str(ours.port), wrapper=AS_NOBODY)
    refusal = "belongs to user root: run the check as that user or as root"
    assert (done.returncode, done.stdout) == (
        Level.UNKNOWN,
        f"UNKNOWN: tailsrv *:{ours.port} (user root): {refusal}\n",
    )
    listed = json.loads(health("--format", "json", wrapper=AS_NOBODY).stdout)
    names = [server["endpoints"] for server in listed["servers"]]
    assert [f"*:{theirs.port}"] in names
    assert [f"*:{ours.port}"] not in names
    ours.kill_all()
    theirs.kill_all()


def test_checks_during_takeovers(serve: Serve, path: Path) -> None:
    """While supervisors die and others take over, each check finds orphans or a supervisor."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2")
    port = server.port
    server.workers(2)
    client = server.connect(b"0\n")
    expect(client, DATA)
    options = Namespace(port=port, pid=None, clients=False, format="text")
    found, end = [], threading.Event()

    def run_checks() -> None:
        while not end.is_set():
            level, text = check(options)
            found.append((level, text.partition("\n")[0]))

    threads = [threading.Thread(target=run_checks) for _ in range(2)]
    for thread in threads:
        thread.start()
    servers = [server]
    try:
        for _ in range(8):
            servers[-1].kill_supervisor()
            # It dies before, while and after it takes over, with the time that the checks take.
            eventually(partial(_longer, found, len(found)))
            servers.append(serve(path, "-w", "2", "-p", str(port)))
            servers[-1].workers(2)
    finally:
        end.set()
        for thread in threads:
            thread.join()
    append(path, DATA)
    expect(client, DATA)
    strange = [
        line
        for level, line in found
        if level is not Level.OK
        and "no supervisor, 2 orphaned workers serve 1 client for another" not in line
        and not re.search(r"[01] of 2 workers ready", line)
    ]
    assert strange == []
    assert {Level.OK, Level.CRITICAL} <= {level for level, _ in found}


def _longer(found: Sized, count: int) -> bool:
    return len(found) > count


# Impostors


@contextmanager
def false_worker(answer: bytes | None, name: str, backlog: int = 16) -> Iterator[None]:
    """Listen at the worker's socket `name`, and send `answer` to each connection."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        ExitStack() as stack,
    ):
        listener.bind(f"\0tailsrv:{name}")
        listener.listen(backlog)
        if answer is not None:
            thread = threading.Thread(target=_answer_all, args=(listener, answer))
            stack.callback(thread.join)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            thread.start()
        yield


def _answer_all(listener: socket.socket, answer: bytes) -> None:
    with suppress(OSError):
        while True:
            with listener.accept()[0] as peer, suppress(OSError):
                if answer:
                    peer.send(answer)


@pytest.fixture
def port() -> Iterator[int]:
    """Reserve a port without a server."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


GREETING = Greeting("9.9", FORMAT, 1, 0, "/log", 1, 1.9)
VALUES = json.loads(GREETING.encode())


def test_greeting_of_another_version(port: int) -> None:
    """A greeting with further fields is read."""
    answer = json.dumps(VALUES | {"format": 99, "further": []}).encode()
    with false_worker(answer, f"a-name:{port}/worker/7"):
        done = health("-p", str(port))
    assert done.stdout.startswith(
        f"CRITICAL: tailsrv a-name:{port}: no supervisor, 1 orphaned worker serves 1 client"
        " for another 1 second\n"
    )


@pytest.mark.parametrize(
    "answer",
    [
        b"x", b"[]", b"{}", b"[" * 9999, *(
            json.dumps(VALUES | changes).encode()
            for changes in (
                {"clients": -1}, {"clients": "1"}, {"path": 1}, {"version": None}, {"slot": 1.5},
                {"seconds": float("nan")}, {"seconds": 1 << 2000},
            )
        ),
    ],
)  # fmt: skip
def test_invalid_greeting(answer: bytes, port: int) -> None:
    """An invalid greeting is UNKNOWN, in one sentence."""
    with false_worker(answer, f"a-name:{port}/worker/7"):
        [found] = find(port=port)
        with pytest.raises(InspectError, match="unexpected answer from an orphaned") as caught:
            inspect(found)
    assert caught.value.level is Level.UNKNOWN
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_refusal(port: int) -> None:
    """A worker that listens, but closes each connection, may be in another user namespace."""
    with false_worker(b"", f"a-name:{port}/worker/7"):
        done = health("-p", str(port))
    assert done.returncode == Level.UNKNOWN
    assert "orphaned worker closed the connection without an answer: it may be in" in done.stdout


def test_escape_sequences_are_escaped(port: int) -> None:
    """Escape sequences in a greeting are printed in escaped form."""
    answer = json.dumps(VALUES | {"path": "/\x1b[2J\n", "version": "\x1b"}).encode()
    with false_worker(answer, f"a-name:{port}/worker/7"):
        done = health("-p", str(port))
    assert "\x1b" not in done.stdout
    assert r"/\x1b[2J" in done.stdout


def test_full_queue(port: int) -> None:
    """A worker whose queue is full does not answer."""
    name = f"a-name:{port}/worker/7"
    with (
        false_worker(None, name, backlog=0),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first,
    ):
        first.connect(f"\0tailsrv:{name}")
        assert find(port=port) == [
            Found((f"a-name:{port}",), None, None, None, ours=False, orphans=(0,))
        ]
        done = health("-p", str(port))
    assert (done.returncode, done.stdout.partition("\n")[0]) == (
        Level.CRITICAL,
        f"CRITICAL: tailsrv a-name:{port}: no supervisor, 1 orphaned worker does not answer",
    )


@pytest.mark.parametrize("name", ["a b:{}/worker/1", "a:{}/worker/x", "a:{}/worker/1.0", "a:{}"])
def test_names_that_are_no_workers(name: str, port: int) -> None:
    """Names that only resemble that of a worker's socket are ignored."""
    with false_worker(None, name.format(port)):
        assert find(port=port) == []


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Run the block with the effective user id `user`."""
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)


@root_only
def test_false_workers_beside_a_server(serve: Serve, path: Path) -> None:
    """Another user's false worker is ignored beside a supervisor, and UNKNOWN on its port."""
    path.write_bytes(DATA)
    server = serve(path)
    server.workers()
    answer = GREETING.encode()
    with ExitStack() as stack:
        for endpoint in (f"*:{server.port}", f"a-name:{server.port}"):
            with acting_as(3_000_000_001):
                stack.enter_context(false_worker(answer, f"{endpoint}/worker/9"))
        one, two = find(port=server.port)
        assert (one.pid, two.uid) == (server.pid, 3_000_000_001)
        with acting_as(3_000_000_002), pytest.raises(NotOursError):
            inspect(two)
        status, first = ask(server)
    assert status == Level.UNKNOWN
    assert first.startswith(
        f"UNKNOWN: 1 of 2 servers: tailsrv a-name:{server.port} (user 3000000001): no supervisor,"
    )


@root_only
def test_false_worker_beside_orphans(serve: Serve, path: Path) -> None:
    """Another user's false worker at the endpoint of orphans is a server of its own."""
    path.write_bytes(DATA)
    server = serve(path)
    orphaned(server, 1, clients=0)
    with ExitStack() as stack:
        with acting_as(3_000_000_001):
            stack.enter_context(false_worker(GREETING.encode(), f"*:{server.port}/worker/7"))
        status, first = ask(server)
    assert status == Level.CRITICAL
    sentence = "no supervisor, 1 orphaned worker serves"
    assert first.startswith(
        f"CRITICAL: 2 of 2 servers: tailsrv *:{server.port}: {sentence} 0 clients for another "
    )
    assert f"tailsrv *:{server.port} (user 3000000001): {sentence} 1 client for " in first
    server.kill_all()


def test_living_workers_are_not_connected_to(serve: Serve, path: Path) -> None:
    """Checks leave no connection in the queues of workers that have a supervisor."""
    path.write_bytes(DATA)
    server = serve(path)
    server.workers()
    for _ in range(3):
        assert ask(server)[0] == Level.OK
    assert queued(server) == 0
