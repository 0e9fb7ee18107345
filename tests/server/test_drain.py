"""How a server drains: within the grace period clients get the rest, new ones are refused."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from support.files import append, random_bytes
from support.processes import gone, stop, switches, title
from support.server import HURRIED, Serve, Server
from support.sockets import expect, expect_eof, recv_all, recv_exactly
from support.strace import needs_strace, strace
from support.waiting import eventually

DATA = random_bytes(1000)
# More than the kernel buffers for a client that does not read.
BIG = random_bytes(16 << 20)

Ending = Callable[[Server, Path], None]


def terminate(server: Server, _path: Path) -> None:
    server.signal(signal.SIGTERM)


def interrupt(server: Server, _path: Path) -> None:
    server.signal(signal.SIGINT)


def delete_file(_server: Server, path: Path) -> None:
    path.unlink()


@pytest.fixture(params=[terminate, interrupt, delete_file], ids=lambda ending: ending.__name__)
def end(request: pytest.FixtureRequest) -> Ending:
    """Return a function that makes a server drain, one for each reason to drain."""
    ending: Ending = request.param
    return ending


@pytest.mark.slow
def test_every_client_gets_the_whole_file(serve: Serve, path: Path, end: Ending) -> None:
    """Every client gets the file up to its end and then EOF, whatever its offset."""
    path.write_bytes(BIG)
    server = serve(path, "-w", "2", "-v", "--grace", "60")
    starts = [0, 1, 5 << 20, len(BIG) - 1, len(BIG), len(BIG) + 1, 1 << 40]
    clients = [server.connect(b"%d\n" % start) for start in starts]
    for client in clients:
        server.streaming(client)
    append(path, DATA)
    end(server, path)
    for start, client in zip(starts, clients, strict=True):
        expect(client, (BIG + DATA)[start:])
        expect_eof(client)
    server.wait()


@pytest.mark.sample(1)
@pytest.mark.slow
def test_slow_reader(serve: Serve, path: Path, end: Ending) -> None:
    """A client that was blocked when the drain began gets the rest within the grace period."""
    path.write_bytes(BIG)
    server = serve(path, "--grace", "60")
    slow = server.connect(b"0\n", receive_buffer=4096)
    expect(slow, BIG[:10])
    end(server, path)
    server.logged("draining")
    expect(slow, BIG[10:])
    expect_eof(slow)
    server.wait()
    assert server.lines("grace period over") == []


@pytest.mark.slow
def test_stray_input(serve: Serve, path: Path) -> None:
    """Unread bytes that a client sent after its header do not make it lose what is queued."""
    path.write_bytes(BIG)
    server = serve(path, "--grace", "60")
    (worker,) = server.workers(1)
    clients = [server.connect(b"0\n", receive_buffer=4096) for _ in range(5)]
    for client in clients:
        expect(client, BIG[:10])
    stop(worker)
    for client in clients:
        client.sendall(b"stray bytes" * 100)
    server.signal(signal.SIGTERM)
    server.logged("draining")
    os.kill(worker, signal.SIGCONT)
    for client in clients:
        client.sendall(b"stray while draining")
        expect(client, BIG[10:])
        expect_eof(client)
    server.wait()


@pytest.mark.slow
def test_stray_input_until_the_last_byte(serve: Serve, path: Path) -> None:
    """A client that keeps sending is not reset while the kernel still holds bytes for it."""
    path.write_bytes(data := BIG[:100_000])
    server = serve(path, "-v", "--grace", "60")
    client = server.connect(b"0\n", receive_buffer=4096)
    server.streaming(client)
    (worker,) = server.workers(1)
    server.signal(signal.SIGTERM)
    eventually(lambda: "[draining, 1 client]" in title(worker))
    for position in range(0, 50_000, 10_000):
        client.sendall(b"stray while the kernel holds the rest")
        assert server.lines("client left") == []
        expect(client, data[position : position + 10_000])
    expect(client, data[50_000:])
    expect_eof(client)
    server.wait()


@pytest.mark.sample(1)
@pytest.mark.slow
def test_the_grace_period_is_a_bound(serve: Serve, path: Path, end: Ending) -> None:
    """A client that does not read delays the end by no more than the grace period."""
    path.write_bytes(BIG)
    server = serve(path, "--grace", "0.3", program=HURRIED)
    stalled = server.connect(b"0\n", receive_buffer=4096)
    done = server.connect(b"0\n")
    expect(stalled, BIG[:10])
    expect(done, BIG)
    stalled.sendall(b"stray bytes, which must not turn the end into a reset")
    end(server, path)
    expect_eof(done)
    server.wait()
    assert len(server.lines("warning: grace period over: ", " slot=0 clients=1 ")) == 1
    rest = recv_all(stalled)
    assert 0 < len(rest) < len(BIG) - 10
    assert rest == BIG[10 : 10 + len(rest)]


@pytest.mark.slow
def test_without_a_grace_period(serve: Serve, path: Path) -> None:
    """With --grace 0 the server ends without waiting for any client."""
    path.write_bytes(BIG)
    server = serve(path, "--grace", "0")
    stalled = server.connect(b"0\n", receive_buffer=4096)
    expect(stalled, BIG[:10])
    server.signal(signal.SIGTERM)
    server.wait()


@pytest.mark.slow
def test_worker_that_does_not_drain(serve: Serve, path: Path) -> None:
    """A hung worker is killed after the grace period, and the server still ends with status 0."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2", "--grace", "0.1")
    stop(server.workers(2)[0])
    server.signal(signal.SIGTERM)
    server.wait()


