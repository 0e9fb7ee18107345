"""Runs a server for minutes or hours with many clients and one fault per second.

Every byte that the server sends is checked. The exit status is 0 if everything was right, 1 if
anything was wrong, and 2 for a wrong command line.
"""

import argparse
import random
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import samples
from content import Content
from growing import ROTATIONS, GrowingFile
from samples import Sample
from served import Server, ServerError, until
from strikes import FAULTS, Faults
from summary import Summary, peak
from tally import Tally
from traffic import Traffic

# The shortest and longest time without faults before memory is measured first, in seconds. Between
# these bounds it is a tenth of the run.
WARM_UP = (1.0, 20.0)
# Seconds within which the server must have noticed that all clients have disconnected. Keepalive
# needs two minutes to find a client that has vanished.
REST = 150.0
# Seconds between two samples, which must be equal before the server counts as being at rest.
STEADY = 0.5
# Seconds between two lines that report progress.
PROGRESS = 10.0
# Bytes in the file at the start.
BEGIN = 1 << 20
MIB = 1 << 20
# Texts that must not be in the server's log, whatever the faults.
BAD = (" error: ", " critical: ", "Traceback", "no client gets", "the log lacks", "are gone")
# An error for which a truncated file is the reason.
TRUNCATED = "its next bytes no longer exist"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes",
        type=positive,
        default=1.0,
        help="duration in minutes (default: 1); the end takes up to two more minutes",
    )
    parser.add_argument(
        "-w", "--workers", type=count, default=2, help="workers of the server (default: 2)"
    )
    parser.add_argument(
        "--scale",
        type=positive,
        default=1.0,
        help="factor for the number of clients (default: 1, which means 54 clients)",
    )
    parser.add_argument(
        "--rate",
        type=positive,
        default=256,
        help="growth of the log in KiB per second (default: 256)",
    )
    parser.add_argument(
        "--max-size",
        type=positive,
        default=2048,
        help="largest size of a file that is not rotated in MiB, which may reduce the rate"
        " (default: 2048)",
    )
    parser.add_argument(
        "--faults",
        type=names,
        default=FAULTS,
        help=f"faults, separated by commas (default: {','.join(FAULTS)})",
    )
    parser.add_argument(
        "--rotate",
        action="store_true",
        help="serve with --follow-name, and rotate the file every few seconds",
    )
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="as --rotate, and truncate the file instead at some of the rotations",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.randrange(1 << 32),
        help="seed of the random choices; repeats the choices of the run with the same seed",
    )
    parser.add_argument(
        "--tailsrv",
        type=shlex.split,
        default=[sys.executable, "-m", "tailsrv"],
        metavar="COMMAND",
        help="command that starts the server",
    )
    parser.add_argument("--folder", help="folder for the served file during the run")
    parser.add_argument(
        "--log", metavar="FILE", help="write the server's log to FILE (default: a temporary file)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the summary as JSON to FILE, in addition to the text on standard output",
    )
    return parser


def positive(text: str) -> float:
    """Parse a positive number. Raises ValueError."""
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError
    return value


