"""No client is lost when workers die at any moment: every byte of every stream is compared."""

import ctypes
import os
import random
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from support.files import append, random_bytes
from support.interpreter import program
from support.load import loaded
from support.processes import NO_CORE, forked_children, gone, open_descriptors, stop
from support.server import HURRIED, Serve, Server
from support.sockets import expect, expect_eof, outcome, recv_all, recv_exactly, reset_at_close
from support.status import await_clients, await_protected, ready_workers, status, worker_pids
from support.strace import needs_strace, strace
from support.waiting import DEADLINE, eventually
from tailsrv.worker_channel import Ping, encode

pytestmark = pytest.mark.slow

DATA = random_bytes(12 << 20)
SMALL = DATA[:1000]
APPENDED = b"appended later"


# Any moment


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.thorough)])
def test_many_kills(serve: Serve, path: Path, kills: int) -> None:
    """Fifty fast and slow clients lose nothing while workers are killed at random moments."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "8")
    dice, killed = random.Random(3), set[int]()
    with loaded(server, path, seed=3) as load:
        while len(killed) < kills:
            load.run(dice.uniform(0, 0.24))
            # Mostly kill the oldest, and sometimes one that has just been forked.
            if living_workers := [pid for pid in forked_children(server.pid) if pid not in killed]:
                killed.add(
                    pid := living_workers[0] if dice.random() < 0.8 else dice.choice(living_workers)
                )
                os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(server.lines("worker was killed", "signal=SIGKILL")) == kills)
    assert not server.lines("error")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("number", "deaths", "age"),
    [
        (signal.SIGSEGV, 4, 1.1),
        (signal.SIGTERM, 8, 0.5),
        pytest.param(signal.SIGSEGV, 12, 1.1, marks=pytest.mark.thorough),
        pytest.param(signal.SIGTERM, 24, 0.5, marks=pytest.mark.thorough),
    ],
)
def test_other_deaths(
    serve: Serve, path: Path, number: signal.Signals, deaths: int, age: float
) -> None:
    """Neither crashes at intervals nor SIGTERM to a worker costs a client any data."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "4", wrapper=NO_CORE)
    # The time when each pid was first seen.
    seen: dict[int, float] = {}
    killed: set[int] = set()

    def kill_one() -> bool:
        living_workers = [pid for pid in worker_pids(server) if pid not in killed]
        for pid in living_workers:
            seen.setdefault(pid, time.monotonic())
        pid = min(living_workers, key=lambda pid: seen[pid], default=0)
        if not pid or time.monotonic() - seen[pid] < age:
            return False
        os.kill(pid, number)
        killed.add(pid)
        return True

    with loaded(server, path, seed=number) as load:
        for _ in range(deaths):
            load.run_until(kill_one)
    assert sum(worker["restarts"] for worker in status(server)["workers"]) == deaths
    assert not server.lines("error")


@pytest.mark.thorough
def test_connections_while_workers_are_killed(serve: Serve, path: Path) -> None:
    """A client that connects while workers are killed gets an exact stream or is closed at once.

    A connection is closed only if its worker dies before reporting it.
    """
    path.write_bytes(SMALL)
    server = serve(path, "-w", "4")
    server.workers(4)
    dice, served, lost = random.Random(5), 0, 0
    for _ in range(20):
        os.kill(eventually(lambda: forked_children(server.pid))[0], signal.SIGKILL)
        for _ in range(15):
            start = dice.randrange(1000)
            client = server.connect(b"%d\n" % start)
            try:
                first = client.recv(1)
            except ConnectionResetError:
                first = b""
            if first:
                expect(client, SMALL[start + 1 :])
                served += 1
            else:
                lost += 1
            client.close()
    assert served > 200
    assert lost < 60


# A chosen moment: the worker is stopped while a client connects, so that it finds the connection
# and the header at once.


