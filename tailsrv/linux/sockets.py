"""System calls on sockets: receive, shut down, and ask what the kernel knows about a connection.

Errors that are part of normal operation are returned as values (`Outcome`), not raised.
"""

import errno
import fcntl
import mmap
import select
import socket
import struct
import sys
import termios
from collections.abc import Mapping
from enum import Enum
from socket import IPPROTO_TCP, SO_KEEPALIVE, SOL_SOCKET, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL
from typing import NamedTuple

from tailsrv.linux.event_loop import MAX_WAIT
from tailsrv.linux.libc_fallbacks import SO_PROTOCOL

# Options that make the kernel end a connection about two minutes after its peer has vanished. The
# times are in seconds.
KEEPALIVE_OPTIONS = (
    (SOL_SOCKET, SO_KEEPALIVE, 1),
    (IPPROTO_TCP, TCP_KEEPIDLE, 60),
    (IPPROTO_TCP, TCP_KEEPINTVL, 15),
    (IPPROTO_TCP, TCP_KEEPCNT, 4),
)

# Descriptors or memory have run out, for this process or the whole system. A retry may succeed.
NO_ROOM_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Outcome(Enum):
    """Why a system call transferred no data, or accepted no connection."""

    WOULD_BLOCK = "would block"
    HUNG_UP = "hung up"
    NO_ROOM = "out of descriptors or memory"
    NO_DESCRIPTOR = "out of the process's descriptors"


# Errors of a connection whose peer is gone. TimeoutError means that the peer has not answered the
# keepalive probes or retransmits. The errors for an unreachable host or network come from a router,
# or from this host if the peer is in the same network.
PEER_GONE = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError, TimeoutError)
PEER_GONE_ERRNOS = frozenset(
    {errno.ENOTCONN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}
)

# The buffer of `discard`. With MSG_TRUNC the kernel never writes to it, so it uses no memory. It is
# larger than the largest receive buffer (tcp_rmem[2], 6 MiB by default), so that one call empties
# the socket.
_DISCARD_BUFFER = mmap.mmap(-1, 64 << 20)


def outcome_of(error: OSError) -> Outcome | OSError:
    """Return what the `error` of a send means, or `error` itself if it is unexpected."""
    if isinstance(error, BlockingIOError):
        return Outcome.WOULD_BLOCK
    if isinstance(error, PEER_GONE) or error.errno in PEER_GONE_ERRNOS:
        return Outcome.HUNG_UP
    return Outcome.NO_ROOM if error.errno in NO_ROOM_ERRNOS else error


def stop_listening(listener: socket.socket) -> None:
    """Refuse new connections from now on.

    Closing `listener` is not enough if other processes have it open: the kernel would continue to
    queue new connections, and would reset them when the last of these processes closes it.
    """
    try:
        listener.shutdown(socket.SHUT_RD)
    except OSError:
        # The socket does not listen any more.
        pass


def is_readable(sock: socket.socket) -> bool:
    """Return whether `sock` has data, a connection to accept, or an end of input."""
    return bool(poll_once({sock.fileno(): select.POLLIN}, 0))


def poll_once(wanted: Mapping[int, int], seconds: float | None) -> dict[int, int]:
    """Wait for poll(2) events, and return the descriptors that have some, each with its events.

    `wanted` has the events to wait for; the kernel adds POLLERR and POLLHUP. Negative descriptors
    are ignored. The wait ends after `seconds` (None: no limit), or after MAX_WAIT if that is less.
    """
    poll = select.poll()
    for fd, events in wanted.items():
        if fd >= 0:
            poll.register(fd, events)
    return dict(poll.poll(None if seconds is None else min(max(0.0, seconds), MAX_WAIT) * 1000))


def peek(sock: socket.socket, count: int) -> bytes | Outcome:
    """Return up to `count` bytes that the peer has sent, and leave them in the socket.

    The result is empty at the end of the peer's data. It is an Outcome if no bytes have arrived
    yet, or if the peer is gone. Raises OSError if the call fails for another reason.
    """
    try:
        return sock.recv(count, socket.MSG_PEEK)
    except BlockingIOError:
        return Outcome.WOULD_BLOCK
    except PEER_GONE:
        return Outcome.HUNG_UP
    except OSError as error:  # pragma: no cover: needs a failing network, see tests/faults
        if error.errno in PEER_GONE_ERRNOS:
            return Outcome.HUNG_UP
        raise


def discard(sock: socket.socket) -> bool:
    """Discard all bytes that the peer has sent, and return whether its data has ended.

    The result is also True if the connection has failed.
    """
    try:
        # MSG_TRUNC discards the bytes without copying them (tcp(7)).
        return sock.recv_into(_DISCARD_BUFFER, 0, socket.MSG_TRUNC) == 0
    except BlockingIOError:
        return False
    except OSError:
        return True


