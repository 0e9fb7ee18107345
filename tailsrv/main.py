"""Turns argv into a `Config` and an exit status for `tailsrv`."""

import gc
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from inotify_simple import INotify
from setproctitle import getproctitle

from tailsrv import __version__
from tailsrv.arguments import make_parser
from tailsrv.config import Config, ConfigError, ExitStatus, Timing
from tailsrv.control import AlreadyServedError, Control, describe_holder, find_supervisor
from tailsrv.linux.process import occupy_standard_descriptors, raise_descriptor_limit
from tailsrv.linux.process_title import make_room
from tailsrv.linux.signals import block_all, ignore_io_signals, interruptible
from tailsrv.linux.sockets import accept_queue
from tailsrv.linux.systemd import is_service, passed_sockets, take_sockets
from tailsrv.listeners import (
    BACKLOG,
    ListenError,
    assign,
    endpoints,
    names_of,
    open_listeners,
    take_listeners,
)
from tailsrv.log import describe_error, fields, logger, set_up
from tailsrv.served_file import CannotServeError, open_file
from tailsrv.supervisor.report_reader import RESERVED_DESCRIPTORS
from tailsrv.supervisor.slot import Slot
from tailsrv.supervisor.supervisor import Supervisor
from tailsrv.supervisor.upgrade import (
    answer_check,
    command,
    is_check,
    is_upgrade,
    keep_private,
    read_state,
)
from tailsrv.supervisor.upgrade_state import StateError, UpgradeState
from tailsrv.titles import longest_title
from tailsrv.worker.worker import work

NO_PORT = "the following arguments are required: -p/--port"
NO_PORT_HINT = " (or a socket unit; for tailsrv@.service set PORT= in /etc/tailsrv/INSTANCE.env, INSTANCE without any backslash)"

# Room in the title for the addresses of passed sockets: two IPv6 addresses. The title's room is
# made before the sockets are taken, so their real names are not known yet.
PASSED = ["[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535"] * 2


