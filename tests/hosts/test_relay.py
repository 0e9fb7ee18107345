"""An origin, two relays, HAProxy and clients on hosts of their own, and failures of each part."""

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

# This network is separate, so every port is free.
PORT = 4321
# The last three are those in haproxy.cfg.
ORIGIN, BALANCER, RELAYS = "10.0.0.1", "10.0.0.10", ("10.0.0.11", "10.0.0.12")
THROUGH_BALANCER, TO_RELAYS = (f"{BALANCER}:{PORT}",), tuple(f"{relay}:{PORT}" for relay in RELAYS)


class Program:
    """A program that runs on a host, with its output in files."""

    def __init__(self, host: Host, path: Path, *command: str | Path) -> None:
        self.output, self._errors = path.with_suffix(".out"), path.with_suffix(".err")
        with self.output.open("wb") as stdout, self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*host.wrapper, *command], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
            )

    @property
    def errors(self) -> str:
        """Everything that the program has written to standard error."""
        return self._errors.read_text()

    def is_running(self) -> bool:
        """Return true if the program runs; otherwise fail with its errors."""
        assert self._process.poll() is None, self.errors
        return True

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End the program with a signal, and return its exit status."""
        self._process.send_signal(number)
        return self._process.wait(DEADLINE)


def serve(host: Host, path: Path, log: Path, *options: str | Path) -> Server:
    """Return a tailsrv that serves `path` on `host` and logs each client."""
    command = [*host.wrapper, *TAILSRV, "-v", "-p", str(PORT), *map(str, options), str(path)]
    return Server(command, log, status=0)


class Relay:
    """A host with a tssync and a tailsrv that serves the local copy."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self._folder = host, folder
        self.name = host.name
        self.copy = folder / "app.log"
        folder.mkdir()

    def start(self) -> None:
        """Start both programs, as the units do."""
        self.start_sync()
        self.server = serve(self.host, self.copy, self._folder / "tailsrv.err")

    def start_sync(self) -> None:
        """Start tssync."""
        self.sync = Program(
            self.host, self._folder / "tssync", *TSSYNC, f"{ORIGIN}:{PORT}", self.copy
        )

    def kill(self) -> None:
        """Kill both programs."""
        self.sync.end()
        self.server.kill_all()
        self.server.wait()

    def finish(self) -> None:
        """End both programs; tailsrv must drain successfully."""
        self.sync.end()
        self.server.finish()


class Balancer:
    """A host with HAProxy, which uses the recommended configuration."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._host, self._folder = host, folder
        self._socket = folder / "admin.sock"
        self.config = folder / "haproxy.cfg"
        text = CONFIG.read_text().replace("/run/haproxy/admin.sock", str(self._socket))
        # The limit for descriptors may be too low for the original value.
        self.config.write_text(text.replace("maxconn 100000", "maxconn 1000"))
        self.start()

    def start(self) -> None:
        """Start HAProxy, and wait for its control socket."""
        self._socket.unlink(missing_ok=True)
        self.program = Program(
            self._host, self._folder / "haproxy", "haproxy", "-db", "-f", self.config
        )
        eventually(lambda: self.program.is_running() and self._socket.exists())

    def finish(self) -> None:
        """Kill HAProxy."""
        self.program.end()

    def relays(self) -> dict[str, dict[str, str]]:
        """Return the statistics of each relay, by name; HAProxy's manual lists the columns."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(str(self._socket))
            sock.sendall(b"show stat\n")
            lines = recv_all(sock).decode().removeprefix("# ").splitlines()
        return {
            row["svname"]: row for row in csv.DictReader(lines) if row["svname"].startswith("relay")
        }

    def has_checked(self, relay: Relay) -> None:
        """Wait until a health check of `relay` has succeeded."""
        # The value starts with an asterisk while the next check is running.
        eventually(lambda: "L4OK" in self.relays()[relay.name]["check_status"])

    def sees(self, relay: Relay, status: str) -> None:
        """Wait until HAProxy has set `relay` to `status`, which is UP or DOWN."""
        eventually(lambda: self.relays()[relay.name]["status"] == status)


class RelayClient(Program):
    """A tscat that starts at byte `start`."""

    def __init__(self, host: Host, path: Path, addresses: tuple[str, ...], start: int) -> None:
        super().__init__(host, path, *TSCAT, *addresses, str(start))
        self.addresses, self.start = addresses, start

    @property
    def reached(self) -> int:
        """The position of the client in the log."""
        return self.start + self.output.stat().st_size

    def reaches(self, offset: int) -> None:
        """Wait until the client has reached `offset`."""
        eventually(lambda: self.is_running() and self.reached >= offset)