@pytest.mark.slow
def test_accept_queue(serve: Serve, path: Path, end: Ending) -> None:
    """Connections that were still in the accept queue when the drain began are served."""
    path.write_bytes(DATA)
    server = serve(path, "-w", "2")
    workers = server.workers(2)
    stop(workers[0])
    # One worker must keep running to notice that the file is gone.
    if end is not delete_file:
        stop(workers[1])
    clients = [server.connect(b"%d\n" % start) for start in range(200)]
    end(server, path)
    server.logged("draining")
    for worker in workers:
        os.kill(worker, signal.SIGCONT)
    for start, client in enumerate(clients):
        expect(client, DATA[start:])
        expect_eof(client)
    server.wait()


@pytest.mark.sample(2)
@pytest.mark.parametrize("header", [b"", b"12", b"  -"])
def test_without_a_header(serve: Serve, path: Path, end: Ending, header: bytes) -> None:
    """A client that has not sent a complete header gets EOF, not a reset."""
    path.write_bytes(DATA)
    server = serve(path)
    silent = server.connect(header)
    expect(server.connect(b"0\n"), DATA)
    end(server, path)
    expect_eof(silent)
    server.wait()


def test_before_there_is_a_file(serve: Serve, path: Path) -> None:
    """A server that ends while it waits for its file closes the waiting connections."""
    server = serve(path)
    client = server.connect(b"0\n")
    server.logged("waiting for file")
    server.signal(signal.SIGTERM)
    expect_eof(client)
    server.wait()


@pytest.mark.slow
def test_appends_during_a_drain_are_not_sent(serve: Serve, path: Path) -> None:
    """Streams end where the file ended when the drain began, not after later appends."""
    path.write_bytes(BIG)
    server = serve(path, "--grace", "60")
    slow = server.connect(b"0\n", receive_buffer=4096)
    expect(slow, BIG[:10])
    (worker,) = server.workers(1)
    server.signal(signal.SIGTERM)
    eventually(lambda: "draining" in title(worker))
    append(path, DATA)
    slow.sendall(b"stray bytes, for which the worker wakes up")
    assert recv_exactly(slow, len(BIG) - 10) == BIG[10:]
    expect_eof(slow)
    server.wait()


