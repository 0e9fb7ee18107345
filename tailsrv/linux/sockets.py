"""sendfile, recv and the like, with would-block, hang-up and out-of-descriptors as values."""

import errno
import fcntl
import mmap
import select
import socket
import struct
import sys
import termios
from enum import Enum
from socket import IPPROTO_TCP, SO_KEEPALIVE, SOL_SOCKET, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL
from typing import NamedTuple

from tailsrv.linux.kernel import SO_PROTOCOL

KEEPALIVE_OPTIONS = (
    (SOL_SOCKET, SO_KEEPALIVE, 1),
    (IPPROTO_TCP, TCP_KEEPIDLE, 60),
    (IPPROTO_TCP, TCP_KEEPINTVL, 15),
    (IPPROTO_TCP, TCP_KEEPCNT, 4),
)


# The system, or a limit of ours, has no room for what a worker needs. That is no fault of the worker, and may pass.
NO_ROOM_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# of epoll watches
_SHORTAGES = NO_ROOM_ERRNOS | {errno.ENOSPC}


# Connections in a row that fail before accept(2) is taken to fail for every one of them.
ACCEPT_TRIES = 64


class Outcome(Enum):
    """Why a system call moved nothing."""

    WOULD_BLOCK = "would block"
    HUNG_UP = "hung up"
    NO_ROOM = "out of descriptors or memory"
    NO_DESCRIPTOR = "out of our own descriptors"


# TimeoutError: keepalive gave up. The unreachable ones: a router said so while keepalive was asking.
PEER_GONE = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError, TimeoutError)
PEER_GONE_ERRNOS = frozenset(
    {errno.ENOTCONN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}
)

# accept(2) hands on errors that the new connection met on the network; they say nothing about the listener.
TRANSIENT_ACCEPT_ERRNOS = PEER_GONE_ERRNOS | {
    errno.ECONNABORTED,
    errno.EPROTO,
    errno.ENOPROTOOPT,
    errno.ENONET,
    errno.EOPNOTSUPP,
    # a firewall rule
    errno.EPERM,
    errno.ETIMEDOUT,
}

# Discarding never writes to its buffer (MSG_TRUNC), so its pages are never there. Larger than the largest
# receive buffer (tcp_rmem[2], 6 MiB by default), so that one call empties the socket.
_DISCARD = mmap.mmap(-1, 64 << 20)


def outcome_of(error: OSError) -> Outcome | OSError:
    """Return what it means that a send has failed; an error itself where it is none to be expected."""
    if isinstance(error, BlockingIOError):
        return Outcome.WOULD_BLOCK
    if isinstance(error, PEER_GONE) or error.errno in PEER_GONE_ERRNOS:
        return Outcome.HUNG_UP
    return Outcome.NO_ROOM if error.errno in NO_ROOM_ERRNOS else error


def accept(listener: socket.socket) -> tuple[socket.socket, tuple[str, int]] | Outcome | OSError:
    """Take one connection, non-blocking, with its peer's address and port.

    Returns an error of the network's where so many connections in a row have failed that the cause is
    not with them: a security policy, for one, may refuse the call before it looks into the queue.
    """
    for _ in range(ACCEPT_TRIES):
        try:
            sock, address = listener.accept()
        except BlockingIOError:
            return Outcome.WOULD_BLOCK
        except OSError as error:
            # it does not listen any more: a worker before this one has stopped that
            if error.errno == errno.EINVAL:
                return Outcome.WOULD_BLOCK
            if error.errno in NO_ROOM_ERRNOS:
                return _without_room(listener, error)
            if error.errno not in TRANSIENT_ACCEPT_ERRNOS:
                raise
            failure = error
        else:
            # accept(2): the new socket does not inherit O_NONBLOCK
            sock.setblocking(False)
            return sock, address[:2]
    return failure


def _without_room(listener: socket.socket, error: OSError) -> Outcome:
    # The kernel takes a descriptor before it looks into the queue: with nobody there, there is no need of one.
    if not _is_readable(listener):
        return Outcome.WOULD_BLOCK
    return Outcome.NO_DESCRIPTOR if error.errno == errno.EMFILE else Outcome.NO_ROOM


def stop_listening(listener: socket.socket) -> None:
    """Have connections refused, whoever else holds the listener: until its last copy is closed they would be queued, and then reset."""
    try:
        listener.shutdown(socket.SHUT_RD)
    except OSError:
        # nobody listens at it any more
        pass


