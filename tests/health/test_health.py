"""`tailsrv-health` and its library, with real servers and with impostors."""

import ctypes
import dataclasses
import json
import os
import pty
import resource
import select
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.files import append, random_bytes
from support.health import HEALTH, ask, ask_json, health
from support.hooks import install_hook
from support.interpreter import program, run_program
from support.processes import AS_NOBODY, NOBODY, as_root, runs, stop
from support.server import HURRIED, Serve, Server, run_tailsrv
from support.sockets import expect
from support.waiting import DEADLINE, eventually
from tailsrv.control_socket import credentials
from tailsrv.health import (
    EndedError,
    InspectError,
    Level,
    NotOursError,
    Report,
    find,
    inspect,
    judge,
)
from tailsrv.health import Server as Found
from tailsrv.health.control_client import ask_status, list_endpoints
from tailsrv.linux.process import start_ticks

# The prefix of a command that sees only processes in /proc.
HIDDEN = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount -t proc -o subset=pid proc /proc && exec "$@"',
    "sh",
)

root_only = pytest.mark.skipif(not as_root, reason="only root can make namespaces")
needs_nobody = pytest.mark.skipif(
    not runs(*AS_NOBODY, sys.executable, "-c", "import tailsrv"),
    reason="not root, or nobody cannot run this Python",
)


def inspect_server(server: Server, *, clients: bool = False) -> Report:
    """Return the library's report on `server`."""
    [found] = find(port=server.port)
    return inspect(found, clients=clients)


def wait_for_clients(server: Server, count: int) -> None:
    """Wait until the supervisor knows of `count` clients."""
    eventually(lambda: inspect_server(server).totals.clients == count)


# Healthy servers


@pytest.mark.slow
def test_healthy(serve: Serve, path: Path) -> None:
    """A healthy server is OK, with a summary and a row for each process, listener and fact."""
    path.write_bytes(random_bytes(3 << 19))
    server = serve(path, "-w", "2", "--max-clients", "500")
    supervisor, workers = server.pid, server.workers(2)
    expect(server.connect(b"0\n"), path.read_bytes())
    wait_for_clients(server, 1)
    done = health("-p", str(server.port))
    first, *lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert first.startswith(f"OK: tailsrv *:{server.port} serves ")
    assert first.endswith("file.log to 1 client with 2 workers")
    assert max(map(len, [first, *lines])) <= 100
    rows = [line.split() for line in lines]
    assert [row[1] for row in rows if row[:1] == ["supervisor"]] == [str(supervisor)]
    assert [int(row[2]) for row in rows if row[:1] == ["worker"]] == workers
    assert {f"0.0.0.0:{server.port}", "total"} <= {row[0] for row in rows if row}
    assert ["clients", "1,", "at", "most", "500"] in rows
    assert "1.5 MiB" in done.stdout
    assert "\x1b" not in done.stdout


def test_json_is_exact(serve: Serve, path: Path) -> None:
    """The JSON output has the exact pids, sizes and limits."""
    path.write_bytes(b"x" * 12345)
    server = serve(path, "-w", "2")
    workers = server.workers(2)
    entry = ask_json(server)
    report = entry["report"]
    assert (entry["level"], entry["reasons"], entry["pid"], entry["uid"]) == (
        "OK",
        [],
        server.pid,
        os.geteuid(),
    )
    assert report["file"] == {
        "path": str(path),
        "size": 12345,
        "gone": False,
        "error": None,
        "follow_name": False,
        "missing": None,
    }
    assert report["log"] == {
        "start": 0,
        "end": 12345,
        "segments": 1,
        "size": 12345,
        "retired": 0,
        "retired_size": 0,
    }
    assert [worker["process"]["pid"] for worker in report["workers"]] == workers
    assert [worker["ready"] for worker in report["workers"]] == [True, True]
    process = report["supervisor"]
    assert process["descriptors"] == psutil.Process(server.pid).num_fds()
    assert process["descriptor_limit"] == psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE)[0]
    assert process["pss"] > 1 << 20
    assert 0 < process["uptime"] < 10 * DEADLINE
    assert report["totals"]["pss"] == process["pss"] + sum(
        worker["process"]["pss"] for worker in report["workers"]
    )
    assert report["segments"] is report["clients"] is None


def test_no_client(serve: Serve, path: Path) -> None:
    """A check does not connect to the service port: the server logs nothing, even with -v."""
    path.write_bytes(b"data")
    server = serve(path, "-v")
    server.workers()
    before = server.log
    assert ask(server, "--clients")[0] == Level.OK
    assert server.log == before


def test_waiting_for_file(serve: Serve, path: Path) -> None:
    """A server that waits for its file is OK, and the output says that it waits."""
    server = serve(path, "-w", "2")
    server.logged("waiting for file")
    done = health("-p", str(server.port))
    assert done.returncode == Level.OK
    assert done.stdout.startswith(f"OK: tailsrv *:{server.port} waits for file ")
    assert "not there yet" in done.stdout


def test_draining(serve: Serve, path: Path) -> None:
    """A server that drains is OK, and the output says that it drains."""
    path.write_bytes(bytes(32 << 20))
    server = serve(path, "--grace", "60")
    server.workers()
    server.connect(b"0\n", receive_buffer=4096)
    wait_for_clients(server, 1)
    server.signal(signal.SIGTERM)
    server.logged("draining")
    status, first = ask(server)
    assert status == Level.OK
    assert first.startswith(f"OK: tailsrv *:{server.port} is draining ")
    assert first.endswith(", 1 client left")


# Clients


@pytest.mark.slow
def test_clients_and_their_lag(serve: Serve, path: Path) -> None:
    """Each client is listed with its start, position and lag, in the order of their lag."""
    path.write_bytes(bytes(1000))
    server = serve(path, "-v")
    [worker] = server.workers()
    ahead, reader, silent = server.connect(b"5000\n"), server.connect(b"-100\n"), server.connect()
    server.streaming(ahead)
    expect(reader, bytes(100))
    wait_for_clients(server, 3)
    stop(worker)
    append(path, bytes(234))
    try:
        clients = {
            client.peer: client for client in inspect_server(server, clients=True).clients or ()
        }
        table = (
            health("-p", str(server.port), "--clients")
            .stdout.partition("\nclient ")[2]
            .splitlines()[1:]
        )
    finally:
        os.kill(worker, signal.SIGCONT)
    peers = ["{}:{}".format(*sock.getsockname()) for sock in (reader, ahead, silent)]
    figures = [
        (client.slot, client.start, client.position, client.lag)
        for client in map(clients.__getitem__, peers)
    ]
    assert figures == [(0, 900, 1000, 234), (0, 5000, 5000, 0), (0, None, None, None)]
    assert [line.split() for line in table] == [
        [peers[0], "0", "900", "1000", "234", "234", "B"],
        [peers[1], "0", "5000", "5000", "0", "beyond", "the", "end"],
        [peers[2], "0", "-", "-", "-", "-"],
    ]


