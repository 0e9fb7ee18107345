"""Finds clients whose machine has vanished while the kernel has bytes for them, and drops them.

TCP keepalive does not run while the kernel has bytes for the peer. The kernel retransmits them for
about 15 minutes (tcp_retries2 in tcp(7)), or probes a closed window for up to 30 minutes.
TCP_USER_TIMEOUT cannot be used instead: it would also end the connection of a client that pauses,
because the window of such a client stays closed.
"""

import logging
from collections.abc import Mapping

from tailsrv.config import DeadPeerLimits
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.sockets import Unacknowledged, unacknowledged
from tailsrv.log import RateLimited
from tailsrv.worker.client import Client, ClientState, Departures

# Clients examined in one turn. This takes about 0.3 ms, by which it may delay the next append.
BATCH = 64


def is_dead(peer: Unacknowledged, limits: DeadPeerLimits) -> bool:
    """Return whether a peer has been silent for too long and has left too many packets unanswered.

    Both conditions are needed. Silence alone is not enough: the kernel's probes of a closed window
    become less frequent, down to one in two minutes. A client that pauses is silent between them,
    although it answers each one [measured: 240 seconds of silence when one probe was lost].
    Unanswered packets alone are not enough: on a fast network, four retransmissions take only three
    seconds.
    """
    return peer.silence > limits.silence and max(peer.retransmits, peer.probes) >= limits.attempts


class DeadPeers:
    """Checks the clients at intervals, as long as some have unacknowledged bytes.

    A check of many clients takes several turns of the loop. While all bytes are acknowledged, no
    check is planned and nothing wakes the worker up. The kernel stores everything that the decision
    needs, so a worker that takes over the clients decides in the same way.

    Args:
        slot: The worker's slot, for the log.
        clients: The worker's clients, by descriptor.
        loop: The worker's event loop.
        departures: Gets each client that is found dead.
        limits: When a client counts as dead.

    """

    def __init__(
        self,
        slot: int,
        clients: Mapping[int, Client],
        loop: EventLoop,
        departures: Departures,
        limits: DeadPeerLimits,
    ) -> None:
        self._slot, self._clients, self._loop = slot, clients, loop
        self._departures, self._limits = departures, limits
        # The clients that the current check has not examined yet. Some may have left.
        self._unexamined: list[Client] = []
        self._dropped = RateLimited(logging.INFO)

    def expect_acks(self) -> None:
        """Plan a check, unless one is planned already.

        Call this when bytes have been sent, or are still unacknowledged.
        """
        if self._check not in self._loop.timers:
            self._loop.timers.set(self._check, self._loop.now + self._limits.interval)

    def _check(self) -> None:
        self._unexamined = list(self._clients.values())
        self._examine_some()

    def _examine_some(self) -> None:
        """Examine up to BATCH clients, and leave the others to the next turn."""
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
                "client has stopped acknowledging: disconnected it, which makes room for another",
                slot=self._slot,
                peer=client,
                silence=f"{peer.silence:.0f}s",
                retransmits=peer.retransmits,
                probes=peer.probes,
            )
            self._departures.add(client)
        else:
            self.expect_acks()
