"""Measures how attacks on a server delay its honest clients.

The delay, from append to arrival, is measured three times: without an attack (`alone`), with an
attack on another server of the same machine (`elsewhere`), and with an attack on their own server
(`here`). In reality, attackers and honest clients run on machines of their own. So the servers use
one half of this machine's processors, and all clients the other half, where an attacker gets only
the time that honest clients do not need. What an attack still costs all processes, in the kernel,
in caches and in the servers' processors, shows in the figures for `elsewhere`.
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

# Number of honest clients.
HONEST = 10
# Bytes of a record.
RECORD = 1024
# Average seconds between two appends.
PAUSE = 0.002
# Seconds between the moment when an attack has all its connections and the measurement.
RAMP = 0.5
# The longest duration of an attack, in seconds.
LONGEST = 60
# Actions per second of an attacker; 0 means as many as possible.
RATES = (2000.0, 0.0)
MIB = 1 << 20


@dataclass(frozen=True)
class Figures:
    """The figures of one round.

    `alone`, `elsewhere` and `here` are p50 and p99 of the delay in milliseconds. `memory` is the
    memory of all processes of the server in MiB: before, during and after the attack.
    """

    alone: tuple[float, ...]
    elsewhere: tuple[float, ...]
    here: tuple[float, ...]
    memory: tuple[float, ...]
    # Lines per second in the server's log.
    lines: float
    # Actions per second of the attacker.
    done: float


class Honest:
    """Honest clients, which are caught up, and the writer that appends records for them."""

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
        """Append for `seconds`; return the delay in seconds of each record at each client."""
        base, sent, found = self._file.size, list[float](), list[float]()
        while len(sent) * PAUSE < seconds:
            sent.append(time.monotonic())
            self._file.append(RECORD)
            # A random pause, so that appends do not synchronize with anything periodic.
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
            if not data or data != self._file.content.read(before, len(data)):
                raise SystemExit(f"wrong: a stream differs, or has ended, at byte {before}")
            self._positions[sock] += len(data)
            found += [
                now - sent[number]
                for number in range(
                    (before - base) // RECORD, (before + len(data) - base) // RECORD
                )
            ]

    def close(self) -> None:
        """Disconnect all clients."""
        for sock in self._positions:
            clients.leave(sock, reset=True)
        self._selector.close()


@contextmanager
def attacked(name: str, rate: float, server: Server, done: list[float]) -> Iterator[None]:
    """Attack `server` in the `with` statement; then append the actions per second to `done`."""
    command = [sys.executable, attacks.__file__, name, str(server.port), str(rate), str(LONGEST)]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as attacker:
        try:
            until(
                lambda: server.status()["clients"] >= attacks.KEPT.get(name, 0),
                "the attackers are connected",
            )
            time.sleep(RAMP)
            yield
        finally:
            attacker.terminate()
            count, _ = attacker.communicate()
            done.append(int(count) / (time.monotonic() - start))


def halves() -> tuple[list[int], list[int]]:
    """Return the processors for the servers, and those for all other processes."""
    processors = sorted(os.sched_getaffinity(0))
    middle = len(processors) // 2
    return processors[:middle] or processors, processors[middle:]


@contextmanager
def serving(folder: Path, processors: Sequence[int]) -> Iterator[tuple[Server, GrowingFile]]:
    """Start a server for the `with` statement, with one worker for each of these processors.

    Gives the server and its file.
    """
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
    """Wait until the server has no more than `clients` clients.

    The server notices some disconnected clients only when it sends to them, so append bytes.
    """

    def is_settled() -> bool:
        file.append(1)
        return bool(server.status()["clients"] <= clients)

    until(is_settled, "the attackers have disconnected")


def play(name: str, rate: float, seconds: float, processors: Sequence[int]) -> Figures:
    """Measure one round of the attack `name` with `rate` actions per second.

    Each of the three measurements takes `seconds`; the servers run on `processors`.
    """
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
    f"{'':10}{'':9}{'alone':>14}{'elsewhere':>14}{'here':>14}{'here/alone':>14}"
    f"{'here/elsewhere':>16}{'memory in MiB':>22}{'log':>7}\n"
    f"{'attack':10}{'done/s':>9}{_PAIR}{_PAIR}{_PAIR}{_PAIR}"
    f"  {_PAIR}  before during  after  lines/s"
)


def median(values: Sequence[Sequence[float]]) -> list[float]:
    """Return the median of each column."""
    return [statistics.median(column) for column in zip(*values, strict=True)]


def ratios(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> list[float]:
    """Return the medians over all rounds of the ratios of `above` to `below`."""
    return median(
        [
            [a / b for a, b in zip(pair, other, strict=True)]
            for pair, other in zip(above, below, strict=True)
        ]
    )


def row(name: str, rounds: Sequence[Figures]) -> str:
    """Format the medians of an attack's rounds as a line of the table that HEAD begins."""

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
    """Measure all attacks, or those that the command line names, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="ATTACK",
        help=f"attacks to measure (default: {', '.join(attacks.ATTACKS)})",
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="duration of each measurement (default: 2)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        nargs="*",
        default=RATES,
        help="actions per second of an attacker; 0: as many as possible (default: 2000 and 0)",
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
