"""The supervisor and its workers.

Titles, listeners, deaths, signals, exit statuses, the control socket, and idleness.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.interpreter import program
from support.processes import AS_NOBODY, children, gone, runs, stop, switches, title
from support.server import TAILSRV, Serve, Server, run_tailsrv
from support.sockets import expect, expect_eof
from support.status import ask
from support.waiting import DEADLINE, eventually

DATA = random_bytes(1000)
APPENDED = b"appended"


# Titles


@pytest.mark.slow
def test_titles(serve: Serve, path: Path) -> None:
    """A process's title tells its role, its endpoints and its number of clients."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2")
    workers = server.workers(2)
    port = server.port
    assert eventually(lambda: server.title().endswith("[2 workers, 0 clients]"))
    assert server.title() == f"tailsrv: supervisor *:{port} {path} [2 workers, 0 clients]"
    assert [title(pid) for pid in workers] == [
        f"tailsrv: worker {slot} *:{port} [0 clients]" for slot in (0, 1)
    ]
    clients = [server.connect(b"0\n") for _ in range(20)]
    for client in clients:
        expect(client, DATA)
    eventually(
        lambda: server.title() == f"tailsrv: supervisor *:{port} {path} [2 workers, 20 clients]"
    )

    def shown() -> int:
        titles = [
            re.fullmatch(rf"tailsrv: worker {slot} \*:{port} \[(\d+) clients?\]", title(pid))
            for slot, pid in enumerate(workers)
        ]
        return sum(int(match[1]) for match in titles if match)

    eventually(lambda: shown() == 20)


@pytest.mark.thorough
@pytest.mark.slow
def test_title_with_singular_and_two_addresses(serve: Serve, path: Path) -> None:
    """A title uses the singular for a count of one, and names all addresses."""
    path.write_bytes(DATA)
    server = serve(path, "--bind", "127.0.0.1", "--bind", "::1")
    client = server.connect(b"0\n")
    endpoints = f"127.0.0.1:{server.port},[::1]:{server.port}"
    eventually(
        lambda: server.title() == f"tailsrv: supervisor {endpoints} {path} [1 worker, 1 client]"
    )
    [worker] = server.workers(1)
    eventually(lambda: title(worker) == f"tailsrv: worker 0 {endpoints} [1 client]")
    # A half-close is not a hang-up: the client still counts.
    client.shutdown(socket.SHUT_WR)
    expect(client, DATA)
    client.close()
    append(path, APPENDED)
    eventually(
        lambda: server.title() == f"tailsrv: supervisor {endpoints} {path} [1 worker, 0 clients]"
    )


def test_title_while_waiting_for_the_file(serve: Serve, path: Path) -> None:
    """Without a file the supervisor's title says that it waits; workers already accept clients."""
    server = serve(path, "-w", "2")
    eventually(
        lambda: server.title() == f"tailsrv: supervisor *:{server.port} {path} [waiting for file]"
    )
    titles = [f"tailsrv: worker {slot} *:{server.port} [0 clients]" for slot in (0, 1)]
    eventually(lambda: sorted(map(title, children(server.pid))) == titles)


@pytest.mark.thorough
@pytest.mark.slow
def test_titles_while_draining(serve: Serve, path: Path) -> None:
    """The titles of supervisor and worker say that they drain, and how many clients are left."""
    path.write_bytes(data := random_bytes(16 << 20))
    server = serve(path, "--grace", "60")
    blocked = server.connect(b"0\n", receive_buffer=4096)
    expect(blocked, data[:10])
    (worker,) = server.workers(1)
    server.process.terminate()
    eventually(lambda: title(worker) == f"tailsrv: worker 0 *:{server.port} [draining, 1 client]")
    eventually(
        lambda: (
            server.title()
            == f"tailsrv: supervisor *:{server.port} {path} [draining, 1 worker, 1 client]"
        )
    )
    expect(blocked, data[10:])
    expect_eof(blocked)


def odd_workers(what: str) -> tuple[str, ...]:
    """Return the command of a tailsrv whose workers behave as `what` says."""
    return (sys.executable, program("odd_workers"), what)