def _is_readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def peek(sock: socket.socket, count: int) -> bytes | Outcome:
    """Return what the client has sent so far, as far as a header can reach, and leave it in the socket."""
    try:
        return sock.recv(count, socket.MSG_PEEK)
    except BlockingIOError:
        return Outcome.WOULD_BLOCK
    except PEER_GONE:
        return Outcome.HUNG_UP
    except (
        OSError
    ) as error:  # pragma: no cover: takes a network that fails, which tests/faults.md pretends
        if error.errno in PEER_GONE_ERRNOS:
            return Outcome.HUNG_UP
        raise


def discard(sock: socket.socket) -> bool:
    """Throw away all that the client has sent, and tell whether that was the end of its input."""
    try:
        # tcp(7): MSG_TRUNC discards without a copy
        return sock.recv_into(_DISCARD, 0, socket.MSG_TRUNC) == 0
    except BlockingIOError:
        return False
    except OSError:
        return True


def unsent(sock: socket.socket) -> int:
    """Return how many bytes the peer has not acknowledged yet, our FIN among them (tcp(7), SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])


# struct tcp_info of linux/tcp.h, part of the kernel's interface: tcpi_state is its first byte, tcpi_bytes_acked
# (since Linux 4.1) the u64 at byte 120.
_TCP_INFO = 128
_ACKED = slice(120, _TCP_INFO)
# tcpi_unacked and tcpi_sacked, which for a listener are its queue's length and limit
_QUEUE = struct.Struct("=24xII")
# TCP_ESTABLISHED, TCP_CLOSE_WAIT: tcp_states.h
_OPEN = frozenset({1, 8})


def bytes_streamed(sock: socket.socket) -> int | None:
    """Return how many bytes have ever been put into `sock`, by whomever.

    None if its connection is not open any more, or if the kernel does not say: of an MPTCP socket it
    tells about the first subflow only, and a system that resembles Linux may leave the end out.

    What the peer has acknowledged plus what it has not. The two come from separate calls, so that an
    acknowledgement may fall between them: they are read until they agree.
    """
    if protocol(sock) != socket.IPPROTO_TCP:
        return None
    before = _tcp_info(sock)
    while True:
        if len(before) < _TCP_INFO or before[0] not in _OPEN:
            return None
        waiting = unsent(sock)
        after = _tcp_info(sock)
        if before[_ACKED] == after[_ACKED] and len(after) == _TCP_INFO:
            return int.from_bytes(after[_ACKED], sys.byteorder) + waiting
        before = after


def _tcp_info(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO)


def protocol(sock: socket.socket) -> int:
    """Return the protocol that the kernel has given `sock`, which need not be what was asked for."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL)


class Unacknowledged(NamedTuple):
    """What the kernel knows of a peer that has yet to acknowledge bytes."""

    # timeouts in a row after which bytes were sent again
    retransmits: int
    # of a closed window, in a row, that were not answered; or of keepalive
    probes: int
    # seconds since the last acknowledgement of any kind
    silence: float


# tcpi_retransmits, tcpi_probes, tcpi_unacked (packets), tcpi_last_ack_recv (milliseconds), and
# tcpi_notsent_bytes (since Linux 4.6).
_UNACKNOWLEDGED = struct.Struct("=2xBB20xI28xI84xI")


def unacknowledged(sock: socket.socket) -> Unacknowledged | None:
    """Return what the kernel knows of the peer of `sock`, None if it has no bytes for that peer.

    Also None for a socket that cannot tell.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKNOWLEDGED.size)
        retransmits, probes, in_flight, silence, waiting = _UNACKNOWLEDGED.unpack(info)
    except (OSError, struct.error):
        return None
    return Unacknowledged(retransmits, probes, silence / 1000) if in_flight or waiting else None


def accept_queue(listener: socket.socket) -> tuple[int, int]:
    """Return how many connections wait in the queue of `listener`, and how many it holds.

    The latter is less than listen(2) was asked for where that was cut, and 0 where it is not known.
    """
    queued, backlog = _QUEUE.unpack_from(_tcp_info(listener).ljust(_QUEUE.size, b"\0"))
    return int(queued), int(backlog)


def take_socket(fd: int) -> tuple[socket.socket, tuple[str, int] | None]:
    """Return the socket behind an inherited descriptor, and its peer if it still has one."""
    sock = socket.socket(fileno=fd)
    try:
        return sock, sock.getpeername()[:2]
    except OSError:
        return sock, None


def shut_down_writing(sock: socket.socket) -> None:
    """Send a FIN behind what is queued, whoever else holds the socket."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        # the peer is gone already
        pass


def lacks_room(error: BaseException) -> bool:
    """Tell whether `error` says that descriptors, memory or epoll watches have run out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _SHORTAGES
    )