def test_rotation(serve: Serve, path: Path) -> None:
    """While a file is moved away, the server is OK; lag counts from one file to the next."""
    data = random_bytes(20_000_000)
    path.write_bytes(data)
    server = serve(path, "--follow-name", program=HURRIED)
    server.workers(1)
    slow, fast = server.connect(b"0\n", receive_buffer=4096), server.connect(b"-1\n")
    expect(fast, data[-1:])
    wait_for_clients(server, 2)
    path.rename(path.with_suffix(".1"))
    eventually(lambda: inspect_server(server).file.missing)
    status, first = ask(server)
    assert status == Level.OK
    assert first.startswith(f"OK: tailsrv *:{server.port} serves ")
    path.write_bytes(bytes(1000))
    expect(fast, bytes(1000))
    path.with_suffix(".1").unlink()
    eventually(lambda: (log := inspect_server(server).log) is not None and log.retired)
    report = inspect_server(server, clients=True)
    [behind] = [
        client
        for client in report.clients or ()
        if client.peer == "{}:{}".format(*slow.getsockname())
    ]
    assert behind.position is not None
    assert behind.lag == len(data) + 1000 - behind.position > 1000
    lines = health("-p", str(server.port), "--clients").stdout.splitlines()
    assert any(line.startswith("log ") and line.endswith("1 deleted (19.1 MiB)") for line in lines)
    assert ["0", "19.1", "MiB", "sealed,", "deleted", "1", "-"] in [line.split() for line in lines]


@pytest.mark.thorough
def test_clients_only_if_asked_for(serve: Serve, path: Path) -> None:
    """No output format lists clients without --clients."""
    path.write_bytes(b"data")
    server = serve(path)
    peer = "{}:{}".format(*server.connect(b"0\n").getsockname())
    wait_for_clients(server, 1)
    for form in ("text", "json", "prometheus"):
        arguments = ("-p", str(server.port), "--format", form)
        assert peer not in health(*arguments).stdout
        assert peer in health(*arguments, "--clients").stdout


# Unhealthy servers


@pytest.mark.thorough
def test_restarted_worker(serve: Serve, path: Path) -> None:
    """A worker that was killed and replaced is a WARNING for a minute, and is counted."""
    path.write_bytes(b"data")
    server = serve(path, "-w", "2")
    os.kill(server.workers(2)[1], signal.SIGKILL)
    server.logged("worker ready: slot=1", count=2)
    assert ask(server) == (
        Level.WARNING,
        f"WARNING: tailsrv *:{server.port}: worker 1 was restarted in the last minute",
    )
    assert [worker["restarts"] for worker in ask_json(server)["report"]["workers"]] == [0, 1]


@pytest.mark.thorough
@pytest.mark.slow
def test_stopped_worker(serve: Serve, path: Path) -> None:
    """A stopped worker is CRITICAL until it continues, and its queued connections are counted."""
    path.write_bytes(b"data")
    server = serve(path)
    [worker] = server.workers()
    stop(worker)
    for _ in range(3):
        server.connect(b"0\n")
    assert ask(server) == (
        Level.CRITICAL,
        f"CRITICAL: tailsrv *:{server.port}: worker 0 is stopped",
    )
    assert inspect_server(server).totals.queued == 3
    os.kill(worker, signal.SIGCONT)
    wait_for_clients(server, 3)
    assert ask(server)[0] == Level.OK


@contextmanager
def traced(pid: int) -> Iterator[None]:
    """Keep the process `pid` from running by ptrace(2), without a stop signal."""
    # The numbers of PTRACE_ATTACH and PTRACE_DETACH.
    attach, detach = 16, 17
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(attach, pid, None, None) != 0:
        pytest.skip(f"no ptrace(2): {os.strerror(ctypes.get_errno())}")
    # The option is __WALL: wait for a child of any kind, and for a traced process.
    os.waitpid(pid, 0x40000000)
    try:
        yield
    finally:
        libc.ptrace(detach, pid, None, None)


@pytest.mark.slow
def test_hung_worker(serve: Serve, path: Path) -> None:
    """A worker that is not stopped but does not answer pings is CRITICAL."""
    path.write_bytes(b"data")
    server = serve(path, "-w", "2")
    with traced(server.workers(2)[1]):
        status, first = ask(server)
        assert (status, first) == (
            Level.CRITICAL,
            f"CRITICAL: tailsrv *:{server.port}: worker 1 hangs",
        )
    eventually(lambda: ask(server)[0] == Level.OK)


def test_few_descriptors(serve: Serve, path: Path) -> None:
    """A process that uses more than nine tenths of its descriptors is a WARNING."""
    path.write_bytes(b"data")
    server = serve(path)
    [worker] = server.workers()
    used = psutil.Process(worker).num_fds()
    resource.prlimit(
        worker,
        resource.RLIMIT_NOFILE,
        (used + 1, resource.prlimit(worker, resource.RLIMIT_NOFILE)[1]),
    )
    status, first = ask(server)
    assert (status, first) == (
        Level.WARNING,
        f"WARNING: tailsrv *:{server.port}: worker 0 uses {used} of {used + 1} descriptors",
    )


def test_gone_file(serve: Serve, path: Path) -> None:
    """A served file that is gone is CRITICAL."""
    path.write_bytes(b"data")
    server = serve(path, "--linger-after-file-is-gone")
    server.workers()
    path.unlink()
    server.logged("file is gone")
    assert ask(server) == (Level.CRITICAL, f"CRITICAL: tailsrv *:{server.port}: the file is gone")
    assert ask_json(server)["report"]["file"] == {
        "path": str(path),
        "size": 4,
        "gone": True,
        "error": None,
        "follow_name": False,
        "missing": None,
    }


