"""Opens connections to the servers of one file, and reconnects with growing pauses.

One round tries every address of every server once, in order. If an attempt fails, or a connection
is lost, the next address is tried at once. When no address is left, the client waits, see
`Backoff`. Then it looks up the names again, and the next round begins.
"""

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
from tailsrv.client.name_lookup import Found, Lookup
from tailsrv.linux.sockets import KEEPALIVE_OPTIONS, poll_once

# A function that waits for poll(2) events of a descriptor (-1: of none), for at most a number of
# seconds (None: without a limit), and returns whether one of them occurred. A caller of `follow`
# may pass its own function, which also waits for other things, or does other work meanwhile. It may
# raise any exception but OSError: the exception interrupts the iteration.
Wait = Callable[[int, int, float | None], bool]


class ConnectError(OSError):
    """No server can be reached. The message says which ones and why, in one line."""


class UnknownHostError(ConnectError):
    """None of the host names has an address."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """The pauses between rounds of attempts to connect.

    The first pause is `first` seconds long. After each further round in a row in which no byte was
    received, it is twice as long, up to `longest` seconds. Each pause is shortened by a random
    amount of up to half, so that clients that lost a server together do not all reconnect at the
    same time.
    """

    first: float = 0.5
    longest: float = 10.0

    def pause(self, failures: int, chance: float) -> float:
        """Return the seconds to wait after `failures` rounds in a row (1 or more) have failed.

        `chance` is a random number from 0 to 1.
        """
        full = min(self.longest, self.first * 2.0 ** min(failures - 1, 30))
        return full * (1 - chance / 2)


def wait(fd: int, events: int, seconds: float | None) -> bool:
    """Wait for events of a descriptor, as a `Wait` does, and for nothing else."""
    return bool(poll_once({fd: events}, seconds))


# The connection ended without an error, so errno has no text for it.
CONNECTION_ENDED = "the server closed the connection"

# The look-up continues, so it has not failed, and getaddrinfo(3) has no text for this.
NAME_SERVICE_SILENT = "the name service does not answer"


class Connector:
    """Returns connected sockets, one after the other.

    `report` is called with a line of text when no address of a round is left to try, unless this
    line is the one reported last, and when bytes arrive again after that.
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
        # Look-ups whose result has not been used yet.
        self._lookups: dict[tuple[str, int], Lookup] = {}
        # The addresses that have not been tried in this round.
        self._untried: Iterator[Found] = iter(())
        # Rounds in a row in which no byte was received.
        self._failures = 0
        # Why attempts and connections of this round have failed.
        self._reasons: list[str] = []
        self._reported = ""
        # Whether an address has ever been found.
        self._resolved_once = False
        # The number of addresses that the last look-ups have found.
        self.addresses = 0

    def connect(self, until: float | None = None, once: bool = False) -> socket.socket:
        """Return a connected socket, after as many rounds as necessary.

        `until` is a time of time.monotonic(). Raises UnknownHostError if no name has an address,
        and none has ever had one. Raises ConnectError if there is no connection at the time
        `until`, or, with `once`, if the first round has failed.
        """
        while True:
            for family, address in self._untried:
                left = _time_left(until)
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
            self.addresses = len(found)
            self._untried = iter(found)

    def close(self) -> None:
        """Stop waiting for look-ups."""
        for lookup in self._lookups.values():
            lookup.close()
        self._lookups.clear()

    def reconnect(self, sock: socket.socket) -> socket.socket:
        """Return another connection to the server that `sock` is connected to. Raises OSError."""
        return _connect_to(sock.family, sock.getpeername(), self._timeout, self._wait)

    def ask(self, sock: socket.socket, header: bytes, count: int, limit: float) -> bytes | None:
        """Return the first `count` bytes of the answer to `header`, on a separate connection.

        The connection is to the server of `sock`. Returns fewer bytes if the connection ends before
        them, b"" if it fails, and None if the bytes have not arrived within `limit` seconds.
        """
        try:
            with self.reconnect(sock) as other:
                return fetch(other, header, count, self._wait, limit)
        except TimeoutError:
            return None
        except OSError:
            return b""

    def failed(self, reason: str) -> None:
        """Note why an attempt has failed, or a connection has ended, for this round's report."""
        self._reasons.append(reason)

    def succeeded(self, name: str) -> None:
        """Note that the server `name` sends bytes that continue the stream.

        The next round that fails counts as the first one again.
        """
        if self._reported:
            self._report(f"connected to {name}")
        self._failures, self._reported = 0, ""
        self._reasons.clear()

    def _end_round(self, until: float | None, once: bool) -> None:
        """Report why all addresses of this round have failed, and pause.

        Raises ConnectError if no other round is to follow.
        """
        text = ", ".join(dict.fromkeys(self._reasons))
        if once:
            raise ConnectError(text)
        if text != self._reported:
            self._report(f"{text}; retrying")
            self._reported = text
        self._reasons.clear()
        self._failures += 1
        pause = self._backoff.pause(self._failures, random.random())  # noqa: S311 - no secret
        left = _time_left(until)
        self._wait(-1, 0, pause if left is None else min(pause, left))
        if _time_left(until) == 0:
            raise ConnectError(text)

    def _resolve(self, until: float | None) -> list[Found]:
        """Return the addresses of all names, in their order, each address once.

        All look-ups of a round together have as much time as one attempt to connect. A look-up that
        needs longer continues, and a later round uses its result. Raises UnknownHostError if no
        name has an address, and none has ever had one.
        """
        late = set(self._lookups)
        for server in self._servers:
            if server not in late:
                self._lookups[server] = Lookup(*server)
        end = time.monotonic() + self._timeout
        found: dict[Found, None] = {}
        for server in self._servers:
            seconds = 0 if server in late else _time_left(end if until is None else min(end, until))
            try:
                found |= dict.fromkeys(self._find(server, seconds))
            except (OSError, UnicodeError) as error:
                self._reasons.append(
                    f"{endpoint(*server)}: {getattr(error, 'strerror', None) or 'not a host name'}"
                )
        if not (found or self._resolved_once or self._lookups):
            raise UnknownHostError(", ".join(self._reasons))
        self._resolved_once = self._resolved_once or bool(found)
        return list(found)

    def _find(self, server: tuple[str, int], seconds: float | None) -> list[Found]:
        """Return the addresses of one name, if they are found within `seconds` (None: no limit).

        Raises OSError or UnicodeError.
        """
        lookup = self._lookups[server]
        if (fd := lookup.fileno()) is not None and not self._wait(fd, select.POLLIN, seconds):
            raise TimeoutError(errno.ETIMEDOUT, NAME_SERVICE_SILENT)
        del self._lookups[server]
        return lookup.result()


