"""Takes connections from a slot's listeners, as far as room and rules allow."""

import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import ip_address

from tailsrv.addresses import endpoint
from tailsrv.config import Network
from tailsrv.inheritance import Inheritance
from tailsrv.linux.event_loop import STALL_PAUSE, EventLoop
from tailsrv.linux.kernel import EPOLLEXCLUSIVE
from tailsrv.linux.sockets import Outcome, accept, stop_listening
from tailsrv.listeners import BACKLOG
from tailsrv.log import RateLimited

# connections taken in one turn; a burst of thousands must not hold up those who stream
ACCEPTS_PER_TURN = 64

# the same from a listener that all workers share: more would let the first to wake take them all
SHARED_ACCEPTS_PER_TURN = 4


# seconds between two lines that say that the server is full: that is no trouble, and may last for years
FULL_INTERVAL = 600.0

Peer = tuple[str, int]


class Acceptor:
    """The listeners of one slot, and who may come in by them.

    `welcome(sock, peer)` is called with each connection, `count()` returns how many clients there are, and
    `make_room()` frees a descriptor and tells whether it could. Without room the listeners are left alone for a
    moment: who wants to connect waits in their queues, and nobody spins.
    """

    def __init__(
        self,
        inheritance: Inheritance,
        loop: EventLoop,
        allow: Sequence[Network],
        handle_accepted: Callable[[socket.socket, Peer], None],
        count: Callable[[], int],
        free_descriptor: Callable[[], bool],
    ) -> None:
        self._slot, self._listeners, self._shared = (
            inheritance.slot,
            inheritance.listeners,
            inheritance.shared,
        )
        self._client_limit = inheritance.client_limit
        self._loop, self._allow = loop, allow
        self._handle_accepted, self._count, self._free_descriptor = (
            handle_accepted,
            count,
            free_descriptor,
        )
        self._turned_away = RateLimited(logging.WARNING, burst=1)
        self._short_of_room = RateLimited(logging.WARNING, burst=1)
        self._failing = RateLimited(logging.WARNING, burst=1)
        self._full = RateLimited(logging.WARNING, burst=1, interval=FULL_INTERVAL)
        self.update_count()

    def start(self) -> None:
        """Accept from now on."""
        for listener in self._listeners:
            self._register(listener)

    def stop(self) -> None:
        """Leave those who want to connect in the queues."""
        self._loop.timers.cancel(self.start)
        for listener in self._listeners:
            self._loop.unregister(listener.fileno())

    def close(self, empty_queues: bool, refuse: bool) -> None:
        """Stop for good; those who have connected are clients already, unless a successor is to serve them.

        With `refuse`, connections that come later are refused at once. Not for sockets that a service manager has passed:
        it listens at them itself, for the next start.
        """
        if empty_queues:
            for listener in self._listeners:
                self._accept(listener, 2 * BACKLOG)
                if refuse:
                    stop_listening(listener)
        self.stop()
        for listener in self._listeners:
            listener.close()
        self._listeners = ()

    def update_count(self) -> None:
        """Say how many clients this slot has, where their number is limited."""
        if self._client_limit is not None:
            self._client_limit.record(self._slot, self._count())

    def _register(self, listener: socket.socket) -> None:
        # wake one of the workers that share it, not all
        flags = EPOLLEXCLUSIVE if self._shared else 0
        self._loop.register(listener.fileno(), partial(self._handle, listener), flags)

    def _handle(self, listener: socket.socket) -> None:
        self._accept(listener, SHARED_ACCEPTS_PER_TURN if self._shared else ACCEPTS_PER_TURN)
        if self._shared and listener.fileno() in self._loop.handlers:
            # The kernel wakes whoever registered first: go to the end of its list, or one worker would get them all.
            self._loop.unregister(listener.fileno())
            self._register(listener)

    def _accept(self, listener: socket.socket, limit: int) -> None:
        for turn in range(limit):
            if self._client_limit is not None and not self._client_limit.claim(
                self._slot, self._count() + 1
            ):
                # else it is not known whether anybody waits: the next wake-up says so
                if turn == 0:
                    self._full(
                        "as many clients as --max-clients allows, more wait",
                        slot=self._slot,
                        max_clients=self._client_limit.limit,
                    )
                    self._pause()
                break
            accepted = accept(listener)
            if isinstance(accepted, Outcome | OSError):
                self._give_way(accepted)
                break
            sock, peer = accepted
            if self._allow and not is_allowed(peer[0], self._allow):
                self._turned_away(
                    "client is not in an allowed network", slot=self._slot, peer=endpoint(*peer)
                )
                sock.close()
            else:
                self._handle_accepted(sock, peer)
        self.update_count()

    def _give_way(self, reason: Outcome | OSError) -> None:
        """Pause where the next try would fail for the same reason; else the next event says when to go on."""
        if isinstance(reason, OSError):
            self._failing(
                "accept(2) fails for every connection, trying again in a moment while they wait",
                slot=self._slot,
                reason=reason,
                hint="see whether a firewall or a security policy refuses it",
            )
            self._pause()
        # Only descriptors of our own are free at once when somebody goes: where all of the system is short, nobody has to.
        elif reason is Outcome.NO_ROOM or (
            reason is Outcome.NO_DESCRIPTOR and not self._free_descriptor()
        ):
            self._short_of_room(
                "short of descriptors or memory, not accepting for a moment",
                slot=self._slot,
                clients=self._count(),
            )
            self._pause()

    def _pause(self) -> None:
        self.stop()
        self._loop.timers.set(self.start, self._loop.now + STALL_PAUSE)


def is_allowed(host: str, networks: Sequence[Network]) -> bool:
    """Tell whether a client at the address `host` may be served; an IPv4 address mapped into IPv6 is an IPv4 address."""
    address = ip_address(host)
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in networks)
