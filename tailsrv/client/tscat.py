"""The command `tscat`: copies a served file to standard output, and follows it."""

import os
import select
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from tailsrv.arguments import make_tscat_parser, split_offset
from tailsrv.client import follow
from tailsrv.client.command_runner import RunError, print_message, run
from tailsrv.linux.process import occupy_standard_descriptors
from tailsrv.linux.sockets import poll_once

STDOUT = 1


class ReaderGoneError(Exception):
    """The reader of standard output has closed its end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tscat` with `argv` (sys.argv if None); return the exit status."""
    return run("tscat", lambda: copy(make_tscat_parser().parse_intermixed_args(argv)))


def copy(options: Namespace) -> None:
    """Copy the served file to standard output as `options` say.

    Raises RunError, and what `follow` and its iterator raise.
    """
    if sys.stdout is None:
        raise RunError("standard output is closed: redirect it to a file or a pipe")
    occupy_standard_descriptors()
    servers, offset = split_offset(options.servers)
    stream = follow(
        servers,
        offset,
        once=options.once,
        idle=options.until_idle,
        until_end=options.no_follow,
        whole_lines=options.lines,
        report=partial(print_message, "tscat"),
        wait=wait_with_reader,
    )
    with stream, suppress(ReaderGoneError):
        for chunk in stream:
            write(chunk)


def wait_with_reader(fd: int, events: int, seconds: float | None) -> bool:
    """Wait as a `Wait` does. Raises ReaderGoneError as soon as standard output has no reader."""
    seen = poll_once({STDOUT: 0, fd: events}, seconds)
    if STDOUT in seen:
        raise ReaderGoneError
    return fd in seen


def write(data: bytes) -> None:
    """Write all of `data` to standard output, which may be non-blocking.

    Raises ReaderGoneError or RunError.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(STDOUT, rest) :]
        except BlockingIOError:
            poll_once({STDOUT: select.POLLOUT}, None)
        except BrokenPipeError:
            raise ReaderGoneError from None
        except OSError as error:
            raise RunError(f"cannot write to standard output: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
