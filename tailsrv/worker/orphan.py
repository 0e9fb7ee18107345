"""Hands everything over to the next supervisor when the supervisor of a worker has died.

The worker listens for a supervisor from its start, so that the next one finds it even before the
worker has noticed that it is orphaned. It answers only when it is.
"""

import select
import socket
import time
from collections.abc import Callable, Sequence

from tailsrv.control_socket import accept_authorized, credentials, overflow_uid
from tailsrv.handover import COMMIT, MAX_PACKET, REVOKED, Greeting, Handover, HandoverError, Request
from tailsrv.linux.event_loop import STALL_PAUSE, EventLoop
from tailsrv.log import fields, logger

# Seconds that a supervisor has to read the next packet of a handover. Until it has read the last
# one, the worker can change its mind: it serves on.
SEND_PATIENCE = 5.0


class Orphan:
    """The sockets at which the next supervisor finds this worker.

    Args:
        loop: The worker's event loop.
        sockets: The sockets, from `bind_for_worker`.
        greeting: Returns how the worker introduces itself.

    """

    def __init__(
        self,
        loop: EventLoop,
        sockets: Sequence[socket.socket],
        greeting: Callable[[], Greeting],
    ) -> None:
        self._loop, self._sockets, self._greeting = loop, sockets, greeting
        for sock in sockets:
            sock.listen()
        self._unmapped_uid: int | None = None
        self._peers: dict[int, socket.socket] = {}
        # The supervisor that has asked for a handover, and what it has asked for.
        self._requests: list[tuple[socket.socket, Request]] = []

    def begin(self) -> None:
        """Accept supervisors and health checks, now that the worker is orphaned."""
        self._unmapped_uid = overflow_uid()
        self._register()

    def _register(self) -> None:
        for sock in self._sockets:
            self._loop.register(sock.fileno(), self._accept)

    def close(self) -> None:
        """Accept no supervisor any more."""
        self._loop.timers.cancel(self._register)
        for sock in (*self._sockets, *self._peers.values()):
            self._loop.unregister(sock.fileno())
            sock.close()
        self._sockets = []
        self._peers.clear()
        self._requests.clear()

    def _accept(self) -> None:
        for sock in self._sockets:
            peers, error = accept_authorized(sock, self._unmapped_uid)
            for peer in peers:
                self._greet(peer)
            if error is not None:
                self._pause()
                return

    def _pause(self) -> None:
        """Wait until there are descriptors or memory again."""
        for sock in self._sockets:
            self._loop.unregister(sock.fileno())
        self._loop.timers.set(self._register, self._loop.now + STALL_PAUSE)

    def _greet(self, peer: socket.socket) -> None:
        try:
            peer.send(self._greeting().encode())
            self._loop.register(peer.fileno(), lambda: self._read(peer))
        except OSError:
            # It has left already, or memory is short. A supervisor tries again.
            peer.close()
            return
        self._peers[peer.fileno()] = peer

    def _read(self, peer: socket.socket) -> None:
        """Read the request of `peer`, or notice that it has left."""
        try:
            packet = peer.recv(MAX_PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        self._loop.unregister(peer.fileno())
        del self._peers[peer.fileno()]
        try:
            self._requests.append((peer, Request.decode(packet)))
        except HandoverError:
            peer.close()

    def take_request(self) -> tuple[socket.socket, Request] | None:
        """Return a supervisor that has asked for a handover, and its request. None if none has."""
        return self._requests.pop(0) if self._requests else None


def hand_over(peer: socket.socket, handover: Handover, patience: float) -> bool:
    """Send `handover` to the supervisor `peer`, and return whether it has taken over.

    The worker must send nothing to its clients from the moment when `handover` was made until this
    returns False. `peer` is closed. `patience` is how many seconds the new worker has to start.
    """
    with peer:
        if not _send(peer, handover):
            return False
        poll = select.poll()
        poll.register(peer, select.POLLIN)
        if not poll.poll(patience * 1000):
            # From now on, sending COMMIT fails. It may have been sent before.
            peer.shutdown(socket.SHUT_RD)
        peer.setblocking(True)
        try:
            committed = peer.recv(MAX_PACKET) == COMMIT
            if not committed:
                peer.send(REVOKED)
        except OSError:
            # All processes that had the connection have closed it.
            return False
        return committed


def _send(peer: socket.socket, handover: Handover) -> bool:
    """Send `handover`, and return whether that was possible."""
    poll = select.poll()
    poll.register(peer, select.POLLOUT)
    deadline = time.monotonic() + SEND_PATIENCE
    for packet, files in handover.packets():
        while True:
            try:
                socket.send_fds(peer, [packet], files)
            except BlockingIOError:
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    logger.error("supervisor does not read the handover: %s", _describe(peer))
                    return False
            except OSError as error:
                logger.error("cannot hand over: %s", f"{_describe(peer)} {fields(reason=error)}")
                return False
            else:
                break
        deadline = time.monotonic() + SEND_PATIENCE
    return True


def _describe(peer: socket.socket) -> str:
    return fields(supervisor=credentials(peer)[0])