@pytest.mark.slow
def test_stopped_supervisor(serve: Serve, path: Path) -> None:
    """A supervisor that does not answer is CRITICAL, with the reason, in each output format."""
    path.write_bytes(b"data")
    server = serve(path)
    server.workers()
    port = server.port
    stop(server.pid)
    try:
        with ThreadPoolExecutor() as pool:
            names = ("text", "json", "prometheus")
            forms = dict(
                zip(
                    names,
                    pool.map(lambda form: health("-p", str(port), "--format", form), names),
                    strict=True,
                )
            )
    finally:
        server.signal(signal.SIGCONT)
    assert {done.returncode for done in forms.values()} == {Level.CRITICAL}
    sentence = f"tailsrv *:{port}: supervisor does not answer: pid {server.pid} is stopped"
    assert forms["text"].stdout == f"CRITICAL: {sentence}\n"
    assert json.loads(forms["json"].stdout)["summary"] == sentence
    assert f'tailsrv_health_status{{server="*:{port}"}} 2\n' in forms["prometheus"].stdout


@contextmanager
def spare_port() -> Iterator[int]:
    """Reserve a port without a server, and keep servers of other tests from it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.mark.parametrize("form", ["text", "json", "prometheus"])
def test_no_server(form: str) -> None:
    """A server that is not found is CRITICAL."""
    with spare_port() as port:
        done = health("-p", str(port), "--format", form)
    assert (done.returncode, done.stderr) == (Level.CRITICAL, "")
    assert {
        "text": "CRITICAL: no tailsrv on port ",
        "json": '"CRITICAL"',
        "prometheus": "\ntailsrv_servers 0\n",
    }[form] in done.stdout
    done = health("--pid", str(os.getpid()))
    assert (done.returncode, done.stdout) == (
        Level.CRITICAL,
        f"CRITICAL: no tailsrv supervisor with pid {os.getpid()} in this network namespace\n",
    )


# Which servers are found


@pytest.mark.thorough
def test_several_addresses_are_one_server(serve: Serve, path: Path) -> None:
    """A server on two addresses counts once; a second server on the same port is separate."""
    path.write_bytes(b"data")
    one = serve(path, "--bind", "127.0.0.2", "--bind", "127.0.0.3")
    one.workers()
    port = str(one.port)
    two = serve(path, "-p", port, "--bind", "127.0.0.4")
    two.workers()
    assert [server.endpoints for server in find(port=one.port)] == [
        (f"127.0.0.2:{port}", f"127.0.0.3:{port}"),
        (f"127.0.0.4:{port}",),
    ]
    assert [server.pid for server in find(pid=two.pid)] == [two.pid]
    done = health("-p", port)
    lines = done.stdout.splitlines()
    assert done.returncode == Level.OK
    assert lines[0] == "OK: 2 tailsrv servers serve 0 clients"
    assert sum(line.startswith("OK: tailsrv 127.0.0.") for line in lines) == 2
    done = health("--pid", str(one.pid))
    assert done.stdout.startswith(f"OK: tailsrv 127.0.0.2:{port},127.0.0.3:{port} serves ")


def test_long_host_name(serve: Serve, path: Path) -> None:
    """A server is found and inspected if its host name is too long for a socket's name."""
    path.write_bytes(b"data")
    # Digits and dots in the format of inet_aton(3), which need no name service.
    host = f"0x7f.{'0' * 50}.{'0' * 50}.1"
    server = serve(path, "--bind", host)
    server.workers()
    expect(server.connect(b"0\n"), b"data")
    wait_for_clients(server, 1)
    assert len(inspect_server(server, clients=True).clients or ()) == 1
    status, first = ask(server, "--clients")
    assert status == Level.OK
    assert first.startswith(f"OK: tailsrv 0x7f.{'0' * 50}.")
    assert f":{server.port} serves " in first
    second = run_tailsrv("-p", str(server.port), "--bind", host, path)
    assert second.returncode == 1
    assert f"pid {server.pid}" in second.stderr


@root_only
@pytest.mark.skipif(not runs("unshare", "--net", "true"), reason="no network namespaces")
@pytest.mark.slow
def test_all_servers_are_listed_and_the_worst_decides(serve: Serve, path: Path) -> None:
    """Without -p, all servers are listed, and the reasons of the worst come first."""
    path.write_bytes(b"data")
    well = serve(path, wrapper=("unshare", "--net"))
    inside = ("nsenter", "--net", "--target", str(well.pid))
    well.workers()
    assert health(wrapper=inside).stdout.startswith(f"OK: tailsrv *:{well.port} serves ")
    restarted, stopped = serve(path, wrapper=inside), serve(path, wrapper=inside)
    os.kill(restarted.workers()[0], signal.SIGKILL)
    restarted.logged("worker ready: ", count=2)
    stop(stopped.workers()[0])
    done = health(wrapper=inside)
    os.kill(stopped.workers()[0], signal.SIGCONT)
    assert done.returncode == Level.CRITICAL
    first, warning = (
        f"tailsrv *:{stopped.port}: worker 0 is stopped",
        f"tailsrv *:{restarted.port}: worker 0 was restarted in the last minute",
    )
    assert done.stdout.partition("\n")[0] == f"CRITICAL: 2 of 3 servers: {first}; {warning}"


@root_only
@pytest.mark.skipif(not runs("unshare", "--net", "true"), reason="no network namespaces")
def test_no_server_at_all() -> None:
    """Without -p, it is CRITICAL that no server is running."""
    done = health(wrapper=("unshare", "--net"))
    assert (done.returncode, done.stdout) == (
        Level.CRITICAL,
        "CRITICAL: no tailsrv of this user in this network namespace\n",
    )


def test_next_file_cannot_be_opened(serve: Serve, path: Path) -> None:
    """A server that cannot open the next file is CRITICAL, with the reason."""
    path.write_bytes(b"data")
    server = serve(path, "--follow-name")
    server.workers(1)
    path.unlink()
    path.mkdir()
    server.logged("cannot serve the next file yet")
    assert ask(server) == (
        Level.CRITICAL,
        f"CRITICAL: tailsrv *:{server.port}: cannot open the file: not a regular file",
    )
    path.rmdir()


def test_connections_that_wait_for_the_client_limit(serve: Serve, path: Path) -> None:
    """Connections that wait because of --max-clients are a WARNING; the reached limit is not."""
    path.write_bytes(b"data")
    server = serve(path, "--max-clients", "1")
    expect(server.connect(b"0\n"), b"data")
    assert ask(server)[0] == Level.OK
    server.connect(b"0\n")
    server.logged("new clients have to wait")
    assert ask(server) == (
        Level.WARNING,
        f"WARNING: tailsrv *:{server.port}: --max-clients is reached (1): 1 connection waiting",
    )