@needs_strace
@pytest.mark.parametrize("other_clients", [0, 3])
def test_killed_between_accept_and_report(serve: Serve, path: Path, other_clients: int) -> None:
    """A connection that was accepted but not reported is closed; no other client is affected."""
    path.write_bytes(SMALL)
    server = serve(path)
    (worker,) = server.workers(1)
    others = [server.connect(b"0\n") for _ in range(other_clients)]
    for other in others:
        expect(other, SMALL)
    stop(worker)
    lost = server.connect(b"0\n")
    with strace(worker, "sendmsg:signal=SIGKILL:when=1"):
        os.kill(worker, signal.SIGCONT)
        assert not outcome(lost)
        eventually(lambda: gone(worker))
    ready_workers(server, [worker])
    append(path, APPENDED)
    for other in others:
        expect(other, APPENDED)
    expect(server.connect(b"0\n"), SMALL + APPENDED)


@needs_strace
def test_killed_between_start_and_header(serve: Serve, path: Path) -> None:
    """A stream whose start was reported continues there, even if its header is still unread."""
    path.write_bytes(SMALL)
    server = serve(path)
    (worker,) = server.workers(1)
    stop(worker)
    clients = [server.connect(header) for header in (b"-5\n", b"-0\n", b"7\njunk")]
    clients[2].shutdown(socket.SHUT_WR)
    # The worker peeks at three headers, and then consumes the first.
    with strace(worker, "recvfrom:delay_enter=60000000:when=4"):
        os.kill(worker, signal.SIGCONT)
        await_protected(server, 3)
        append(path, APPENDED)
        os.kill(worker, signal.SIGKILL)
    for client, start in zip(clients, (-5, 1000, 7), strict=True):
        expect(client, SMALL[start:] + APPENDED)
    append(path, SMALL)
    for client in clients:
        expect(client, SMALL)


def test_killed_before_the_header_was_complete(serve: Serve, path: Path) -> None:
    """A client without a complete header keeps its connection and the part that it has sent."""
    path.write_bytes(SMALL)
    server = serve(path)
    (worker,) = server.workers(1)
    silent, incomplete = server.connect(), server.connect(b"99")
    await_clients(server, 2)
    os.kill(worker, signal.SIGKILL)
    ready_workers(server, [worker])
    incomplete.sendall(b"8\n")
    expect(incomplete, SMALL[998:])
    silent.sendall(b"0\n")
    expect(silent, SMALL)


@pytest.mark.sample(1)
@needs_strace
@pytest.mark.parametrize(
    "when", [1, 3, *(pytest.param(when, marks=pytest.mark.thorough) for when in (2, 7, 20))]
)
@pytest.mark.parametrize("what", ["signal=SIGKILL", "signal=SIGSEGV", "delay_exit=60000000"])
def test_killed_inside_sendfile(serve: Serve, path: Path, what: str, when: int) -> None:
    """A worker that dies before, in or after sendfile(2) causes no loss and no duplicate bytes."""
    path.write_bytes(DATA)
    server = serve(path, wrapper=NO_CORE)
    (worker,) = server.workers(1)
    stop(worker)
    clients = [server.connect(b"0\n", receive_buffer=size) for size in (0, 4096, 1 << 16)]
    received = b""
    with strace(worker, f"sendfile:{what}:when={when}"):
        os.kill(worker, signal.SIGCONT)
        if what.startswith("delay"):
            clients[0].settimeout(0.1)
            while not is_held(worker):
                with suppress(TimeoutError):
                    received += clients[0].recv(1 << 16)
            os.kill(worker, signal.SIGKILL)
            clients[0].settimeout(DEADLINE)
        else:
            received += recv_exactly(clients[0], len(DATA))
            for client in clients[1:]:
                expect(client, DATA)
            # If that took fewer than `when` calls, cause more of them.
            while not gone(worker):
                append(path, APPENDED)
                for client in clients:
                    expect(client, APPENDED)
    assert received == DATA[: len(received)]
    if what.startswith("delay"):
        expect(clients[0], DATA[len(received) :])
        for client in clients[1:]:
            expect(client, DATA)
    assert gone(worker)
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)


