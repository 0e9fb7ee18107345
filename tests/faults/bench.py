"""A server in which faults occur one after another, its clients, and what happens to them."""

import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from support.files import append, random_bytes
from support.processes import children, descriptors, session
from support.server import HELD, Server
from support.sockets import connect, reset
from support.status import ask, ready_workers
from support.waiting import DEADLINE, eventually

# Part of the log line of a worker whose supervisor has died.
GONE = "supervisor is gone"


class FaultClient:
    """A connection, and the position of its stream in the log."""

    def __init__(self, sock: socket.socket, position: int) -> None:
        self.sock = sock
        self.position = position

    def read(self, data: bytes) -> bool:
        """Read to the end of `data`, and compare; return whether the stream lasted that long."""
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
        """Reset the connection, if it still exists."""
        if self.sock.fileno() >= 0:
            reset(self.sock)

    def ended(self) -> bool:
        """Tell whether the stream ends here; a timeout of the socket means that it does not."""
        with self.sock:
            try:
                return self.sock.recv(1) == b""
            except ConnectionError:
                return True


def activity(pid: int) -> tuple[str, ...]:
    """Return the state of a process, and how often it has gone to sleep and been preempted."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ()
    return tuple(line for line in lines if line.startswith(("State", "voluntary", "nonvoluntary")))


class FaultBench:
    """A server for a series of faults, with clients that follow its file and one that stalls."""

    FOLLOWERS = 3

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.hold = folder, folder / "file.log", folder / "hold"
        # The state file is alone in its folder, so that strace can select the calls about both.
        self.state_file = folder / "state" / "log.json"
        for new in (self.hold, self.state_file.parent):
            new.mkdir()
        self.server: Server | None = None
        # The log from offset 0 on, and the offset of the earliest byte that can still be read.
        self.data, self.start = b"", 0
        self.followers: list[FaultClient] = []
        self.stalled: FaultClient | None = None
        self.lost = 0
        self.worker = 0
        # The number of log lines about upgrades that are over.
        self.upgrade_lines = 0
        self.asker: socket.socket | None = None
        self.starts = 0

    # The server.

    def launch(self, fresh: bool = True) -> Server:
        """Start a server; a fault may make it end early.

        With `fresh`, it has a new log and no state file. Otherwise it continues with those that the
        server before it has left.
        """
        if fresh:
            self.new_log()
        self.starts += 1
        self.lost = 0
        # Without these variables the first system calls would be a search for translations.
        environment = ("-u", "LANGUAGE", "LC_ALL=C", f"TAILSRV_TEST_HOLD={self.hold}")
        options = ("-p", "0", "--follow-name", "--state-file", str(self.state_file))
        command = ["env", *environment, *HELD, *options, str(self.path)]
        self.server = Server(command, self.folder / f"stderr-{self.starts}", 0)
        return self.server

    def new_log(self) -> None:
        """Start a new log, whose file has no bytes in common with the one before."""
        for old in [*self.folder.glob("file.log*"), *self.state_file.parent.iterdir()]:
            old.unlink()
        self.data, self.start = b"", 0
        self.new_file()

    def new_file(self) -> None:
        """Put the next file of the log in the place of the present one."""
        fresh = self.folder / "next"
        content = random_bytes(300_000, seed=len(self.data) + self.starts)
        fresh.write_bytes(content)
        fresh.rename(self.path)
        self.data += content

    def move_away(self) -> None:
        """Rename the file as logrotate does with `dateext`; it can still be read."""
        self.path.rename(self.folder / f"file.log-{time.time_ns()}")

    def connect_clients(self) -> None:
        """Connect the clients that must not be affected by faults."""
        assert self.server is not None
        self.worker = self.server.workers(1)[0]
        self.fill_up()

    def ready(self) -> Server:
        """Return the server; start it if there is none."""
        if self.server is None:
            self.launch()
            self.connect_clients()
        assert self.server is not None
        return self.server

    def join(self, position: int, receive_buffer: int = 0) -> FaultClient:
        assert self.server is not None
        return FaultClient(
            connect(self.server.port, b"%d\n" % position, receive_buffer=receive_buffer), position
        )

    def fill_up(self) -> None:
        """Connect the clients that are missing: one that stalls, and FOLLOWERS, each different."""
        if self.stalled is None:
            self.stalled = self.join(self.start, receive_buffer=4096)
        while len(self.followers) < self.FOLLOWERS:
            client = self.join(len(self.data) - 100)
            if len(self.followers) == 1:
                client.sock.shutdown(socket.SHUT_WR)
            elif len(self.followers) == 2:
                client.sock.sendall(b"junk\n")
            assert client.read(self.data)
            self.followers.append(client)

    def stop(self) -> None:
        """Kill the server, and forget its clients."""
        for client in [*self.followers, *([self.stalled] if self.stalled else [])]:
            client.sock.close()
        self.followers, self.stalled = [], None
        if self.server is not None:
            for pid in session(self.server.pid):
                os.kill(pid, signal.SIGKILL)
            self.server.process.wait(DEADLINE)
            self.server = None

    def finish(self) -> None:
        """Assert that the stalled client can read everything, and that all processes then sleep."""
        if self.server is None or self.stalled is None:
            return
        assert self.stalled.read(self.data)
        eventually(self.is_quiet)
        self.server.signal(signal.SIGTERM)
        assert self.server.process.wait(DEADLINE) == 0

    def is_quiet(self) -> bool:
        """Tell whether no process wakes up within half a second; one that polls would."""
        before = [activity(pid) for pid in self.pids()]
        time.sleep(0.5)
        return before == [activity(pid) for pid in self.pids()]

    def log(self) -> str:
        """Return the log of the current or last server."""
        path = self.folder / f"stderr-{self.starts}"
        return path.read_text() if path.exists() else ""

    # Its processes.

    def pids(self) -> list[int]:
        assert self.server is not None
        return [self.server.pid, *children(self.server.pid)]

    def rest(self) -> None:
        """Wait until every process keeps sleeping; one that spins does not."""

        def look() -> bool:
            before = [activity(pid) for pid in self.pids()]
            # Shorter than the poll interval of a worker without inotify, which does not count as
            # spinning.
            time.sleep(0.01)
            return before == [activity(pid) for pid in self.pids()] and all(
                one and "sleeping" in one[0] for one in before
            )

        eventually(look)

    def held(self, name: str, pid: Callable[[], int | None]) -> int:
        """Wait until a process has stopped at the breakpoint `name`, and return its pid."""

        def look() -> int | None:
            found = pid()
            return found if found and "stopped" in activity(found)[0] else None

        found = eventually(look)
        (self.hold / name).unlink()
        assert found
        return found

    def held_child(self, name: str, besides: int = 0) -> int:
        """Wait until a child has stopped at the breakpoint `name`, and return its pid."""
        assert self.server is not None
        server = self.server
        return self.held(
            name,
            lambda: next(
                (pid for pid in children(server.pid) if pid != besides and activity(pid)), None
            ),
        )

    # Its clients.

    def append(self) -> None:
        """Append a record, which every follower receives."""
        self.write(200)
        self.follow()

    def write(self, count: int) -> None:
        """Append a record to the file."""
        record = random_bytes(count, seed=len(self.data))
        self.data += record
        append(self.path, record)

    def follow(self) -> None:
        """Let the followers read everything."""
        staying = [client for client in self.followers if client.read(self.data)]
        self.lost += len(self.followers) - len(staying)
        self.followers = staying

    def visit(self, count: int = 1000, receive_buffer: int = 0) -> None:
        """Connect, read the last `count` bytes, and reset the connection."""
        client = self.join(len(self.data) - count, receive_buffer)
        self.lost += not client.read(self.data)
        client.reset()

    def crowd(self) -> None:
        """Connect many clients at once, read, and reset all connections."""
        clients = [self.join(len(self.data) - 100) for _ in range(105)]
        self.lost += len(clients) - sum(client.read(self.data) for client in clients)
        for client in clients:
            client.reset()

    def visit_slowly(self) -> None:
        self.visit(250_000, receive_buffer=4096)

    def visit_in_pieces(self) -> None:
        """Send a header in three pieces, each of which the worker reads separately."""
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
        """Visit and close the connection, which the worker notices when it sends the next bytes."""
        client = self.join(len(self.data) - 10)
        self.lost += not client.read(self.data)
        client.sock.close()
        self.append()
        self.append()

    def be_refused(self) -> None:
        """Send an invalid header."""
        assert self.server is not None
        client = FaultClient(connect(self.server.port, b"abc\n"), 0)
        assert client.ended()

    def be_alone(self) -> None:
        """Disconnect all clients, then connect new ones: the worker monitors appends again."""
        for client in [*self.followers, *([self.stalled] if self.stalled else [])]:
            client.reset()
        self.followers, self.stalled = [], None
        self.await_clients()
        self.fill_up()
        self.append()

    def ask(self) -> None:
        """Ask the supervisor for the status, and for the clients."""
        assert self.server is not None
        for name in ("", "/clients"):
            try:
                self.lost += not ask(f"*:{self.server.port}{name}")[0]
            except (ConnectionError, struct.error):
                self.lost += 1

    # What is done to the server.

    def kill_worker(self) -> None:
        """Kill the worker, and wait for its successor."""
        os.kill(self.worker, signal.SIGKILL)
        self.await_worker()

    def await_worker(self) -> None:
        """Wait for another worker that is ready and lives, or for the end of the server.

        A worker that waited for the file has a successor by then.
        """
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
        """Wait until the upgrade has succeeded or failed."""
        assert self.server is not None
        server = self.server

        def look() -> bool:
            lines = server.lines("upgrade")[self.upgrade_lines :]
            return server.process.poll() is not None or any(
                "upgraded: " in line or "failed" in line for line in lines
            )

        eventually(look)
        if any("upgraded: " in line for line in server.lines("upgrade")[self.upgrade_lines :]):
            self.await_worker()

    def rotate(self) -> None:
        """Replace the file; every stream continues with the next one."""
        start = len(self.data)
        self.new_file()
        self.follow()
        self.read_stalled()
        # No new stream begins in the file that was replaced.
        self.start = start

    def rotate_slowly(self) -> None:
        """Rename the file, append to it, create the next one empty, append to both, delete one.

        The first byte of the next file is its last one here, so no client is late for it.
        """
        self.move_away()
        moved = max(self.folder.glob("file.log-*"))
        self.rest()
        self.path.touch()
        self.rest()
        self._append_to(moved)
        self.rest()
        start = len(self.data)
        self.write(200_000)
        self.follow()
        self.read_stalled()
        self.rest()
        moved.unlink()
        self.rest()
        self.start = start

    def _append_to(self, path: Path) -> None:
        """Append a record to a file that the path no longer names; the followers get it."""
        record = random_bytes(100, seed=len(self.data))
        self.data += record
        append(path, record)
        self.follow()

    def truncate(self) -> None:
        """Truncate the file and write to it; the streams of clients that had all of it continue."""
        self.read_stalled()
        self.rest()
        os.truncate(self.path, 0)
        self.start = len(self.data)
        self.rest()
        self.write(200_000)
        self.follow()

    def archive(self) -> None:
        """Rotate as logrotate does with `dateext`; the old file can still be read."""
        self.move_away()
        self.new_file()
        self.follow()

    def read_stalled(self) -> None:
        """Let the stalled client read everything and disconnect; fill_up() connects another one."""
        if self.stalled is not None:
            self.lost += not self.stalled.read(self.data)
            self.stalled.reset()
            self.stalled = None

    # The state file.

    def restart(self) -> None:
        """Kill the server and start another one: every offset must have its old meaning."""
        self.stop()
        self.launch(fresh=False)
        everything = self.join(self.start)
        assert everything.read(self.data), f"a stream from {self.start} ended:\n{self.log()}"
        everything.reset()
        self.connect_clients()
        # Keep the time short that the next restart takes.
        if len(self.data) > 3_000_000:
            self.stop()

    # The outcome.

    def await_clients(self) -> None:
        """Wait until the supervisor has counted all connections and disconnections.

        After a fault it may not read the reports of a worker for a moment. Until then its count can
        be right by chance: neither the arrival nor the departure of a client is in it. A request
        for the status pings the worker, and reports are read in their order. So the count includes
        the earlier reports if the answer to the ping has been read.
        """
        assert self.server is not None
        endpoint = f"*:{self.server.port}"
        count = len(self.followers) + (self.stalled is not None)

        # Each request pings the worker, unless an earlier ping has not been answered yet. The next
        # one shows whether it has.
        ask(endpoint)

        def look() -> bool:
            found = json.loads(ask(endpoint)[0])
            return found["clients"] == count and not any(
                worker["silent"] for worker in found["workers"]
            )

        eventually(look)

    def count_descriptors(self) -> Mapping[int, int]:
        """Return how many descriptors each process has open.

        One inotify instance does not count. The supervisor opens one when it first waits for the
        next file, and a worker that polls has none.
        """
        counts = {}
        for pid in self.pids() if self.server is not None else ():
            opened = descriptors(pid)
            counts[pid] = len(opened) - min(1, opened.count("anon_inode:inotify"))
        return counts

    def ended(self) -> bool:
        """Tell whether the server has ended, or will: all followers were disconnected."""
        assert self.server is not None
        return self.server.process.poll() is not None or (self.lost > 0 and not self.followers)

    def outcome(self) -> str:
        """Return the outcome for the clients and the server, in the words of faults.md.

        This waits until all processes sleep.
        """
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
        """Return how the server has ended; its workers may serve on until a supervisor takes over.

        All processes are killed.
        """
        assert self.server is not None
        server = self.server
        ended = server.process.wait(DEADLINE)
        eventually(lambda: not session(server.pid) or (ended and server.lines(GONE)))
        served_on = bool(session(server.pid))
        # A worker without a supervisor does not roll by itself, so followers would wait there.
        if served_on and ended == 1:
            self.append()
        lost = self.lost
        self.stop()
        if served_on and ended == 1 and not lost:
            return "served on"
        return f"ends {ended}" if ended or lost else "exact"
