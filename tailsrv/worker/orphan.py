"""Hands everything over to the next supervisor when the supervisor of a worker has died.

The worker listens for a supervisor from its start, so that the next one finds it even before the
worker has noticed that it is orphaned. It answers only when it is.
"""

import select
import socket
import time
from collections.abc import Sequence
from functools import partial

from tailsrv.control_socket import accept_authorized, credentials, overflow_uid
from tailsrv.handover import COMMIT, MAX_PACKET, REVOKED, Greeting, Handover, HandoverError, Request
from tailsrv.linux.event_loop import MEMORY_RETRY, STALL_PAUSE, EventLoop
from tailsrv.log import fields, logger

# Seconds that a supervisor has to read the next packet of a handover. Until it has read the last
# one, the worker can change its mind: it serves on.
SEND_PATIENCE = 5.0


class Orphan:
    """The sockets at which the next supervisor finds this worker.

    Args:
        loop: The worker's event loop.
        sockets: The sockets, from `bind_for_worker`.

    """

    def __init__(self, loop: EventLoop, sockets: Sequence[socket.socket]) -> None:
        self._loop, self._sockets = loop, sockets
        for sock in sockets:
            sock.listen()
        self._unmapped_uid: int | None = None
        # The supervisors and health checks that have connected, and those that have been greeted.
        self._callers: list[socket.socket] = []
        self._peers: dict[int, socket.socket] = {}
        # The supervisor that has asked for a handover, and what it has asked for.
        self._requests: list[tuple[socket.socket, Request]] = []
        for sock in self._sockets:
            # An orphan that could not register them, for lack of epoll watches, would lose clients.
            loop.register(sock.fileno(), self._accept, events=0)

    def begin(self) -> None:
        """Accept supervisors and health checks, now that the worker is orphaned."""
        self._unmapped_uid = overflow_uid()
        self._resume()

    def _resume(self) -> None:
        for sock in self._sockets:
            self._loop.resume(sock.fileno())

    def close(self) -> None:
        """Accept no supervisor any more."""
        self._loop.timers.cancel(self._resume)
        for sock in (*self._sockets, *self._callers, *self._peers.values()):
            self._loop.unregister(sock.fileno())
            sock.close()
        self._sockets = []
        self._callers.clear()
        self._peers.clear()
        self._requests.clear()

    def _accept(self) -> None:
        for sock in self._sockets:
            peers, error = accept_authorized(sock, self._unmapped_uid)
            self._callers += peers
            if error is not None:
                self._pause()
                return

    def _pause(self) -> None:
        """Wait until there are descriptors or memory again."""
        for sock in self._sockets:
            self._loop.pause(sock.fileno())
        self._loop.timers.set(self._resume, self._loop.now + STALL_PAUSE)

    def has_callers(self) -> bool:
        """Return whether greet() must be called. Ask this in every turn."""
        return bool(self._callers)

    def greet(self, greeting: Greeting) -> None:
        """Send `greeting`, by which the worker introduces itself, to those that have connected."""
        callers, self._callers = self._callers, []
        for peer in callers:
            self._greet(peer, greeting.encode())

    def _greet(self, peer: socket.socket, greeting: bytes) -> None:
        try:
            # A supervisor that has a greeting must not find the connection closed.
            self._loop.register(peer.fileno(), partial(self._read, peer))
            peer.send(greeting)
        except OSError:
            # It has left already, or memory is short. A supervisor tries again.
            self._loop.unregister(peer.fileno())
            peer.close()
            return
        self._peers[peer.fileno()] = peer

    def _read(self, peer: socket.socket) -> None:
        """Read the request of `peer`, or notice that it has left."""
        try:
            packet = peer.recv(MAX_PACKET)
        except BlockingIOError:
            return
        except ConnectionError:
            packet = b""
        except OSError:
            # The kernel has no memory for the packet now.
            self._loop.stall(peer.fileno(), MEMORY_RETRY)
            return
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
        if _is_committed(peer):
            return True
        _revoke(peer)
        return False


def _is_committed(peer: socket.socket) -> bool:
    """Wait for COMMIT or the end of the connection, and return whether it was COMMIT."""
    while True:
        try:
            return peer.recv(MAX_PACKET) == COMMIT
        except OSError:
            # COMMIT may be there nevertheless: the kernel lacks memory for it now, or first reports
            # that the connection was closed with a packet unread.
            time.sleep(MEMORY_RETRY)


def _revoke(peer: socket.socket) -> None:
    """Send REVOKED, unless all processes that had the connection have closed it."""
    while True:
        try:
            peer.send(REVOKED)
        except ConnectionError:
            return
        except OSError:
            # Without REVOKED, the new worker would take this process for dead.
            time.sleep(MEMORY_RETRY)
        else:
            return


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
                # Memory may be short, or too many descriptors of this user may be on their way.
                if not isinstance(error, ConnectionError) and time.monotonic() < deadline:
                    time.sleep(MEMORY_RETRY)
                    continue
                logger.error("cannot hand over: %s", f"{_describe(peer)} {fields(reason=error)}")
                return False
            else:
                break
        deadline = time.monotonic() + SEND_PATIENCE
    return True


def _describe(peer: socket.socket) -> str:
    return fields(supervisor=credentials(peer)[0])