def test_no_standard_output() -> None:
    """A closed standard output is UNKNOWN, without a message."""
    command = f"exec {shlex.quote(sys.executable)} -m tailsrv.health -p 1 >&-"
    done = subprocess.run(
        ["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stderr) == (Level.UNKNOWN, "")


@pytest.mark.thorough
@needs_nobody
def test_other_users(serve: Serve, open_folder: Path) -> None:
    """Root sees all servers and their users; other users see and list only their own."""
    path = open_folder / "file.log"
    path.write_bytes(b"data")
    path.chmod(0o644)
    ours, theirs = serve(path), serve(path, wrapper=AS_NOBODY)
    ours.workers(), theirs.workers()
    assert f" *:{theirs.port} (user nobody) serves " in ask(theirs)[1]
    assert health("-p", str(theirs.port), wrapper=AS_NOBODY).stdout.startswith(
        f"OK: tailsrv *:{theirs.port} serves "
    )
    done = health("-p", str(ours.port), wrapper=AS_NOBODY)
    sentence = (
        f"tailsrv *:{ours.port} (user root): "
        "belongs to user root: run the check as that user or as root"
    )
    assert (done.returncode, done.stdout) == (Level.UNKNOWN, f"UNKNOWN: {sentence}\n")
    done = health("--pid", str(ours.pid), wrapper=AS_NOBODY)
    assert (done.returncode, done.stdout) == (Level.UNKNOWN, f"UNKNOWN: {sentence}\n")
    listed = health("--format", "prometheus", wrapper=AS_NOBODY).stdout
    assert f'server="*:{theirs.port}"' in listed
    assert f'server="*:{ours.port}"' not in listed


# Impostors, and supervisors of another version


@contextmanager
def impostor(answer: bytes, backlog: int = 16, name: str = "") -> Iterator[int]:
    """Run an impostor that sends `answer`; yield the port that it claims to serve."""
    with spare_port() as port, socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(f"\0tailsrv:{name or f'127.9.9.9:{port}'}")
        listener.listen(backlog)
        if backlog:
            thread = threading.Thread(target=answer_all, args=(listener, answer))
            stack.callback(thread.join)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            thread.start()
        yield port


def answer_all(listener: socket.socket, answer: bytes) -> None:
    """Send `answer` to each connection until the listener is shut down."""
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        with peer:
            try:
                peer.sendall(answer)
            except OSError:
                pass


FILE = {
    "path": "/log",
    "gone": False,
    "missing": None,
    "size": 1,
    "error": None,
    "follow_name": False,
}
LOG = {"start": 0, "end": 1, "segments": 1, "size": 1, "retired": 0, "retired_size": 0}


def status_of(pid: int, **changes: object) -> bytes:
    """Return a status as the process `pid` could send it."""
    status = {
        "version": "1.0.0", "command": ["tailsrv"], "pid": pid, "ticks": start_ticks(pid),
        "state": "serving",
        "started": 1767225600.0, "endpoints": ["*:1"], "file": FILE, "log": LOG,
        "clients": 0, "unprotected": 0, "max_clients": 0, "workers": [], "listeners": [],
    }  # fmt: skip
    return json.dumps(status | changes).encode()


SEGMENT = {
    "base": 0,
    "size": 1,
    "sealed": True,
    "clients": 0,
    "path": "/log",
    "deleted": False,
}


def listing_of(pid: int, **changes: object) -> bytes:
    """Return a list of segments and clients as the process `pid` could send it."""
    return json.dumps({"pid": pid, "end": 1, "segments": [], "clients": []} | changes).encode()


def worker_of(pid: int, ticks: int | None) -> dict[str, object]:
    counts = {"clients": 0, "unprotected": 0, "restarts": 0}
    return {
        "slot": 0,
        "pid": pid,
        "ticks": ticks,
        "ready": True,
        "restarted": None,
        "silent": 0.0,
        **counts,
    }


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "answer",
    [
        b"hello", b"null", b"[]", b"{}", b'{"pid": NaN}', b"\xff\n", b"[" * 100_000, b"",
        status_of(1), status_of(os.getpid(), ticks=1), status_of(os.getpid(), ticks="1"),
        status_of(os.getpid(), workers=None), status_of(os.getpid(), state=1),
        status_of(os.getpid(), file=FILE | {"gone": "no"}), status_of(os.getpid(), workers={}),
        status_of(os.getpid(), file=FILE | {"missing": "no"}), status_of(os.getpid(), log=[]),
        status_of(os.getpid(), log=LOG | {"end": -1}), status_of(os.getpid(), log={}),
        status_of(os.getpid(), clients=1 << 63), status_of(os.getpid(), started=1 << 2000),
        b'{"pid": ' + b"9" * 5000 + b"}", status_of(1 << 40), status_of(0),
        status_of(os.getpid(), version="x" * 20_000),
        status_of(os.getpid(), state=["\x1b" * 99_999]),
        status_of(os.getpid(), workers=[worker_of(1 << 40, 1)]),
        status_of(os.getpid(), workers=[worker_of(1, 1 << 2000)]),
        status_of(os.getpid(), workers=[worker_of(1, 1)] * 1025),
        status_of(os.getpid(), state="x" * (1 << 22)), status_of(os.getpid(), clients=True),
        status_of(os.getpid(), clients=-1), status_of(os.getpid(), started=float("inf")),
    ],
)  # fmt: skip
def test_invalid_status(answer: bytes) -> None:
    """An invalid status, or one of another process, is UNKNOWN, in one sentence."""
    with impostor(answer) as port:
        done = health("-p", str(port))
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (Level.UNKNOWN, "", 1)
    assert done.stdout.startswith(f"UNKNOWN: tailsrv 127.9.9.9:{port}: ")
    assert len(done.stdout) < 400
    assert done.stdout.rstrip("\n").isprintable()


# A status with the largest values that the check accepts from an impostor.
LARGEST = (1 << 63) - 1
EXTREME = {
    "command": ["x" * (1 << 20)],
    "endpoints": ["\n" * 16_384] * 2,
    "pid": os.getpid(),
    "ticks": start_ticks(os.getpid()),
    "clients": LARGEST,
    "unprotected": LARGEST,
    "started": 1e18,
    "max_clients": 1,
    "version": "\x1b" * 16_384,
    "state": "\n" * 16_384,
    "workers": [
        {
            "slot": LARGEST, "pid": pid, "ticks": LARGEST, "ready": True, "clients": LARGEST,
            "restarts": LARGEST, "unprotected": LARGEST, "restarted": -1e18, "silent": 1e18,
        }
        for pid in (1, 1 << 22, None) * 300
    ],
    "listeners": [
        {"slot": None, "endpoint": "\ud800\n", "queued": LARGEST, "backlog": LARGEST}
    ] * 2000,
    "file": {
        "path": "\0" * 16_384, "size": LARGEST, "gone": True, "error": "\x1b[2J\n" * 3000,
        "follow_name": True, "missing": 1e18,
    },
    "log": dict.fromkeys(LOG, LARGEST),
}  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "json", "prometheus"])
def test_extreme_answer(form: str) -> None:
    """The largest figures and texts that are accepted do not make a check fail."""
    with impostor(json.dumps(EXTREME).encode()) as port:
        done = health("-p", str(port), "--format", form)
    assert (done.returncode, done.stderr) == (Level.CRITICAL, "")
    if form == "text":
        assert done.stdout.replace("\n", "").isprintable()
    elif form == "json":
        assert json.loads(done.stdout)["level"] == "CRITICAL"
    else:
        assert list(text_string_to_metric_families(done.stdout))


