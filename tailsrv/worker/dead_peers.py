"""Finds clients whose machine has vanished while bytes are on their way to them.

TCP keepalive does not run while the kernel has bytes for the peer. The kernel retransmits them for
some 15 minutes (tcp_retries2 in tcp(7)), or probes a closed window for up to 30 minutes.
TCP_USER_TIMEOUT is no cure: it also ends a client that pauses, since its window stays closed.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.sockets import Unacknowledged, unacknowledged
from tailsrv.log import RateLimited
from tailsrv.worker.client import Client, ClientState

# Clients examined in one turn: some 0.3 ms, which the next append may have to wait for.
BATCH = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """When a peer counts as dead.

    The defaults allow as much as keepalive does, so that it makes no difference whether the file
    grows.
    """

    # seconds from one check of all clients to the next
    interval: float = 30.0
    # seconds without a packet that acknowledges anything
    silence: float = 120.0
    # retransmissions or window probes, one after another, that were not answered
    attempts: int = 4


def is_dead(peer: Unacknowledged, limits: Limits) -> bool:
    """Tell whether a peer has been silent and was asked for long enough to be given up.

    Both conditions are needed. The kernel's probes of a closed window come to be two minutes apart:
    a client that pauses is silent for as long between them, but answers each [measured: 240 seconds
    where one was lost]. And on a fast network four retransmissions take only three seconds.
    """
    return peer.silence > limits.silence and max(peer.retransmits, peer.probes) >= limits.attempts


class DeadPeers:
    """Checks `clients` by the clock while some have yet to acknowledge bytes, and drops the dead.

    `drop(client)` is called for each of them. The kernel keeps all that the decision needs, so a
    worker's successor decides alike. A check of many clients takes several turns of the loop. While
    no bytes are on their way, no check is planned and nothing wakes up.
    """

    def __init__(
        self,
        slot: int,
        clients: Mapping[int, Client],
        loop: EventLoop,
        drop: Callable[[Client], None],
        limits: Limits | None = None,
    ) -> None:
        self._slot, self._clients, self._loop, self._drop = slot, clients, loop, drop
        self._limits = limits or Limits()
        # by the check that is under way; some may have left
        self._unexamined: list[Client] = []
        self._dropped = RateLimited(logging.INFO)

    def expect_acks(self) -> None:
        """Plan a check unless one is planned: bytes have been sent, or not acknowledged yet."""
        if self._check not in self._loop.timers:
            self._loop.timers.set(self._check, self._loop.now + self._limits.interval)

    def _check(self) -> None:
        self._unexamined = list(self._clients.values())
        self._examine_some()

    def _examine_some(self) -> None:
        """Examine a BATCH of clients, and leave the others to the next turn."""
        for client in self._unexamined[-BATCH:]:
            if client.state is not ClientState.CLOSED:
                self._examine(client)
        del self._unexamined[-BATCH:]
        if self._unexamined:
            self._loop.timers.set(self._examine_some, self._loop.now)

    def _examine(self, client: Client) -> None:
        if (peer := unacknowledged(client.sock)) is None:
            return
        if is_dead(peer, self._limits):
            self._dropped(
                "client's machine has stopped acknowledging, disconnected it, its place is free", slot=self._slot, peer=client,
                silence=f"{peer.silence:.0f}s", retransmits=peer.retransmits, probes=peer.probes,
            )  # fmt: skip
            self._drop(client)
        else:
            self.expect_acks()
