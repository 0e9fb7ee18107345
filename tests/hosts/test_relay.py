"""An origin, two relays, HAProxy and clients, on hosts of their own; then one thing after the other breaks."""

import csv
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.checkout import ROOT
from support.files import append, random_bytes
from support.namespaces import Host, Network, reason_to_skip
from support.server import TAILSRV, Server
from support.sockets import recv_all
from support.waiting import DEADLINE, eventually

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

TSCAT = (sys.executable, "-m", "tailsrv.client.tscat")
TSSYNC = (sys.executable, "-m", "tailsrv.client.tssync")

CONFIG = ROOT / "contrib" / "relay" / "haproxy.cfg"

# in a network of our own every port is free
PORT = 4321
# the last three as in haproxy.cfg
ORIGIN, BALANCER, RELAYS = "10.0.0.1", "10.0.0.10", ("10.0.0.11", "10.0.0.12")
THROUGH_BALANCER, TO_RELAYS = (f"{BALANCER}:{PORT}",), tuple(f"{relay}:{PORT}" for relay in RELAYS)


class Program:
    """A program that runs on a host, its output in files."""

    def __init__(self, host: Host, path: Path, *command: str | Path) -> None:
        self.output, self._errors = path.with_suffix(".out"), path.with_suffix(".err")
        with self.output.open("wb") as stdout, self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*host.wrapper, *command], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
            )

    @property
    def errors(self) -> str:
        """What it has written to standard error."""
        return self._errors.read_text()

    def is_running(self) -> bool:
        """Tell that it runs; if not, fail with what it has said."""
        assert self._process.poll() is None, self.errors
        return True

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End it with a signal, and return its exit status."""
        self._process.send_signal(number)
        return self._process.wait(DEADLINE)


def serve(host: Host, path: Path, log: Path) -> Server:
    """Return a tailsrv that serves `path` on `host`, and tells of each client."""
    return Server(
        [*host.wrapper, *TAILSRV, "-v", "-p", str(PORT), "--follow-name", str(path)], log, status=0
    )


class Relay:
    """A host with a tssync, and a tailsrv that serves its copy."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self._folder = host, folder
        self.name = host.name
        self.copy = folder / "app.log"
        folder.mkdir()

    def start(self) -> None:
        """Start both, as the units do."""
        self.start_sync()
        self.server = serve(self.host, self.copy, self._folder / "tailsrv.err")

    def start_sync(self) -> None:
        """Start tssync."""
        self.sync = Program(
            self.host, self._folder / "tssync", *TSSYNC, f"{ORIGIN}:{PORT}", self.copy
        )

    def kill(self) -> None:
        """Kill both."""
        self.sync.end()
        self.server.expected_status = -signal.SIGKILL
        self.server.signal(signal.SIGKILL)
        self.server.wait()

    def finish(self) -> None:
        """End both, in good order."""
        self.sync.end()
        self.server.finish()


class Balancer:
    """A host with HAProxy, configured as we recommend."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._host, self._folder = host, folder
        self._socket = folder / "admin.sock"
        self.config = folder / "haproxy.cfg"
        text = CONFIG.read_text().replace("/run/haproxy/admin.sock", str(self._socket))
        # not everybody may have so many descriptors
        self.config.write_text(text.replace("maxconn 100000", "maxconn 1000"))
        self.start()

    def start(self) -> None:
        """Start it, and wait until it can be asked."""
        self._socket.unlink(missing_ok=True)
        self.program = Program(
            self._host, self._folder / "haproxy", "haproxy", "-db", "-f", self.config
        )
        eventually(lambda: self.program.is_running() and self._socket.exists())

    def finish(self) -> None:
        """End it at once."""
        self.program.end()

    def relays(self) -> dict[str, dict[str, str]]:
        """Return what it knows of each relay, by name, with the columns that its manual names."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(str(self._socket))
            sock.sendall(b"show stat\n")
            lines = recv_all(sock).decode().removeprefix("# ").splitlines()
        return {
            row["svname"]: row for row in csv.DictReader(lines) if row["svname"].startswith("relay")
        }

    def has_checked(self, relay: Relay) -> None:
        """Wait until a check has found `relay` well."""
        # with an asterisk while the next is under way
        eventually(lambda: "L4OK" in self.relays()[relay.name]["check_status"])

    def sees(self, relay: Relay, status: str) -> None:
        """Wait until it holds `relay` for UP or DOWN."""
        eventually(lambda: self.relays()[relay.name]["status"] == status)


class RelayClient(Program):
    """A tscat from byte `start` on."""

    def __init__(self, host: Host, path: Path, addresses: tuple[str, ...], start: int) -> None:
        super().__init__(host, path, *TSCAT, *addresses, str(start))
        self.addresses, self.start = addresses, start

    @property
    def reached(self) -> int:
        """How far it has come in the file."""
        return self.start + self.output.stat().st_size

    def reaches(self, offset: int) -> None:
        """Wait until it has come so far."""
        eventually(lambda: self.is_running() and self.reached >= offset)