def test_answer_that_drips() -> None:
    """An answer that arrives byte by byte without an end is read only until the deadline."""
    with (
        spare_port() as port,
        socket.socket(socket.AF_UNIX) as listener,
        ThreadPoolExecutor(1) as pool,
    ):
        listener.bind(f"\0tailsrv:127.9.9.9:{port}")
        listener.listen()
        found = find_only(port)
        listener.accept()[0].close()
        asked = pool.submit(ask_status, found, time.monotonic() + 0.2)
        with listener.accept()[0] as peer:
            while not asked.done():
                with suppress(OSError):
                    peer.send(b"[")
                select.select([], [], [], 0.005)
        with pytest.raises(InspectError, match="does not answer") as caught:
            asked.result()
    assert caught.value.level is Level.CRITICAL


@root_only
def test_no_threads() -> None:
    """If no thread can be started, servers are inspected one after another."""
    with impostor(b"") as port:
        done = run_program("health_without_threads", "-p", str(port))
    assert (done.returncode, done.stderr) == (Level.UNKNOWN, "")
    assert (
        done.stdout == f"UNKNOWN: tailsrv 127.9.9.9:{port} (user 0): "
        "belongs to user 0: run the check as that user or as root\n"
    )


def find_only(port: int) -> Found:
    """Return the server that is found on `port`."""
    [found] = find(port=port)
    return found


def test_server_that_was_replaced() -> None:
    """An answer from another pid than the found one means that the server was replaced."""
    with (
        impostor(status_of(os.getpid())) as port,
        pytest.raises(EndedError, match="another server has replaced it"),
    ):
        inspect(dataclasses.replace(find_only(port), pid=1))


def test_server_that_exits_with_an_unread_request() -> None:
    """A server that exits with an unread request in its queue is reported as ended."""
    with (
        spare_port() as port,
        socket.socket(socket.AF_UNIX) as listener,
        ThreadPoolExecutor(1) as pool,
    ):
        listener.bind(f"\0tailsrv:127.9.9.9:{port}")
        listener.listen()
        found = find_only(port)
        # Drop the connection by which it was found.
        listener.accept()[0].close()
        asked = pool.submit(inspect, found)
        assert select.select([listener], [], [], DEADLINE)[0]
        listener.close()
        with pytest.raises(EndedError, match="the server has ended"):
            asked.result(DEADLINE)


CLOSES_AND_ENDS = """
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0tailsrv:" + sys.argv[1])
listener.listen()
print(flush=True)
for _ in range(2):
    listener.accept()[0].close()
# As long as the kernel could need to end the process.
time.sleep(0.05)
"""


def test_server_that_is_killed_before_it_answers() -> None:
    """A server whose process ends a moment after its sockets are closed has ended."""
    with spare_port() as port:
        command = [sys.executable, "-c", CLOSES_AND_ENDS, f"127.9.9.9:{port}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(EndedError, match="the server has ended"):
                inspect(find_only(port))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"[]", "list of clients: invalid data"),
        (listing_of(1), "list of clients reports pid 1, but here"),
        (listing_of(os.getpid(), segments=[SEGMENT] * 2001), "list of clients: invalid data"),
        (listing_of(os.getpid(), segments=[SEGMENT | {"path": 1}]), "invalid data: 'not a string"),
        (listing_of(os.getpid(), segments=None), "invalid data: 'not a list"),
    ],
    ids=["not an object", "another process", "too many segments", "wrong path", "no segments"],
)
def test_invalid_client_list(answer: bytes, reason: str) -> None:
    """A client list that is invalid, or from another process, is an error."""
    with (
        impostor(status_of(os.getpid())) as port,
        impostor(answer, name=f"127.9.9.9:{port}/clients"),
    ):
        inspect(find_only(port))
        with pytest.raises(InspectError, match=reason):
            inspect(find_only(port), clients=True)