def is_held(pid: int) -> bool:
    """Return whether strace has held `pid` at one system call during two checks."""
    before = psutil.Process(pid).num_ctx_switches(), Path(f"/proc/{pid}/syscall").read_text()
    # There is no event to wait for: the test is that nothing happens.
    time.sleep(0.02)
    after = psutil.Process(pid).num_ctx_switches(), Path(f"/proc/{pid}/syscall").read_text()
    return before == after and psutil.Process(pid).status() == psutil.STATUS_TRACING_STOP


# A client that kills


def slot_of(server: Server, sock: socket.socket) -> int:
    """Return the slot that serves `sock`; requires a server with -v."""
    line = server.logged("client streams: ", f" peer=127.0.0.1:{sock.getsockname()[1]} ")
    return int(line.partition(" slot=")[2].split()[0])


def spread(server: Server, count: int) -> list[list[socket.socket]]:
    """Return streaming clients of the first two slots, at least `count` of each."""
    found: list[list[socket.socket]] = [[], []]
    while min(map(len, found)) < count:
        client = server.connect(b"0\n")
        found[slot_of(server, client)].append(client)
    return found


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", ["raise", "exit", "SIGABRT", "SIGSEGV"])
def test_client_that_kills_its_workers(serve: Serve, path: Path, how: str) -> None:
    """A client that kills each worker that adopts it costs only the clients of its slot."""
    path.write_bytes(SMALL)
    server = serve(
        path,
        "-v",
        "-w",
        "2",
        wrapper=NO_CORE,
        program=(sys.executable, program("poisoned_workers"), how),
    )
    server.traceback_expected = True
    server.workers(2)
    clients = spread(server, 3)
    for client in clients[0] + clients[1]:
        expect(client, SMALL)
    poison = server.connect(b"666\n")
    line = server.logged("workers crashed right after taking over clients")
    slot = int(line.partition(" slot=")[2].split()[0])
    assert not outcome(poison)
    for client in clients[slot]:
        assert not outcome(client)
    append(path, APPENDED)
    for client in clients[1 - slot]:
        expect(client, APPENDED)
    for client in [client for slot_clients in spread(server, 2) for client in slot_clients]:
        expect(client, SMALL + APPENDED)
    assert [worker["restarts"] > 0 for worker in status(server)["workers"]] == [
        slot == 0,
        slot == 1,
    ]


def test_client_that_kills_its_workers_in_a_drain(serve: Serve, path: Path) -> None:
    """A client that kills each worker that adopts it does not prolong a drain."""
    path.write_bytes(SMALL)
    server = serve(
        path, "-v", "--grace", "3600", program=(sys.executable, program("poisoned_workers"), "exit")
    )
    (worker,) = server.workers(1)
    stop(worker)
    # The client waits in the accept queue, which a drain empties.
    poison = server.connect(b"666\n")
    server.signal(signal.SIGTERM)
    server.logged("draining: ")
    os.kill(worker, signal.SIGCONT)
    server.logged("workers crashed right after taking over clients")
    assert not outcome(poison)
    server.wait()
    assert len(server.lines("worker crashed")) == 3


# Descriptors


def descriptor_counts(server: Server) -> list[int]:
    """Return the number of descriptors of the supervisor and of each worker."""
    return [open_descriptors(pid) for pid in [server.pid, *worker_pids(server)]]


