"""The settings of one server: the frozen `Config`, its defaults and its checks.

Pure: this module makes no system call and imports no other module of tailsrv.
"""

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network
from math import isfinite

# Default of --grace, in seconds. Service managers give a service more time than this to stop.
DEFAULT_GRACE = 5.0

# Default of --orphan-timeout, in seconds. A service manager starts a service again in less time.
DEFAULT_ORPHAN_TIMEOUT = 30.0

# No server needs more workers. Without a limit, a typing error could become a fork bomb.
MAX_WORKERS = 1024

# The kernel gives no process as many descriptors as this.
MAX_CLIENTS = 1 << 30

Network = IPv4Network | IPv6Network


class ExitStatus(IntEnum):
    """Exit statuses of `tailsrv`. They are part of the interface: docs/using.md lists the same."""

    # Shut down as requested, or the file is gone.
    DONE = 0
    # The server cannot serve: for example, the port is in use, or the file cannot be read.
    CANNOT_SERVE = 1
    # The command line is wrong.
    USAGE = 2
    # Workers cannot start. A worker that fails to start exits with this status as well.
    CANNOT_BOOT = 3


class ConfigError(ValueError):
    """A setting has a value that tailsrv cannot use; the message names the option and the value."""


@dataclass(frozen=True, slots=True)
class DeadPeerLimits:
    """When a peer counts as dead.

    With the defaults, a dead peer is found after about as long as keepalive takes, whether the file
    grows or not.
    """

    # Seconds from one check of all clients to the next.
    interval: float = 30.0
    # Seconds since the last acknowledgement of any kind from the peer.
    silence: float = 120.0
    # Retransmissions or window probes in a row that the peer has not answered.
    attempts: int = 4


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the server waits where no event wakes it up; all numbers are seconds, 0 or more.

    No option sets these. Tests start a server with shorter ones.
    """

    # Seconds between attempts to open a file that does not exist yet or cannot be read yet. A delay
    # of half a second does not matter to clients that wait for a file to appear.
    open_retry: float = 0.5

    # Seconds between polls of a file whose appends inotify does not report. Each poll wakes up an
    # idle machine.
    poll_interval: float = 1.0

    # Seconds without an append after which the active segment is sealed, once the next file of its
    # name has a byte. Its writer needs a moment to reopen its log.
    settle: float = 1.0

    # Seconds after the first byte of the next file until the active segment is sealed in any case.
    seal_limit: float = 5.0

    # Seconds that workers have to acknowledge the order to freeze, before a roll. A worker that
    # does not is killed: clients of all workers wait for it.
    freeze_patience: float = 2.0

    # Seconds between polls of a sealed segment, to count bytes that are appended too late.
    late_interval: float = 5.0

    # Seconds for which late bytes are counted.
    late_patience: float = 60.0

    # Seconds that orphaned workers have to answer a supervisor that takes over. Those that do not
    # are killed.
    takeover_patience: float = 5.0

    # Seconds that the next supervisor has to start a worker, when an orphaned worker has handed
    # everything over. Then the orphan serves on.
    commit_patience: float = 30.0

    # Seconds between attempts to write the state file, if that has failed.
    save_retry: float = 10.0

    # Seconds between checks whether sealed segments have been deleted, where inotify does not
    # report that.
    deletion_poll: float = 10.0

    # Seconds to wait after fork(2) has failed for lack of memory or because the limit on tasks was
    # reached. Both may be temporary.
    fork_retry: float = 1.0

    # Seconds. A worker that has lived for this long did not fail at start-up, so its successor is
    # started without delay.
    long_life: float = 1.0

    # Seconds to wait before a slot gets its next worker, after two workers in a row have each
    # lived for less than `long_life`. The delay doubles with each further such death, up to
    # `max_delay`.
    first_delay: float = 0.1
    max_delay: float = 5.0

    # Seconds after the grace period until workers that have not exited are killed. They need a
    # moment to close their last clients.
    kill_margin: float = 1.0

    # Seconds between two status texts for the service manager. Each text wakes it up.
    status_interval: float = 5.0

    # When a client whose machine has vanished is disconnected.
    dead_peers: DeadPeerLimits = DeadPeerLimits()


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of one server.

    Args:
        path: The file to serve.
        port: The TCP port to listen on. 0 lets the kernel choose a port; None means that the
            service manager passes the listening sockets.
        workers: The number of worker processes, from 1 to MAX_WORKERS.
        bind: The addresses to listen on. Empty means every address of the machine.
        grace: Seconds that clients have to read the rest of the log when the server ends.
        orphan_timeout: Seconds for which workers serve on when the supervisor has died. 0 makes
            them end at once.
        header_timeout: Seconds that a client has to send its header. 0 means no limit.
        linger: Keep serving the open file when its path no longer names it.
        follow_name: Continue the log with the next file of that name when the path no longer names
            the open file.
        state_file: The file that keeps the segments of the log. Empty means that offsets begin at
            0 with each start.
        max_clients: The largest number of clients at a time. 0 means no limit.
        allow: The networks that clients may connect from. Empty means all.
        timing: Shorter waits, for tests.

    Raises:
        ConfigError: A value is out of range, or two settings cannot be combined.

    """

    path: str
    port: int | None
    workers: int = 1
    bind: tuple[str, ...] = ()
    grace: float = DEFAULT_GRACE
    orphan_timeout: float = DEFAULT_ORPHAN_TIMEOUT
    header_timeout: float = 0.0
    linger: bool = False
    follow_name: bool = False
    state_file: str = ""
    max_clients: int = 0
    allow: tuple[Network, ...] = ()
    timing: Timing = Timing()

    def __post_init__(self) -> None:
        if not self.path or "\0" in self.path:
            raise ConfigError("argument FILE: must not be empty or contain a NUL byte")
        if self.port is not None:
            _check_range("-p/--port", self.port, 0, 65535)
        if self.port is None and self.bind:
            raise ConfigError(
                "argument --bind: needs -p/--port;"
                " leave out --bind if the service manager passes the listening sockets"
            )
        _check_range("-w/--workers", self.workers, 1, MAX_WORKERS)
        for option, seconds in (
            ("--grace", self.grace),
            ("--orphan-timeout", self.orphan_timeout),
            ("--header-timeout", self.header_timeout),
        ):
            if not (isfinite(seconds) and seconds >= 0):
                raise ConfigError(f"argument {option}: must be 0 or more seconds, not {seconds}")
        _check_range("--max-clients", self.max_clients, 0, MAX_CLIENTS)
        if self.state_file and not self.follow_name:
            raise ConfigError("argument --state-file: needs --follow-name")
        if "\0" in self.state_file:
            raise ConfigError("argument --state-file: must not contain a NUL byte")
        if self.linger and self.follow_name:
            raise ConfigError(
                "argument --follow-name: not allowed with argument --linger-after-file-is-gone"
            )


def _check_range(option: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(f"argument {option}: must be from {least} to {most}, not {value}")