class Tree:
    """All of it."""

    def __init__(self, network: Network, folder: Path) -> None:
        self._folder = folder
        self.file = folder / "app.log"
        append(self.file, random_bytes(1 << 20))
        self.origin_host = network.host("origin", ORIGIN, loss=0.01, delay=0.01)
        self.start_origin()
        self.relays = [
            Relay(network.host(f"relay{number}", ip), folder / f"relay{number}")
            for number, ip in enumerate(RELAYS, 1)
        ]
        for relay in self.relays:
            relay.start()
        self.balancer = Balancer(network.host("balancer", BALANCER), folder)
        self.clients_host = network.host("clients", "10.0.0.20", loss=0.01, delay=0.005)
        self.clients: list[RelayClient] = []

    def start_origin(self) -> None:
        """Start the origin's tailsrv."""
        self.origin = serve(self.origin_host, self.file, self._folder / "origin.err")

    def restart_origin(self) -> None:
        """End it in good order, and start it again with the same file."""
        self.origin.finish()
        self.start_origin()

    def finish(self) -> None:
        """End all, the clients first, who must be content."""
        for client in self.clients:
            assert client.end(signal.SIGINT) == 0, client.errors
        self.balancer.finish()
        for relay in self.relays:
            relay.finish()
        self.origin.finish()

    def add_client(self, addresses: tuple[str, ...], start: int = 0) -> None:
        """Start a tscat."""
        path = self._folder / f"client{len(self.clients)}"
        self.clients.append(RelayClient(self.clients_host, path, addresses, start))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Append to the file meanwhile, and wait until every client goes on before and after."""
        done = threading.Event()
        writer = threading.Thread(target=self._write, args=[done])
        writer.start()
        try:
            self.goes_on(self.clients)
            yield
            self.goes_on(self.clients)
        finally:
            done.set()
            writer.join()

    def _write(self, done: threading.Event) -> None:
        chance = random.Random(self.file.stat().st_size)
        while not done.wait(chance.uniform(0, 0.02)):
            append(self.file, chance.randbytes(chance.randrange(1, 4000)))

    def goes_on(self, clients: Sequence[RelayClient]) -> None:
        """Wait until these clients have what is in the file now, and some more."""
        size = self.file.stat().st_size
        eventually(lambda: all(client.reached > size for client in clients))

    @property
    def balanced(self) -> list[RelayClient]:
        """The clients that come by way of HAProxy."""
        return [client for client in self.clients if client.addresses == THROUGH_BALANCER]

    def is_exact(self) -> None:
        """Assert that every client gets what is in the file, to the byte."""
        data = self.file.read_bytes()
        for client in self.clients:
            client.reaches(len(data))
            assert client.output.read_bytes() == data[client.start :]

    def favourite(self) -> Relay:
        """Return the relay to which HAProxy has sent the most of its clients."""
        seen = self.balancer.relays()
        return max(self.relays, key=lambda relay: int(seen[relay.name]["scur"]))


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Return the tree, with all at its place and well. Each test leaves it so."""
    if reason := reason_to_skip("haproxy"):
        pytest.skip(f"no hosts: {reason}")
    with tempfile.TemporaryDirectory(prefix="tailsrv-") as folder, Network() as network:
        tree = Tree(network, Path(folder))
        for start in (0, 0, 0, 1000):
            tree.add_client(THROUGH_BALANCER, start)
        tree.add_client(TO_RELAYS)
        yield tree
        tree.finish()


def test_checks_are_no_clients(tree: Tree) -> None:
    """HAProxy's checks find the relays well, and no tailsrv sees anything of them."""
    tree.is_exact()
    for relay in tree.relays:
        tree.balancer.has_checked(relay)
        assert len(relay.server.lines("client")) == len(relay.server.lines("client streams"))
    assert sum(len(relay.server.lines("client streams")) for relay in tree.relays) == len(
        tree.clients
    )


def test_a_relay_dies(tree: Tree) -> None:
    """The clients of a relay that is killed go on with the other one, and it comes back as it was."""
    with tree.writing():
        relay = tree.favourite()
        relay.kill()
        tree.goes_on(tree.clients)
        tree.balancer.sees(relay, "DOWN")
        relay.start()
        tree.balancer.sees(relay, "UP")
    tree.is_exact()


def test_a_relay_falls_silent(tree: Tree) -> None:
    """HAProxy takes the clients of a relay that is cut off away from it; one that came by itself waits for it."""
    with tree.writing():
        relay = tree.favourite()
        relay.host.cut()
        tree.goes_on(tree.balanced)
        tree.balancer.sees(relay, "DOWN")
        relay.host.join()
        tree.balancer.sees(relay, "UP")
    tree.is_exact()


def test_a_tssync_dies(tree: Tree) -> None:
    """A tssync that is killed takes no client with it, and the next one goes on where its copy ends."""
    with tree.writing():
        relay = tree.favourite()
        relay.sync.end()
        relay.start_sync()
    tree.is_exact()


def test_the_origin_restarts(tree: Tree) -> None:
    """The origin's tailsrv comes back with the same file, and the relays come back to it."""
    with tree.writing():
        tree.restart_origin()
    tree.is_exact()


def test_the_balancer_dies(tree: Tree) -> None:
    """The clients come back when HAProxy does."""
    with tree.writing():
        tree.balancer.finish()
        tree.balancer.start()
    tree.is_exact()