def test_no_descriptor_leaks(serve: Serve, path: Path) -> None:
    """A thousand clients that leave in every way, and some worker deaths, leak no descriptor."""
    path.write_bytes(SMALL)
    server = serve(path, "-w", "2")
    ready_workers(server)
    before = descriptor_counts(server)
    headers, killed = (b"0\n", b"-0\n", b"", b"rubbish\n", b"12", b"5\njunk"), list[int]()
    for batch in range(20):
        clients = [server.connect(headers[(batch + number) % len(headers)]) for number in range(50)]
        if batch % 4 == 3:
            killed.append(ready_workers(server, besides=killed)[batch % 2])
            os.kill(killed[-1], signal.SIGKILL)
        for client in clients[::2]:
            reset_at_close(client)
        for client in clients:
            client.close()
        append(path, b"x")
    ready_workers(server)

    def none_left() -> bool:
        # The server cannot tell a close from a half-close until it sends this.
        append(path, b"x")
        return bool(status(server)["clients"] == 0)

    eventually(none_left)
    eventually(lambda: descriptor_counts(server) == before)
    assert sum(worker["restarts"] for worker in status(server)["workers"]) == 5


def test_unprotected_clients(serve: Serve, path: Path) -> None:
    """If the supervisor has no descriptors left, all clients are served.

    Unprotected clients are counted, and logged once.
    """
    path.write_bytes(SMALL)
    server = serve(path, "-v", "-w", "2", wrapper=("prlimit", "--nofile=64:64"))
    workers = server.workers(2)
    clients = [server.connect(b"0\n") for _ in range(60)]
    for client in clients:
        expect(client, SMALL)
    await_clients(server, 60)
    unprotected = status(server)["unprotected"]
    assert 20 < unprotected < 60
    assert (
        len(
            server.lines(
                "warning: out of file descriptors: new clients will be disconnected", "unprotected="
            )
        )
        == 1
    )
    slots = [slot_of(server, client) for client in clients]
    os.kill(workers[0], signal.SIGKILL)
    line = server.logged("worker was killed", "slot=0")
    ready_workers(server, workers[:1])
    lost = int(line.partition(" lost=")[2].split()[0])
    append(path, APPENDED)
    survived = [receives(client, APPENDED) for client in clients]
    assert survived.count(False) == lost
    assert all(alive for alive, slot in zip(survived, slots, strict=True) if slot == 1)
    assert status(server)["unprotected"] == unprotected - lost
    assert status(server)["clients"] == 60 - lost
    new = server.connect(b"0\n")
    expect(new, SMALL + APPENDED)


def receives(client: socket.socket, data: bytes) -> bool:
    """Return whether `client` receives `data`, rather than the end of its stream."""
    try:
        received = client.recv(len(data))
    except ConnectionResetError:
        return False
    assert received in (data, b"")
    return bool(received)


def test_no_descriptor_for_a_successor(serve: Serve, path: Path) -> None:
    """A slot keeps its clients while the supervisor lacks descriptors to spawn its worker.

    The worker is spawned as soon as descriptors are available.
    """
    path.write_bytes(SMALL)
    server = serve(path, program=HURRIED)
    (worker,) = server.workers(1)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    # Before the limit is lowered, the supervisor must have its duplicate of the client's socket.
    await_protected(server, 1)
    limits = psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE)
    psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE, (5, limits[1]))
    os.kill(worker, signal.SIGKILL)
    server.logged("error: cannot spawn a worker, clients of its slot wait: slot=0")
    append(path, APPENDED)
    waiting = server.connect(b"0\n")
    psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE, limits)
    expect(client, APPENDED)
    expect(waiting, SMALL + APPENDED)


@needs_strace
def test_no_process_for_a_successor(serve: Serve, path: Path) -> None:
    """Clients of a slot whose worker cannot be forked wait until it can."""
    path.write_bytes(SMALL)
    server = serve(path, program=HURRIED)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    before = ready_workers(server)
    with strace(server.pid, "clone:error=EAGAIN:when=1"):
        os.kill(before[0], signal.SIGKILL)
        server.logged(
            "error: cannot spawn a worker, clients of its slot wait: slot=0",
            "Resource temporarily unavailable",
        )
    append(path, APPENDED)
    expect(client, APPENDED)
    ready_workers(server, besides=before)