@pytest.mark.parametrize("form", ["text", "json", "prometheus"])
def test_longest_list_of_segments(form: str) -> None:
    """As many segments as a list may have are shown, however large their figures are."""
    segment = SEGMENT | {
        "base": LARGEST,
        "size": LARGEST,
        "clients": LARGEST,
        "path": "\x1b" * 4096,
    }
    with (
        impostor(status_of(os.getpid())) as port,
        impostor(
            listing_of(os.getpid(), segments=[segment] * 2000), name=f"127.9.9.9:{port}/clients"
        ),
    ):
        done = health("-p", str(port), "--clients", "--format", form)
    assert (done.returncode, done.stderr) == (Level.CRITICAL, "")
    if form == "text":
        rows = [line for line in done.stdout.splitlines() if line.startswith(str(LARGEST))]
        assert len(rows) == 2000
        assert max(map(len, rows)) <= 100
    elif form == "json":
        [found] = json.loads(done.stdout)["servers"]
        assert len(found["report"]["segments"]) == 2000


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Run the block with the effective user id `user`."""
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)


def test_file_system_that_does_not_answer() -> None:
    """A server that cannot read the size of its file is CRITICAL."""
    worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        workers = [worker_of(worker.pid, start_ticks(worker.pid))]
        status = status_of(os.getpid(), workers=workers, file=FILE | {"size": None})
        with impostor(status) as port:
            done = health("-p", str(port))
    finally:
        worker.communicate()
    assert done.returncode == Level.CRITICAL
    reason = "the file cannot be read: its file system does not answer"
    assert done.stdout.startswith(f"CRITICAL: tailsrv 127.9.9.9:{port}: {reason}\n")
    assert "/log, cannot be read\n" in done.stdout


@root_only
def test_no_proc() -> None:
    """An empty /proc is UNKNOWN, because no server can be found."""
    without = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
    done = health(wrapper=without)
    assert (done.returncode, done.stderr) == (Level.UNKNOWN, "")
    assert done.stdout.startswith(
        "UNKNOWN: cannot look for servers: [Errno 2] No such file or directory"
    )


@root_only
def test_user_without_a_name() -> None:
    """A user without a name is shown as a number, and its server is refused to other users."""
    with acting_as(3_000_000_001):
        held = impostor(b"")
        port = held.__enter__()
    try:
        found = find_only(port)
        assert (found.uid, found.user, found.ours) == (3_000_000_001, "3000000001", False)
        with (
            acting_as(3_000_000_002),
            pytest.raises(NotOursError, match="belongs to user 3000000001: "),
        ):
            inspect(found)
    finally:
        held.__exit__(None, None, None)


@pytest.mark.sample(1)
@root_only
@pytest.mark.parametrize("beside", [False, True])
def test_impostor_beside_a_server(serve: Serve, path: Path, beside: bool) -> None:
    """An impostor is CRITICAL for root, but UNKNOWN if a real server has the same port."""
    path.write_bytes(b"data")
    with ExitStack() as stack:
        port = stack.enter_context(spare_port())
        if beside:
            server = serve(path)
            server.workers()
            port = server.port
        with acting_as(3_000_000_001):
            stack.enter_context(impostor(status_of(os.getpid()), name=f"a-name:{port}"))
        done = health("-p", str(port))
        metrics = health("-p", str(port), "--format", "prometheus").stdout
    assert done.returncode == (Level.UNKNOWN if beside else Level.CRITICAL)
    assert done.stdout.partition("\n")[0].endswith(
        f"tailsrv a-name:{port} (user 3000000001): no worker"
    )
    assert (f'tailsrv_health_status{{server="*:{port}"}} 0\n' in metrics) is beside
    assert list(text_string_to_metric_families(metrics))


@root_only
def test_names_of_one_pid_under_two_users() -> None:
    """Names that one process bound as different users are listed as different servers."""
    with spare_port() as port, ExitStack() as stack:
        for user, host in ((3_000_000_001, "127.9.9.8"), (0, "127.9.9.9")):
            with acting_as(user):
                stack.enter_context(impostor(b"", name=f"{host}:{port}"))
        found = find(port=port)
    assert [(server.uid, server.endpoints) for server in found] == [
        (3_000_000_001, (f"127.9.9.8:{port}",)),
        (0, (f"127.9.9.9:{port}",)),
    ]


@root_only
def test_silence_of_another_user() -> None:
    """Silence of root's supervisor is NotOursError for other users and an error for root."""
    with impostor(b"") as port:
        found = find_only(port)
        with acting_as(3_000_000_002), pytest.raises(NotOursError, match="belongs to user root: "):
            inspect(found)
        with pytest.raises(
            InspectError,
            match="closed the connection without an answer: it may be in another user namespace",
        ):
            inspect(found)


needs_user_namespace = pytest.mark.skipif(
    not as_root or not runs("unshare", "--user", "--map-user=1000", "true"),
    reason="no user namespaces",
)


ROOTLESS = (*AS_NOBODY, "unshare", "--user", "--map-user=1000")


@pytest.mark.skipif(
    not runs(*ROOTLESS, sys.executable, "-c", "import tailsrv"),
    reason="no user namespaces, or Python cannot be read",
)
def test_server_in_another_user_namespace(serve: Serve, open_folder: Path) -> None:
    """If a server cannot map root, the report says that its user namespace may differ."""
    path = open_folder / "file.log"
    path.write_bytes(b"data")
    path.chmod(0o644)
    server = serve(path, wrapper=ROOTLESS)
    server.workers()
    status, first = ask(server)
    assert status == Level.UNKNOWN
    assert (
        "(user nobody): supervisor closed the connection without an answer: "
        "it may be in another user namespace" in first
    )


@needs_user_namespace
def test_user_of_another_user_namespace_is_not_trusted() -> None:
    """A user that merely has the same id through a user namespace is not trusted."""
    with ExitStack() as stack:
        with acting_as(3_000_000_001):
            port = stack.enter_context(impostor(status_of(os.getpid())))
        done = health("-p", str(port), wrapper=("unshare", "--user", "--map-user=65534"))
    assert done.returncode == Level.UNKNOWN
    assert "belongs to a user that this user namespace does not map: " in done.stdout


@root_only
@pytest.mark.slow
def test_user_database_that_does_not_answer(tmp_path: Path) -> None:
    """Users whose names cannot be looked up in time are shown as numbers; each is tried once."""
    install_hook(tmp_path, "slow_users")
    with spare_port() as port, ExitStack() as stack:
        for number, user in enumerate([0, 0, 3_000_000_001, 3_000_000_001, 3_000_000_002]):
            with acting_as(user):
                stack.enter_context(impostor(b"", name=f"127.9.9.{number}:{port}"))
        done = health("-p", str(port), "--format", "json", env={"PYTHONPATH": str(tmp_path)})
    assert done.stderr == ""
    users = {server["user"] for server in json.loads(done.stdout)["servers"]}
    assert users == {"root", "3000000001", "3000000002"}


