"""The frozen `Config`, its defaults and its checks. Pure: no system call, nothing of ours."""

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network
from math import isfinite

DEFAULT_GRACE = 5.0  # seconds; service managers give a stopping service longer than that

MAX_WORKERS = 1024  # far beyond any machine's processors; a typing slip must not become a fork bomb
MAX_CLIENTS = 1 << 30  # more than the kernel gives a process descriptors for


Network = IPv4Network | IPv6Network


class ExitStatus(IntEnum):
    """How `tailsrv` ends; part of the interface, the same in docs/using.md."""

    DONE = 0  # ended as asked, or the file is gone
    CANNOT_SERVE = 1  # port in use, file unreadable, not a regular file, ...
    USAGE = 2  # the command line is wrong
    CANNOT_BOOT = 3  # workers cannot start; also what a worker that cannot boot exits with


class ConfigError(ValueError):
    """A setting has a value that tailsrv cannot work with; the message names both."""


@dataclass(frozen=True, slots=True)
class Config:
    """What one server was asked to do.

    `path` is the file to serve and `port` a TCP port (0: the kernel chooses; None: the service manager passes
    the sockets). `bind` holds the addresses to listen on; empty means every address of the machine. `grace` and
    `header_timeout` are seconds; a `header_timeout` of 0 means never. When the file is gone, `linger` serves on what
    it was, and `follow_name` the next file of its name. `max_clients` of 0 means no limit; `allow` holds the networks
    that clients may come from, empty for all. Raises ConfigError for a value out of range.
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

    def __post_init__(self) -> None:
        if not self.path or "\0" in self.path:
            raise ConfigError("FILE must be a path that is not empty")
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}")
        if self.port is None and self.bind:
            raise ConfigError("bind is for a port of our own, not for sockets that the service manager passes")
        if not 1 <= self.workers <= MAX_WORKERS:
            raise ConfigError(f"workers must be from 1 to {MAX_WORKERS}, not {self.workers}")
        for name, seconds in (("grace", self.grace), ("header-timeout", self.header_timeout)):
            if not (isfinite(seconds) and seconds >= 0):
                raise ConfigError(f"{name} must be 0 or more seconds, not {seconds}")
        if not 0 <= self.max_clients <= MAX_CLIENTS:
            raise ConfigError(f"max-clients must be from 0 to {MAX_CLIENTS}, not {self.max_clients}")
        if self.linger and self.follow_name:
            raise ConfigError("linger-after-file-is-gone and follow-name exclude each other")
