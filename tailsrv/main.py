"""The command `tailsrv`: from the command line to a running supervisor and an exit status.

`main()` parses the arguments, opens the file and the listening sockets, or takes them over from the
version that an upgrade has replaced, and runs the supervisor until the server ends.
"""

import gc
import os
import socket
import struct
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from inotify_simple import INotify
from setproctitle import getproctitle

from tailsrv import __version__
from tailsrv.arguments import make_parser
from tailsrv.config import Config, ConfigError, ExitStatus, Timing
from tailsrv.control_socket import AlreadyServedError, Control, describe_holder, find_supervisor
from tailsrv.linux.process import occupy_standard_descriptors, raise_descriptor_limit
from tailsrv.linux.process_title import make_room
from tailsrv.linux.signals import block_all, ignore_io_signals, interruptible
from tailsrv.linux.sockets import accept_queue
from tailsrv.linux.systemd import is_service, passed_sockets, take_sockets
from tailsrv.linux.tcp_info_check import counts_streams
from tailsrv.listeners import (
    BACKLOG,
    PORT_TRIES,
    ListenError,
    PortInUseError,
    assign,
    each_once,
    endpoints,
    extend_listeners,
    inode,
    names_of,
    open_listeners,
    share,
    take_listeners,
)
from tailsrv.log import describe_error, fields, logger, set_up
from tailsrv.segments import Log, Segment
from tailsrv.served_file import CannotServeError, open_file
from tailsrv.supervisor.log_store import LogStore, Restored
from tailsrv.supervisor.report_reader import RESERVED_DESCRIPTORS
from tailsrv.supervisor.slot import Slot
from tailsrv.supervisor.state_file import StateFileError, default_path
from tailsrv.supervisor.supervisor import Supervisor
from tailsrv.supervisor.takeover import (
    Orphan,
    TakeoverError,
    collect,
    compose,
    find,
    find_homes,
    why_in_use,
)
from tailsrv.supervisor.upgrade import (
    command,
    is_check,
    is_upgrade,
    keep_private,
    read_state,
)
from tailsrv.supervisor.upgrade_state import StateError, UpgradeState
from tailsrv.titles import longest_title
from tailsrv.upgrade_check import answer_check
from tailsrv.worker.worker import work

NO_PORT = "the following arguments are required: -p/--port"
NO_PORT_HINT = (
    " (or start the socket unit; for tailsrv@.service set PORT= in /etc/tailsrv/INSTANCE.env,"
    " where INSTANCE has no backslashes)"
)

# Two IPv6 addresses, for which room in the process title is reserved if the service manager passes
# the sockets. Their real addresses are not known yet when the room is reserved.
LONGEST_PASSED = ["[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535"] * 2


