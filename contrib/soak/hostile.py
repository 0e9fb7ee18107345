"""Measures what attacks cost the honest, from append to arrival: alone, with the attack on another server of the machine, and on theirs.

Strangers and honest clients are hosts of their own where it counts. So the servers have one half of this machine's processors,
attackers and honest clients the other, and an attacker there gets what the honest leave. What the attack still takes from everybody,
in the kernel, in caches, and of the servers' processors, is seen where it hits the other server: `elsewhere`.
"""

import argparse
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import attacks
import clients
import samples
from content import Content
from growing import GrowingFile
from served import Server, until

# clients
HONEST = 10
# bytes
RECORD = 1024
# seconds between two appends, on average
PAUSE = 0.002
# seconds of an attack in full swing before anything is measured
RAMP = 0.5
# seconds that an attack may last
LONGEST = 60
# things a second that an attacker does; 0 is as many as it can
RATES = (2000.0, 0.0)
MIB = 1 << 20


@dataclass(frozen=True)
class Figures:
    """What one round showed: p50 and p99 in milliseconds; MiB of all the server's processes before, during and after."""

    alone: tuple[float, ...]
    elsewhere: tuple[float, ...]
    here: tuple[float, ...]
    memory: tuple[float, ...]
    # in the log, a second
    lines: float
    # by the attacker, a second
    done: float


class Honest:
    """Clients that are caught up, and the writer that they wait for."""

    def __init__(self, port: int, file: GrowingFile) -> None:
        self._file = file
        self._dice = random.Random(1)
        self._selector = selectors.DefaultSelector()
        self._positions: dict[socket.socket, int] = {}
        for _ in range(HONEST):
            sock = clients.connect(port)
            sock.send(b"%d\n" % file.size)
            self._positions[sock] = file.size
            self._selector.register(sock, selectors.EVENT_READ)

    def measure(self, seconds: float) -> list[float]:
        """Append for so long, and return how long each record took to each client."""
        base, sent, found = self._file.size, list[float](), list[float]()
        while len(sent) * PAUSE < seconds:
            sent.append(time.monotonic())
            self._file.append(RECORD)
            # in step with nobody
            due = sent[-1] + self._dice.uniform(0.5, 1.5) * PAUSE
            while (left := due - time.monotonic()) > 0:
                self._collect(left, base, sent, found)
        while min(self._positions.values()) < self._file.size:
            self._collect(10.0, base, sent, found)
        return found

    def _collect(
        self, timeout: float, base: int, sent: Sequence[float], found: list[float]
    ) -> None:
        for key, _ in self._selector.select(timeout):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            try:
                data = sock.recv(1 << 20)
            except OSError:
                data = b""
            before, now = self._positions[sock], time.monotonic()
            if not data or data != self._file.content.read(0, before, len(data)):
                raise SystemExit(f"wrong: a stream differs, or has ended, at byte {before}")
            self._positions[sock] += len(data)
            found += [
                now - sent[number]
                for number in range(
                    (before - base) // RECORD, (before + len(data) - base) // RECORD
                )
            ]

    def close(self) -> None:
        """Leave."""
        for sock in self._positions:
            clients.leave(sock, reset=True)
        self._selector.close()


@contextmanager
def attacked(name: str, rate: float, server: Server, done: list[float]) -> Iterator[None]:
    """Have the server attacked; in the end `done` has one figure more, how much was done a second."""
    command = [sys.executable, attacks.__file__, name, str(server.port), str(rate), str(LONGEST)]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as attacker:
        try:
            until(
                lambda: server.status()["clients"] >= attacks.KEPT.get(name, 0),
                "the attackers have come",
            )
            time.sleep(RAMP)
            yield
        finally:
            attacker.terminate()
            count, _ = attacker.communicate()
            done.append(int(count) / (time.monotonic() - start))


def halves() -> tuple[list[int], list[int]]:
    """Return the processors for the servers, and those for everybody else."""
    processors = sorted(os.sched_getaffinity(0))
    middle = len(processors) // 2
    return processors[:middle] or processors, processors[middle:]


@contextmanager
def serving(folder: Path, processors: Sequence[int]) -> Iterator[tuple[Server, GrowingFile]]:
    """Give a server, with a worker for each of these processors, and its file."""
    folder.mkdir()
    file = GrowingFile(folder / "file", Content(1))
    file.append(8 << 20)
    command = ["taskset", "-c", ",".join(map(str, processors)), sys.executable, "-m", "tailsrv"]
    server = Server(command, ["-w", str(len(processors))], file.path, folder / "log")
    try:
        server.start(len(processors))
        yield server, file
    finally:
        server.end()
        file.close()