def unsent(sock: socket.socket) -> int:
    """Return how many bytes the peer of `sock` has not acknowledged yet (SIOCOUTQ of tcp(7)).

    An unacknowledged FIN counts as one byte.
    """
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])


# Parts of struct tcp_info of linux/tcp.h, which is a stable interface of the kernel. tcpi_state is
# the first byte. tcpi_bytes_acked (since Linux 4.1) is the u64 at byte 120.
_TCP_INFO_SIZE = 128
_BYTES_ACKED = slice(120, _TCP_INFO_SIZE)
# tcpi_unacked and tcpi_sacked. For a listener, these are the length and the limit of its queue.
_ACCEPT_QUEUE = struct.Struct("=24xII")
# TCP_ESTABLISHED and TCP_CLOSE_WAIT of tcp_states.h.
_OPEN_STATES = frozenset({1, 8})


def bytes_streamed(sock: socket.socket) -> int | None:
    """Return how many bytes have been written to `sock` since it was connected, by any process.

    The result is None if the connection is not open any more, or if the kernel does not give the
    number. That is so for an MPTCP socket, of which it describes only the first subflow, and on a
    system that resembles Linux but leaves out the end of TCP_INFO.

    The number is the sum of the acknowledged and the unacknowledged bytes. These come from separate
    calls, and an acknowledgement may arrive between them, so they are read again until they agree.
    """
    if protocol(sock) != socket.IPPROTO_TCP:
        return None
    before = _tcp_info(sock)
    while True:
        if len(before) < _TCP_INFO_SIZE or before[0] not in _OPEN_STATES:
            return None
        unacknowledged_bytes = unsent(sock)
        after = _tcp_info(sock)
        if before[_BYTES_ACKED] == after[_BYTES_ACKED] and len(after) == _TCP_INFO_SIZE:
            return int.from_bytes(after[_BYTES_ACKED], sys.byteorder) + unacknowledged_bytes
        before = after


def _tcp_info(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)


def protocol(sock: socket.socket) -> int:
    """Return the protocol of `sock`, which may differ from the one that was asked for."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL)


class Unacknowledged(NamedTuple):
    """What the kernel knows about a peer that has not acknowledged all bytes yet."""

    # Number of retransmission timeouts in a row.
    retransmits: int
    # Number of unanswered probes in a row: window probes (to a closed window) or keepalive probes.
    probes: int
    # Seconds since the last acknowledgement of any kind.
    silence: float


# The fields tcpi_retransmits, tcpi_probes, tcpi_unacked (packets), tcpi_last_ack_recv
# (milliseconds) and tcpi_notsent_bytes (since Linux 4.6) of struct tcp_info.
_UNACKNOWLEDGED = struct.Struct("=2xBB20xI28xI84xI")


def unacknowledged(sock: socket.socket) -> Unacknowledged | None:
    """Return what the kernel knows about the peer of `sock`, if it has unacknowledged bytes.

    The result is None if all bytes are acknowledged, or if the kernel does not give these numbers.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKNOWLEDGED.size)
        retransmits, probes, in_flight, silence, waiting = _UNACKNOWLEDGED.unpack(info)
    except (OSError, struct.error):
        return None
    return Unacknowledged(retransmits, probes, silence / 1000) if in_flight or waiting else None


def accept_queue(listener: socket.socket) -> tuple[int, int]:
    """Return how many connections wait in the accept queue of `listener`, and its limit.

    The limit is lower than the one that was passed to listen(2) if the system has lowered it. It is
    0 if it is not known.
    """
    queued, backlog = _ACCEPT_QUEUE.unpack_from(
        _tcp_info(listener).ljust(_ACCEPT_QUEUE.size, b"\0")
    )
    return int(queued), int(backlog)


def take_socket(fd: int) -> tuple[socket.socket, tuple[str, int] | None]:
    """Return the socket of an inherited descriptor, with the address and port of its peer.

    The peer is None if the socket is not connected any more.
    """
    sock = socket.socket(fileno=fd)
    try:
        return sock, sock.getpeername()[:2]
    except OSError:
        return sock, None


def shut_down_writing(sock: socket.socket) -> None:
    """Send a FIN after the queued bytes, although other processes may have the socket open."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        # The peer is gone already.
        pass


# ENOSPC means that the limit on epoll watches is reached (epoll_ctl(2)).
_SHORTAGE_ERRNOS = NO_ROOM_ERRNOS | {errno.ENOSPC}


def lacks_room(error: BaseException) -> bool:
    """Return whether `error` means that descriptors, memory or epoll watches have run out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _SHORTAGE_ERRNOS
    )
