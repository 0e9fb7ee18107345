"""Copies a file that tailsrv serves to standard output: the command `tscat`."""

import os
import select
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from tailsrv.arguments import make_tscat_parser, split_offset
from tailsrv.client import follow
from tailsrv.client.command import RunError, print_message, run
from tailsrv.client.connector import milliseconds
from tailsrv.linux.process import occupy_standard_descriptors

STDOUT = 1


class ReaderGoneError(Exception):
    """Standard output has no reader any more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tscat` with `argv` (sys.argv if None); return the exit status."""
    return run("tscat", lambda: copy(make_tscat_parser().parse_intermixed_args(argv)))


def copy(options: Namespace) -> None:
    """Copy what `options` ask for."""
    if sys.stdout is None:
        raise RunError("standard output is closed")
    occupy_standard_descriptors()
    servers, offset = split_offset(options.servers)
    stream = follow(
        servers,
        offset,
        once=options.once,
        idle=options.until_idle,
        whole_lines=options.lines,
        report=partial(print_message, "tscat"),
        wait=wait_with_reader,
    )
    with stream, suppress(ReaderGoneError):
        for chunk in stream:
            write(chunk)


def wait_with_reader(fd: int, events: int, seconds: float | None) -> bool:
    """Wait as a `Wait` does; raises NobodyReadsError as soon as that is so."""
    poll = select.poll()
    # hang-ups are told unasked
    poll.register(STDOUT, 0)
    if fd >= 0:
        poll.register(fd, events)
    seen = dict(poll.poll(milliseconds(seconds)))
    if STDOUT in seen:
        raise ReaderGoneError
    return fd in seen


def write(data: bytes) -> None:
    """Write all of `data` to standard output, whatever that is. Raises NobodyReadsError, RunError."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(STDOUT, rest) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(STDOUT, select.POLLOUT)
            poll.poll()
        except BrokenPipeError:
            raise ReaderGoneError from None
        except OSError as error:
            raise RunError(f"cannot write: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
