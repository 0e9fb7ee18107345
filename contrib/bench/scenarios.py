"""What is measured: the work, how it is timed, and the figures that come of it."""

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
# seconds until memory is looked at: what is freed late is freed by then
SETTLE = 0.3

# connections at once: fewer than wait in any of these servers' queues
BACKLOG = 2048
# clients from which on memory for each of them is more than noise
ENOUGH = 100
# descriptors that a process has beside its clients'
OVERHEAD = 64


@dataclass(frozen=True)
class Figure:
    """What one number means."""

    label: str
    unit: str
    lower_is_better: bool = True
    # not the server's, but the load generator's
    of_load: bool = False


# By key. A scenario's figures are those that its function returns.
FIGURES = {
    "throughput": Figure("throughput", "MB/s", lower_is_better=False),
    "cpu_per_gb": Figure("CPU time for each GB", "ms"),
    "load_busy": Figure("load generator busy", "%", of_load=True),
    "p50": Figure("append to client, p50", "µs"),
    "p99": Figure("append to client, p99", "µs"),
    "last_p50": Figure("append to last client, p50", "µs"),
    "last_p99": Figure("append to last client, p99", "µs"),
    "cpu_per_delivery": Figure("CPU time for each delivery", "µs"),
    "replayed": Figure("throughput of those that replay", "MB/s", lower_is_better=False),
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
    """What one run has shown: the server with no client, with all, and after the work; and what the clients say."""

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
        """Seconds that the sender has worked; None where processes have come or gone meanwhile and taken their count along."""
        if own := self.result["sender_cpu_s"]:
            return own
        return self.after.cpu - self.full.cpu if self.after.pids == self.full.pids else None

    def cpu_for(self, name: str, amount: float) -> Numbers:
        """Return the figure `name`: what the sender has worked for each of `amount`, if that is known."""
        return {} if self.cpu is None else {name: self.cpu / amount}


@dataclass(frozen=True)
class Scenario:
    """One kind of work at one size. `arguments` are load.c's."""

    name: str
    mode: str
    clients: int
    size: int
    arguments: tuple[object, ...]
    figures: Callable[[Sample], Numbers]
    replayers: int = 0
    kills: bool = False
    # it can be had without a server
    bare: bool = False
    settles: bool = False

    @property
    def family(self) -> str:
        """Its name without the size."""
        return self.name.partition("-")[0]

    def obstacle(self, server: Server) -> str:
        """Return why `server` cannot be asked to do this; empty: it can."""
        if server.bare and not self.bare:
            return "only a server can do this"
        if self.kills and not server.is_ours:
            return "a process of it that is killed takes its client's stream along"
        if (
            server.most_clients is not None
            and self.clients + self.replayers > server.most_clients
            and self.mode != "connect"
        ):
            return f"not with more than {server.most_clients} clients: it starts processes for each"
        return ""

    def count(self, server: Server) -> int:
        """Return with how many clients `server` is measured: as far as it and the descriptors go."""
        limit = descriptors() - OVERHEAD
        most = limit // 2 if server.bare else limit * (server.workers if server.is_ours else 1)
        if server.is_ours and server.workers > 1:
            # the kernel does not spread them evenly
            most = int(most * 0.95)
        return min(self.clients, most, server.most_clients or most)

    def threads(self, clients: int, threads: int) -> int:
        """Return over how many of the generator's threads, each with descriptors of its own, the clients are spread."""
        return min(clients, max(threads, math.ceil(clients / (descriptors() - OVERHEAD))))

    def run(self, server: Server, generator: Generator, threads: int) -> Numbers:
        """Measure `server` once and return the figures. Raises LoadError, ServerError."""
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
    """Return how many descriptors a process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _unprotected(started: Running) -> int:
    """Return how many clients a tailsrv had no descriptor left for."""
    if not started.server.is_ours:
        return 0
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"\0tailsrv:127.0.0.1:{started.port}")
        with sock.makefile("rb") as status:
            return int(json.load(status)["unprotected"])


# What comes of a run, by family


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


# How much work: the default, and a quick round


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
    """Return the scenario that is run only when it is asked for: it takes that many descriptors, and some memory."""
    return Scenario("crowd", "follow", clients, 4096, ("-n", 1), _crowd, settles=True)


def usual() -> list[Scenario]:
    """Return the scenarios of the default run."""
    return [
        _replays(1, 1024), _replays(8, 256), _replays(64, 32), _replays(1000, 2),
        _follows(1, 300, 2), _follows(10, 200, 2), _follows(100, 50, 2), _follows(1000, 10, 2.5), _follows(5000, 3, 3),
        _firehoses(10, 20_000, 2), _mixes(20, 50, 64, 3), _connects(2000),
        _idles(10), _idles(100), _idles(1000), _idles(5000), _deaths(1000), _deaths(5000),
    ]  # fmt: skip


def quick() -> list[Scenario]:
    """Return those of a run that takes less than a minute, and says less."""
    return [
        _replays(1, 256), _replays(8, 32), _replays(64, 4),
        _follows(1, 300, 0.5), _follows(10, 200, 0.5), _follows(100, 50, 0.5), _follows(1000, 10, 0.5),
        _firehoses(10, 20_000, 0.3), _mixes(20, 20, 16, 0.5), _connects(500), _idles(10), _idles(100), _idles(1000), _deaths(1000),
    ]  # fmt: skip
