"""Accepts connections from a slot's listeners, within --max-clients and --allow."""

import errno
import logging
import socket
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from ipaddress import ip_address

from tailsrv.addresses import endpoint
from tailsrv.config import Network
from tailsrv.linux.event_loop import STALL_PAUSE, EventLoop
from tailsrv.linux.libc_fallbacks import EPOLLEXCLUSIVE
from tailsrv.linux.sockets import (
    NO_ROOM_ERRNOS,
    PEER_GONE_ERRNOS,
    Outcome,
    is_readable,
    stop_listening,
)
from tailsrv.listeners import BACKLOG, listen
from tailsrv.log import RateLimited
from tailsrv.worker_context import WorkerContext

# After this many failures of accept(2) in a row, the connections are assumed not to be the cause.
ACCEPT_TRIES = 64

# accept(2) also reports network errors of the new connection. They do not mean that the listener
# itself fails.
TRANSIENT_ACCEPT_ERRNOS = PEER_GONE_ERRNOS | {
    errno.ECONNABORTED,
    errno.EPROTO,
    errno.ENOPROTOOPT,
    errno.ENONET,
    errno.EOPNOTSUPP,
    # A firewall rule refuses the connection.
    errno.EPERM,
    errno.ETIMEDOUT,
}

# Largest number of connections accepted from one listener in one turn. A burst of thousands must
# not delay the clients that are being served.
ACCEPTS_PER_TURN = 64

# The same for a listener that all workers share. With a larger number, the first worker to wake up
# would accept all connections.
SHARED_ACCEPTS_PER_TURN = 4

# Seconds between two log lines about the limit of clients being reached. This is not an error, and
# it may last for years.
FULL_INTERVAL = 600.0

# A socket and the address of its peer. None: the worker has run out of descriptors, and can accept
# no more connections in this turn. It should disconnect a client that can be spared, or wait.
Accepted = tuple[socket.socket, tuple[str, int]] | None


class Acceptor:
    """Accepts the connections of one slot, and closes those that --allow does not permit.

    When a connection cannot be accepted (too many clients, no descriptors, no memory), the acceptor
    ignores its listeners for STALL_PAUSE seconds. New connections wait in the accept queues, and
    the loop does not spin.

    Args:
        context: The slot, its listeners, and the limit on clients, if any.
        loop: The worker's event loop.
        allow: The networks that clients may come from. If empty, all clients are accepted.
        clients: The worker's clients, which the limit counts.

    """

    def __init__(
        self,
        context: WorkerContext,
        loop: EventLoop,
        allow: Sequence[Network],
        clients: Collection[object],
    ) -> None:
        self._slot, self._listeners, self._shared = (
            context.slot,
            context.listeners,
            context.shared,
        )
        self._client_limit = context.client_limit
        self._loop, self._allow, self._clients = loop, allow, clients
        # The listeners whose accept queues are not empty.
        self._readable: list[socket.socket] = []
        self._not_allowed = RateLimited(logging.WARNING, burst=1)
        self._short_of_room = RateLimited(logging.WARNING, burst=1)
        self._failing = RateLimited(logging.WARNING, burst=1)
        self._full = RateLimited(logging.WARNING, burst=1, interval=FULL_INTERVAL)
        self.update_count()

    def listen(self) -> None:
        """Let the listeners listen that do not yet: those that a takeover has added."""
        for listener in self._listeners:
            listen(listener)

    def start(self) -> None:
        """Accept connections from now on."""
        for listener in self._listeners:
            self._register(listener)

    def stop(self) -> None:
        """Stop accepting. New connections stay in the accept queues."""
        self._loop.timers.cancel(self.start)
        for listener in self._listeners:
            self._loop.unregister(listener.fileno())

    def close(self, refuse: bool) -> Iterator[Accepted]:
        """Empty the accept queues, then stop accepting for good and close the listeners.

        `refuse` makes the kernel refuse later connections at once. Pass False if the sockets come
        from a service manager, which listens on them itself to start the server again. Yields the
        connections.
        """
        for listener in self._listeners:
            yield from self._accept(listener, 2 * BACKLOG)
            if refuse:
                stop_listening(listener)
        self.hand_over()

    @property
    def listeners(self) -> Sequence[socket.socket]:
        """The listeners that the acceptor has not closed."""
        return self._listeners

    def hand_over(self) -> None:
        """Close the listeners without emptying the accept queues, which another worker serves."""
        self.stop()
        for listener in self._listeners:
            listener.close()
        self._listeners = ()

    def update_count(self) -> None:
        """Write the number of this slot's clients to the shared memory, if --max-clients is set."""
        if self._client_limit is not None:
            self._client_limit.record(self._slot, len(self._clients))

    def _register(self, listener: socket.socket) -> None:
        # For each connection, wake only one of the workers that share the listener.
        flags = EPOLLEXCLUSIVE if self._shared else 0
        self._loop.register(listener.fileno(), partial(self._readable.append, listener), flags)

    def accept(self) -> Iterable[Accepted]:
        """Accept connections from the listeners that the loop has reported as readable.

        Yields each of them as soon as it is accepted, so that the caller can do other work between
        two of them. Call this in every turn.
        """
        return self._accept_all() if self._readable else ()

    def _accept_all(self) -> Iterator[Accepted]:
        readable = self._readable[:]
        self._readable.clear()
        for listener in readable:
            if listener.fileno() not in self._loop.handlers:
                # The acceptor has stopped in this turn.
                continue
            yield from self._accept(
                listener, SHARED_ACCEPTS_PER_TURN if self._shared else ACCEPTS_PER_TURN
            )
            if self._shared and listener.fileno() in self._loop.handlers:
                # The kernel wakes the worker that registered first, which would get all
                # connections. Registering again puts this worker at the end of the kernel's list.
                self._loop.unregister(listener.fileno())
                self._register(listener)

    def _accept(self, listener: socket.socket, limit: int) -> Iterator[Accepted]:
        for attempt in range(limit):
            if self._client_limit is not None and not self._client_limit.claim(
                self._slot, len(self._clients) + 1
            ):
                # In the first attempt, a connection is waiting: the listener was reported as
                # readable. In later attempts, the queue may be empty. If it is not, the next event
                # reports that.
                if attempt == 0:
                    self._full(
                        "as many clients as --max-clients allows: new clients have to wait",
                        slot=self._slot,
                        max_clients=self._client_limit.limit,
                    )
                    self._pause()
                break
            accepted = accept(listener)
            if isinstance(accepted, Outcome | OSError):
                yield from self._handle_failure(accepted)
                break
            sock, peer = accepted
            if self._allow and not is_allowed(peer[0], self._allow):
                self._not_allowed(
                    "client is not in an allowed network: closed its connection",
                    slot=self._slot,
                    peer=endpoint(*peer),
                )
                sock.close()
            else:
                yield sock, peer
        self.update_count()

    def _handle_failure(self, reason: Outcome | OSError) -> Iterator[Accepted]:
        """Pause if the next accept(2) would fail for the same reason.

        Otherwise the next event on the listener says when to accept again.
        """
        if isinstance(reason, OSError):
            self._failing(
                "accept(2) fails for every connection: new clients wait, and the worker retries",
                slot=self._slot,
                reason=reason,
                hint="check whether a firewall or a security policy refuses it",
            )
            self._pause()
        # Disconnecting a client helps at once if this process has reached its own limit of
        # descriptors (NO_DESCRIPTOR), but not if the whole system has run out (NO_ROOM).
        elif reason is Outcome.NO_DESCRIPTOR:
            yield None
        elif reason is Outcome.NO_ROOM:
            self._wait_for_room("raise fs.file-max, or free memory")

    def wait_for_descriptor(self) -> None:
        """Pause, because accept() has yielded None, and no client can be spared."""
        self._wait_for_room("raise LimitNOFILE= or ulimit -Hn")

    def _wait_for_room(self, hint: str) -> None:
        self._short_of_room(
            "out of file descriptors or memory: new clients wait, and the worker retries",
            slot=self._slot,
            clients=len(self._clients),
            hint=hint,
        )
        self._pause()

    def _pause(self) -> None:
        self.stop()
        self._loop.timers.set(self.start, self._loop.now + STALL_PAUSE)