@pytest.mark.slow
def test_title_while_starting(serve: Serve, path: Path) -> None:
    """Until every slot has had a ready worker, the title says `starting`."""
    path.touch()
    server = serve(path, "-w", "2", program=odd_workers("one is ready"))
    server.logged("worker ready: slot=0")
    eventually(lambda: server.title() == f"tailsrv: supervisor *:{server.port} {path} [starting]")
    server.signal(signal.SIGQUIT)


# Listeners


def listening_inodes(pid: int, table: str, port: int) -> set[str]:
    """Return the inodes of the listening sockets of `port` that the process `pid` holds."""
    rows = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    listening = {
        row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port
    }
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(link))
        except FileNotFoundError:
            pass
    return {inode for inode in listening if f"socket:[{inode}]" in links}


def test_one_listener_for_each_slot_and_address(serve: Serve, path: Path) -> None:
    """Each worker holds only the listeners of its slot; the supervisor holds all of them."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "4")
    workers = server.workers(4)
    for table in ("tcp", "tcp6"):
        held = [listening_inodes(pid, table, server.port) for pid in workers]
        assert [len(inodes) for inodes in held] == [1, 1, 1, 1]
        assert len(set.union(*held)) == 4
        assert listening_inodes(server.pid, table, server.port) == set.union(*held)


@pytest.mark.slow
def test_every_connection_is_served(serve: Serve, path: Path) -> None:
    """Every connection is accepted, and every worker gets a share of them."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "4", "-v")
    clients = [
        server.connect(b"%d\n" % number, ("127.0.0.1", "::1")[number % 2]) for number in range(200)
    ]
    for number, client in enumerate(clients):
        expect(client, DATA[number:])
    shares = [len(server.lines(f"client streams: slot={slot} ")) for slot in range(4)]
    assert sum(shares) == 200
    assert min(shares) > 10


@pytest.mark.slow
@pytest.mark.parametrize("bind", [(), ("--bind", "127.0.0.1")])
def test_second_instance(serve: Serve, path: Path, bind: Sequence[str]) -> None:
    """A second server on the port ends with status 1 and names the first one's pid.

    The first server continues undisturbed.
    """
    path.write_bytes(DATA)
    server = serve(path, *bind)
    where = f"127.0.0.1:{server.port}" if bind else f"*:{server.port}"
    second = run_tailsrv("-p", str(server.port), *bind, path)
    (line,) = second.stderr.splitlines()
    assert line.endswith(
        f"critical: cannot serve: path={path} "
        f"reason='{where} is served by another tailsrv, pid {server.pid}'"
    )
    assert second.returncode == 1
    for _ in range(20):
        expect(server.connect(b"0\n"), DATA)


def test_port_of_another_program(path: Path) -> None:
    """A port that another program listens on is refused with status 1, even with SO_REUSEPORT."""
    path.write_bytes(DATA)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = run_tailsrv("-p", str(port), "--bind", "127.0.0.1", path)
    (line,) = ended.stderr.splitlines()
    assert (
        f"critical: cannot serve: path={path} reason='cannot listen on 127.0.0.1:{port}: "
        "Address already in use; choose another port" in line
    )
    assert ended.returncode == 1


@pytest.mark.slow
def test_same_port_on_different_addresses(serve: Serve, path: Path, tmp_path: Path) -> None:
    """Two servers can use the same port on different addresses, each with its own file."""
    path.write_bytes(DATA)
    (other_path := tmp_path / "other").write_bytes(APPENDED)
    server = serve(path, "--bind", "127.0.0.1")
    other = serve(other_path, "--bind", "127.0.0.2", "-p", str(server.port))
    assert other.port == server.port
    expect(server.connect(b"0\n"), DATA)
    expect(other.connect(b"0\n", "127.0.0.2"), APPENDED)


@pytest.mark.slow
def test_port_is_free_after_the_end(serve: Serve, path: Path) -> None:
    """A server that has had clients can be restarted at once on the same port."""
    path.write_bytes(DATA)
    server = serve(path)
    client = server.connect(b"0\n")
    expect(client, DATA)
    server.process.terminate()
    expect_eof(client)
    server.wait()
    restarted = serve(path, "-p", str(server.port))
    expect(restarted.connect(b"0\n"), DATA)


