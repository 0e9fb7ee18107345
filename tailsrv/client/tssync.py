"""Keeps a local file equal to one that tailsrv serves: the command `tssync`."""

import fcntl
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from tailsrv.addresses import parse_endpoint
from tailsrv.arguments import make_tssync_parser
from tailsrv.client import OtherFileError, follow
from tailsrv.client.command import print_message, run
from tailsrv.client.connector import wait
from tailsrv.client.local_copy import LocalCopy
from tailsrv.formatting import size
from tailsrv.linux.event_loop import Timers
from tailsrv.linux.process import occupy_standard_descriptors

# seconds before there is a line: most catching up is done by then
PROGRESS_DELAY = 0.5

# seconds from one line to the next
PROGRESS_INTERVAL = 0.2

ERASE = "\r\x1b[K"


# bytes; the most that an ordinary user's pipe may hold
PIPE_SIZE = 1 << 20
# linux/fcntl.h; an interpreter may be built without the name
F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)
# seconds without a byte
QUIET_TIME = 0.5
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# seconds between attempts while the disk is full
DISK_FULL_RETRY = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tssync` with `argv` (sys.argv if None); return the exit status."""
    return run("tssync", lambda: keep(make_tssync_parser().parse_intermixed_args(argv)))


def keep(options: Namespace) -> None:
    """Keep the copy that `options` ask for."""
    occupy_standard_descriptors()
    end_by_signals()
    # before there is a file
    servers = [parse_endpoint(server) for server in options.servers]
    with LocalCopy(options.path) as local_copy:
        Keeper(local_copy, servers, options).run()


def end_by_signals() -> None:
    """Have SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that what has come is synced; with nohup(1), SIGHUP does nothing.

    The first one does. Others come along: of a closed terminal there are often two, and systemd may send SIGHUP after SIGTERM.
    They must not interrupt the sync.
    """
    numbers = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]

    def end(_number: int, _frame: object) -> NoReturn:
        for number in numbers:
            # SIG_IGN would be a complaint if one is there already
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, end)


class Keeper:
    """Moves bytes from the socket by a pipe into the file, and sees to fsync and the progress line meanwhile."""

    def __init__(
        self, local_copy: LocalCopy, servers: Sequence[tuple[str, int]], options: Namespace
    ) -> None:
        self._local_copy, self._servers, self._options = local_copy, servers, options
        self._progress = Progress(options.path)
        self._timers = Timers()
        self._full = False

    def run(self) -> None:
        """Keep the copy until the end that the options ask for."""
        try:
            # what an earlier run has left: from here on it is known what the disk has
            self._sync()
            while not self._copy():
                self._sync()
                aside = self._local_copy.set_aside()
                self._say(
                    f"the remote file is another one now: {self._local_copy.path} becomes {aside}, and begins again"
                )
        finally:
            self._progress.rest()
            self._sync()

    def _copy(self) -> bool:
        """Append what comes; False: the remote file is another one, and the copy is to begin again."""
        stream = follow(
            self._servers,
            self._local_copy.length,
            once=self._options.once,
            idle=self._options.until_idle,
            recall=self._local_copy.recall,
            report=self._say,
            wait=self._wait,
        )
        with stream, pipe() as (out, into):
            try:
                while count := stream.splice(into, PIPE_SIZE):
                    self._local_copy.append(out, count, self._wait_for_room)
                    self._appended()
            except OtherFileError:
                if self._options.on_mismatch == "stop":
                    raise OtherFileError(
                        f"{self._local_copy.path} is not the beginning of the remote file: its last bytes differ"
                    ) from None
                return False
            return True

    def _appended(self) -> None:
        now = time.monotonic()
        if self._full:
            self._full = False
            self._say(f"there is room again for {self._local_copy.path}")
        if self._options.fsync is not None and self._sync not in self._timers:
            self._timers.set(self._sync, now + self._options.fsync)
        self._progress.grow(self._local_copy.length, now)
        self._timers.set(self._progress.rest, now + QUIET_TIME)

    def _wait_for_room(self, reason: str) -> None:
        if not self._full:
            self._full = True
            self._say(f"cannot append to {self._local_copy.path}: {reason}; waiting for room")
        self._wait(-1, 0, DISK_FULL_RETRY)

    def _wait(self, fd: int, events: int, seconds: float | None) -> bool:
        """Wait as a `Wait` does, and do what is due meanwhile."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            now = time.monotonic()
            self._timers.run(now)
            limits = (self._timers.timeout(now), None if end is None else end - now)
            if wait(
                fd, events, min((limit for limit in limits if limit is not None), default=None)
            ):
                return True
            if end is not None and time.monotonic() >= end:
                return False

    def _sync(self) -> None:
        if self._options.fsync is not None:
            self._local_copy.sync()

    def _say(self, text: str) -> None:
        self._progress.rest()
        print_message("tssync", text)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Give a pipe's two ends, as roomy as may be."""
    out, into = os.pipe()
    try:
        try:
            fcntl.fcntl(into, F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            # this user's pipes have taken all that they may: a smaller one serves, too
            pass
        yield out, into
    finally:
        os.close(out)
        os.close(into)


class Progress:
    """The line; `name` is what grows. It is drawn only where standard error is a terminal."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = bool(sys.stderr and sys.stderr.isatty())
        # when, and how long it was then
        self._begun: tuple[float, int] | None = None
        self._drawn: float | None = None

    def grow(self, length: int, now: float) -> None:
        """Note that what grows has reached `length`."""
        if self._begun is None:
            self._begun = now, length
        begun, first = self._begun
        if (
            self._terminal
            and now - begun >= PROGRESS_DELAY
            and now - (self._drawn or begun) >= PROGRESS_INTERVAL
        ):
            self._drawn = now
            self._write(
                f"{ERASE}{self._name}: {size(length)}, {size((length - first) / (now - begun))}/s"
            )

    def rest(self) -> None:
        """Take the line away: it is caught up, or something else is to be said."""
        if self._drawn is not None:
            self._write(ERASE)
        self._begun = self._drawn = None

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            # it has gone
            self._terminal = False


if __name__ == "__main__":
    sys.exit(main())
