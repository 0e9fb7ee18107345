"""A server to which faults happen one after another, clients of it, and what becomes of them."""

import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from support.files import append, random_bytes
from support.processes import children, open_descriptors, session
from support.server import HELD, Server
from support.sockets import connect, reset
from support.status import ask, ready_workers, status
from support.waiting import DEADLINE, eventually


class FaultClient:
    """A connection, and where in the file its stream is."""

    def __init__(self, sock: socket.socket, position: int) -> None:
        self.sock = sock
        self.position = position

    def read(self, data: bytes) -> bool:
        """Read up to the end of `data`, all of which must be right; return whether the stream has lasted so long."""
        while self.position < len(data):
            try:
                some = self.sock.recv(min(len(data) - self.position, 1 << 16))
            except ConnectionError:
                some = b""
            if not some:
                self.sock.close()
                return False
            assert some == data[self.position : self.position + len(some)], (
                f"wrong bytes at {self.position}"
            )
            self.position += len(some)
        return True

    def reset(self) -> None:
        """Leave without a good-bye, if the connection is still there."""
        if self.sock.fileno() >= 0:
            reset(self.sock)

    def ended(self) -> bool:
        """Tell whether the stream ends here; that it does not shows when the time for it is over."""
        with self.sock:
            try:
                return self.sock.recv(1) == b""
            except ConnectionError:
                return True


