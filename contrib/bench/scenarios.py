"""The scenarios of the benchmark: the load of each one, how it runs, and the figures it yields."""

import json
import math
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from generator import Generator, Numbers
from processes import Look
from servers import Running, Server, running

MIB = 1 << 20
NOTHING = Look(frozenset(), 0.0, 0, 0, 0)
# Seconds to wait before memory is measured, so that memory that is freed late is not counted.
SETTLE = 0.3

# The largest number of connections that are made at once. The accept queue of each of the servers
# is longer.
BACKLOG = 2048
# With fewer clients than this, the memory per client is lost in noise.
ENOUGH = 100
# Descriptors that a process needs in addition to one for each client.
OVERHEAD = 64


@dataclass(frozen=True)
class Figure:
    """The meaning of one number in the results."""

    label: str
    unit: str
    lower_is_better: bool = True
    # Whether the number describes the load generator instead of the server.
    of_load: bool = False


# All figures by key. A scenario has those that its function `figures` returns.
FIGURES = {
    "throughput": Figure("throughput", "MB/s", lower_is_better=False),
    "cpu_per_gb": Figure("CPU time for each GB", "ms"),
    "load_busy": Figure("load generator busy", "%", of_load=True),
    "p50": Figure("append to client, p50", "µs"),
    "p99": Figure("append to client, p99", "µs"),
    "last_p50": Figure("append to last client, p50", "µs"),
    "last_p99": Figure("append to last client, p99", "µs"),
    "cpu_per_delivery": Figure("CPU time for each delivery", "µs"),
    "replayed": Figure("throughput of replaying clients", "MB/s", lower_is_better=False),
    "serial": Figure("connections one by one", "per s", lower_is_better=False),
    "burst": Figure("connections all at once", "per s", lower_is_better=False),
    "pss": Figure("memory of all its processes", "MiB"),
    "pss_per_client": Figure("the same for each client", "KiB"),
    "kernel_per_client": Figure("kernel memory for each client, both ends", "KiB"),
    "sockets_per_client": Figure("TCP queues for each client, both ends", "KiB"),
    "death": Figure("a worker's death to the last client's next byte", "ms"),
    "joined": Figure("until all are connected and caught up", "s"),
    "all": Figure("append to last client", "ms"),
    "clients": Figure("clients", "", lower_is_better=False),
    "unprotected": Figure("of them not protected against a worker's death", ""),
}


@dataclass(frozen=True)
class Sample:
    """The measurements of one run.

    `before`, `full` and `after` describe the server without clients, with all clients, and after
    the work. `joined` and `result` are the load generator's figures of connecting and of the work.
    `unprotected` is the number of clients that would not survive the death of their worker.
    """

    clients: int
    threads: int
    before: Look
    full: Look
    after: Look
    joined: Numbers
    result: Numbers
    unprotected: int

    @property
    def cpu(self) -> float | None:
        """Processor time of the sender for the work, in seconds.

        It is None if the server's processes have changed meanwhile: the time of a process that has
        exited is unknown.
        """
        if own := self.result["sender_cpu_s"]:
            return own
        return self.after.cpu - self.full.cpu if self.after.pids == self.full.pids else None

    def cpu_for(self, name: str, amount: float) -> Numbers:
        """Return the figure `name`: processor time divided by `amount`; empty if it is unknown."""
        return {} if self.cpu is None else {name: self.cpu / amount}