@pytest.mark.thorough
def test_worker_that_is_another_process() -> None:
    """A worker's pid is ignored if its start time or its parent differs."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = start_ticks(child.pid)
    assert own is not None
    other = os.getppid()
    cases = [
        (child.pid, own, Level.OK),
        (child.pid, own - 1, Level.CRITICAL),
        (other, start_ticks(other), Level.CRITICAL),
    ]
    try:
        for pid, ticks, level in cases:
            with impostor(status_of(os.getpid(), workers=[worker_of(pid, ticks)])) as port:
                assert health("-p", str(port)).returncode == level
    finally:
        child.communicate()


def test_escape_sequences_are_escaped() -> None:
    """Escape sequences in a status are printed in escaped form."""
    evil = "\x1b[2J\n"
    file = FILE | {"path": f"/log{evil}"}
    listeners = [{"slot": 0, "endpoint": evil, "queued": 0, "backlog": 1}]
    with impostor(
        status_of(os.getpid(), state=evil, version=evil, file=file, listeners=listeners)
    ) as port:
        done = health("-p", str(port))
    assert done.returncode == Level.OK
    assert "\x1b" not in done.stdout
    assert r"\x1b[2J" in done.stdout


def test_queue_that_has_room_in_time() -> None:
    """A request waits for space in a full queue, and is answered then."""
    status = status_of(os.getpid())
    with spare_port() as port, socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(f"\0tailsrv:127.9.9.9:{port}")
        listener.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(f"\0tailsrv:127.9.9.9:{port}")
        pool = stack.enter_context(ThreadPoolExecutor(1))
        asked = pool.submit(inspect, find_only(port))
        listener.accept()[0].close()
        while not asked.done():
            if select.select([listener], [], [], 0.01)[0]:
                # A check of a concurrent test may connect too, and close at once.
                with listener.accept()[0] as peer, suppress(OSError):
                    peer.sendall(status)
        assert asked.result().state == "serving"


WITHOUT_SOCKET_TIMEOUTS = """
import socket
del socket.SO_SNDTIMEO, socket.SO_RCVTIMEO
"""


@pytest.mark.thorough
def test_socket_timeouts_are_not_used(serve: Serve, path: Path, tmp_path: Path) -> None:
    """SO_SNDTIMEO and SO_RCVTIMEO are not used: their format differs on 32-bit machines."""
    path.write_bytes(b"data")
    server = serve(path)
    server.workers()
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_SOCKET_TIMEOUTS)
    done = health("-p", str(server.port), "--clients", env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (Level.OK, "")


@pytest.mark.thorough
@pytest.mark.slow
def test_full_queue() -> None:
    """A supervisor whose control socket's queue stays full is CRITICAL."""
    with impostor(b"", backlog=0) as port, socket.socket(socket.AF_UNIX) as first:
        first.connect(f"\0tailsrv:127.9.9.9:{port}")
        done = health("-p", str(port))
    assert done.returncode == Level.CRITICAL
    assert (
        done.stdout == f"CRITICAL: tailsrv 127.9.9.9:{port}: supervisor does not answer: "
        "the queue of its control socket is full\n"
    )


INVALID_HOSTS = (
    "a:1,b", "a,b", "a/b", 'a"b', "a\\b", "a=b", "a\u00a0b", "a\x1bb", "a\u202eb", "**", "\udcff",
    "::1", "a:b", "[]", "[::1", "[::1%]", "[::1%a,b]", "[::1%a b]", "[x]",
)  # fmt: skip


def test_forged_list_of_sockets(tmp_path: Path) -> None:
    """Names that forge lines of /proc/net/unix, or resemble a server's name, are ignored."""
    with spare_port() as port, ExitStack() as stack:
        names = [
            f"\0a\n0: 0 0 zzzzzzzz 0 0 1 @tailsrv:127.9.9.9:{port}",
            f"\0b\n@tailsrv:127.9.9.9:{port}", f"\0tailsrv:127.9.9.9:{port}/clients",
            f"\0tailsrv:a b:{port}", f"\0tailsrv::{port}", "\0tailsrv:127.9.9.9:0",
            f"\0c\n0: 0 0 10000 0 0 1 @tailsrv:127.9.9.9:{port}",
            *(f"\0tailsrv:{host}:{port}" for host in INVALID_HOSTS), "\0tailsrv:127.9.9.9:65536",
        ]  # fmt: skip
        for name in names:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(name.encode(errors="surrogateescape"))
            listener.listen()
        packets = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        packets.bind(f"\0tailsrv:127.9.9.9:{port}")
        packets.listen()
        stack.enter_context(socket.socket(socket.AF_UNIX)).bind(
            str(tmp_path / f"tailsrv:127.9.9.9:{port}")
        )
        assert find(port=port) == []


@pytest.mark.parametrize(
    "host",
    [
        "*",
        "127.9.9.9",
        "log-server_1.example.net",
        "b\u00fccher.example",
        "[::1]",
        "[::ffff:127.9.9.9]",
        "[fe80::1%eth0.100]",
    ],
)
def test_names_of_servers(host: str) -> None:
    """A server is found by its name for every kind of host that `--bind` accepts."""
    with spare_port() as port, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0tailsrv:{host}:{port}")
        listener.listen()
        assert [server.endpoints for server in find(port=port)] == [(f"{host}:{port}",)]


@pytest.mark.thorough
@pytest.mark.slow
def test_many_sockets_come_and_go() -> None:
    """Servers are found while other processes bind and close many sockets."""
    with spare_port() as port, ExitStack() as stack:
        names = {f"127.9.9.{number}:{port}" for number in range(100)}
        for name in names:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(f"\0tailsrv:{name}")
            listener.listen()
        churn = stack.enter_context(
            subprocess.Popen([sys.executable, program("names_come_and_go")], stdout=subprocess.PIPE)
        )
        stack.callback(churn.kill)
        assert churn.stdout is not None
        churn.stdout.readline()
        for _ in range(500):
            assert names <= set(list_endpoints())


@root_only
@pytest.mark.skipif(not runs(*HIDDEN, "true"), reason="no mount namespaces")
def test_hidden_proc(serve: Serve, path: Path) -> None:
    """With ProcSubset=pid, a check reports the processes that it can see, and is OK."""
    path.write_bytes(b"data")
    server = serve(path)
    [worker] = server.workers()
    command = [*HIDDEN, *HEALTH, "-p", str(server.port), "--format", "json"]
    # Standard error is not checked: psutil 5 warns there about files that it cannot read.
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    [found] = json.loads(done.stdout)["servers"]
    assert (done.returncode, found["level"], found["pid"]) == (Level.OK, "OK", server.pid)
    assert found["report"]["workers"][0]["process"]["pid"] == worker


def accept_from(pid: int, listener: socket.socket) -> socket.socket:
    """Accept the next connection of process `pid`; drop those of concurrent tests' checks."""
    while True:
        sock, _ = listener.accept()
        if credentials(sock)[0] == pid:
            return sock
        sock.close()


