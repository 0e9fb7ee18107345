"""Runs a server for minutes or hours under mixed traffic, with a fault every second, and checks every byte that it sends.

The exit status is 0 if all was well, 1 if anything was wrong, 2 for a wrong command line.
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
from growing import GrowingFile
from samples import Sample
from served import Server, ServerError, until
from strikes import FAULTS, Faults
from summary import Summary, peak
from tally import Tally
from traffic import Traffic

# seconds without faults before memory is looked at for the first time: a tenth of the run, within these
WARM_UP = (1.0, 20.0)
# seconds until the server has none of the clients any more: keepalive takes two minutes to find one that left unseen
REST = 150.0
# seconds between two looks at a server that are to be alike
STEADY = 0.5
# seconds between two lines that say how far we are
PROGRESS = 10.0
# bytes in the file at the start
BEGIN = 1 << 20
MIB = 1 << 20
# lines that no fault of ours may bring about
BAD = (" error: ", " critical: ", "Traceback")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes",
        type=positive,
        default=1.0,
        help="how long, 1 by default; the end takes up to two more",
    )
    parser.add_argument(
        "-w", "--workers", type=count, default=2, help="of the server, 2 by default"
    )
    parser.add_argument(
        "--scale", type=positive, default=1.0, help="times as many clients as usual, which is 54"
    )
    parser.add_argument(
        "--rate",
        type=positive,
        default=256,
        help="KiB a second that the file grows by, 256 by default",
    )
    parser.add_argument(
        "--max-size",
        type=positive,
        default=2048,
        help="MiB that the file may grow to in the end: lowers the rate; 2048 by default",
    )
    parser.add_argument(
        "--faults",
        type=names,
        default=FAULTS,
        help=f"which, separated by commas; by default {','.join(FAULTS)}",
    )
    parser.add_argument(
        "--rotate",
        action="store_true",
        help="serve with --follow-name, and rotate the file as one fault more",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.randrange(1 << 32),
        help="repeats the choices of another run",
    )
    parser.add_argument(
        "--tailsrv",
        type=shlex.split,
        default=[sys.executable, "-m", "tailsrv"],
        metavar="COMMAND",
        help="what starts the server",
    )
    parser.add_argument("--folder", help="where the file is made, for the time of the run")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="where the summary goes as JSON; as text it goes to standard output",
    )
    return parser


def positive(text: str) -> float:
    """Return a number of the command line."""
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError
    return value


def count(text: str) -> int:
    """Return a number of processes of the command line."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def names(text: str) -> list[str]:
    """Return the faults that the command line names."""
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
        # of these, the last of each time that all was quiet
        self.rests: list[Sample] = []
        dice = random.Random(arguments.seed)
        self.file = GrowingFile(folder / "file", Content(arguments.seed))
        self.file.append(BEGIN)
        options = ["-w", str(arguments.workers), *(["--follow-name"] if arguments.rotate else [])]
        self.server = Server(arguments.tailsrv, options, self.file.path, folder / "log")
        rate = min(arguments.rate * 1024, arguments.max_size * (1 << 20) / self.seconds)
        self.traffic = Traffic(self.server, self.file, self.tally, rate, dice)
        names = [*arguments.faults, "rotate"] if arguments.rotate else arguments.faults
        self.faults = Faults(names, self.server, self.traffic, self.tally, dice)

    def run(self) -> Summary:
        """Run it, and return what is to be said of it."""
        begun, status = time.monotonic(), None
        try:
            self.server.start(self.arguments.workers)
            self.warm_up()
            self.work()
            status = self.server.end()
        except (ServerError, OSError) as error:
            # the latter: of the disk, for instance
            self.tally.note_wrong(str(error))
        except KeyboardInterrupt:
            self.tally.note_wrong("interrupted")
        finally:
            self.traffic.clear()
            self.server.end()
            self.file.close()
        return self.summarize(time.monotonic() - begun, status)

    def warm_up(self) -> None:
        """Have every process do its work once before it is looked at: until then it shares memory with its parent."""
        least, most = WARM_UP
        self.traffic.start(self.arguments.scale)
        self.traffic.run(max(least, min(most, self.seconds / 10)))
        self.rest()

    def work(self) -> None:
        """Have the clients, and the faults."""
        self.traffic.start(self.arguments.scale)
        self.faults.strike()
        self.watch()
        begun = told = time.monotonic()
        while (gone := time.monotonic() - begun) < self.seconds:
            self.traffic.run(min(PROGRESS, self.seconds - gone))
            self.check()
            if time.monotonic() - told > PROGRESS / 2:
                told = time.monotonic()
                self.tell(told - begun)
        self.faults.calm()
        self.rest()

    def rest(self) -> None:
        """Bring every stream to its end, then have the clients leave, and look at what the server holds without them."""
        self.traffic.catch_up()
        self.check()
        self.traffic.clear()
        until(self.is_left, "all is quiet again", REST)
        until(self.is_steady, "the server is at rest", REST)
        self.rests.append(self.samples[-1])

    def check(self) -> None:
        """Raise ServerError if there is no point in going on."""
        self.server.check_alive()
        if self.tally.hopeless():
            raise ServerError("too much is wrong, not going on")

    def is_left(self) -> bool:
        """Tell whether the server has seen the last client leave; to find some it must send them something."""
        self.file.append(1)
        return self.server.whole() and self.server.status()["clients"] == 0

    def is_steady(self) -> bool:
        """Take a sample, and tell whether it is like the last."""
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
        """Take samples, once a second."""
        self.samples.append(samples.take(self.server.processes()))
        if self.traffic.busy:
            self.traffic.later(1.0, self.watch)

    def tell(self, seconds: float) -> None:
        """Say how far we are."""
        tally = self.tally
        print(
            f"{seconds:.0f} of {self.seconds:.0f} s: {tally.checked >> 20} MiB checked, {tally.faults.total()} faults, "
            f"{len(self.traffic.readers)} clients, {self.samples[-1].pss / MIB:.1f} MiB, {len(tally.wrong)} wrong",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def summarize(self, seconds: float, status: int | None) -> Summary:
        """Return what is to be said of the run."""
        log = self.server.log
        return Summary(
            command=shlex.join(self.server.command),
            seed=self.arguments.seed,
            seconds=seconds,
            file_bytes=sum(self.file.sizes),
            status=status,
            tally=self.tally,
            start=self.rests[0] if self.rests else None,
            end=self.rests[1] if len(self.rests) > 1 else None,
            peak=peak(self.samples),
            log_lines=len(log),
            bad_lines=[line for line in log if any(bad in line for bad in BAD)][:20],
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line says, and return the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    try:
        # now: after hours it would be a pity
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
