"""A server that loses its supervisor again and again, its clients, and its processes."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from faults.bench import FaultClient, activity
from support.files import append, random_bytes
from support.processes import descriptors
from support.server import HELD, Server
from support.sockets import LINE_LENGTH, connect, recv_exactly
from support.status import ask
from support.waiting import DEADLINE, eventually

TOOK_OVER = "took over: "
# The clients of each worker, each with its header.
KINDS = {
    # Follows the end of the log, and the same after a `?` line.
    "follower": b"-100\n",
    "asker": b"?-100\n",
    # Has read little, and its socket is full.
    "stalled": b"?1000\n",
    # Have sent no header, or a part of one.
    "silent": b"",
    "slow": b"-1",
}
HEADERLESS = ("silent", "slow")


class OrphanBench:
    """Two workers with clients of all kinds. Each supervisor is killed, and the next takes over."""

    WORKERS = 2

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.hold = folder, folder / "file.log", folder / "hold"
        self.state_file = folder / "state" / "log.json"
        for new in (self.hold, self.state_file.parent):
            new.mkdir()
        # All servers of this log, and the one whose supervisor lives, if there is one.
        self.servers: list[Server] = []
        self.server: Server | None = None
        self.port = 0
        self.data = b""
        # The clients of each group by their kind. A group stays together in one worker.
        self.groups: list[dict[str, FaultClient]] = []
        # Whether the path names a file that the workers do not serve yet.
        self.rotated = False
        # Descriptors of a worker and of a supervisor, not counting those of clients.
        self.usual: dict[str, int] = {}

    # The servers

    def command(self, port: int) -> list[str]:
        environment = ("-u", "LANGUAGE", "LC_ALL=C", f"TAILSRV_TEST_HOLD={self.hold}")
        options = ("-p", str(port), "-w", str(self.WORKERS), "--orphan-timeout", "300")
        log = ("--follow-name", "--state-file", str(self.state_file), str(self.path))
        return ["env", *environment, *HELD, *options, *log]

    def start(self, port: int) -> Server:
        server = Server(self.command(port), self.folder / f"stderr-{len(self.servers)}", 0)
        if port:
            # Do not wait for the log line that has it: a fault may be about that.
            server.port = port
        self.servers.append(server)
        return server

    def ready(self) -> Server:
        """Return a server with all clients: a new one, or one that takes over from orphans."""
        if self.server is None and self.servers:
            self.take_over()
        elif self.server is None:
            self.launch()
        self.fill_up()
        assert self.server is not None
        return self.server

    def launch(self) -> None:
        """Start a server with a log of two segments, of which the second one is active."""
        for old in [*self.folder.glob("file.log*"), *self.state_file.parent.iterdir()]:
            old.unlink()
        self.data = b""
        self.new_file()
        self.server = self.start(0)
        self.port = self.server.port
        self.server.workers(self.WORKERS)
        self.rotate()
        self.server.logged("rolled: ")
        self.rotated = False

    def new_file(self) -> None:
        """Put the next file of the log in the place of the present one."""
        fresh = self.folder / "next"
        content = random_bytes(400_000, seed=len(self.data) + time.time_ns() % 1000)
        fresh.write_bytes(content)
        fresh.rename(self.path)
        self.data += content

    def rotate(self) -> None:
        """Rename the file, which can still be read, and create the next one."""
        self.path.rename(self.folder / f"file.log-{time.time_ns()}")
        self.new_file()
        self.rotated = True

    def kill_supervisor(self) -> None:
        """Kill the supervisor, and wait until its workers have closed their channels to it."""
        assert self.server is not None
        before = {pid: found for pid in self.workers() if (found := _sockets(pid))}
        self.server.kill_supervisor()
        self.server = None
        eventually(lambda: all(sockets - _sockets(pid) for pid, sockets in before.items()))

    def take_over(self) -> None:
        """Start a server that takes over, without a fault."""
        self.server = self.start(self.port)
        self.server.logged(TOOK_OVER)
        self.rotated = False

    def workers(self) -> list[int]:
        """Return the pids of all workers, of whichever server."""
        supervisors = {server.pid for server in self.servers}
        return sorted(pid for pid in sessions(supervisors) if pid not in supervisors)

    def greetings(self) -> dict[int, int]:
        """Return the pid of each orphan, with the number of clients that it says it has."""
        names = re.findall(
            rf" 00010000 0005 01 +\d+ @(tailsrv:\*:{self.port}/worker/.+)$",
            Path("/proc/net/unix").read_text(),
            re.MULTILINE,
        )
        found = {}
        for name in names:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(DEADLINE)
                sock.connect(f"\0{name}")
                greeting = json.loads(sock.recv(1 << 16))
                found[greeting["pid"]] = greeting["clients"]
        return found

    def pids(self) -> list[int]:
        """Return the pids of all processes."""
        return [*([self.server.pid] if self.server else []), *self.workers()]

    def stop(self) -> None:
        """Kill everything."""
        for client in self.clients():
            client.sock.close()
        self.groups, self.server = [], None
        for pid in sessions({server.pid for server in self.servers}):
            os.kill(pid, signal.SIGKILL)
        for server in self.servers:
            server.process.wait(DEADLINE)
        self.servers, self.usual = [], {}

    def log(self) -> str:
        """Return the logs of the last servers."""
        return "\n".join(f"--- {server.pid}\n{server.log}" for server in self.servers[-3:])

    # The clients

    def clients(self) -> Iterator[FaultClient]:
        for group in self.groups:
            yield from group.values()

    def fill_up(self) -> None:
        """Connect the clients that are missing in a group."""
        assert self.server is not None
        self.groups = self.groups or [{} for _ in range(self.WORKERS)]
        slots = self._slots()
        places = [
            next((slots[name] for client in group.values() if (name := _name(client)) in slots), -1)
            for group in self.groups
        ]
        # A group without clients gets the slot that is left.
        free = [slot for slot in range(self.WORKERS) if slot not in places]
        places = [free.pop() if place < 0 else place for place in places]
        while missing := [
            (group, slot, kind)
            for group, slot in zip(self.groups, places, strict=True)
            for kind in KINDS
            if kind not in group
        ]:
            kind = missing[0][2]
            client = self.join(kind)
            slot = self._slot_of(_name(client))
            group = self.groups[places.index(slot)]
            if kind in group:
                client.reset()
            else:
                group[kind] = client

    def _slot_of(self, name: str) -> int:
        eventually(lambda: name in self._slots())
        return self._slots()[name]

    def _slots(self) -> dict[str, int]:
        """Return the slot of each client by its address."""
        found = json.loads(ask(f"*:{self.port}/clients")[0])
        return {client["peer"]: client["slot"] for client in found["clients"]}

    def join(self, kind: str) -> FaultClient:
        """Connect a client, which reads its `?` line."""
        stalls = kind == "stalled"
        start = 1000 if stalls else len(self.data) - 100
        sock = connect(self.port, KINDS[kind], receive_buffer=4096 if stalls else 0)
        if KINDS[kind].startswith(b"?"):
            assert recv_exactly(sock, LINE_LENGTH) == b"%019d %019d\n" % (start, len(self.data))
        return FaultClient(sock, start)

    def check_streams(self) -> int:
        """Append, let all clients read, and let a new one connect; return how many have ended.

        A client that does not follow reads a part of what it can. Those that have ended are removed
        from their group. The others get not a single byte more than they should.
        """
        record = random_bytes(200, seed=len(self.data))
        self.data += record
        append(self.path, record)
        for group in self.groups:
            for kind, client in group.items():
                if kind == "stalled":
                    client.read(self.data[: client.position + 10_000])
                elif kind not in HEADERLESS and not self.rotated:
                    client.read(self.data)
        if not self.rotated:
            self.visit(b"-1000\n", 1000)
        self.rest()
        lost = 0
        for group in self.groups:
            for kind, client in list(group.items()):
                if client.sock.fileno() < 0 or (kind != "stalled" and self._has_ended(client)):
                    group.pop(kind).sock.close()
                    lost += 1
        return lost

    def _has_ended(self, client: FaultClient) -> bool:
        """Tell whether the stream of a client that has read everything ends here.

        After a rotation without a supervisor, workers may have rolled, so that there is more.
        """
        client.sock.setblocking(False)
        try:
            while more := client.sock.recv(1 << 16):
                expected = self.data[client.position : client.position + len(more)]
                assert self.rotated, f"superfluous bytes at {client.position}"
                assert more == expected, f"wrong bytes at {client.position}"
                client.position += len(more)
        except BlockingIOError:
            return False
        except ConnectionError:
            pass
        finally:
            client.sock.settimeout(DEADLINE)
        return True

    def uncounted(self) -> int:
        """Return how many of the clients the supervisor does not count, once visitors have left.

        A request for the status pings the workers. Their answers include all earlier departures.
        """
        ask(f"*:{self.port}")

        def look() -> dict[str, Any]:
            status: dict[str, Any] = json.loads(ask(f"*:{self.port}")[0])
            return {} if any(worker["silent"] for worker in status["workers"]) else status

        return len(list(self.clients())) - int(eventually(look)["clients"])

    def visit(self, header: bytes, count: int) -> None:
        """Connect, read the last `count` bytes, and reset the connection."""
        visitor = FaultClient(connect(self.port, header), len(self.data) - count)
        assert visitor.read(self.data)
        visitor.reset()

    def complete_headers(self) -> int:
        """Let clients without a complete header send the rest; return how many have ended.

        They read, and leave. Stalled clients that have almost everything leave as well.
        """
        lost = 0
        for group in self.groups:
            for kind, rest, count in (("silent", b"-5\n", 5), ("slow", b"7\n", 17)):
                if (client := group.pop(kind, None)) is None:
                    continue
                client.position = len(self.data) - count
                try:
                    client.sock.sendall(rest)
                except ConnectionError:
                    client.sock.close()
                    lost += 1
                    continue
                lost += not client.read(self.data)
                client.reset()
            if "stalled" in group and group["stalled"].position > 300_000:
                lost += not group["stalled"].read(self.data)
                group.pop("stalled").reset()
        return lost

    # The processes

    def rest(self) -> None:
        """Wait until every process keeps sleeping; one that spins does not."""

        def look() -> bool:
            if self.server is not None and self.server.process.poll() is not None:
                self.server = None
            before = [activity(pid) for pid in self.pids()]
            time.sleep(0.01)
            return before == [activity(pid) for pid in self.pids()] and all(
                one and "sleeping" in one[0] for one in before
            )

        eventually(look)

    def check_descriptors(self) -> None:
        """Assert that no process has more or fewer descriptors than usual, besides clients."""
        if self.rotated:
            # It is unknown whether the workers have rolled.
            return
        try:
            eventually(self._has_usual_descriptors)
        except AssertionError as error:
            found = {pid: sorted(descriptors(pid)) for pid in self.pids()}
            raise AssertionError(f"usual: {self.usual}, found: {found}") from error

    def _segments(self) -> int:
        return len(list(self.folder.glob("file.log*")))

    def is_used_up(self) -> bool:
        """Tell whether the log has so many segments that the next scene should have another one."""
        return self._segments() > 8

    def _has_usual_descriptors(self) -> bool:
        # A process that rests has noticed that earlier callers have left.
        self.rest()
        used = {pid: _descriptors(pid) - self._segments() for pid in self.pids()}
        if self.server is None:
            served = self.greetings()
        else:
            status = json.loads(ask(f"*:{self.port}")[0])
            served = {worker["pid"]: worker["clients"] for worker in status["workers"]}
        total = sum(served.values())
        if total != len(list(self.clients())):
            return False
        if self.server is None:
            # An orphan has no channel to a supervisor.
            return all(used[pid] - served[pid] == self.usual["worker"] - 1 for pid in served)
        return used[self.server.pid] - total == self.usual.setdefault(
            "supervisor", used[self.server.pid] - total
        ) and all(
            used[pid] - clients == self.usual.setdefault("worker", used[pid] - clients)
            for pid, clients in served.items()
        )


def sessions(sids: set[int]) -> list[int]:
    """Return the pids of the living processes of these sessions."""
    found = []
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            with suppress(OSError):
                fields = Path(f"/proc/{folder}/stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) in sids and fields[0] not in "ZX":
                    found.append(int(folder))
    return found


def _descriptors(pid: int) -> int:
    """Return how many descriptors a process has open.

    One inotify instance does not count, nor does the list of mounts: they can be missing.
    """
    opened = [path for path in descriptors(pid) if not path.endswith("/mountinfo")]
    return len(opened) - min(1, opened.count("anon_inode:inotify"))


def _sockets(pid: int) -> set[str]:
    """Return the sockets of a process; none if it has ended."""
    try:
        return {what for what in descriptors(pid) if what.startswith("socket:")}
    except OSError:
        return set()


def _name(client: FaultClient) -> str:
    if client.sock.fileno() < 0:
        return ""
    host, port = client.sock.getsockname()
    return f"{host}:{port}"