def test_interrupt(tmp_path: Path) -> None:
    """SIGINT ends a waiting check without a message."""
    with spare_port() as port, socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(DEADLINE)
        listener.bind(f"\0tailsrv:127.9.9.9:{port}")
        listener.listen()
        with (tmp_path / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [*HEALTH, "-p", str(port)], stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
            )
        # The first connection only finds out the server's user and pid.
        accept_from(process.pid, listener).close()
        asked = accept_from(process.pid, listener)
        process.send_signal(signal.SIGINT)
        # A shell reports this as status 130.
        assert process.wait(DEADLINE) == -signal.SIGINT
        asked.close()
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.thorough
@needs_nobody
def test_other_user_is_not_trusted() -> None:
    """A check does not wait for an answer from another user's process."""
    as_other_user = ("setpriv", f"--reuid={NOBODY - 1}", f"--regid={NOBODY - 1}", "--clear-groups")
    with spare_port() as port:
        command = [*as_other_user, sys.executable, program("take_name"), f"127.9.9.9:{port}"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as impostor_process:
            assert impostor_process.stdout is not None
            impostor_process.stdout.readline()
            done = health("-p", str(port), wrapper=AS_NOBODY)
            impostor_process.communicate(b"\n")
    assert done.returncode == Level.UNKNOWN
    assert f"belongs to user {NOBODY - 1}: " in done.stdout


# Prometheus


def test_prometheus_is_parsed(serve: Serve, open_folder: Path) -> None:
    """A Prometheus parser reads all metrics, each with help and type, and an escaped path."""
    path = open_folder / 'a"b\\c\nd é'
    path.write_bytes(bytes(1000))
    server = serve(path, "-w", "2")
    server.workers(2)
    reader = server.connect(b"900\n")
    expect(reader, bytes(100))
    wait_for_clients(server, 1)
    done = health(
        "-p",
        str(server.port),
        "--format",
        "prometheus",
        "--clients",
        env={"PYTHONIOENCODING": "latin-1"},
    )
    families = {family.name: family for family in text_string_to_metric_families(done.stdout)}
    assert done.returncode == Level.OK
    assert all(
        name.startswith("tailsrv_") and family.documentation and family.type != "unknown"
        for name, family in families.items()
    )
    assert [sample.labels["path"] for sample in families["tailsrv_info"].samples] == [str(path)]
    figures = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    name = f"*:{server.port}"
    assert figures["tailsrv_health_status", name] == Level.OK
    assert figures["tailsrv_file_size_bytes", name] == 1000
    assert figures["tailsrv_log_end_bytes", name] == 1000
    assert figures["tailsrv_log_segments", name] == 1
    assert figures["tailsrv_state", name, "serving"] == 1
    assert figures["tailsrv_worker_restarts_total", name, "1"] == 0
    assert (
        figures["tailsrv_process_open_fds", name, "supervisor"]
        == psutil.Process(server.pid).num_fds()
    )
    [lag] = families["tailsrv_client_lag_bytes"].samples
    assert (lag.labels["peer"], lag.value) == ("{}:{}".format(*reader.getsockname()), 0)


# The command line


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "arguments",
    [
        ("-p", "x"), ("-p", "0"), ("-p", "65536"), ("--pid", "0"), ("--pid", "-1"),
        ("--format", "xml"), ("-p", "1", "--pid", "1"), ("--nonsense",), ("what",),
    ],
)  # fmt: skip
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    """A wrong command line is UNKNOWN; argparse's own exit status would be CRITICAL."""
    done = health(*arguments)
    assert (done.returncode, done.stdout) == (Level.UNKNOWN, "")
    assert "tailsrv-health: error: " in done.stderr


def test_installed_command() -> None:
    """The installed package has the command tailsrv-health."""
    command = Path(sysconfig.get_path("scripts")) / "tailsrv-health"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout.split()[0]) == (0, "tailsrv-health")


@pytest.mark.sample(1)
@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_closed_pipe(arguments: tuple[str, ...], serve: Serve, path: Path) -> None:
    """A closed output pipe changes neither the exit status nor standard error."""
    path.write_bytes(b"data")
    server = serve(path)
    server.workers()
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = health("-p", str(server.port), *arguments, stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (Level.OK, "")


@pytest.mark.parametrize("arguments", [("-p", "1"), ("--help",)])
def test_full_disk(arguments: tuple[str, ...]) -> None:
    """Output that cannot be written is UNKNOWN, with the reason on one line."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = health(*arguments, stdout=full)
    finally:
        os.close(full)
    assert (done.returncode, done.stderr.count("\n")) == (Level.UNKNOWN, 1)
    assert "No space left" in done.stderr


@pytest.mark.parametrize(
    ("env", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colour_only_on_a_terminal_that_wants_it(env: dict[str, str], coloured: bool) -> None:
    """On a terminal the level is coloured, unless NO_COLOR or TERM forbids it."""
    ours, theirs = pty.openpty()
    try:
        plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        with spare_port() as port:
            done = subprocess.run(
                [*HEALTH, "-p", str(port)], stdout=theirs, env=plain | env, timeout=DEADLINE
            )
        output = os.read(ours, 1000)
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == Level.CRITICAL
    assert output.startswith(
        b"\x1b[31mCRITICAL\x1b[0m: no tailsrv" if coloured else b"CRITICAL: no tailsrv"
    )


# The library


def test_library(serve: Serve, path: Path) -> None:
    """The library finds, inspects and judges as the command does; its results are immutable."""
    path.write_bytes(b"data")
    server = serve(path)
    [worker] = server.workers()
    [found] = find(pid=server.pid)
    report = inspect(found)
    assert (found.endpoints, found.ours, report.server) == ((f"*:{server.port}",), True, found)
    assert [seen.process.pid for seen in report.workers if seen.process] == [worker]
    assert (judge(report).level, judge(report).reasons) == (Level.OK, ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.state = "rich"  # type: ignore[misc]


def test_library_reports_that_a_server_has_ended(serve: Serve, path: Path) -> None:
    """A server that exited after it was found raises EndedError."""
    path.write_bytes(b"data")
    server = serve(path)
    server.workers()
    [found] = find(port=server.port)
    server.finish()
    with pytest.raises(EndedError) as caught:
        inspect(found)
    assert caught.value.level is Level.CRITICAL
    assert issubclass(EndedError, InspectError)
    assert issubclass(NotOursError, InspectError)
    assert find(port=server.port) == []