@pytest.mark.sample(1)
@pytest.mark.slow
def test_connections_are_refused_while_draining(serve: Serve, path: Path, end: Ending) -> None:
    """The port is closed as soon as the drain has begun, while streams continue."""
    path.write_bytes(BIG)
    server = serve(path, "-w", "2", "--grace", "60")
    server.workers(2)
    slow = server.connect(b"0\n", receive_buffer=4096)
    expect(slow, BIG[:10])
    end(server, path)
    server.logged("draining")

    def refused() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", server.port)) != 0

    eventually(refused)
    expect(slow, BIG[10:])
    expect_eof(slow)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_after_the_file_has_gone(
    serve: Serve, path: Path, number: signal.Signals
) -> None:
    """A first signal continues the drain of a file that is gone; a second one ends it at once."""
    path.write_bytes(BIG)
    server = serve(path, "--grace", "60")
    slow = server.connect(b"0\n", receive_buffer=4096)
    stalled = server.connect(b"0\n", receive_buffer=4096)
    expect(slow, BIG[:10])
    expect(stalled, BIG[:10])
    path.unlink()
    server.logged("file is gone, draining")
    server.signal(number)
    server.logged(f"draining: signal={number.name}")
    expect(slow, BIG[10:])
    expect_eof(slow)
    server.signal(number)
    server.wait()


@pytest.mark.slow
def test_accept_queue_of_a_worker_that_has_just_died(serve: Serve, path: Path) -> None:
    """If a worker's death and SIGTERM are noticed together, its accept queue is still served."""
    path.write_bytes(DATA)
    server = serve(path)
    [worker] = server.workers(1)
    stop(server.pid)
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: gone(worker))
    client = server.connect(b"0\n")
    server.signal(signal.SIGTERM)
    server.signal(signal.SIGCONT)
    expect(client, DATA)
    expect_eof(client)
    server.wait()


# A worker that dies when a drain begins: its successor serves the accept queue.


def assert_served_and_ended(server: Server, clients: list[socket.socket]) -> None:
    """Assert that each client gets the whole file and EOF, and that the server ends."""
    for client in clients:
        expect(client, DATA)
        expect_eof(client)
    server.wait()


@pytest.mark.slow
def test_accept_queue_of_a_worker_that_is_killed_before_it_drains(serve: Serve, path: Path) -> None:
    """If a worker is killed before it obeys the order to drain, its successor serves its queue."""
    path.write_bytes(DATA)
    server = serve(path)
    [worker] = server.workers(1)
    stop(worker)
    clients = [server.connect(b"0\n") for _ in range(100)]
    server.signal(signal.SIGTERM)
    server.logged("draining")
    os.kill(worker, signal.SIGKILL)
    assert_served_and_ended(server, clients)


@pytest.mark.slow
def test_accept_queue_of_a_worker_that_dies_after_its_report(serve: Serve, path: Path) -> None:
    """If a worker dies right after it reports a file gone, its successor serves its queue."""
    path.write_bytes(DATA)
    server = serve(path)
    [worker] = server.workers(1)
    stop(server.pid)
    before = switches(worker)
    path.unlink()
    eventually(
        lambda: (
            switches(worker) > before and psutil.Process(worker).status() == psutil.STATUS_SLEEPING
        )
    )
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: gone(worker))
    clients = [server.connect(b"0\n") for _ in range(100)]
    server.signal(signal.SIGCONT)
    assert_served_and_ended(server, clients)


@needs_strace
@pytest.mark.slow
def test_accept_queue_of_a_worker_that_ends_before_its_order(serve: Serve, path: Path) -> None:
    """If TERM reaches a worker before the supervisor's order does, its queue is still served."""
    path.write_bytes(DATA)
    server = serve(path)
    [worker] = server.workers(1)
    with strace(worker, "exit_group:delay_enter=300000"):
        # Without an order the worker exits as in a crash. strace delays this exit for longer than
        # the supervisor needs to send an order.
        os.kill(worker, signal.SIGTERM)
        eventually(lambda: psutil.Process(worker).status() == psutil.STATUS_TRACING_STOP)
        clients = [server.connect(b"0\n") for _ in range(100)]
        server.signal(signal.SIGTERM)
        assert_served_and_ended(server, clients)


@pytest.mark.thorough
@pytest.mark.slow
def test_signal_to_the_whole_group(serve: Serve, path: Path) -> None:
    """TERM to the whole process group loses no connection of queues longer than a turn accepts."""
    for _ in range(10):
        path.write_bytes(DATA)
        server = serve(path, "-w", "2")
        server.workers(2)
        clients = [server.connect(b"0\n") for _ in range(100)]
        os.killpg(server.pid, signal.SIGTERM)
        assert_served_and_ended(server, clients)
