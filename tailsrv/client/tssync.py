"""The command `tssync`: keeps a local file equal to a served file.

The bytes move from the socket through a pipe into the file, inside the kernel if splice(2) is
available.
"""

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
from tailsrv.client import Follow, GoneError, OtherFileError, follow
from tailsrv.client.command_runner import print_message, run
from tailsrv.client.connector import wait
from tailsrv.client.local_copy import LocalCopy
from tailsrv.formatting import clock, size
from tailsrv.linux.event_loop import Timers
from tailsrv.linux.process import occupy_standard_descriptors

# Seconds until the progress line is first drawn. Most copies have caught up by then.
PROGRESS_DELAY = 0.5
# Seconds between two updates of the progress line.
PROGRESS_INTERVAL = 0.2
# Seconds without a byte after which the progress line is removed.
PROGRESS_HIDE_DELAY = 0.5
# Moves the cursor to the start of the line, and erases the line (ECMA-48).
ERASE = "\r\x1b[K"
# Bytes: by default the largest pipe of an unprivileged user (pipe-max-size in pipe(7)).
PIPE_SIZE = 1 << 20
# From linux/fcntl.h, because an interpreter may have been built without the name.
F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds between attempts to write while the disk is full.
DISK_FULL_RETRY = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tssync` with `argv` (sys.argv if None); return the exit status."""
    return run("tssync", lambda: sync(make_tssync_parser().parse_intermixed_args(argv)))


def sync(options: Namespace) -> None:
    """Keep a copy as `options` say. Raises RunError, OSError, and what `follow` raises."""
    occupy_standard_descriptors()
    interrupt_on_signals()
    # Parse these first: if one is malformed, no file must be created.
    servers = [parse_endpoint(server) for server in options.servers]
    with LocalCopy(options.path) as local_copy:
        Synchronizer(local_copy, servers, options).run()


def interrupt_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that received bytes are synced.

    A signal that is ignored at the start, as SIGHUP is under nohup(1), stays ignored. Only the
    first signal raises the exception. Others often follow: a closed terminal may send two, and
    systemd may send SIGHUP after SIGTERM. They must not interrupt the sync.
    """
    numbers = [number for number in ENDING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]

    def end(_number: int, _frame: object) -> NoReturn:
        for number in numbers:
            # Do not use SIG_IGN: if another of these signals is already pending in the interpreter,
            # it would find no function to call, and print an error message.
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, end)


class Synchronizer:
    """Copies bytes from the connection to the file, and syncs it; updates the progress line."""

    def __init__(
        self, local_copy: LocalCopy, servers: Sequence[tuple[str, int]], options: Namespace
    ) -> None:
        self._local_copy, self._servers, self._options = local_copy, servers, options
        self._progress = Progress(options.path)
        self._timers = Timers()
        self._disk_full = False

    def run(self) -> None:
        """Keep the copy until a signal, an error, or an option ends it."""
        try:
            # Sync the bytes that an earlier run has written. From then on, `LocalCopy` knows which
            # bytes are on the disk.
            self._sync()
            while not self._copy():
                self._sync()
                aside = self._local_copy.move_aside()
                self._print(
                    f"{self._local_copy.path} is not the beginning of the remote file"
                    f" (was it rotated?): renamed it to {aside}, starting a new copy"
                )
        finally:
            self._progress.clear()
            if self._options.no_follow:
                self._local_copy.sync()
            else:
                self._sync()

    def _copy(self) -> bool:
        """Append the received bytes until the stream ends.

        Returns False if the local file is not the beginning of the served file, and
        `--on-mismatch` demands a new copy.
        """
        stream = follow(
            self._servers,
            self._local_copy.length,
            once=self._options.once,
            idle=self._options.until_idle,
            until_end=self._options.no_follow,
            recall=self._local_copy.recall,
            report=self._print,
            wait=self._wait,
        )
        with stream, pipe() as (out, into):
            try:
                while count := stream.splice(into, PIPE_SIZE):
                    self._local_copy.append(out, count, self._wait_for_room)
                    self._appended(stream)
            except GoneError as error:
                raise GoneError(
                    error.offset,
                    error.start,
                    f"{self._local_copy.path} cannot be continued: it ends at offset"
                    f" {error.offset}, but the remote log starts at offset {error.start} now; the"
                    " bytes between them were deleted; name a server that still has them",
                ) from None
            except OtherFileError:
                if self._options.on_mismatch == "stop":
                    raise OtherFileError(
                        f"{self._local_copy.path} is not the beginning of the remote file (was it"
                        " rotated?); use --on-mismatch=restart to keep it and start a new copy"
                    ) from None
                return False
            return True

    def _appended(self, stream: Follow) -> None:
        now = time.monotonic()
        if self._disk_full:
            self._disk_full = False
            self._print(f"appending to {self._local_copy.path} again")
        if self._options.fsync is not None and self._sync not in self._timers:
            self._timers.set(self._sync, now + self._options.fsync)
        self._progress.grow(self._local_copy.length, stream.end, now)
        self._timers.set(self._progress.clear, now + PROGRESS_HIDE_DELAY)

    def _wait_for_room(self, reason: str) -> None:
        if not self._disk_full:
            self._disk_full = True
            self._print(
                f"cannot append to {self._local_copy.path}: {reason}; waiting for free space"
            )
        self._wait(-1, 0, DISK_FULL_RETRY)

    def _wait(self, fd: int, events: int, seconds: float | None) -> bool:
        """Wait as a `Wait` does, and run the timers in the meantime."""
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

    def _print(self, text: str) -> None:
        self._progress.clear()
        print_message("tssync", text)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Open a pipe, as large as possible up to PIPE_SIZE; yield its reading and its writing end."""
    out, into = os.pipe()
    try:
        try:
            fcntl.fcntl(into, F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            # This user's pipes have reached their memory limit. A smaller pipe works as well.
            pass
        yield out, into
    finally:
        os.close(out)
        os.close(into)


def progress_text(length: int, end: int | None, rate: float) -> str:
    """Return the progress of a copy that has `length` of `end` bytes, and grows by `rate` a second.

    Without the total if it is unknown, or if the copy has grown beyond it.
    """
    if end is None or length >= end:
        return f"{size(length)}, {size(rate)}/s"
    text = f"{size(length)} of {size(end)} ({length * 100 // end}%), {size(rate)}/s"
    return f"{text}, {clock((end - length) / rate)} left" if rate > 0 else text


class Progress:
    """The progress line of the file `name`. It is drawn only if standard error is a terminal."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = bool(sys.stderr and sys.stderr.isatty())
        # When the file began to grow, and its length at that time.
        self._begun: tuple[float, int] | None = None
        # When the line was last drawn. None: there is no line now.
        self._drawn: float | None = None

    def grow(self, length: int, end: int | None, now: float) -> None:
        """Note that the file is `length` bytes long at the time `now`. Draw the line if due.

        `end` is the length of the remote file, if it is known.
        """
        if self._begun is None:
            self._begun = now, length
        begun, first = self._begun
        if (
            self._terminal
            and now - begun >= PROGRESS_DELAY
            and now - (self._drawn or begun) >= PROGRESS_INTERVAL
        ):
            self._drawn = now
            rate = (length - first) / (now - begun)
            self._write(f"{ERASE}{self._name}: {progress_text(length, end, rate)}")

    def clear(self) -> None:
        """Remove the line, because the copy has caught up or another message is to be printed."""
        if self._drawn is not None:
            self._write(ERASE)
        self._begun = self._drawn = None

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            # The terminal was closed.
            self._terminal = False


if __name__ == "__main__":
    sys.exit(main())