def parse(argv: Sequence[str] | None) -> tuple[Config, int]:
    """Parse `argv` (sys.argv if None); a usage error exits the program with status 2.

    Returns the configuration and the verbosity of the log, from -1 (warnings) to 1 (debug).
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    passed = bool(passed_sockets())
    if passed and (args.port is not None or args.bind):
        parser.error(
            "-p/--port and --bind cannot be combined with sockets from the service manager:"
            " leave both out (PORT= empty)"
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
            orphan_timeout=args.orphan_timeout,
            header_timeout=args.header_timeout,
            linger=args.linger_after_file_is_gone,
            follow_name=args.follow_name,
            state_file=state_file_of(args),
            max_clients=args.max_clients,
            allow=tuple(args.allow),
        )
    except ConfigError as error:
        parser.error(str(error))
    return config, args.verbose - args.quiet


def state_file_of(args: Namespace) -> str:
    """Return the path of the state file, empty if there is none.

    The default is a file in the folder that the service manager provides.
    """
    if args.state_file is not None:
        return str(args.state_file)
    return (default_path(os.environ, args.path) or "") if args.follow_name else ""


def main(argv: Sequence[str] | None = None, timing: Timing | None = None) -> int:
    """Run `tailsrv` with `argv` (sys.argv if None) until the server ends; return the exit status.

    `timing` is for tests. An upgrade keeps it only if the new program passes it to main() again.
    """
    # setproctitle finds the memory for its title only while the environment is as the kernel laid
    # it out, so call it first. It raises this error for a file name that cannot be decoded, but
    # only after it has found the memory.
    with suppress(UnicodeDecodeError):
        getproctitle()
    config, verbosity = parse(argv)
    if timing is not None:
        config = replace(config, timing=timing)
    if is_check():
        return answer_check(config)
    # make_room() may execute the command line of this process again. If the caller has passed
    # arguments, that is not the command to execute.
    if argv is None:
        names = LONGEST_PASSED if config.port is None else endpoints(config.bind, 65535)
        make_room(longest_title(names, config.path), *command())
    # Signals stay blocked until the supervisor has installed its handlers.
    block_all()
    ignore_io_signals()
    set_up(verbosity)
    try:
        occupy_standard_descriptors()
        state = read_state()
        supervisor = prepare(config) if state is None else continue_upgrade(config, state)
    except (
        CannotServeError,
        ListenError,
        AlreadyServedError,
        StateError,
        StateFileError,
        TakeoverError,
        OSError,
    ) as error:
        # OSError: out of descriptors or memory.
        logger.critical("cannot serve: %s", fields(path=config.path, reason=error))
        return ExitStatus.CANNOT_SERVE
    try:
        status = supervisor.run()
    except (OSError, MemoryError) as error:
        # The workers notice that the supervisor is gone, and wait for another one.
        logger.critical("supervisor failed: %s", describe_error(error))
        status = ExitStatus.CANNOT_SERVE
    except Exception:
        logger.exception("supervisor failed with an internal error, please report this bug")
        status = ExitStatus.CANNOT_SERVE
    # The interpreter restores the default action of signals while it exits. Without this, another
    # SIGTERM at that moment would kill the process, and the exit status would be lost.
    block_all()
    return status


@dataclass(frozen=True, slots=True)
class Listening:
    """The listening sockets of a new server, or the orphaned workers that have them.

    Attributes:
        names: The endpoints, as text.
        control: The control sockets.
        orphans: The workers to take over from.
        listeners: The sockets of each slot if there are no orphans.
        shared: Whether all slots share the same sockets.

    """

    names: list[str]
    control: Control
    orphans: Sequence[Orphan] = ()
    listeners: Sequence[list[socket.socket]] = ()
    shared: bool = False


def prepare(config: Config) -> Supervisor:
    """Open the file and the listening sockets for a new server, and return its supervisor.

    If workers whose supervisor has died still serve the same endpoints, take over from them.

    Raises CannotServeError, ListenError, AlreadyServedError, StateFileError or TakeoverError.
    """
    descriptors = raise_descriptor_limit()
    # Take the passed sockets before anything else is opened: they have fixed descriptor numbers.
    passed = take_listeners(take_sockets())
    store = LogStore(config.state_file, config.path) if config.state_file else None
    # getaddrinfo(3) blocks while a name server does not answer.
    with interruptible():
        if config.port is None:
            listening = listen_at_passed(config, passed)
        else:
            listening = listen_at_port(config, config.port)
    if listening.orphans:
        supervisor = take_over_orphans(config, listening, passed, store)
    else:
        supervisor = begin(config, listening, store)
    listeners = [slot.listeners for slot in supervisor.pool.slots]
    logger.info(
        "listening: %s",
        fields(
            version=__version__,
            endpoints=",".join(listening.names),
            port=listeners[0][0].getsockname()[1],
            workers=config.workers,
            descriptors=descriptors,
        ),
    )
    warn_of_limits(config, listeners, descriptors)
    return supervisor


def listen_at_passed(config: Config, passed: Sequence[socket.socket]) -> Listening:
    """Listen at the sockets that a service manager has passed.

    Raises AlreadyServedError or TakeoverError.
    """
    names = names_of(passed)
    control = Control.lock(names)
    # The port does not show whether there are orphans: the service manager has it.
    found = find(names, config.timing.takeover_patience, trust_all=False)
    if found.orphans:
        return Listening(names, control, found.orphans)
    listeners, shared = assign(passed, config.workers)
    return Listening(names, control, (), listeners, shared)


def listen_at_port(config: Config, port: int) -> Listening:
    """Listen at `port`, or find the orphaned workers that do.

    Raises AlreadyServedError if another tailsrv listens there, TakeoverError, and ListenError for
    any other failure.
    """
    if port == 0:
        return listen_at_free_port(config)
    names = endpoints(config.bind, port)
    try:
        listeners = open_listeners(config.bind, port, config.workers)
    except PortInUseError as error:
        for endpoint in names:
            if find_supervisor(endpoint) is not None:
                raise AlreadyServedError(describe_holder(endpoint)) from None
        control = Control.lock(names)
        found = find(names, config.timing.takeover_patience, trust_all=True)
        if found.orphans:
            return Listening(names, control, found.orphans)
        if reason := why_in_use(names, found.foreign):
            raise ListenError(f"{error}: {reason}") from None
        # Orphans that do not answer have been killed.
        return Listening(names, control, (), open_listeners(config.bind, port, config.workers))
    return Listening(names, Control.lock(names), (), listeners)


def listen_at_free_port(config: Config, tries: int = PORT_TRIES) -> Listening:
    """Listen at a port that the kernel chooses. Raises AlreadyServedError or ListenError."""
    listeners = open_listeners(config.bind, 0, config.workers)
    names = endpoints(config.bind, listeners[0][0].getsockname()[1])
    try:
        return Listening(names, Control.lock(names), (), listeners)
    except AlreadyServedError:
        # Another supervisor is about to take this port over, but its orphans have just ended. As
        # long as the port is open here, the kernel chooses another one.
        if tries == 1:
            raise
        return listen_at_free_port(config, tries - 1)


def begin(config: Config, listening: Listening, store: LogStore | None) -> Supervisor:
    """Return the supervisor of a server that begins with the file, or waits for it.

    Raises CannotServeError or StateFileError.
    """
    if config.follow_name and store is None:
        logger.info(
            "offsets begin at 0, because no state file keeps them: %s",
            fields(path=config.path, hint="--state-file"),
        )
    restored = open_log(config, store)
    prepare_to_fork()
    slots = [
        Slot(index, sockets, listening.shared) for index, sockets in enumerate(listening.listeners)
    ]
    supervisor = Supervisor(
        config, slots, listening.names, listening.control, partial(work, config=config), store
    )
    supervisor.begin(restored)
    return supervisor


def open_log(config: Config, store: LogStore | None) -> Restored:
    """Open the file, and those before and after it that the state file leads to.

    Raises CannotServeError or StateFileError.
    """
    # open(2) blocks while a network file system does not answer.
    with interruptible():
        restored = store.restore() if store else Restored(None, [], 0)
        if restored.log is None and (file := open_file(config.path)) is not None:
            return Restored(Log([Segment(restored.end, file)]), [], restored.end)
    return restored


def take_over_orphans(
    config: Config,
    listening: Listening,
    passed: Sequence[socket.socket],
    store: LogStore | None,
) -> Supervisor:
    """Return a supervisor that continues what the orphaned workers serve.

    `passed` are the sockets that a service manager has passed. Raises TakeoverError, ListenError or
    StateFileError.
    """
    if store is not None:
        # A state file that belongs to something else must not be overwritten.
        store.check()
    counts = counts_streams()
    prepare_to_fork()
    # The clients wait from here on, until the new workers are ready.
    orphans = collect(listening.orphans, config, counts, config.timing.takeover_patience)
    handovers = [orphan.handover for orphan in orphans]
    owned = [list(map(inode, handover.listeners)) for handover in handovers]
    taken = [socket.socket(fileno=fd) for handover in handovers for fd in handover.listeners]
    if config.port is not None:
        listeners, shared = extend_listeners(config.bind, config.port, config.workers, taken)
    else:
        # If the service manager has made new sockets, connections wait in the old ones as well.
        listeners, shared = assign(each_once([*passed, *taken]), config.workers)
    rows = [[inode(sock.fileno()) for sock in row] for row in listeners]
    homes = None if shared else find_homes(owned, rows)
    if homes is None and not shared:
        listeners, shared = share([sock for row in listeners for sock in row], config.workers)
    try:
        state, places = compose(
            handovers,
            listeners,
            shared,
            homes or [None] * len(orphans),
            listening.names,
            config.follow_name,
        )
        predecessors: list[list[socket.socket]] = [[] for _ in listeners]
        for orphan, place in zip(orphans, places, strict=True):
            predecessors[place].append(orphan.sock)
        supervisor = load(config, state, listening.control, store, predecessors)
    except (ValueError, OverflowError, struct.error) as error:
        raise TakeoverError(f"orphaned workers do not serve the same log: {error}") from error
    if state.log is None:
        # The orphans have waited for the file.
        supervisor.begin(open_log(config, store))
    elif supervisor.roller is not None:
        supervisor.roller.take_over()
    return supervisor


def warn_of_limits(
    config: Config, listeners: Sequence[Sequence[socket.socket]], descriptors: int
) -> None:
    """Log a warning for each limit of the system that is lower than what the server needs."""
    _, backlog = accept_queue(listeners[0][0])
    # The length is 0 if the system does not report it.
    if 0 < backlog < BACKLOG:
        logger.warning(
            "accept queues are shorter than requested, some clients will connect more slowly"
            " when many connect at once: %s",
            fields(
                backlog=backlog,
                wanted=BACKLOG,
                hint="raise net.core.somaxconn, and Backlog= of the socket unit if there is one",
            ),
        )
    # The supervisor has a descriptor for each client. A worker may need as many, if all clients
    # connect to it.
    needed = config.max_clients + RESERVED_DESCRIPTORS + sum(map(len, listeners)) + config.workers
    if config.max_clients and needed > descriptors:
        logger.warning(
            "file descriptor limit is too low for --max-clients: %s",
            fields(
                max_clients=config.max_clients,
                needed=needed,
                descriptors=descriptors,
                hint="raise LimitNOFILE= or ulimit -Hn",
            ),
        )


def continue_upgrade(config: Config, state: UpgradeState) -> Supervisor:
    """Continue the server of the previous version from `state`, which an upgrade has passed on."""
    raise_descriptor_limit()
    keep_private(state.descriptors())
    prepare_to_fork()
    control = Control([socket.socket(fileno=fd) for fd in state.control])
    store = (
        LogStore(config.state_file, config.path, *state.state_lock) if config.state_file else None
    )
    return load(config, state, control, store)


def load(
    config: Config,
    state: UpgradeState,
    control: Control,
    store: LogStore | None,
    predecessors: Sequence[list[socket.socket]] = (),
) -> Supervisor:
    """Return the supervisor of a server that has the given `state`.

    `predecessors` are the connections to the orphaned workers of each slot.
    """
    slots = [Slot.load(index, saved) for index, saved in enumerate(state.slots)]
    for slot, orphans in zip(slots, predecessors, strict=False):
        slot.predecessors = orphans
    return Supervisor(
        config, slots, state.endpoints, control, partial(work, config=config), store, state
    )


def prepare_to_fork() -> None:
    """Do work once that every worker would otherwise repeat, and let workers share memory."""
    # The first INotify searches for the C library, which starts a child process. It may fail: a
    # worker that gets no inotify instance reports that itself, and polls.
    with suppress(OSError):
        INotify().close()
    gc.collect()
    # A garbage collection in a worker writes to every object that it examines, and each page
    # written to is copied for that worker. Frozen objects are not examined.
    gc.freeze()