@dataclass(frozen=True)
class Scenario:
    """One kind of load with one number of clients.

    `mode` and `arguments` are for load.c. `size` is the file's size in bytes at the start.
    `figures` computes the results. `replayers` is the number of clients, in addition to `clients`,
    that replay the file. `kills` says that a worker is killed, and `settles` that the server gets a
    moment of rest before memory is measured.
    """

    name: str
    mode: str
    clients: int
    size: int
    arguments: tuple[object, ...]
    figures: Callable[[Sample], Numbers]
    replayers: int = 0
    kills: bool = False
    # Whether the bare sender of the load generator can do it as well.
    bare: bool = False
    settles: bool = False

    @property
    def family(self) -> str:
        """The name without the number of clients."""
        return self.name.partition("-")[0]

    def obstacle(self, server: Server) -> str:
        """Return why `server` cannot run this scenario; empty if it can."""
        if server.bare and not self.bare:
            return "only a server can do this"
        if self.kills and not server.is_ours:
            return "its clients do not survive the death of a process"
        if (
            server.most_clients is not None
            and self.clients + self.replayers > server.most_clients
            and self.mode != "connect"
        ):
            return (
                f"more than {server.most_clients} clients,"
                " and the server starts processes for each client"
            )
        return ""

    def count(self, server: Server) -> int:
        """Return how many clients `server` is measured with.

        This is fewer than `clients` if the server, or the descriptor limit, does not allow so many.
        """
        limit = descriptors() - OVERHEAD
        most = limit // 2 if server.bare else limit * (server.workers if server.is_ours else 1)
        if server.is_ours and server.workers > 1:
            # The kernel does not distribute clients evenly over the workers.
            most = int(most * 0.95)
        return min(self.clients, most, server.most_clients or most)

    def threads(self, clients: int, threads: int) -> int:
        """Return how many threads of the load generator the clients are spread over.

        Each thread has descriptors of its own, so more than `threads` may be needed.
        """
        return min(clients, max(threads, math.ceil(clients / (descriptors() - OVERHEAD))))

    def run(self, server: Server, generator: Generator, threads: int) -> Numbers:
        """Measure `server` once and return the figures. Raises LoadError or ServerError."""
        generator.make(self.size)
        clients = self.count(server)
        threads = self.threads(clients, threads)
        arguments = [*self.arguments, "-c", clients, "-t", threads]
        if server.bare:
            with generator.start(self.mode, *arguments, "-B", server.bare) as load:
                joined = load.ready()
                return self.figures(
                    Sample(clients, threads, NOTHING, NOTHING, NOTHING, joined, load.go(), 0)
                )
        with running(server, generator.file) as started:
            before = started.look()
            victim = ["-k", started.workers()[0]] if self.kills else []
            with generator.start(self.mode, *arguments, *victim, "-p", started.port) as load:
                joined = load.ready()
                if self.settles:
                    time.sleep(SETTLE)
                full, unprotected = started.look(), _unprotected(started)
                result = load.go()
                return self.figures(
                    Sample(
                        clients, threads, before, full, started.look(), joined, result, unprotected
                    )
                )


