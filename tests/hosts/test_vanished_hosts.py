"""Hosts that vanish while bytes are in flight to them."""

import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.interpreter import program
from support.namespaces import Host, Network, enter, in_thread, reason_to_skip
from support.processes import children
from support.server import Server
from support.sockets import connect, expect
from support.waiting import eventually


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Yield a network to which the tests connect hosts."""
    if reason := reason_to_skip():
        pytest.skip(f"no hosts: {reason}")
    with Network() as network:
        yield network


def start(host: Host, path: Path, *options: str) -> Server:
    """Return a server on `host` that declares peers dead after about a second."""
    command: Sequence[str | Path] = [
        *host.wrapper,
        sys.executable,
        program("impatient_server"),
        "-v",
        "-p",
        "0",
        *options,
        path,
    ]
    return Server([*command], path.with_suffix(".err"), status=0)


def connect_from(
    host: Host, to: Host, server: Server, header: bytes, receive_buffer: int = 0
) -> socket.socket:
    """Return a connection from `host` to the server, which has read `header` if it is not empty."""

    def make() -> socket.socket:
        namespace = os.open(host.path, os.O_RDONLY)
        try:
            enter(namespace)
        finally:
            os.close(namespace)
        return connect(server.port, header, to.address, receive_buffer)

    sock = in_thread(make)
    server.clients.append(sock)
    if header:
        server.streaming(sock)
    return sock


def given_up(server: Server, sock: socket.socket) -> list[str]:
    """Return the log lines which report that the peer at `sock` is dead."""
    host, port = sock.getsockname()
    return server.lines("stopped acknowledging", f" peer={host}:{port} ")


@pytest.mark.hosts
@pytest.mark.slow
def test_machines_vanish(network: Network, tmp_path: Path) -> None:
    """Vanished clients are dropped, a waiting client is served, all others get every byte."""
    server_host = network.host("server", "10.0.1.1")
    client_host = network.host("client", "10.0.1.2")
    lives, slow = network.host("lives", "10.0.1.3"), network.host("slow", "10.0.1.4", delay=0.1)
    path, data = tmp_path / "log", random_bytes(1 << 16)
    path.write_bytes(data)
    server = start(server_host, path, "--max-clients", "5")
    try:
        growing, closed = (
            connect_from(client_host, server_host, server, b"-0\n"),
            connect_from(client_host, server_host, server, b"0\n", 4096),
        )
        paused, far = (
            connect_from(lives, server_host, server, b"0\n", 4096),
            connect_from(slow, server_host, server, b"0\n"),
        )
        quiet = connect_from(lives, server_host, server, b"9999999\n")
        waiting = connect_from(lives, server_host, server, b"")
        waiting.sendall(b"65536\n")
        server.logged("as many clients as --max-clients allows")
        client_host.cut()
        append(path, b"more")
        eventually(lambda: given_up(server, growing) and given_up(server, closed))
        for sock in (paused, far):
            expect(sock, data + b"more")
        expect(waiting, b"more")
        assert len(server.lines("stopped acknowledging")) == 2
        assert not server.lines("client left", f":{quiet.getsockname()[1]} ")
    finally:
        client_host.join()
        server.finish()


@pytest.mark.hosts
@pytest.mark.slow
def test_a_machine_vanishes_with_its_worker(network: Network, tmp_path: Path) -> None:
    """A successor drops a client that vanished with bytes of the killed worker in flight."""
    server_host = network.host("server2", "10.0.1.11")
    client_host = network.host("client2", "10.0.1.12")
    path = tmp_path / "log"
    path.write_bytes(b"first")
    server = start(server_host, path)
    try:
        sock = connect_from(client_host, server_host, server, b"-0\n")
        client_host.cut()
        append(path, b"more")
        os.kill(children(server.pid)[0], signal.SIGKILL)
        eventually(lambda: given_up(server, sock))
        server.logged("worker ready: ", count=2)
    finally:
        client_host.join()
        server.finish()