def _connect_to(
    family: socket.AddressFamily, address: Any, timeout: float, wait: Wait
) -> socket.socket:
    """Return a non-blocking socket that is connected to `address`.

    Raises OSError if that fails, or takes longer than `timeout` seconds.
    """
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        for level, option, value in KEEPALIVE_OPTIONS:
            sock.setsockopt(level, option, value)
        # Deliver a byte that is marked as urgent in its place, like any other byte. By default the
        # kernel would take it out of the stream, unless a device on the path has removed the mark.
        # Then the received bytes would depend on the network path (RFC 6093).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        failure = sock.connect_ex(address)
        if failure == errno.EINPROGRESS:
            completed = wait(sock.fileno(), select.POLLOUT, timeout)
            failure = (
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if completed
                else errno.ETIMEDOUT
            )
        if not failure and sock.getsockname() == sock.getpeername():
            # TCP self-connection: nothing listens on the port, and the kernel has chosen that port
            # as the source port. This client would receive its own header, so treat it as refused.
            failure = errno.ECONNREFUSED
        if failure:
            raise OSError(failure, os.strerror(failure))
    except BaseException:
        sock.close()
        raise
    return sock


def name_of(sock: socket.socket) -> str:
    """Return the "HOST:PORT" of the server that `sock` is connected to. Raises OSError."""
    return endpoint(*sock.getpeername()[:2])


def fetch(sock: socket.socket, header: bytes, count: int, wait: Wait, limit: float) -> bytes:
    """Send `header` and return the first `count` bytes of the answer, or fewer if it ends before.

    Raises OSError if the connection fails, or if bytes are missing after `limit` seconds.
    """
    sock.send(header)
    data = b""
    end = time.monotonic() + limit
    while len(data) < count:
        if not wait(sock.fileno(), select.POLLIN, max(0.0, end - time.monotonic())):
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        try:
            received = sock.recv(count - len(data))
        except BlockingIOError:
            continue
        if not received:
            break
        data += received
    return data


def _time_left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())