@needs_strace
def test_client_that_cannot_be_watched(serve: Serve, path: Path) -> None:
    """A client that epoll cannot watch is closed, and no other client is affected."""
    path.write_bytes(SMALL)
    server = serve(path)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    [worker] = ready_workers(server)
    with strace(worker, "epoll_ctl:error=ENOSPC:when=1"):
        expect_eof(server.connect())
        server.logged(
            "error: client disconnected: epoll cannot watch its socket: slot=0",
            "No space left on device",
        )
    append(path, APPENDED)
    expect(client, APPENDED)
    expect(server.connect(b"0\n"), SMALL + APPENDED)


@needs_strace
@pytest.mark.parametrize("error", ["ENFILE", "ENOMEM", "ENOBUFS"])
def test_system_without_descriptors_or_memory(serve: Serve, path: Path, error: str) -> None:
    """If the system lacks descriptors or memory, new clients wait, and no client is dropped."""
    path.write_bytes(SMALL)
    server = serve(path)
    silent = server.connect()
    [worker] = ready_workers(server)
    await_clients(server, 1)
    with strace(worker, f"accept4:error={error}:when=1"):
        new = server.connect(b"0\n")
        server.logged("out of file descriptors or memory: new clients wait")
        expect(new, SMALL)
    silent.sendall(b"0\n")
    expect(silent, SMALL)


def channel_of(worker: int) -> socket.socket:
    """Return a duplicate of a worker's end of its channel."""
    pidfd_getfd, libc = 438, ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(worker)
    try:
        for fd in os.listdir(f"/proc/{worker}/fd"):
            if (taken := libc.syscall(pidfd_getfd, process, int(fd), 0)) < 0:
                pytest.skip(f"pidfd_getfd(2) is not permitted: {os.strerror(ctypes.get_errno())}")
            try:
                sock = socket.socket(fileno=taken)
            except OSError:
                os.close(taken)
                continue
            # The other one listens for the next supervisor.
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if sock.type == socket.SOCK_SEQPACKET and not listens:
                return sock
            sock.close()
    finally:
        os.close(process)
    raise AssertionError("the worker has no channel")


def test_malformed_reports(serve: Serve, path: Path) -> None:
    """Malformed reports, and orders from a worker, are logged, and their descriptors are closed."""
    path.write_bytes(SMALL)
    server = serve(path)
    client = server.connect(b"0\n")
    expect(client, SMALL)
    [worker] = ready_workers(server)
    await_protected(server, 1)
    before = open_descriptors(server.pid)
    with channel_of(worker) as channel:
        for packet in (b"nonsense", encode(Ping())):
            socket.send_fds(channel, [packet], [channel.fileno()])
        eventually(lambda: len(server.lines("error: ignored a malformed report: ", "slot=0 ")) == 2)
    eventually(lambda: open_descriptors(server.pid) == before)
    append(path, APPENDED)
    expect(client, APPENDED)
    assert ready_workers(server) == [worker]


# The end


def kill_until_backoff(server: Server) -> None:
    """Kill the only worker repeatedly, until the backoff of its slot exceeds one second."""
    while not server.lines("respawning after a delay: slot=0 seconds=1.6"):
        for pid in forked_children(server.pid):
            # The process may have been killed in the last round and reaped in this one.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: gone(pid))  # type: ignore[misc]


