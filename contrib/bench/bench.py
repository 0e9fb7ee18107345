#!/usr/bin/env python3
"""Measures tailsrv, socat with tail -f, and any other server of the protocol.

README.md explains the scenarios.
"""

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import processes
import servers
from generator import Generator, LoadError
from report import Cell, Results, brief
from scenarios import Scenario, crowd, quick, usual
from servers import Server, ServerError

EPILOG = """\
A COMMAND is split into words like a shell command; then {port} and {file} in it are replaced.
It must stay in the foreground and serve 127.0.0.1.
exit status: 0 all is measured, 1 a server failed or nothing can be measured, 2 usage
"""


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def make_parser() -> Parser:
    """Return the parser of the command line."""
    processors = len(os.sched_getaffinity(0))
    parser = Parser(
        prog="bench",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quick", action="store_true", help="one round with less work; takes less than a minute"
    )
    parser.add_argument(
        "--rounds",
        type=whole,
        metavar="N",
        help="number of rounds; results are their medians (default: 3; 1 with --quick)",
    )
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        help="run only these scenarios, by name (`replay-8`) or family (`replay`);"
        " `crowd` is run only if it is named here",
    )
    parser.add_argument(
        "--workers", type=whole, default=processors, metavar="N",
        help="measure tailsrv with 1, 2, 4, ... up to N workers"
        f" (default: {processors}, the number of processors); 0: leave out tailsrv",
    )  # fmt: skip
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        type=other,
        metavar="NAME=COMMAND",
        help="measure another server; may be repeated",
    )
    parser.add_argument("--no-socat", action="store_true", help="leave out socat with tail -f")
    parser.add_argument(
        "--no-bare",
        action="store_true",
        help="do not measure the limits of the load generator",
    )
    parser.add_argument(
        "--clients",
        type=whole,
        default=20_000,
        metavar="N",
        help="number of clients in the scenario crowd (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=whole, default=max(1, processors // 2), metavar="N",
        help="number of threads that act as clients"
        " (default: %(default)s, half of the processors)",
    )  # fmt: skip
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-results"),
        metavar="FOLDER",
        help="folder for the results (default: %(default)s)",
    )
    return parser


def whole(text: str) -> int:
    """Parse a whole number of 0 or more. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"not a whole number of 0 or more: {text!r}")
    return int(text)


def other(text: str) -> Server:
    """Return the server that `NAME=COMMAND` describes. Raises ArgumentTypeError."""
    name, _, command = text.partition("=")
    if not name or "{port}" not in command or "{file}" not in command:
        raise argparse.ArgumentTypeError(
            f"not NAME=COMMAND with {{port}} and {{file}} in it: {text!r}"
        )
    return Server(name, command)


def choose_scenarios(parser: Parser, args: argparse.Namespace) -> list[Scenario]:
    """Return the scenarios that `--only` names, or all scenarios of the run without it."""
    found = quick() if args.quick else usual()
    if args.only is None:
        return found
    found.append(crowd(args.clients))
    wanted = args.only.split(",")
    for name in wanted:
        if not any(name in (scenario.name, scenario.family) for scenario in found):
            parser.error(
                f"no scenario {name!r}; there are {', '.join(scenario.name for scenario in found)}"
            )
    return [scenario for scenario in found if scenario.name in wanted or scenario.family in wanted]


def choose_servers(args: argparse.Namespace) -> list[Server]:
    """Return the servers to measure. Ratios in the results compare them with the first one."""
    counts = [
        1 << power for power in range(args.workers.bit_length()) if 1 << power < args.workers
    ] + [args.workers] * bool(args.workers)
    found = [*map(servers.tailsrv, counts), *args.server]
    if not args.no_socat and (socat := servers.socat()) is not None:
        found.append(socat)
    if not args.no_bare:
        found += map(servers.bare, counts or [1])
    return found


class Progress:
    """Reports progress on standard error: a line for each measurement that has ended.

    On a terminal, one more line shows the measurement that is running.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._terminal = sys.stderr.isatty()

    def begin(self, what: str) -> None:
        """Show what is measured now, on a terminal."""
        if self._terminal:
            done = 20 * self._done // self._total
            line = f"[{'#' * done}{'.' * (20 - done)}] {self._done}/{self._total} {what}"
            print(
                f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def end(self, what: str, outcome: str) -> None:
        """Print the result of the measurement `what`."""
        self._done += 1
        start = "\r\033[K" if self._terminal else ""
        print(
            f"{start}{self._done:>3}/{self._total} {what}: {outcome}", file=sys.stderr, flush=True
        )


def measure_all(results: Results, generator: Generator, rounds: int, threads: int) -> None:
    """Measure every scenario with every server, in rounds.

    In each round of a scenario all servers are measured in turn, so that a change of the machine's
    speed affects all servers alike.
    """
    able = [
        [server for server in results.servers if not results.cell(scenario, server).skipped]
        for scenario in results.scenarios
    ]
    progress = Progress(rounds * sum(map(len, able)))
    for scenario, its_servers in zip(results.scenarios, able, strict=True):
        for turn in range(1, rounds + 1):
            for server in its_servers:
                what = f"{scenario.name}, round {turn} of {rounds}, {server.name}"
                progress.begin(what)
                progress.end(
                    what,
                    _measure(results.cell(scenario, server), scenario, server, generator, threads),
                )


def _measure(
    cell: Cell, scenario: Scenario, server: Server, generator: Generator, threads: int
) -> str:
    """Measure `server` once, add the result to `cell`, and return it as text."""
    try:
        figures = scenario.run(server, generator, threads)
    except (LoadError, ServerError, OSError) as error:
        # A failure of one server is a result. The others are measured all the same.
        cell.failed = str(error)
        return f"failed: {error}"
    cell.rounds.append(figures)
    return brief(figures)


def run(scenarios: list[Scenario], found: list[Server], args: argparse.Namespace) -> int:
    """Measure, write the results, even if interrupted, and return the exit status."""
    settings = {
        "rounds": args.rounds,
        "quick": args.quick,
        "threads": args.threads,
        "descriptors": raise_descriptor_limit(),
    }
    results = Results(scenarios, found, processes.describe_machine(), settings)
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="tailsrv-bench-") as folder:
        generator = Generator(Path(folder))
        try:
            measure_all(results, generator, args.rounds, args.threads)
        except KeyboardInterrupt:
            interrupted = True
    results.write(args.output)
    print(f"results are in {args.output}", file=sys.stderr)
    for failure in results.failures():
        print(f"failed: {failure}", file=sys.stderr)
    return 130 if interrupted else bool(results.failures())


def raise_descriptor_limit() -> int:
    """Raise the descriptor limit of this process and its children to the hard limit; return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    # SIGTERM raises KeyboardInterrupt, so that the server that is being measured is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = make_parser()
    args = parser.parse_args(argv)
    scenarios = choose_scenarios(parser, args)
    args.rounds = (1 if args.quick else 3) if args.rounds is None else args.rounds
    if min(args.rounds, args.threads, args.clients) < 1:
        parser.error("--rounds, --threads and --clients must be 1 or more")
    try:
        return run(scenarios, choose_servers(args), args)
    except (LoadError, ServerError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
