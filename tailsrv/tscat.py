"""Copies a file that tailsrv serves to standard output: the command `tscat`."""

import os
import select
import sys
from collections.abc import Sequence

from tailsrv.client import OtherFileError, PlaceError, follow
from tailsrv.client_arguments import ExitStatus, make_tscat_parser, split_offset

STDOUT = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tscat` with `argv` (sys.argv if None); return the exit status."""
    try:
        options = make_tscat_parser().parse_intermixed_args(argv)
        servers, offset = split_offset(options.servers)
        os.fstat(STDOUT)  # before a connection takes its number
        with follow(
            servers, offset, once=options.once, idle=options.until_idle, whole_lines=options.lines, report=complain, wait=wait_for_reader
        ) as stream:
            for chunk in stream:
                write(chunk)
    except (KeyboardInterrupt, BrokenPipeError):
        return ExitStatus.DONE
    except ValueError as error:
        complain(str(error))
        return ExitStatus.USAGE
    except OtherFileError as error:
        complain(str(error))
        return ExitStatus.OTHER_FILE
    except (OSError, PlaceError) as error:
        complain(str(error))
        return ExitStatus.FAILED
    return ExitStatus.DONE


def complain(text: str) -> None:
    """Say a line on standard error, if there is one."""
    print(f"tscat: {text}", file=sys.stderr)


def wait_for_reader(fd: int, events: int, seconds: float | None) -> bool:
    """Wait as a `Wait` does; raises BrokenPipeError as soon as nobody reads standard output any more."""
    poll = select.poll()
    poll.register(STDOUT, 0)  # errors are reported unasked
    if fd >= 0:
        poll.register(fd, events)
    seen = dict(poll.poll(None if seconds is None else max(0.0, seconds) * 1000))
    if seen.get(STDOUT, 0) & (select.POLLERR | select.POLLHUP):
        raise BrokenPipeError
    return fd in seen


def write(data: bytes) -> None:
    """Write all of `data` to standard output, whatever that is."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(STDOUT, rest) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(STDOUT, select.POLLOUT)
            poll.poll()


if __name__ == "__main__":
    sys.exit(main())
