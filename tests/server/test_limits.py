"""Limits: --max-clients, --allow, and warnings about limits of the system."""

import os
import select
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.processes import runs, switches
from support.server import Serve, Server, activated
from support.sockets import connect, expect, expect_eof, needs_ipv6, reset
from support.waiting import DEADLINE, eventually

DATA = random_bytes(1000)
# Seconds. Within this time a server that polls every 0.2 seconds would accept another client.
QUIET = 1.0


@pytest.fixture(autouse=True)
def file(path: Path) -> None:
    """Write the data to the served file."""
    path.write_bytes(DATA)


def all_readable(socks: Iterable[socket.socket], seconds: float = 0) -> list[socket.socket]:
    """Return the sockets that have data to read, after `seconds` at the latest."""
    return select.select(list(socks), [], [], seconds)[0]


def served(socks: list[socket.socket], count: int) -> list[socket.socket]:
    """Wait until `count` of `socks` are served, assert that no more are, and return these."""
    eventually(lambda: len(all_readable(socks)) >= count)
    # There is no event to wait for: this asserts that nothing happens.
    time.sleep(QUIET)
    found = all_readable(socks)
    assert len(found) == count
    return found


# --max-clients


@pytest.mark.sample(1)
@pytest.mark.parametrize("workers", [1, 4])
def test_max_clients(serve: Serve, path: Path, workers: int) -> None:
    """Exactly --max-clients are served at a time, by all workers together; the others wait."""
    server = serve(path, "-w", str(workers), "--max-clients", "5")
    socks = [server.connect(b"0\n") for _ in range(12)]
    found = served(socks, 5)
    for sock in found[:3]:
        expect(sock, DATA)
        socks.remove(sock)
        sock.shutdown(socket.SHUT_RDWR)
        sock.close()
    eventually(lambda: append_something(path) and len(all_readable(socks)) == 5)
    server.logged("as many clients as --max-clients allows: new clients have to wait: ")


def append_something(path: Path) -> bool:
    """Append a byte: a server notices a closed connection only when it sends to it."""
    append(path, b"x")
    return True


def test_max_clients_without_a_header(serve: Serve, path: Path) -> None:
    """A client counts before it sends its header, and --header-timeout makes room for others."""
    server = serve(path, "--max-clients", "2", "--header-timeout", "1")
    silent = [server.connect() for _ in range(2)]
    eventually(lambda: "2 clients" in server.title())
    waiting = server.connect(b"0\n")
    for sock in silent:
        expect_eof(sock)
    expect(waiting, DATA)


def test_waiting_clients_cost_little(serve: Serve, path: Path) -> None:
    """While clients wait for room, the worker polls a few times a second and does not spin."""
    server = serve(path, "--max-clients", "1")
    (worker,) = server.workers(1)
    client = server.connect(b"0\n")
    expect(client, DATA)
    waiting = [server.connect(b"0\n") for _ in range(20)]
    server.logged("new clients have to wait")
    before = switches(worker)
    # There is no event to wait for.
    time.sleep(QUIET)
    assert switches(worker) - before < 50
    assert not all_readable(waiting)


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
def test_limit_survives(serve: Serve, path: Path, how: signal.Signals) -> None:
    """Respawns and upgrades keep the client limit exactly: no client too many, none too few."""
    server = serve(path, "-w", "2", "--max-clients", "6")
    workers = server.workers(2)
    socks = [server.connect(b"0\n") for _ in range(10)]
    admitted = served(socks, 6)
    for sock in admitted:
        expect(sock, DATA)
    if how is signal.SIGHUP:
        server.signal(how)
        server.logged("upgraded: ", "clients=6")
    else:
        for worker in workers:
            os.kill(worker, how)
        server.logged("worker ready: ", count=4)
    waiting = [sock for sock in socks if sock not in admitted]
    # There is no event to wait for.
    time.sleep(QUIET)
    assert not all_readable(waiting)
    for sock in admitted:
        sock.close()
    for sock in waiting:
        eventually(lambda sock=sock: append_something(path) and all_readable([sock]))  # type: ignore[misc]