# Deaths


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGQUIT, signal.SIGSEGV])
def test_worker_is_replaced(serve: Serve, path: Path, number: signal.Signals) -> None:
    """A worker that ends by any signal is replaced in its slot, and no client is disturbed."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", "-v")
    first, second = server.workers(2)
    clients = [server.connect(b"0\n") for _ in range(30)]
    for client in clients:
        expect(client, DATA)
    for slot in (0, 1):
        assert any(
            server.lines(f"client streams: slot={slot} ", f":{client.getsockname()[1]} ")
            for client in clients
        )
    os.kill(first, number)
    eventually(lambda: gone(first))
    assert server.workers(2)[1] == second
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)
    for _ in range(30):
        expect(server.connect(b"0\n"), DATA + APPENDED)
    assert server.logged("warning: worker ", f"pid={first}").split()[-1] == (
        "status=0" if number is signal.SIGTERM else f"signal={number.name}"
    )


@pytest.mark.slow
def test_accept_queue_outlives_the_worker(serve: Serve, path: Path) -> None:
    """Connections that a killed worker had not accepted are served by its successor."""
    path.write_bytes(DATA)
    server = serve(path)
    (worker,) = server.workers(1)
    stop(worker)
    clients = [server.connect(b"%d\n" % number) for number in range(200)]
    os.kill(worker, signal.SIGKILL)
    for number, client in enumerate(clients):
        expect(client, DATA[number:])
    assert server.workers(1) != [worker]


@pytest.mark.slow
def test_worker_is_killed_repeatedly(serve: Serve, path: Path) -> None:
    """A server whose worker is killed repeatedly serves all appends to new clients."""
    path.write_bytes(data := DATA)
    server = serve(path)
    for _ in range(3):
        (worker,) = server.workers(1)
        os.kill(worker, signal.SIGKILL)
        append(path, APPENDED)
        data += APPENDED
        expect(server.connect(b"0\n"), data)
        server.logged("worker was killed: ", f"pid={worker} ")
    assert len(server.lines("worker was killed: ", "signal=SIGKILL")) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_worker_ignores(serve: Serve, path: Path, number: signal.Signals) -> None:
    """A worker ignores signals that a terminal sends to the whole foreground group."""
    path.write_bytes(DATA)
    server = serve(path)
    (worker,) = server.workers(1)
    client = server.connect(b"0\n")
    expect(client, DATA)
    for _ in range(3):
        os.kill(worker, number)
        append(path, APPENDED)
        expect(client, APPENDED)
    assert server.workers(1) == [worker]
    assert server.lines("warning") == []


@pytest.mark.slow
def test_supervisor_killed(serve: Serve, path: Path) -> None:
    """With --orphan-timeout 0, workers end with their supervisor, and the port becomes free."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "3", "--orphan-timeout", "0")
    workers = server.workers(3)
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, DATA)
    # From here on, no process has a message to send.
    eventually(lambda: server.title().endswith("[3 workers, 10 clients]"))
    server.kill_supervisor()
    eventually(lambda: all(gone(worker) for worker in workers))
    server.wait()
    restarted = serve(path, "-p", str(server.port))
    expect(restarted.connect(b"0\n"), DATA)