def count(text: str) -> int:
    """Parse a whole number of 1 or more. Raises ValueError."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def names(text: str) -> list[str]:
    """Parse names of faults, separated by commas. Raises ArgumentTypeError."""
    if unknown := set(text.split(",")) - set(FAULTS):
        raise argparse.ArgumentTypeError(f"no such fault: {', '.join(sorted(unknown))}")
    return text.split(",")


class Soak:
    """One run."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.seconds = arguments.minutes * 60
        self.tally = Tally()
        self.samples: list[Sample] = []
        # The samples that were taken while the server was at rest, before the faults and after.
        self.rests: list[Sample] = []
        dice = random.Random(arguments.seed)
        self.file = GrowingFile(folder / "file", Content(arguments.seed))
        self.file.append(BEGIN)
        options = ["-w", str(arguments.workers)]
        self.rotations: tuple[str, ...] = ()
        rate = arguments.rate * 1024
        if arguments.rotate or arguments.truncate:
            options += ["--follow-name", "--state-file", str(folder / "state")]
            self.rotations = ROTATIONS + (("truncate",) if arguments.truncate else ())
        else:
            rate = min(rate, arguments.max_size * MIB / self.seconds)
        self.server = Server(
            arguments.tailsrv, options, self.file.path, Path(arguments.log or folder / "log")
        )
        self.traffic = Traffic(self.server, self.file, self.tally, rate, self.rotations, dice)
        self.faults = Faults(arguments.faults, self.server, self.traffic, self.tally, dice)

    def run(self) -> Summary:
        """Run the test, and return its summary."""
        begun, status = time.monotonic(), None
        try:
            self.server.start(self.arguments.workers)
            self.warm_up()
            self.work()
            status = self.server.end()
        except (ServerError, OSError) as error:
            # OSError: the disk is full, for example.
            self.tally.note_wrong(str(error))
        except KeyboardInterrupt:
            self.tally.note_wrong("interrupted")
        finally:
            self.traffic.clear()
            self.server.end()
            self.file.close()
        return self.summarize(time.monotonic() - begun, status)

    def warm_up(self) -> None:
        """Let every process work before its memory is measured first.

        Until then it shares much of its memory with its parent.
        """
        least, most = WARM_UP
        self.traffic.start(self.arguments.scale)
        self.traffic.run(max(least, min(most, self.seconds / 10)))
        self.rest()

    def work(self) -> None:
        """Run clients and faults for the duration of the test."""
        self.traffic.start(self.arguments.scale)
        self.faults.strike()
        self.watch()
        begun = reported = time.monotonic()
        while (gone := time.monotonic() - begun) < self.seconds:
            self.traffic.run(min(PROGRESS, self.seconds - gone))
            self.check()
            if time.monotonic() - reported > PROGRESS / 2:
                reported = time.monotonic()
                self.report_progress(reported - begun)
        self.faults.calm()
        self.rest()

    def rest(self) -> None:
        """Let every stream catch up, disconnect all clients, and take a sample without clients."""
        if self.rotations:
            # A supervisor gets an inotify instance with the first rotation that it sees.
            self.file.rotate("rename", self.traffic.dice)
        self.traffic.catch_up()
        self.check()
        self.traffic.clear()
        until(self.has_no_clients, "the server has noticed that all clients have left", REST)
        self.file.delete_older()
        until(self.has_no_deleted_files, "the server has closed all deleted files", REST)
        until(self.is_steady, "the server is at rest", REST)
        self.rests.append(self.samples[-1])

    def check(self) -> None:
        """Raise ServerError if the server has exited or too many errors have been found."""
        self.server.check_alive()
        if self.tally.hopeless():
            raise ServerError("too many errors, stopping")

    def has_no_clients(self) -> bool:
        """Return whether the server has noticed that the last client has disconnected.

        The server notices some disconnected clients only when it sends to them, so append a byte.
        """
        self.file.append(1)
        return self.server.is_whole() and self.server.status()["clients"] == 0

    def has_no_deleted_files(self) -> bool:
        """Return whether the server has no deleted file open."""
        return not samples.deleted_files(self.server.processes(), self.file.path)

    def is_steady(self) -> bool:
        """Take a sample; return whether it is like the last one, except for the memory."""
        time.sleep(STEADY)
        before, sample = (
            self.samples[-1] if self.samples else None,
            samples.take(self.server.processes()),
        )
        self.samples.append(sample)
        return (
            before is not None and replace(before, pss=sample.pss, sockets=sample.sockets) == sample
        )

    def watch(self) -> None:
        """Take a sample once a second."""
        self.samples.append(samples.take(self.server.processes()))
        if self.traffic.busy:
            self.traffic.later(1.0, self.watch)

    def report_progress(self, seconds: float) -> None:
        """Print a line about the first `seconds` of the run to standard error."""
        tally = self.tally
        print(
            f"{seconds:.0f} of {self.seconds:.0f} s: {tally.checked >> 20} MiB checked,"
            f" {tally.faults.total()} faults, {tally.rotations.total()} rotations,"
            f" {len(self.traffic.readers)} clients, {self.samples[-1].pss / MIB:.1f} MiB,"
            f" {self.samples[-1].descriptors} descriptors, {len(tally.wrong)} wrong",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def summarize(self, seconds: float, status: int | None) -> Summary:
        """Return the summary of a run that took `seconds` and ended with `status`."""
        log = self.server.log
        return Summary(
            command=shlex.join(self.server.command),
            seed=self.arguments.seed,
            seconds=seconds,
            log_bytes=self.file.size,
            status=status,
            tally=self.tally,
            start=self.rests[0] if self.rests else None,
            end=self.rests[1] if len(self.rests) > 1 else None,
            peak=peak(self.samples),
            log_lines=len(log),
            bad_lines=[line for line in log if self.is_bad(line)][:20],
        )

    def is_bad(self, line: str) -> bool:
        """Return whether `line` should not be in the server's log."""
        expected = self.arguments.truncate and TRUNCATED in line
        return not expected and any(bad in line for bad in BAD)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test that the command line describes, and return the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    try:
        # Open the file now, because an error would be a nuisance after a run of hours.
        json = open(arguments.json, "w") if arguments.json else None  # noqa: SIM115
        with tempfile.TemporaryDirectory(prefix="tailsrv-soak-", dir=arguments.folder) as folder:
            summary = Soak(arguments, Path(folder)).run()
    except OSError as error:
        parser.error(str(error))
    print(summary.text())
    if json:
        with json:
            print(summary.json(), file=json)
    return 1 if summary.reasons() else 0


if __name__ == "__main__":
    sys.exit(main())