def descriptors() -> int:
    """Return the largest number of descriptors that a process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _unprotected(started: Running) -> int:
    """Return how many clients of a tailsrv are not protected, for lack of descriptors."""
    if not started.server.is_ours:
        return 0
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"\0tailsrv:127.0.0.1:{started.port}")
        with sock.makefile("rb") as status:
            return int(json.load(status)["unprotected"])


# The figures of a run, by family of scenarios


def _replay(sample: Sample) -> Numbers:
    size, seconds = sample.result["bytes"], sample.result["seconds"]
    busy = 100 * sample.result["load_cpu_s"] / seconds / sample.threads
    return {
        "throughput": size / seconds / 1e6,
        **sample.cpu_for("cpu_per_gb", size / 1e12),
        "load_busy": busy,
    }


def _latency(sample: Sample) -> Numbers:
    return {"p50": sample.result["p50_us"], "p99": sample.result["p99_us"]}


def _fan_out(sample: Sample) -> Numbers:
    last = {"last_p50": sample.result["last_p50_us"], "last_p99": sample.result["last_p99_us"]}
    return {**last, **sample.cpu_for("cpu_per_delivery", sample.result["deliveries"] / 1e6)}


def _firehose(sample: Sample) -> Numbers:
    return {
        **_latency(sample),
        **sample.cpu_for("cpu_per_delivery", sample.result["deliveries"] / 1e6),
    }


def _mixed(sample: Sample) -> Numbers:
    return {
        **_latency(sample),
        "replayed": sample.result["replayed"] / sample.result["seconds"] / 1e6,
    }


def _connect(sample: Sample) -> Numbers:
    return {
        "serial": sample.clients / sample.result["serial_s"],
        "burst": sample.clients / sample.result["burst_s"],
    }


def _memory(sample: Sample) -> Numbers:
    figures = {"pss": sample.full.pss / 1024}
    if sample.clients < ENOUGH:
        return figures
    return {
        **figures,
        "pss_per_client": (sample.full.pss - sample.before.pss) / sample.clients,
        "kernel_per_client": (sample.full.kernel - sample.before.kernel) / sample.clients,
    }


def _death(sample: Sample) -> Numbers:
    return {"death": sample.result["max_us"] / 1000}


def _crowd(sample: Sample) -> Numbers:
    times = {"joined": sample.joined["joined_s"], "all": sample.result["max_us"] / 1000}
    queues = (sample.full.sockets - sample.before.sockets) / sample.clients
    return {
        "clients": sample.clients,
        **times,
        **_memory(sample),
        "sockets_per_client": queues,
        "unprotected": sample.unprotected,
    }


# The scenarios of the default run and of a quick one


def _replays(clients: int, mib: int) -> Scenario:
    return Scenario(f"replay-{clients}", "replay", clients, mib * MIB, (), _replay, bare=True)


def _follows(clients: int, rate: int, seconds: float) -> Scenario:
    arguments = ("-n", int(rate * seconds), "-r", rate, "-l", 128)
    return Scenario(f"fanout-{clients}", "follow", clients, 4096, arguments, _fan_out, bare=True)


def _idles(clients: int) -> Scenario:
    return Scenario(f"idle-{clients}", "follow", clients, 4096, ("-n", 0), _memory, settles=True)


def _deaths(clients: int) -> Scenario:
    return Scenario(f"death-{clients}", "follow", clients, 4096, ("-n", 1), _death, kills=True)


def _firehoses(clients: int, rate: int, seconds: float) -> Scenario:
    arguments = ("-n", int(rate * seconds), "-r", rate, "-l", 1024)
    return Scenario(f"firehose-{clients}", "follow", clients, 4096, arguments, _firehose, bare=True)


def _mixes(live: int, replayers: int, mib: int, seconds: float) -> Scenario:
    arguments = ("-n", int(100 * seconds), "-r", 100, "-l", 128, "-R", replayers)
    return Scenario(
        f"mixed-{replayers}", "follow", live, mib * MIB, arguments, _mixed, replayers=replayers
    )


def _connects(clients: int) -> Scenario:
    return Scenario(f"connect-{clients}", "connect", min(clients, BACKLOG), 4096, (), _connect)


def crowd(clients: int) -> Scenario:
    """Return the scenario `crowd`, which runs only if --only names it.

    It needs descriptors and memory for that many clients.
    """
    return Scenario("crowd", "follow", clients, 4096, ("-n", 1), _crowd, settles=True)


def usual() -> list[Scenario]:
    """Return the scenarios of the default run."""
    return [
        _replays(1, 1024), _replays(8, 256), _replays(64, 32), _replays(1000, 2),
        _follows(1, 300, 2), _follows(10, 200, 2), _follows(100, 50, 2), _follows(1000, 10, 2.5),
        _follows(5000, 3, 3),
        _firehoses(10, 20_000, 2), _mixes(20, 50, 64, 3), _connects(2000),
        _idles(10), _idles(100), _idles(1000), _idles(5000), _deaths(1000), _deaths(5000),
    ]  # fmt: skip


def quick() -> list[Scenario]:
    """Return the scenarios of a quick run, which takes less than a minute and is less exact."""
    return [
        _replays(1, 256), _replays(8, 32), _replays(64, 4),
        _follows(1, 300, 0.5), _follows(10, 200, 0.5), _follows(100, 50, 0.5),
        _follows(1000, 10, 0.5), _firehoses(10, 20_000, 0.3), _mixes(20, 20, 16, 0.5),
        _connects(500), _idles(10), _idles(100), _idles(1000), _deaths(1000),
    ]  # fmt: skip