# Signals to the supervisor


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_ends_on_signals(serve: Serve, path: Path, number: signal.Signals) -> None:
    """TERM, INT and QUIT end the server with status 0."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2")
    server.workers(2)
    client = server.connect(b"0\n")
    expect(client, DATA)
    server.signal(number)
    server.wait()
    assert len(server.lines("info: ended: status=0")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_ends_while_waiting_for_the_file(serve: Serve, path: Path, number: signal.Signals) -> None:
    """TERM, INT and QUIT also end a server that has no file yet."""
    server = serve(path)
    server.logged("waiting for file")
    server.signal(number)
    server.wait()


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGQUIT,),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGTERM, signal.SIGQUIT),
    ],
)
def test_ends_at_once(serve: Serve, path: Path, numbers: Sequence[signal.Signals]) -> None:
    """QUIT, or a second TERM or INT, ends the server although clients are behind."""
    path.write_bytes(data := random_bytes(16 << 20))
    server = serve(path, "--grace", "3600")
    blocked = server.connect(b"0\n", receive_buffer=4096)
    expect(blocked, data[:10])
    *first, last = numbers
    for number in first:
        server.signal(number)
        server.logged("draining: ", f"signal={number.name}")
    server.signal(last)
    server.wait()


def test_repeated_sigterm_until_the_process_has_ended(serve: Serve, path: Path) -> None:
    """Repeated TERM does not change the exit status, even while the interpreter shuts down."""
    path.write_bytes(DATA)
    server = serve(path)
    server.workers(1)
    while server.process.poll() is None:
        server.signal(signal.SIGTERM)
    server.wait()


@pytest.mark.slow
def test_interrupt_of_the_whole_group(serve: Serve, path: Path) -> None:
    """Ctrl-C, which also reaches the workers, drains the server."""
    path.write_bytes(data := random_bytes(4 << 20))
    server = serve(path, "-w", "2")
    server.workers(2)
    clients = [server.connect(b"0\n") for _ in range(6)]
    for client in clients:
        expect(client, data[:10])
    os.killpg(server.pid, signal.SIGINT)
    for client in clients:
        expect(client, data[10:])
        expect_eof(client)
    server.wait()


# Workers that cannot start


@pytest.mark.slow
def test_worker_that_cannot_boot(serve: Serve, path: Path) -> None:
    """A worker that cannot boot logs the reason, and the server ends with status 3."""
    path.touch()
    server = serve(path, status=3, program=odd_workers("no descriptors"))
    server.wait()
    assert len(server.lines("critical: worker cannot boot: slot=0", "Too many open files")) == 1
    assert len(server.lines(f"critical: workers cannot start: slot=0 status={os.EX_TEMPFAIL}")) == 1


@pytest.mark.slow
def test_oom_killer_prefers_workers(serve: Serve, path: Path) -> None:
    """The OOM killer prefers every worker, also a successor, to the supervisor."""
    path.touch()
    server = serve(path, "-w", "2")

    def adjustment(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    os.kill(server.workers(2)[0], signal.SIGKILL)
    server.logged("worker ready: slot=0", count=2)
    assert adjustment(server.pid) == adjustment(os.getpid())
    assert {adjustment(pid) for pid in server.workers(2)} == {
        min(adjustment(server.pid) + 500, 1000)
    }


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("shortage", ["descriptor", "memory"])
def test_successor_short_of_descriptors_or_memory(serve: Serve, path: Path, shortage: str) -> None:
    """Successors that run out of descriptors or memory are replaced until one takes over."""
    path.write_bytes(DATA)
    lives = Path(f"{path}.lives")
    server = serve(path, program=odd_workers(f"six find no {shortage}"))
    clients = [server.connect(b"0\n") for _ in range(10)]
    for client in clients:
        expect(client, DATA)
    os.kill(server.workers(1)[0], signal.SIGKILL)
    server.logged("worker ran out of descriptors or memory: ", f"status={os.EX_TEMPFAIL}", count=6)
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)
    assert len(lives.read_bytes()) == 8


@pytest.mark.slow
def test_one_of_several_workers_cannot_boot(serve: Serve, path: Path) -> None:
    """Status 3 of one worker ends the server at once, with all its other workers."""
    path.touch()
    server = serve(path, "-w", "3", status=3, program=odd_workers("one cannot boot"))
    server.wait()
    assert len(server.lines("warning: worker cannot boot: slot=1", "status=3")) == 1
    assert len(server.lines("critical: workers cannot start: slot=1 status=3")) == 1


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(("what", "died"), [("fails", "status=1"), ("crashes", "signal=SIGSEGV")])
def test_worker_that_is_never_ready(serve: Serve, path: Path, what: str, died: str) -> None:
    """Five deaths in a row before a worker is ready, with growing delays, end the server.

    The exit status is 3.
    """
    path.touch()
    server = serve(path, status=3, program=odd_workers(what))
    server.wait()
    assert len(server.lines("warning: worker crashed: slot=0", died)) == 5
    assert [
        line.rpartition("=")[2] for line in server.lines("respawning after a delay: slot=0")
    ] == ["0.01", "0.02", "0.04"]
    assert len(server.lines(f"critical: workers cannot start: slot=0 {died}")) == 1


@pytest.mark.thorough
@pytest.mark.slow
def test_worker_that_is_ready_and_dies(serve: Serve, path: Path) -> None:
    """A worker that dies each time after it was ready is always replaced, with growing delays."""
    path.touch()
    server = serve(path, program=odd_workers("ready and fails"))
    server.logged("worker crashed: slot=0", "status=1", count=7)
    delays = [line.rpartition("=")[2] for line in server.lines("respawning after a delay: slot=0")]
    assert delays[:5] == ["0.01", "0.02", "0.04", "0.08", "0.16"]
    assert server.lines("critical") == []


@pytest.mark.slow
def test_worker_that_raises(serve: Serve, path: Path) -> None:
    """An uncaught exception is logged, ends only the worker, and does not reach the supervisor."""
    path.touch()
    server = serve(path, program=odd_workers("ready and raises"))
    server.logged("worker crashed: slot=0", f"status={os.EX_SOFTWARE}")
    assert "IndexError: list index out of range" in server.log
    server.traceback_expected = True
    server.signal(signal.SIGQUIT)


# The control socket


@pytest.mark.slow
def test_status(serve: Serve, path: Path) -> None:
    """The control socket of each endpoint belongs to the supervisor and answers with the status."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", "--bind", "127.0.0.1", "--bind", "::1")
    workers = server.workers(2)
    for _ in range(10):
        expect(server.connect(b"0\n"), DATA)
    eventually(lambda: "10 clients" in server.title())
    endpoints = [f"127.0.0.1:{server.port}", f"[::1]:{server.port}"]
    for endpoint in endpoints:
        answer, pid = ask(endpoint)
        status = json.loads(answer)
        assert pid == server.pid
        assert (status["pid"], status["state"], status["clients"]) == (server.pid, "serving", 10)
        assert status["endpoints"] == endpoints
        assert (status["file"]["path"], status["file"]["size"]) == (str(path), len(DATA))
        assert [
            (worker["slot"], worker["pid"], worker["ready"]) for worker in status["workers"]
        ] == [
            (0, workers[0], True),
            (1, workers[1], True),
        ]
        assert sum(worker["clients"] for worker in status["workers"]) == 10