def is_allowed(host: str, networks: Sequence[Network]) -> bool:
    """Return whether a client at the address `host` may be served.

    An IPv4 address that is mapped into IPv6 (`::ffff:192.0.2.1`) counts as an IPv4 address.
    """
    address = ip_address(host)
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in networks)


def accept(listener: socket.socket) -> tuple[socket.socket, tuple[str, int]] | Outcome | OSError:
    """Accept one connection.

    A connection that fails before it is accepted is skipped.

    Returns:
        The new socket, which is non-blocking, and the address and port of its peer. Or an Outcome,
        if there is no connection to accept, or no descriptor or memory for it. Or the last error,
        if ACCEPT_TRIES calls in a row have failed: then the cause is not in the connections. For
        instance, a security policy may refuse the call before the kernel looks into the queue.

    Raises:
        OSError: The listener itself fails.

    """
    for _ in range(ACCEPT_TRIES):
        try:
            sock, address = listener.accept()
        except BlockingIOError:
            return Outcome.WOULD_BLOCK
        except OSError as error:
            # The socket does not listen any more: a process that shares it has called
            # `stop_listening`.
            if error.errno == errno.EINVAL:
                return Outcome.WOULD_BLOCK
            if error.errno in NO_ROOM_ERRNOS:
                return _without_room(listener, error)
            if error.errno not in TRANSIENT_ACCEPT_ERRNOS:
                raise
            failure = error
        else:
            # The new socket does not inherit O_NONBLOCK (accept(2)).
            sock.setblocking(False)
            return sock, address[:2]
    return failure


def _without_room(listener: socket.socket, error: OSError) -> Outcome:
    # The kernel allocates a descriptor before it looks into the queue, so it may report this error
    # although there is no connection to accept.
    if not is_readable(listener):
        return Outcome.WOULD_BLOCK
    return Outcome.NO_DESCRIPTOR if error.errno == errno.EMFILE else Outcome.NO_ROOM