def parse(argv: Sequence[str] | None) -> tuple[Config, int]:
    """Return what `argv` asks for, and how much is to be logged; a usage error ends the program with status 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    passed = bool(passed_sockets())
    if passed and (args.port is not None or args.bind):
        parser.error(
            "-p/--port and --bind do not go with the sockets that the service manager passes: leave them out (PORT= empty)"
        )
    if not passed and args.port is None and not is_upgrade():
        parser.error(NO_PORT + (NO_PORT_HINT if is_service() else ""))
    try:
        config = Config(
            path=args.path,
            port=args.port,
            workers=args.workers,
            bind=tuple(args.bind),
            grace=args.grace,
            header_timeout=args.header_timeout,
            linger=args.linger_after_file_is_gone,
            follow_name=args.follow_name,
            max_clients=args.max_clients,
            allow=tuple(args.allow),
        )
    except ConfigError as error:
        parser.error(str(error))
    return config, args.verbose - args.quiet


def main(argv: Sequence[str] | None = None, timing: Timing | None = None) -> int:
    """Run `tailsrv` with `argv` (sys.argv if None) until it is told to end; return the exit status.

    `timing` is for tests. An upgrade keeps it where the program that is run again passes it again.
    """
    # of a file name; it has looked by then
    with suppress(UnicodeDecodeError):
        # setproctitle finds its room only while the environment is as the kernel laid it out
        getproctitle()
    config, verbosity = parse(argv)
    if timing is not None:
        config = replace(config, timing=timing)
    if is_check():
        return answer_check()
    # With arguments of a caller's, the command line of this process is not the one to execute.
    if argv is None:
        names = PASSED if config.port is None else endpoints(config.bind, 65535)
        make_room(longest_title(names, config.path), *command())
    # until the supervisor's handlers are there
    block_all()
    ignore_io_signals()
    set_up(verbosity)
    try:
        occupy_standard_descriptors()
        handed_on = read_state()
        supervisor, file = prepare(config) if handed_on is None else take_over(config, handed_on)
    except (CannotServeError, ListenError, AlreadyServedError, StateError, OSError) as error:
        # OSError: no descriptors, no memory
        logger.critical("cannot serve: %s", fields(path=config.path, reason=error))
        return ExitStatus.CANNOT_SERVE
    try:
        status = supervisor.run(file)
    except (OSError, MemoryError) as error:
        # the workers see it, and end as well
        logger.critical("cannot go on: %s", describe_error(error))
        status = ExitStatus.CANNOT_SERVE
    # The interpreter's own end gives signals their default action back: one more TERM would be our exit status.
    block_all()
    return status


def prepare(config: Config) -> tuple[Supervisor, int | None]:
    """Return a supervisor that listens as `config` says, and the open file, None if there is none yet.

    Raises CannotServeError, ListenError, AlreadyServedError.
    """
    descriptors = raise_descriptor_limit()
    # before anything else is opened: they have their numbers
    passed = take_listeners(take_sockets())
    # open(2) waits for a network file system that does not answer
    with interruptible():
        file = open_file(config.path)
    prepare_to_fork()
    if config.port is None:
        names = names_of(passed)
        listeners, shared = assign(passed, config.workers)
    else:
        # getaddrinfo(3) waits for a name server that does not answer
        with interruptible():
            listeners, shared = listen(config, config.port), False
        names = endpoints(config.bind, listeners[0][0].getsockname()[1])
    control = Control.lock(names)
    port = listeners[0][0].getsockname()[1]
    logger.info(
        "listening: %s",
        fields(
            version=__version__,
            endpoints=",".join(names),
            port=port,
            workers=config.workers,
            descriptors=descriptors,
        ),
    )
    warn_of_limits(config, listeners, descriptors)
    slots = [Slot(index, sockets, shared) for index, sockets in enumerate(listeners)]
    return Supervisor(config, slots, names, control, partial(work, config=config)), file


def warn_of_limits(
    config: Config, listeners: Sequence[Sequence[socket.socket]], descriptors: int
) -> None:
    """Say which limits of the system will be met before ours."""
    _, backlog = accept_queue(listeners[0][0])
    # 0: a system that does not tell
    if 0 < backlog < BACKLOG:
        logger.warning(
            "accept queues are cut short, in a storm of connections some wait longer: %s",
            fields(
                backlog=backlog,
                wanted=BACKLOG,
                hint="raise net.core.somaxconn, or Backlog= of the socket unit",
            ),
        )
    needed = config.max_clients + RESERVED_DESCRIPTORS + sum(map(len, listeners)) + config.workers
    if config.max_clients and needed > descriptors:
        logger.warning(
            "descriptors do not suffice for --max-clients, in a worker and once more in the supervisor: %s",
            fields(
                max_clients=config.max_clients,
                needed=needed,
                descriptors=descriptors,
                hint="raise LimitNOFILE= or ulimit -Hn",
            ),
        )


def take_over(config: Config, handed_on: UpgradeState) -> tuple[Supervisor, int | None]:
    """Return a supervisor that goes on from what the version before us handed on, and the open file if there is one."""
    raise_descriptor_limit()
    keep_private(handed_on.descriptors())
    prepare_to_fork()
    slots = [Slot.load(index, saved) for index, saved in enumerate(handed_on.slots)]
    control = Control([socket.socket(fileno=fd) for fd in handed_on.control])
    return Supervisor(
        config, slots, handed_on.endpoints, control, partial(work, config=config), handed_on
    ), handed_on.file


def listen(config: Config, port: int) -> list[list[socket.socket]]:
    """Return the listeners of each slot. Raises ListenError, naming another tailsrv on the port."""
    try:
        return open_listeners(config.bind, port, config.workers)
    except ListenError:
        for endpoint in endpoints(config.bind, port):
            if find_supervisor(endpoint) is not None:
                raise AlreadyServedError(describe_holder(endpoint)) from None
        raise


def prepare_to_fork() -> None:
    """Do once what every worker would otherwise do for itself, so that they share the memory."""
    # a worker that gets no instance says so itself, and polls
    with suppress(OSError):
        # looks for the C library, by way of a child process
        INotify().close()
    gc.collect()
    # a collection in a worker would write to every page that it looks at, and get its own copy
    gc.freeze()