def percentiles(latencies: Sequence[float]) -> tuple[float, float]:
    """Return p50 and p99 in milliseconds."""
    ordered = sorted(latencies)
    return ordered[len(ordered) // 2] * 1000, ordered[len(ordered) * 99 // 100] * 1000


def settle(server: Server, file: GrowingFile, clients: int) -> None:
    """Wait until only so many clients are left; some are found to have left by what is sent to them."""

    def look() -> bool:
        file.append(1)
        return bool(server.status()["clients"] <= clients)

    until(look, "the attackers have left")


def play(name: str, rate: float, seconds: float, processors: Sequence[int]) -> Figures:
    """Measure one round of an attack."""
    with (
        tempfile.TemporaryDirectory(prefix="tailsrv-hostile-") as folder,
        serving(Path(folder, "here"), processors) as (server, file),
        serving(Path(folder, "elsewhere"), processors) as (other, their_file),
    ):
        honest, done = Honest(server.port, file), list[float]()
        honest.measure(0.5)
        before = samples.take(server.processes())
        alone = percentiles(honest.measure(seconds))
        with attacked(name, rate, other, done):
            elsewhere = percentiles(honest.measure(seconds))
        settle(other, their_file, 0)
        lines, start = len(server.log), time.monotonic()
        with attacked(name, rate, server, done):
            here = percentiles(honest.measure(seconds))
            during = samples.take(server.processes())
        speed = (len(server.log) - lines) / (time.monotonic() - start)
        settle(server, file, HONEST)
        after = samples.take(server.processes())
        honest.close()
        return Figures(
            alone,
            elsewhere,
            here,
            tuple(sample.pss / MIB for sample in (before, during, after)),
            speed,
            done[-1],
        )


_PAIR = "    p50    p99"
HEAD = (
    f"{'':10}{'':9}{'alone':>14}{'elsewhere':>14}{'here':>14}{'here/alone':>14}{'here/elsewhere':>16}{'memory in MiB':>22}{'log':>7}\n"
    f"{'attack':10}{'done/s':>9}{_PAIR}{_PAIR}{_PAIR}{_PAIR}  {_PAIR}  before during  after  lines/s"
)


def median(values: Sequence[Sequence[float]]) -> list[float]:
    """Return the median of each column."""
    return [statistics.median(column) for column in zip(*values, strict=True)]


def ratios(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> list[float]:
    """Return the medians of each round's ratios."""
    return median(
        [
            [a / b for a, b in zip(pair, other, strict=True)]
            for pair, other in zip(above, below, strict=True)
        ]
    )


def row(name: str, rounds: Sequence[Figures]) -> str:
    """Return the medians of an attack's rounds as a line under HEAD."""

    def show(values: Sequence[float], digits: int = 2) -> str:
        return "".join(f"{value:7.{digits}f}" for value in values)

    alone, elsewhere, here = (
        [getattr(figures, part) for figures in rounds] for part in ("alone", "elsewhere", "here")
    )
    latencies = "".join(show(median(part)) for part in (alone, elsewhere, here))
    costs = f"{show(ratios(here, alone))}  {show(ratios(here, elsewhere))}"
    memory = show(median([figures.memory for figures in rounds]), 1)
    done, lines = (
        statistics.median(figure)
        for figure in zip(*((figures.done, figures.lines) for figures in rounds), strict=True)
    )
    return f"{name:10}{done:9.0f}{latencies}{costs} {memory}{lines:9.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of all attacks, or of those that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="ATTACK", help=f"by default all of {', '.join(attacks.ATTACKS)}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="for each measurement, 2 by default"
    )
    parser.add_argument(
        "--rate",
        type=float,
        nargs="*",
        default=RATES,
        help="things a second that an attacker does; 0: as many as it can",
    )
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.names) - set(attacks.ATTACKS):
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    servers, others = halves()
    os.sched_setaffinity(0, others)
    print(HEAD)
    for name in arguments.names or attacks.ATTACKS:
        for rate in arguments.rate:
            print(
                row(
                    name,
                    [play(name, rate, arguments.seconds, servers) for _ in range(arguments.rounds)],
                ),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