def test_status_while_waiting_for_the_file(serve: Serve, path: Path) -> None:
    """The status is available before the file exists."""
    server = serve(path)
    server.logged("waiting for file")
    status = json.loads(ask(f"*:{server.port}")[0])
    assert (status["state"], status["file"]["size"], status["clients"]) == (
        "waiting for file",
        None,
        0,
    )


@pytest.mark.thorough
@pytest.mark.slow
def test_status_is_for_the_same_user_and_root(serve: Serve, path: Path, open_folder: Path) -> None:
    """Another user gets no status; the same user and root do."""
    if os.geteuid() != 0 or not runs(*AS_NOBODY, *TAILSRV, "--version"):
        pytest.skip("requires root, to become another user")
    path.write_bytes(DATA)
    (public := open_folder / "file.log").write_bytes(DATA)
    own, other = serve(path), serve(public, wrapper=AS_NOBODY)

    def ask_as_nobody(server: Server) -> bytes:
        command = [*AS_NOBODY, sys.executable, program("ask_control"), f"*:{server.port}"]
        return subprocess.run(command, capture_output=True, timeout=DEADLINE, check=True).stdout

    assert ask_as_nobody(own) == b""
    assert json.loads(ask_as_nobody(other))["pid"] == other.pid
    assert json.loads(ask(f"*:{other.port}")[0])["pid"] == other.pid
    assert json.loads(ask(f"*:{own.port}")[0])["pid"] == own.pid


# Idleness


@pytest.mark.slow
def test_idle(serve: Serve, path: Path) -> None:
    """A quiet file causes no wake-up, with clients caught up, ahead, half-closed or headerless."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2")
    processes = [server.pid, *server.workers(2)]
    clients = [
        server.connect(header)
        for header in (b"0\n", b"-0\n", b"5000\n", b"", b"12", b"0\njunk", b"0\n") * 7
    ]
    for client in clients[5::7]:
        client.shutdown(socket.SHUT_WR)
    for client in clients[6::7]:
        expect(client, DATA)
    eventually(lambda: server.title().endswith("[2 workers, 49 clients]"))
    eventually(lambda: quiet(processes), deadline=2 * DEADLINE)


def quiet(pids: Sequence[int]) -> bool:
    """Return whether the processes have slept for two seconds.

    A timer that is due later than that is not detected.
    """
    before = [switches(pid) for pid in pids]
    # There is no event to wait for: the test is that none happens.
    time.sleep(2)
    return [switches(pid) for pid in pids] == before
