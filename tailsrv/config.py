"""The frozen `Config`, its defaults and its checks. Pure: no system call, nothing of ours."""

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network
from math import isfinite

# seconds; service managers give a stopping service longer than that
DEFAULT_GRACE = 5.0

# far beyond any machine's processors; a typing slip must not become a fork bomb
MAX_WORKERS = 1024
# more than the kernel gives a process descriptors for
MAX_CLIENTS = 1 << 30


Network = IPv4Network | IPv6Network


class ExitStatus(IntEnum):
    """How `tailsrv` ends; part of the interface, the same in docs/using.md."""

    # ended as asked, or the file is gone
    DONE = 0
    # port in use, file unreadable, not a regular file, ...
    CANNOT_SERVE = 1
    # the command line is wrong
    USAGE = 2
    # workers cannot start; also what a worker that cannot boot exits with
    CANNOT_BOOT = 3


class ConfigError(ValueError):
    """A setting has a value that tailsrv cannot work with; the message names both."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the server waits where nothing tells it that something has happened; all in seconds, 0 or more.

    No option sets these. A test that would have to sit through such a wait starts a server with shorter ones.
    """

    # Between attempts to open a file that does not exist yet, or may not be read yet. Nobody notices half a second.
    open_retry: float = 0.5

    # Between looks at a file whose appends inotify does not report. Each look wakes up an idle machine.
    poll_interval: float = 1.0

    # Without an append, until a file that was moved away counts as complete: its writer needs a moment to reopen its log.
    settle: float = 1.0

    # Between looks at such a file after that, for bytes that are appended too late.
    late_interval: float = 5.0

    # How long such a file is held open to count late bytes. If it was deleted, it keeps its disk space for as long.
    late_patience: float = 60.0

    # After fork(2) has failed for lack of memory or of room in the task limit; both may pass.
    fork_retry: float = 1.0

    # A worker that lived at least this long did not fail at start-up, so its successor starts at once.
    long_life: float = 1.0

    # The backoff before the next worker of a slot whose workers die young doubles from the first to the second of these.
    first_delay: float = 0.1
    max_delay: float = 5.0

    # Beyond the grace, until workers that do not end are killed. They need a moment to close their last clients.
    kill_margin: float = 1.0

    # Between two status texts for the service manager, which wakes up for each.
    status_interval: float = 5.0


@dataclass(frozen=True, slots=True)
class Config:
    """What one server was asked to do.

    `path` is the file to serve and `port` a TCP port (0: the kernel chooses; None: the service manager passes
    the sockets). `bind` holds the addresses to listen on; empty means every address of the machine. `grace` and
    `header_timeout` are seconds; a `header_timeout` of 0 means never. When the file is gone, `linger` serves on what
    it was, and `follow_name` the next file of its name. `max_clients` of 0 means no limit; `allow` holds the networks
    that clients may come from, empty for all. `timing` is for tests. Raises ConfigError for a value out of range.
    """

    path: str
    port: int | None
    workers: int = 1
    bind: tuple[str, ...] = ()
    grace: float = DEFAULT_GRACE
    header_timeout: float = 0.0
    linger: bool = False
    follow_name: bool = False
    max_clients: int = 0
    allow: tuple[Network, ...] = ()
    timing: Timing = Timing()

    def __post_init__(self) -> None:
        if not self.path or "\0" in self.path:
            raise ConfigError("FILE must be a path that is not empty")
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}")
        if self.port is None and self.bind:
            raise ConfigError(
                "bind is for a port of our own, not for sockets that the service manager passes"
            )
        if not 1 <= self.workers <= MAX_WORKERS:
            raise ConfigError(f"workers must be from 1 to {MAX_WORKERS}, not {self.workers}")
        for name, seconds in (("grace", self.grace), ("header-timeout", self.header_timeout)):
            if not (isfinite(seconds) and seconds >= 0):
                raise ConfigError(f"{name} must be 0 or more seconds, not {seconds}")
        if not 0 <= self.max_clients <= MAX_CLIENTS:
            raise ConfigError(
                f"max-clients must be from 0 to {MAX_CLIENTS}, not {self.max_clients}"
            )
        if self.linger and self.follow_name:
            raise ConfigError("linger-after-file-is-gone and follow-name exclude each other")