class Tree:
    """The origin, its relays, the balancer and the clients."""

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
        options = ("--follow-name", "--state-file", self._folder / "state")
        self.origin = serve(self.origin_host, self.file, self._folder / "origin.err", *options)

    def restart_origin(self, rotated: bool = False) -> None:
        """Drain the origin, and start it again; rotate its log before if `rotated`."""
        self.origin.finish()
        if rotated:
            self.rotate()
        self.start_origin()

    def rotate(self) -> None:
        """Rotate the origin's log. The writer opens the new file with its next append."""
        self.file.rename(self._folder / f"app.log-{20260101 + len(self._rotated())}")

    def _rotated(self) -> list[Path]:
        return sorted(self._folder.glob("app.log-*"))

    def read_log(self) -> bytes:
        """Return the contents of the origin's log: of all its files, in order."""
        return b"".join(path.read_bytes() for path in [*self._rotated(), self.file])

    def finish(self) -> None:
        """End everything; the clients are first, and must exit with status 0."""
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
        """Append to the log during the block; wait at its start and end for all clients."""
        done = threading.Event()
        writer = threading.Thread(target=self._write, args=[done])
        writer.start()
        try:
            self.await_progress(self.clients)
            yield
            self.await_progress(self.clients)
        finally:
            done.set()
            writer.join()

    def _write(self, done: threading.Event) -> None:
        chance = random.Random(len(self.read_log()))
        while not done.wait(chance.uniform(0, 0.02)):
            append(self.file, chance.randbytes(chance.randrange(1, 4000)))

    def await_progress(self, clients: Sequence[RelayClient]) -> None:
        """Wait until these clients have received the current contents of the log, and more."""
        eventually(self.file.exists)
        size = len(self.read_log())
        eventually(lambda: all(client.reached > size for client in clients))

    @property
    def balanced(self) -> list[RelayClient]:
        """The clients that connect through HAProxy."""
        return [client for client in self.clients if client.addresses == THROUGH_BALANCER]

    def assert_exact(self) -> None:
        """Assert that every client receives exactly the contents of the log."""
        data = self.read_log()
        for client in self.clients:
            client.reaches(len(data))
            assert client.output.read_bytes() == data[client.start :]

    def busiest_relay(self) -> Relay:
        """Return the relay with the most clients through HAProxy."""
        seen = self.balancer.relays()
        return max(self.relays, key=lambda relay: int(seen[relay.name]["scur"]))


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Yield the tree with all parts running; each test must leave it in this state."""
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
    """HAProxy's checks succeed, and no tailsrv accepts them as clients."""
    tree.assert_exact()
    for relay in tree.relays:
        tree.balancer.has_checked(relay)
        assert len(relay.server.lines("client")) == len(relay.server.lines("client streams"))
    assert sum(len(relay.server.lines("client streams")) for relay in tree.relays) == len(
        tree.clients
    )


def test_a_relay_dies(tree: Tree) -> None:
    """The clients of a killed relay resume at the other one, and the relay can be started again."""
    with tree.writing():
        relay = tree.busiest_relay()
        relay.kill()
        tree.await_progress(tree.clients)
        tree.balancer.sees(relay, "DOWN")
        relay.start()
        tree.balancer.sees(relay, "UP")
    tree.assert_exact()


def test_a_relay_falls_silent(tree: Tree) -> None:
    """HAProxy moves the clients of an unreachable relay; a direct client waits for it."""
    with tree.writing():
        relay = tree.busiest_relay()
        relay.host.cut()
        tree.await_progress(tree.balanced)
        tree.balancer.sees(relay, "DOWN")
        relay.host.join()
        tree.balancer.sees(relay, "UP")
    tree.assert_exact()


def test_a_tssync_dies(tree: Tree) -> None:
    """After a killed tssync, clients stay connected, and the next tssync resumes its local copy."""
    with tree.writing():
        relay = tree.busiest_relay()
        relay.sync.end()
        relay.start_sync()
    tree.assert_exact()


def test_the_origin_restarts(tree: Tree) -> None:
    """After a restart of the origin with the same file, the relays resume."""
    with tree.writing():
        tree.restart_origin()
    tree.assert_exact()


def test_the_origin_rotates_its_log(tree: Tree) -> None:
    """Rotations of the origin's log, also one while it is down, change no byte and no offset."""
    with tree.writing():
        tree.rotate()
        tree.await_progress(tree.clients)
        tree.rotate()
        tree.await_progress(tree.clients)
        tree.restart_origin(rotated=True)
    tree.assert_exact()
    assert all(relay.copy.read_bytes() == tree.read_log() for relay in tree.relays)


def test_the_balancer_dies(tree: Tree) -> None:
    """After a restart of HAProxy, the clients resume."""
    with tree.writing():
        tree.balancer.finish()
        tree.balancer.start()
    tree.assert_exact()
