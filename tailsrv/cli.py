"""Turns argv into a `Config` and an exit status for `tailsrv`."""

import argparse
import gc
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from inotify_simple import INotify
from setproctitle import getproctitle

from tailsrv import __version__
from tailsrv.config import DEFAULT_GRACE, Config, ConfigError, ExitStatus
from tailsrv.control import AlreadyServedError, Control, describe_holder, find_supervisor
from tailsrv.listener import ListenError, endpoints, open_listeners
from tailsrv.log import fields, logger, set_up
from tailsrv.processors import count_processors
from tailsrv.signals import hold
from tailsrv.slot import Slot
from tailsrv.state import State, StateError
from tailsrv.supervisor import Supervisor
from tailsrv.syscalls import raise_descriptor_limit
from tailsrv.upgrade import answer_check, is_check, keep_private, read_state
from tailsrv.watch import CannotServeError, open_file
from tailsrv.worker import work

EPILOG = """\
A client sends one line, where to start: N (from byte N), -N (the last N bytes), -0 (only what is new).
It gets the file from there, and then every byte appended:  echo 0 | nc HOST PORT

signals: TERM or INT drain and end, QUIT ends at once, HUP upgrades to the installed version in place
exit status: 0 ended as asked or the file is gone, 1 cannot serve, 2 usage, 3 workers cannot start
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `tailsrv`."""
    parser = argparse.ArgumentParser(
        prog="tailsrv",
        description="Serve one append-only file to any number of TCP clients: like tail -f, as a server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="FILE", help="the file to serve; it may come into being later")
    parser.add_argument("-p", "--port", type=whole, required=True, help="TCP port to listen on; 0: the kernel chooses one")
    parser.add_argument(
        "-w", "--workers", type=workers, default=1, metavar="N|auto",
        help="worker processes (default: 1); auto: one for each processor that this process may use",
    )  # fmt: skip
    parser.add_argument(
        "--bind", action="append", default=[], metavar="ADDR",
        help="address to listen on, may be repeated (default: all addresses, IPv4 and IPv6)",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=seconds, default=DEFAULT_GRACE, metavar="SECONDS",
        help="how long clients have to take what is in the file when the server ends (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--header-timeout", type=seconds, default=0.0, metavar="SECONDS",
        help="end connections that have not sent their line by then (default: 0, never)",
    )  # fmt: skip
    parser.add_argument(
        "--linger-after-file-is-gone", action="store_true",
        help="go on serving the file when it is deleted, moved away or replaced, instead of ending",
    )  # fmt: skip
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="log each connection, too")
    volume.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def whole(text: str) -> int:
    """Return the whole number `text`; int() alone would also take `1_000` and other people's digits."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"not a whole number: {text!r}")
    return int(text.lstrip("0")[:20] or "0")  # enough to be too much


def workers(text: str) -> int:
    """Return the number of workers that `-w` asks for."""
    return count_processors() if text == "auto" else whole(text)


def seconds(text: str) -> float:
    """Return the seconds that `text` says."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text!r}") from None


def parse(argv: Sequence[str] | None) -> tuple[Config, int]:
    """Return what `argv` asks for, and how much is to be logged; a usage error ends the program with status 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        config = Config(
            path=args.path,
            port=args.port,
            workers=args.workers,
            bind=tuple(args.bind),
            grace=args.grace,
            header_timeout=args.header_timeout,
            linger=args.linger_after_file_is_gone,
        )
    except ConfigError as error:
        parser.error(str(error))
    return config, args.verbose - args.quiet


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tailsrv` with `argv` (sys.argv if None) until it is told to end; return the exit status."""
    with suppress(UnicodeDecodeError):  # of a file name; it has looked by then
        getproctitle()  # setproctitle finds its room only while the environment is as the kernel laid it out
    config, verbosity = parse(argv)
    if is_check():
        return answer_check()
    hold()  # until the supervisor's handlers are there
    occupy_standard_descriptors()
    set_up(verbosity)
    try:
        handed_on = read_state()
        supervisor, file = prepare(config) if handed_on is None else take_over(config, handed_on)
    except (CannotServeError, ListenError, AlreadyServedError, StateError, OSError) as error:  # OSError: no descriptors, no memory
        logger.critical("cannot serve: %s", fields(path=config.path, reason=error))
        return ExitStatus.CANNOT_SERVE
    status = supervisor.run(file)
    # The interpreter's own end gives signals their default action back: one more TERM would be our exit status.
    hold()
    return status


def prepare(config: Config) -> tuple[Supervisor, int | None]:
    """Return a supervisor that listens as `config` says, and the open file, None if there is none yet.

    Raises CannotServeError, ListenError, AlreadyServedError.
    """
    descriptors = raise_descriptor_limit()
    file = open_file(config.path)
    prepare_to_fork()
    listeners, port = listen(config)
    names = endpoints(config.bind, port)
    control = Control.lock(names)
    logger.info(
        "listening: %s",
        fields(version=__version__, endpoints=",".join(names), port=port, workers=config.workers, descriptors=descriptors),
    )
    slots = [Slot(index, sockets) for index, sockets in enumerate(listeners)]
    return Supervisor(config, slots, names, control, partial(work, config=config)), file


def take_over(config: Config, handed_on: State) -> tuple[Supervisor, int | None]:
    """Return a supervisor that goes on from what the version before us handed on, and the open file if there is one."""
    raise_descriptor_limit()
    keep_private(handed_on.descriptors())
    prepare_to_fork()
    slots = [Slot.load(index, saved) for index, saved in enumerate(handed_on.slots)]
    control = Control([socket.socket(fileno=fd) for fd in handed_on.control])
    return Supervisor(config, slots, handed_on.endpoints, control, partial(work, config=config), handed_on), handed_on.file


def occupy_standard_descriptors() -> None:
    """See to it that 0, 1 and 2 are open: a client's socket under such a number would be sent the log."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def listen(config: Config) -> tuple[list[list[socket.socket]], int]:
    """Return the listeners of each slot and their port. Raises ListenError, naming another tailsrv on the port."""
    try:
        listeners = open_listeners(config.bind, config.port, config.workers)
    except ListenError:
        for endpoint in endpoints(config.bind, config.port):
            if find_supervisor(endpoint) is not None:
                raise AlreadyServedError(describe_holder(endpoint)) from None
        raise
    return listeners, listeners[0][0].getsockname()[1]


def prepare_to_fork() -> None:
    """Do once what every worker would otherwise do for itself, so that they share the memory."""
    with suppress(OSError):  # a worker that gets no instance says so itself, and polls
        INotify().close()  # looks for the C library, by way of a child process
    gc.collect()
    gc.freeze()  # a collection in a worker would write to every page that it looks at, and get its own copy
