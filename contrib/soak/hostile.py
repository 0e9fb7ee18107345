"""Measures what attacks cost the honest: from append to arrival, without an attack and beside it, medians of several rounds.

Attacker, honest clients and server share this machine's processors, though the attacker is the last to get one. What that
alone costs is seen where the same attack hits another server: the column `elsewhere`.
"""

import argparse
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

HONEST = 10  # clients
RECORD = 1024  # bytes
PAUSE = 0.005  # seconds between two appends
RAMP = 1.5  # seconds until an attack is in full swing: 10,000 connections
MIB = 1 << 20


@dataclass(frozen=True)
class Figures:
    """What one round showed: p50 and p99 in milliseconds, and MiB of all the server's processes before, during and after."""

    alone: tuple[float, ...]
    elsewhere: tuple[float, ...]
    here: tuple[float, ...]
    memory: tuple[float, ...]
    lines: int  # in the log


class Honest:
    """Clients that are caught up, and the writer that they wait for."""

    def __init__(self, port: int, file: GrowingFile) -> None:
        self._file = file
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
            while (left := sent[-1] + PAUSE - time.monotonic()) > 0:
                self._collect(left, base, sent, found)
        while min(self._positions.values()) < self._file.size:
            self._collect(10.0, base, sent, found)
        return found

    def _collect(self, timeout: float, base: int, sent: Sequence[float], found: list[float]) -> None:
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
            found += [now - sent[number] for number in range((before - base) // RECORD, (before + len(data) - base) // RECORD)]

    def close(self) -> None:
        """Leave."""
        for sock in self._positions:
            clients.leave(sock, reset=True)
        self._selector.close()


@contextmanager
def attacked(name: str, port: int) -> Iterator[None]:
    """Have the port attacked."""
    with subprocess.Popen([sys.executable, attacks.__file__, name, str(port)], stderr=subprocess.DEVNULL) as attacker:
        try:
            time.sleep(RAMP)
            yield
        finally:
            attacker.kill()


@contextmanager
def serving(folder: Path, workers: int) -> Iterator[tuple[Server, GrowingFile]]:
    """Give a server and its file."""
    folder.mkdir()
    file = GrowingFile(folder / "file", Content(1))
    file.append(8 << 20)
    server = Server([sys.executable, "-m", "tailsrv"], ["-w", str(workers)], file.path, folder / "log")
    try:
        server.start(workers)
        yield server, file
    finally:
        server.end()
        file.close()


def percentiles(latencies: Sequence[float]) -> tuple[float, float]:
    """Return p50 and p99 in milliseconds."""
    ordered = sorted(latencies)
    return ordered[len(ordered) // 2] * 1000, ordered[len(ordered) * 99 // 100] * 1000


def settle(server: Server, file: GrowingFile) -> None:
    """Wait until only the honest are left; some are found to have left by what is sent to them."""

    def look() -> bool:
        file.append(1)
        return bool(server.status()["clients"] <= HONEST)

    until(look, "the attackers have left")


def play(name: str, seconds: float, workers: int) -> Figures:
    """Measure one round of an attack."""
    with (
        tempfile.TemporaryDirectory(prefix="tailsrv-hostile-") as folder,
        serving(Path(folder, "here"), workers) as (server, file),
        serving(Path(folder, "elsewhere"), workers) as (other, _),
    ):
        honest = Honest(server.port, file)
        honest.measure(0.5)
        before, lines = samples.take(server.processes()), len(server.log)
        alone = percentiles(honest.measure(seconds))
        with attacked(name, other.port):
            elsewhere = percentiles(honest.measure(seconds))
        with attacked(name, server.port):
            here = percentiles(honest.measure(seconds))
            during = samples.take(server.processes())
        settle(server, file)
        after = samples.take(server.processes())
        memory = before.pss / MIB, during.pss / MIB, after.pss / MIB
        honest.close()
        return Figures(alone, elsewhere, here, memory, len(server.log) - lines)


_PAIR = "    p50    p99"
HEAD = (
    f"{'':11}{'alone':>14}{'elsewhere':>14}{'here':>14}{'here/alone':>14}{'here/elsewhere':>16}{'memory in MiB':>22}    log\n"
    f"{'attack':11}{_PAIR}{_PAIR}{_PAIR}{_PAIR}  {_PAIR}  before during  after  lines"
)


def row(name: str, rounds: Sequence[Figures]) -> str:
    """Return the medians of an attack's rounds as a line under HEAD."""

    def medians(part: str) -> list[float]:
        return [statistics.median(column) for column in zip(*(getattr(figures, part) for figures in rounds), strict=True)]

    def show(values: Sequence[float], digits: int) -> str:
        return "".join(f"{value:7.{digits}f}" for value in values)

    alone, elsewhere, here = medians("alone"), medians("elsewhere"), medians("here")
    ratios = [[ours / theirs for ours, theirs in zip(here, those, strict=True)] for those in (alone, elsewhere)]
    latencies = show(alone, 2) + show(elsewhere, 2) + show(here, 2)
    lines = statistics.median(figures.lines for figures in rounds)
    return f"{name:11}{latencies}{show(ratios[0], 1)}  {show(ratios[1], 1)} {show(medians('memory'), 1)}{lines:7.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of all attacks, or of those that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ATTACK", help=f"by default all of {', '.join(attacks.ATTACKS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement, 3 by default")
    parser.add_argument("-w", "--workers", type=int, default=2, help="of the server, 2 by default")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.names) - set(attacks.ATTACKS):
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    print(HEAD)
    for name in arguments.names or attacks.ATTACKS:
        print(row(name, [play(name, arguments.seconds, arguments.workers) for _ in range(arguments.rounds)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
