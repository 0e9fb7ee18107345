"""Opens connections to the servers of one file: each address of each name in turn, with a growing pause between rounds."""

import errno
import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tailsrv.addresses import endpoint
from tailsrv.client.lookup import Found, Lookup
from tailsrv.linux.event_loop import MAX_WAIT
from tailsrv.linux.sockets import KEEPALIVE_OPTIONS

# How to wait: for events of a descriptor (-1: none), for at most so many seconds (None: for ever). Tells whether they came.
# One's own may watch other things meanwhile, and raise what it likes but OSError, to end the stream.
Wait = Callable[[int, int, float | None], bool]


class ConnectError(OSError):
    """No server can be reached; the message says which and why, in one line."""


class UnknownHostError(ConnectError):
    """None of the names has an address."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """The pauses between rounds in which nothing came: they double from `first` to `longest` seconds.

    Chance takes up to half off each, so that those who lost a server together do not come back together.
    """

    first: float = 0.5
    longest: float = 10.0

    def pause(self, failures: int, chance: float) -> float:
        """Return the seconds to wait after so many failures in a row; `chance` is from 0 to 1."""
        whole = min(self.longest, self.first * 2.0 ** min(failures - 1, 30))
        return whole * (1 - chance / 2)


def wait(fd: int, events: int, seconds: float | None) -> bool:
    """Wait as a `Wait` does, for nothing else."""
    poll = select.poll()
    if fd >= 0:
        poll.register(fd, events)
    return bool(poll.poll(milliseconds(seconds)))


def milliseconds(seconds: float | None) -> float | None:
    """Return the timeout for poll(2)."""
    return None if seconds is None else min(max(0.0, seconds), MAX_WAIT) * 1000


# in good order: errno has no words for it
CONNECTION_ENDED = "the connection was ended"

# nor for this, which is no failure yet
NAME_SERVICE_SILENT = "the name service does not answer"

# seconds; a server that has sent nothing for so long has sent all there is
QUIET_TIME = 1.0
# seconds for the few bytes that are fetched on a connection of their own: 2 kB/s at least
FETCH_TIMEOUT = 30.0


class Connector:
    """Gives connected sockets, one after the other.

    `report` is told why nothing comes, once for each reason, and when all is well again.
    """

    def __init__(
        self,
        servers: Sequence[tuple[str, int]],
        backoff: Backoff,
        timeout: float,
        wait: Wait,
        report: Callable[[str], object],
    ) -> None:
        self._servers, self._backoff, self._timeout = list(dict.fromkeys(servers)), backoff, timeout
        self._wait, self._report = wait, report
        # those that have not been used
        self._lookups: dict[tuple[str, int], Lookup] = {}
        # the addresses of this round that have not been tried
        self._round: Iterator[Found] = iter(())
        # rounds in a row that brought no byte
        self._failures = 0
        # of this round
        self._reasons: list[str] = []
        self._reported = ""
        # a name had an address
        self._ever = False
        # there is more than one address
        self.choice = False

    def connect(self, until: float | None = None, once: bool = False) -> socket.socket:
        """Return a connection. Raises UnknownHostError if no name has an address from the very start.

        Raises ConnectError if the first round brings none, with `once`, or if there is none at the time `until`.
        """
        while True:
            for family, address in self._round:
                left = _left(until)
                try:
                    return _connect_to(
                        family,
                        address,
                        self._timeout if left is None else min(left, self._timeout),
                        self._wait,
                    )
                except OSError as error:
                    self.failed(f"{endpoint(*address[:2])}: {error.strerror}")
            if self._reasons:
                self._end_round(until, once)
            found = self._resolve(until)
            self.choice = len(found) > 1
            self._round = iter(found)

    def close(self) -> None:
        """Wait for no look-up any more."""
        for lookup in self._lookups.values():
            lookup.close()
        self._lookups.clear()

    def reconnect(self, sock: socket.socket, wait: Wait) -> socket.socket:
        """Return another connection to the server at the other end of `sock`. Raises OSError."""
        return _connect_to(sock.family, sock.getpeername(), self._timeout, wait)

    def failed(self, reason: str) -> None:
        """Note why a connection has ended, and that its turn is over."""
        self._reasons.append(reason)

    def succeeded(self, name: str) -> None:
        """Note that a byte has come: the next failure is a first one."""
        if self._reported:
            self._report(f"{name} is there again")
        self._failures, self._reported = 0, ""
        self._reasons.clear()

    def _end_round(self, until: float | None, once: bool) -> None:
        """Say why this round brought nothing, and pause. Raises ConnectError where there is to be no other."""
        text = ", ".join(dict.fromkeys(self._reasons))
        if once:
            raise ConnectError(text)
        if text != self._reported:
            self._report(f"{text}; trying again")
            self._reported = text
        self._reasons.clear()
        self._failures += 1
        pause = self._backoff.pause(self._failures, random.random())  # noqa: S311 - no secret
        left = _left(until)
        self._wait(-1, 0, pause if left is None else min(pause, left))
        if _left(until) == 0:
            raise ConnectError(text)

    def _resolve(self, until: float | None) -> list[Found]:
        """Return the addresses of all names, each once, in their order. Raises UnknownHostError at the very start.

        All look-ups together may take as long as a connection. Those that take longer go on, and a later round uses what they find.
        """
        late = set(self._lookups)
        for server in self._servers:
            if server not in late:
                self._lookups[server] = Lookup(*server)
        end = time.monotonic() + self._timeout
        found: dict[Found, None] = {}
        for server in self._servers:
            seconds = 0 if server in late else _left(end if until is None else min(end, until))
            try:
                found |= dict.fromkeys(self._find(server, seconds))
            except (OSError, UnicodeError) as error:
                self._reasons.append(
                    f"{endpoint(*server)}: {getattr(error, 'strerror', None) or 'not a host name'}"
                )
        if not (found or self._ever or self._lookups):
            raise UnknownHostError(", ".join(self._reasons))
        self._ever = self._ever or bool(found)
        return list(found)

    def _find(self, server: tuple[str, int], seconds: float | None) -> list[Found]:
        """Return the addresses of one name, if they are found within so many seconds. Raises OSError, UnicodeError."""
        lookup = self._lookups[server]
        if (fd := lookup.fileno()) is not None and not self._wait(fd, select.POLLIN, seconds):
            raise TimeoutError(errno.ETIMEDOUT, NAME_SERVICE_SILENT)
        del self._lookups[server]
        return lookup.result()


def _connect_to(
    family: socket.AddressFamily, address: Any, timeout: float, wait: Wait
) -> socket.socket:
    """Return a connection to `address`, non-blocking. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        for level, option, value in KEEPALIVE_OPTIONS:
            sock.setsockopt(level, option, value)
        # A byte that is marked as urgent is a byte of the stream like any other. Otherwise the kernel would leave it out,
        # unless something on the way took the mark off: what is copied would depend on the way (RFC 6093).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        failure = sock.connect_ex(address)
        if failure == errno.EINPROGRESS:
            came = wait(sock.fileno(), select.POLLOUT, timeout)
            failure = (
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if came else errno.ETIMEDOUT
            )
        if not failure and sock.getsockname() == sock.getpeername():
            # nobody listens at a port that the kernel has given to ourselves: we would hear our header
            failure = errno.ECONNREFUSED
        if failure:
            raise OSError(failure, os.strerror(failure))
    except BaseException:
        sock.close()
        raise
    return sock


def name_of(sock: socket.socket) -> str:
    """Return the server at the other end of `sock`, as people write it. Raises OSError."""
    return endpoint(*sock.getpeername()[:2])


def fetch(
    sock: socket.socket, header: bytes, count: int, wait: Wait, limit: float = FETCH_TIMEOUT
) -> bytes:
    """Ask for `header` and return the first `count` bytes that come, fewer if no more do. Raises OSError, at an end too.

    Also raises it after `limit` seconds in which there was always a little more: what has come would say nothing about the file.
    """
    sock.send(header)
    data = b""
    end = time.monotonic() + limit
    while len(data) < count and wait(sock.fileno(), select.POLLIN, QUIET_TIME):
        some = sock.recv(count - len(data))
        if not some:
            raise ConnectionAbortedError(errno.ECONNABORTED, CONNECTION_ENDED)
        data += some
        if len(data) < count and time.monotonic() >= end:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return data


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())