# --allow


def test_allow(serve: Serve, path: Path) -> None:
    """Clients from allowed networks are served; others are closed at once and logged once."""
    server = serve(path, "--allow", "127.0.0.1", "--allow", "127.9.0.0/16")
    expect(server.connect(b"0\n"), DATA)
    for address in ("127.9.1.2", "127.9.255.255"):
        expect(connect_from(server, address), DATA)
    for address in ("127.0.0.2", "127.8.0.1", "127.0.0.2"):
        with connect_from(server, address) as sock:
            assert closed(sock)
    assert server.logged("client is not in an allowed network: ").count("peer=127.0.0.2:") == 1
    assert len(server.lines("not in an allowed network")) == 1


def connect_from(server: Server, address: str) -> socket.socket:
    """Return a connection from `address`."""
    sock = socket.create_connection(("127.0.0.1", server.port), DEADLINE, (address, 0))
    server.clients.append(sock)
    sock.sendall(b"0\n")
    return sock


def closed(sock: socket.socket) -> bool:
    """Return whether the connection ends without a byte."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        # The server has closed the socket without reading the header.
        return True


@needs_ipv6
def test_allow_ipv6(serve: Serve, path: Path) -> None:
    """An IPv6 network allows IPv6 clients only."""
    server = serve(path, "--allow", "::1")
    expect(server.connect(b"0\n", host="::1"), DATA)
    assert closed(server.connect(b"0\n"))


@needs_ipv6
def test_allow_mapped(serve: Serve, path: Path) -> None:
    """An IPv4 client of a dual-stack socket is matched with the IPv4 networks."""
    server = serve(path, "-p", "", "--allow", "127.0.0.0/8", wrapper=activated("tcp6"))
    expect(server.connect(b"0\n"), DATA)
    assert closed(server.connect(b"0\n", host="::1"))


# Warnings


def test_descriptors_do_not_suffice(serve: Serve, path: Path) -> None:
    """A descriptor limit too low for --max-clients causes a warning, and the server serves."""
    server = serve(path, "--max-clients", "1000", wrapper=("prlimit", "--nofile=200"))
    line = server.logged("warning: file descriptor limit is too low for --max-clients")
    assert " max_clients=1000 " in line
    assert " descriptors=200 " in line
    expect(server.connect(b"0\n"), DATA)


def test_descriptors_suffice(serve: Serve, path: Path) -> None:
    """If the descriptor limit suffices, or without --max-clients, there is no warning."""
    for options in ((), ("--max-clients", "100")):
        server = serve(path, *options, wrapper=("prlimit", "--nofile=200"))
        server.workers(1)
        assert not server.lines("warning")


SMALL_QUEUES = (
    "unshare",
    "--net",
    "--map-root-user",
    "sh",
    "-c",
    'echo 100 >/proc/sys/net/core/somaxconn && exec "$@"',
    "sh",
)


def test_backlog_is_cut(serve: Serve, path: Path) -> None:
    """If the kernel shortens the accept queues, the log says how short they are, with a hint."""
    if not runs(*SMALL_QUEUES, "true"):
        pytest.skip("cannot create a network namespace")
    os.truncate(path, 0)
    server = serve(path, wrapper=SMALL_QUEUES)
    line = server.logged(
        "accept queues are shorter than requested", "backlog=100 wanted=4096", "net.core.somaxconn"
    )
    assert server.lines("warning") == [line]


def test_waiting_clients_keep_their_header(serve: Serve, path: Path) -> None:
    """A client that waits for room stays connected in the accept queue and keeps its header."""
    server = serve(path, "--max-clients", "1")
    first = server.connect(b"0\n")
    expect(first, DATA)
    second = connect(server.port, b"0\n")
    server.clients.append(second)
    server.logged("new clients have to wait")
    # The server notices a reset at once.
    reset(first)
    expect(second, DATA)