def activity(pid: int) -> tuple[str, ...]:
    """Return the state of a process, and how often it has been put to sleep and woken."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ()
    return tuple(line for line in lines if line.startswith(("State", "voluntary", "nonvoluntary")))


class FaultBench:
    """A server, clients that follow its file, and one that never reads; faults happen to it one after another."""

    FOLLOWERS = 3

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.hold = folder, folder / "file.log", folder / "hold"
        self.hold.mkdir()
        self.server: Server | None = None
        self.data = b""
        self.followers: list[FaultClient] = []
        self.stalled: FaultClient | None = None
        self.lost = 0
        self.worker = 0
        # lines of the log that speak of upgrades which are over
        self.told = 0
        self.asker: socket.socket | None = None
        self.starts = 0

    # The server

    def launch(self, *options: str) -> Server:
        """Start a server, which need not get far."""
        self.new_file()
        self.starts += 1
        self.lost = 0
        # no look for translations, among the first calls
        environment = ("-u", "LANGUAGE", "LC_ALL=C", f"TAILSRV_TEST_HOLD={self.hold}")
        command = ["env", *environment, *HELD, "-p", "0", "--follow-name", *options, str(self.path)]
        self.server = Server(command, self.folder / f"stderr-{self.starts}", 0)
        return self.server

    def new_file(self) -> None:
        """Begin a file that shares no bytes with the one before."""
        fresh = self.folder / "next"
        self.data = random_bytes(300_000, seed=len(self.data) + self.starts)
        fresh.write_bytes(self.data)
        fresh.rename(self.path)

    def settle_in(self) -> None:
        """Have the clients connected that are to notice nothing."""
        assert self.server is not None
        self.worker = self.server.workers(1)[0]
        self.stalled = self.join(0, receive_buffer=4096)
        self.fill_up()

    def ready(self) -> Server:
        """Return the server, started if there is none."""
        if self.server is None:
            self.launch()
            self.settle_in()
        assert self.server is not None
        return self.server

    def join(self, position: int, receive_buffer: int = 0) -> FaultClient:
        assert self.server is not None
        return FaultClient(
            connect(self.server.port, b"%d\n" % position, receive_buffer=receive_buffer), position
        )

    def fill_up(self) -> None:
        """Have as many followers as there are to be, of different habits."""
        while len(self.followers) < self.FOLLOWERS:
            client = self.join(len(self.data) - 100)
            if len(self.followers) == 1:
                client.sock.shutdown(socket.SHUT_WR)
            elif len(self.followers) == 2:
                client.sock.sendall(b"junk\n")
            assert client.read(self.data)
            self.followers.append(client)

    def stop(self) -> None:
        """End the server at once, and forget its clients."""
        for client in [*self.followers, *([self.stalled] if self.stalled else [])]:
            client.sock.close()
        self.followers, self.stalled = [], None
        if self.server is not None:
            for pid in session(self.server.pid):
                os.kill(pid, signal.SIGKILL)
            self.server.process.wait(DEADLINE)
            self.server = None

    def finish(self) -> None:
        """Assert that all is quiet, and that who has never read gets everything when the server ends in good order."""
        if self.server is None or self.stalled is None:
            return
        assert self.stalled.read(self.data)
        eventually(self.is_quiet)
        self.server.signal(signal.SIGTERM)
        assert self.server.process.wait(DEADLINE) == 0

    def is_quiet(self) -> bool:
        """Tell whether no process has woken up for half a second, which one that looks again and again would."""
        before = [activity(pid) for pid in self.pids()]
        time.sleep(0.5)
        return before == [activity(pid) for pid in self.pids()]

    def log(self) -> str:
        """Return the log of the server that runs now, or has run last."""
        path = self.folder / f"stderr-{self.starts}"
        return path.read_text() if path.exists() else ""

    # What its processes do

    def pids(self) -> list[int]:
        assert self.server is not None
        return [self.server.pid, *children(self.server.pid)]

    def rest(self) -> None:
        """Wait until every process sleeps on; one that spins never does."""

        def look() -> bool:
            before = [activity(pid) for pid in self.pids()]
            # shorter than between two looks of a worker that has no inotify: that is no spin
            time.sleep(0.01)
            return before == [activity(pid) for pid in self.pids()] and all(
                one and "sleeping" in one[0] for one in before
            )

        eventually(look)

    def held(self, place: str, pid: Callable[[], int | None]) -> int:
        """Wait until a process is held at `place`, and return its pid."""

        def look() -> int | None:
            found = pid()
            return found if found and "stopped" in activity(found)[0] else None

        found = eventually(look)
        (self.hold / place).unlink()
        assert found
        return found

    def held_child(self, place: str, besides: int = 0) -> int:
        """Wait until a child is held at `place`, and return its pid."""
        assert self.server is not None
        server = self.server
        return self.held(
            place,
            lambda: next(
                (pid for pid in children(server.pid) if pid != besides and activity(pid)), None
            ),
        )

    # What its clients do

    def append(self) -> None:
        """Append a record, which every follower gets."""
        reporter = random_bytes(200, seed=len(self.data))
        self.data += reporter
        append(self.path, reporter)
        staying = [client for client in self.followers if client.read(self.data)]
        self.lost += len(self.followers) - len(staying)
        self.followers = staying

    def visit(self, count: int = 1000, receive_buffer: int = 0) -> None:
        """Connect, read the last `count` bytes, and vanish."""
        client = self.join(len(self.data) - count, receive_buffer)
        self.lost += not client.read(self.data)
        client.reset()

    def crowd(self) -> None:
        """Have many come at once, read and vanish."""
        clients = [self.join(len(self.data) - 100) for _ in range(105)]
        self.lost += len(clients) - sum(client.read(self.data) for client in clients)
        for client in clients:
            client.reset()

    def visit_slowly(self) -> None:
        self.visit(250_000, receive_buffer=4096)

    def visit_in_pieces(self) -> None:
        """Send a header in three pieces, each of which the worker sees."""
        assert self.server is not None
        client = FaultClient(connect(self.server.port, b"-1"), len(self.data) - 123)
        for piece in (b"2", b"3\n"):
            self.rest()
            try:
                client.sock.sendall(piece)
            except ConnectionError:
                break
        self.lost += not client.read(self.data)
        client.reset()

    def leave(self) -> None:
        """Visit and close in good order, which shows with what is sent next."""
        client = self.join(len(self.data) - 10)
        self.lost += not client.read(self.data)
        client.sock.close()
        self.append()
        self.append()

    def be_refused(self) -> None:
        """Send what is no header."""
        assert self.server is not None
        client = FaultClient(connect(self.server.port, b"abc\n"), 0)
        assert client.ended()

    def be_alone(self) -> None:
        """Leave no client, then come back: appends are asked about again."""
        for client in [*self.followers, *([self.stalled] if self.stalled else [])]:
            client.reset()
        self.followers, self.stalled = [], None
        self.await_clients()
        self.stalled = self.join(0, receive_buffer=4096)
        self.fill_up()
        self.append()

    def ask(self) -> None:
        """Ask the supervisor how it is, and who is connected."""
        assert self.server is not None
        for name in ("", "/clients"):
            try:
                self.lost += not ask(f"*:{self.server.port}{name}")[0]
            except (ConnectionError, struct.error):
                self.lost += 1

    # What happens to it

    def kill_worker(self) -> None:
        """Kill the worker, and wait for its successor."""
        os.kill(self.worker, signal.SIGKILL)
        self.await_worker()

    def await_worker(self) -> None:
        """Wait for another worker that is ready and lives, or for the end; one that waited for the file has a successor by then."""
        assert self.server is not None
        server, last = self.server, self.worker

        def look() -> int:
            found = [
                word
                for line in server.lines("worker ready: ")
                for word in line.split()
                if word.startswith("pid=")
            ]
            pid = int(found[-1].removeprefix("pid="))
            return (
                pid
                if (pid != last and pid in children(server.pid))
                or server.process.poll() is not None
                else 0
            )

        self.worker = eventually(look)

    def await_upgrade(self) -> None:
        """Wait until the upgrade is over, one way or the other."""
        assert self.server is not None
        server = self.server

        def look() -> bool:
            lines = server.lines("upgrade")[self.told :]
            return server.process.poll() is not None or any(
                "upgraded: " in line or "failed" in line for line in lines
            )

        eventually(look)
        if any("upgraded: " in line for line in server.lines("upgrade")[self.told :]):
            self.await_worker()

    def rotate(self) -> None:
        """Replace the file; all streams end with the old one, and clients that come meanwhile get the new one."""
        old = self.data
        self.new_file()
        for client in [*self.followers, self.stalled]:
            assert client is not None
            assert client.read(old)
            assert client.ended()
        self.followers, self.stalled = [], self.join(0, receive_buffer=4096)
        self.fill_up()
        self.await_worker()

    # What has become of it

    def await_clients(self) -> None:
        """Wait until the supervisor knows of those who are connected, and of nobody else."""
        assert self.server is not None
        server = self.server
        count = len(self.followers) + (self.stalled is not None)
        eventually(lambda: status(server)["clients"] == count)

    def count_descriptors(self) -> Mapping[int, int]:
        """Return how many descriptors each process has."""
        return (
            {pid: open_descriptors(pid) for pid in self.pids()} if self.server is not None else {}
        )

    def ended(self) -> bool:
        """Tell whether the server has ended, or is about to: all its clients have been told so."""
        assert self.server is not None
        return self.server.process.poll() is not None or (self.lost > 0 and not self.followers)

    def outcome(self) -> str:
        """Return in the table's words what has become of the clients and the server, once all are at rest."""
        worker = self.worker
        if not self.ended():
            self.append()
            self.visit()
        if self.ended():
            return self.end()
        assert self.server is not None
        self.worker = ready_workers(self.server)[0]
        self.await_clients()
        self.rest()
        lost, self.lost = self.lost, 0
        self.fill_up()
        if lost > 1:
            return f"{lost} closed"
        return (
            ("closed" if lost else "exact")
            if self.worker == worker
            else "closed, replaced"
            if lost
            else "replaced"
        )

    def end(self) -> str:
        """Return how the server has ended, with nothing left of it."""
        assert self.server is not None
        server, lost = self.server, self.lost
        ended = server.process.wait(DEADLINE)
        eventually(lambda: not session(server.pid))
        self.stop()
        return f"ends {ended}" if ended or lost else "exact"