def test_drain_of_a_slot_in_backoff(serve: Serve, path: Path) -> None:
    """On SIGTERM, clients of a slot in backoff, and those in its queue, get the whole file."""
    path.write_bytes(DATA)
    server = serve(path, "--grace", "20")
    clients = [
        server.connect(b"0\n", receive_buffer=4096),
        server.connect(b"-0\n"),
        server.connect(b"1000\n"),
    ]
    clients[2].shutdown(socket.SHUT_WR)
    expect(clients[0], DATA[:1000])
    await_clients(server, 3)
    kill_until_backoff(server)
    append(path, APPENDED)
    queued = server.connect(b"-5\n")
    server.signal(signal.SIGTERM)
    whole = DATA + APPENDED
    received = [recv_all(client) for client in (*clients, queued)]
    lengths = [len(stream) for stream in received]
    assert lengths == [len(whole) - 1000, len(APPENDED), len(whole) - 1000, 5]
    assert received == [whole[1000:], APPENDED, whole[1000:], whole[-5:]]
    server.wait()


@pytest.mark.sample(1)
@pytest.mark.parametrize("deaths", [1, 3])
def test_killed_while_draining(serve: Serve, path: Path, deaths: int) -> None:
    """A successor finishes the drain in which its predecessor was killed."""
    path.write_bytes(DATA)
    server = serve(path, "--grace", "20")
    server.workers(1)
    blocked, half = (
        server.connect(b"0\n", receive_buffer=4096),
        server.connect(b"7\n", receive_buffer=4096),
    )
    half.shutdown(socket.SHUT_WR)
    expect(blocked, DATA[:1000])
    expect(half, DATA[7:1000])
    server.signal(signal.SIGTERM)
    seen: list[int] = []
    for _ in range(deaths):
        worker = eventually(lambda: [pid for pid in draining_workers(server) if pid not in seen])[0]
        seen.append(worker)
        os.kill(worker, signal.SIGKILL)
    assert recv_all(blocked) == DATA[1000:]
    assert recv_all(half) == DATA[1000:]
    server.wait()


def test_killed_in_a_drain_before_it_read_a_header(serve: Serve, path: Path) -> None:
    """In a drain, a successor starts the streams that its predecessor had not started."""
    path.write_bytes(SMALL)
    server = serve(path)
    [worker] = ready_workers(server)
    client = server.connect()
    await_clients(server, 1)
    stop(worker)
    client.sendall(b"0\n")
    server.signal(signal.SIGTERM)
    server.logged("draining: ")
    os.kill(worker, signal.SIGKILL)
    expect(client, SMALL)
    expect_eof(client)
    server.wait()


def draining_workers(server: Server) -> list[int]:
    """Return the pids of the workers that drain."""
    return [pid for pid in forked_children(server.pid) if "draining" in server.title(pid)]


def test_killed_after_the_last_client_of_a_drain(serve: Serve, path: Path) -> None:
    """A drain without clients ends, even if its worker was killed."""
    path.write_bytes(DATA)
    server = serve(path, "--grace", "20")
    blocked = server.connect(b"0\n", receive_buffer=4096)
    expect(blocked, DATA[:1000])
    server.signal(signal.SIGTERM)
    worker = eventually(lambda: draining_workers(server))[0]
    reset_at_close(blocked)
    stop(worker)
    blocked.close()
    os.kill(worker, signal.SIGKILL)
    server.wait()


@pytest.mark.thorough
def test_backoff_does_not_outlast_a_drain(serve: Serve, path: Path) -> None:
    """In a drain, a dead worker is replaced without backoff, so its streams can end in time."""
    data = random_bytes(20_000_000)
    path.write_bytes(data)
    server = serve(path, "--grace", "4")
    client = server.connect(b"0\n", receive_buffer=4096)
    await_clients(server, 1)
    count = 1
    while not server.lines("respawning after a delay: ", "seconds=1.6"):
        server.logged("worker ready: ", count=count)
        os.kill(worker_pids(server)[0], signal.SIGKILL)
        server.logged("worker was killed: ", count=count)
        count += 1
    server.logged("worker ready: ", count=count)
    server.signal(signal.SIGTERM)
    server.logged("draining: ")
    os.kill(worker_pids(server)[0], signal.SIGKILL)
    expect(client, data)
    expect_eof(client)
