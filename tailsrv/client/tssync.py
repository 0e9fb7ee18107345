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
from functools import partial
from typing import NoReturn

from tailsrv.addresses import parse_endpoint
from tailsrv.arguments import make_tssync_parser
from tailsrv.client import GoneError, OtherFileError, follow
from tailsrv.client.command_runner import print_message, run
from tailsrv.client.connector import wait
from tailsrv.client.local_copy import LocalCopy
from tailsrv.linux.event_loop import Timers
from tailsrv.linux.process import occupy_standard_descriptors

# Bytes: by default the largest pipe of an unprivileged user (pipe-max-size in pipe(7)).
PIPE_SIZE = 1 << 20
# From linux/fcntl.h, because an interpreter may have been built without the name.
F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds between attempts to write while the disk is full.
DISK_FULL_RETRY = 1.0

report = partial(print_message, "tssync")


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
    """Copies bytes from the connection to the file, and syncs it."""

    def __init__(
        self, local_copy: LocalCopy, servers: Sequence[tuple[str, int]], options: Namespace
    ) -> None:
        self._local_copy, self._servers, self._options = local_copy, servers, options
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
                report(
                    f"{self._local_copy.path} is not the beginning of the remote file"
                    f" (was it rotated?): renamed it to {aside}, starting a new copy"
                )
        finally:
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
            report=report,
            wait=self._wait,
        )
        with stream, pipe() as (out, into):
            try:
                while count := stream.splice(into, PIPE_SIZE):
                    self._local_copy.append(out, count, self._wait_for_room)
                    self._appended()
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

    def _appended(self) -> None:
        if self._disk_full:
            self._disk_full = False
            report(f"appending to {self._local_copy.path} again")
        if self._options.fsync is not None and self._sync not in self._timers:
            self._timers.set(self._sync, time.monotonic() + self._options.fsync)

    def _wait_for_room(self, reason: str) -> None:
        if not self._disk_full:
            self._disk_full = True
            report(f"cannot append to {self._local_copy.path}: {reason}; waiting for free space")
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


if __name__ == "__main__":
    sys.exit(main())
