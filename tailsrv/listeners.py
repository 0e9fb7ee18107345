"""Makes the SO_REUSEPORT listening sockets, one for each slot and address, or takes those that a service manager passes."""

import errno
import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from tailsrv.addresses import endpoint
from tailsrv.diagnostics import cannot_bind
from tailsrv.linux import kernel
from tailsrv.linux.sockets import KEEPALIVE_OPTIONS, protocol
from tailsrv.log import fields, logger

# A storm of reconnects fills the queue of a slot before its worker sees the first; the kernel cuts this to
# net.core.somaxconn, which is 4096 by default.
BACKLOG = 4096

# Of the kernel's choices of a port, how many may be taken at another address. Where none fits, the addresses overlap.
PORT_TRIES = 16

# What a stalled reader may pin in the kernel beyond what is in flight. Measured against none, 256 KiB, 512 KiB and
# 1 MiB: with 128 KiB replays are as fast or faster (1000 clients: 1.7 times), and the caught-up wait a quarter as long
# beside 50 replaying clients.
NOTSENT_LOWAT = 128 << 10

# Accepted sockets inherit these (tcp(7) has a list; measured for all of them), so that a connection costs
# no system call for them. Keepalive finds the clients that left while the file was quiet. TCP_USER_TIMEOUT stays off:
# it would end readers that pause.
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    *KEEPALIVE_OPTIONS,
    (socket.IPPROTO_TCP, kernel.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT),
)


class ListenError(Exception):
    """Listening is not possible; the message says where and why, in one line."""


@dataclass(frozen=True, slots=True)
class Address:
    """One address to listen on, resolved: its family, what bind(2) takes, and how a person writes it.

    `name` is the host name that it is one of several addresses of, None where there is no other.
    """

    family: socket.AddressFamily
    host: str
    scope: int = 0
    name: str | None = field(default=None, compare=False)

    def sockaddr(self, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
        """Return what bind(2) takes."""
        return (
            (self.host, port, 0, self.scope)
            if self.family == socket.AF_INET6
            else (self.host, port)
        )


# the name of all addresses: a machine without IPv6 has only the first of these two
_ALL = "*"
EVERY_ADDRESS = (
    Address(socket.AF_INET, "0.0.0.0", name=_ALL),  # noqa: S104 a server's default
    Address(socket.AF_INET6, "::", name=_ALL),
)


def endpoints(bind: Sequence[str], port: int) -> list[str]:
    """Return how each address that is listened on is written, `*` for all of them."""
    return [endpoint(host, port) for host in dict.fromkeys(host.strip("[]") for host in bind)] or [
        f"*:{port}"
    ]


def resolve(bind: Sequence[str]) -> list[Address]:
    """Return the addresses that `bind` names, each once; every address where it is empty."""
    if not bind:
        return list(EVERY_ADDRESS)
    found: dict[Address, Address] = {}
    for host in bind:
        addresses = _look_up(host)
        for address in addresses:
            # Who asks for an address by itself, too, needs that one.
            if len(addresses) == 1 or address not in found:
                found[address] = replace(address, name=host if len(addresses) > 1 else None)
    return list(found.values())


def _look_up(host: str) -> list[Address]:
    """Return the addresses of `host`, a name or an address, each once. Raises ListenError."""
    try:
        answers = socket.getaddrinfo(
            host.strip("[]"), None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ListenError(
            f"no such address: {host} ({getattr(error, 'strerror', None) or error})"
        ) from error
    found = (
        Address(family, str(sockaddr[0]), int(sockaddr[3]) if len(sockaddr) > 3 else 0)
        for family, _, _, _, sockaddr in answers
    )
    return list(dict.fromkeys(found))


def open_listeners(bind: Sequence[str], port: int, slots: int) -> list[list[socket.socket]]:
    """Return the listening sockets of each slot, one for each address.

    A port of 0 lets the kernel choose one that is free at all of them. Of the addresses of one host name
    those that this machine does not have are left out, with a warning. Raises ListenError.
    """
    addresses = resolve(bind)
    # held until one fits, so that the kernel does not choose the same port again
    with ExitStack() as unfit:
        for tries_left in reversed(range(PORT_TRIES)):
            if firsts := _listen_at_all(addresses, port, unfit if tries_left else None):
                break
    _warn_of_missing(
        [address for address in addresses if address not in firsts and address.name != _ALL]
    )
    port = next(iter(firsts.values())).getsockname()[1]
    siblings = (
        [_listen(address, port, exclusive=False) for address in firsts] for _ in range(slots - 1)
    )
    return [list(firsts.values()), *siblings]


def _listen_at_all(
    addresses: Sequence[Address], port: int, unfit: ExitStack | None
) -> dict[Address, socket.socket]:
    """Return an exclusive listener for each address that there is.

    Where the kernel's choice of a port for one is taken at another, return none, and put them into `unfit` if there is such.
    """
    with ExitStack() as opened:
        firsts: dict[Address, socket.socket] = {}
        missing: list[tuple[Address, OSError]] = []
        chosen = port
        for address in addresses:
            try:
                firsts[address] = opened.enter_context(_listen(address, chosen, exclusive=True))
            except OSError as error:
                if error.errno == errno.EADDRINUSE and chosen != port and unfit is not None:
                    unfit.enter_context(opened.pop_all())
                    return {}
                if error.errno not in _NO_SUCH_ADDRESS:
                    raise _refused(address, chosen, error) from error
                missing.append((address, error))
            else:
                chosen = firsts[address].getsockname()[1]
        for address, reason in missing:
            if not any(address.name == other.name for other in firsts if other.name):
                raise _refused(address, port, reason)
        opened.pop_all()
        return firsts


def _refused(address: Address, port: int, error: OSError) -> ListenError:
    return ListenError(
        f"cannot listen on {endpoint(address.host, port)}: {cannot_bind(error, port)}"
    )


def _warn_of_missing(addresses: Iterable[Address]) -> None:
    for address in addresses:
        logger.warning(
            "this machine does not have one of the addresses of a name, clients cannot connect to it: %s",
            fields(
                name=address.name,
                address=address.host,
                hint="name the address that is meant with --bind, or see to it that it is there",
            ),
        )


def take_listeners(passed: Sequence[int]) -> list[socket.socket]:
    """Return the listening sockets behind the descriptors that a service manager has passed. Raises ListenError."""
    return [_take_listener(fd) for fd in passed]


def assign(
    listeners: Sequence[socket.socket], slots: int
) -> tuple[list[list[socket.socket]], bool]:
    """Return the listeners of each slot, and whether all slots share them.

    As many as there are slots, all at one address (SO_REUSEPORT), are used one each; otherwise each slot gets a copy of all.
    """
    if len(listeners) == slots and len({sock.getsockname() for sock in listeners}) == 1:
        return [[sock] for sock in listeners], False
    if slots == 1:
        return [list(listeners)], False
    # each slot's own, to keep and to close
    copies = [[sock.dup() for sock in listeners] for _ in range(slots)]
    for sock in listeners:
        sock.close()
    return copies, True


def _take_listener(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ListenError(
            f"descriptor {fd}, passed by the service manager, is no socket: {os.strerror(error.errno or 0)}"
        ) from error
    if (
        sock.type != socket.SOCK_STREAM
        or sock.family not in (socket.AF_INET, socket.AF_INET6)
        or not listens
    ):
        raise ListenError(
            f"descriptor {fd}, passed by the service manager, is no listening TCP socket; use ListenStream=PORT"
        )
    if (other := _other_protocol(sock)) is not None:
        raise ListenError(
            f"descriptor {fd}, passed by the service manager, is no TCP socket but {other}; use SocketProtocol=tcp"
        )
    _set_options(sock)
    _forbid_fast_open(sock)
    return sock


def _other_protocol(sock: socket.socket) -> str | None:
    """Return what `sock` speaks if that is not TCP itself: then nobody could say where a stream stands."""
    number = protocol(sock)
    if number == socket.IPPROTO_TCP:
        return None
    return "MPTCP" if number == kernel.IPPROTO_MPTCP else f"protocol {number}"


def names_of(listeners: Sequence[socket.socket]) -> list[str]:
    """Return how the addresses of `listeners` are written, each once, `*` for all of the machine's."""
    names = (sock.getsockname()[:2] for sock in listeners)
    every = {address.host for address in EVERY_ADDRESS}
    return list(
        dict.fromkeys(endpoint("*" if host in every else host, port) for host, port in names)
    )


_NO_SUCH_ADDRESS = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})


def _listen(address: Address, port: int, exclusive: bool) -> socket.socket:
    """Return a listening socket that its later siblings can join.

    An exclusive one listens *before* it gets SO_REUSEPORT, so that the kernel refuses a second server on the
    port, also one that starts in the same instant; with the option from the start it would share the clients.
    """
    sock = socket.socket(address.family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if (other := _other_protocol(sock)) is not None:
            raise ListenError(
                f"the kernel gives us {other} sockets instead of TCP; start without mptcpize, or exempt us from its BPF program"
            )
        # a restart need not wait for TIME_WAIT
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if not exclusive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _set_options(sock)
        sock.bind(address.sockaddr(port))
        sock.listen(BACKLOG)
        _forbid_fast_open(sock)
        if exclusive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except (OSError, ListenError):
        sock.close()
        raise
    return sock


def _set_options(sock: socket.socket) -> None:
    sock.setblocking(False)
    for level, option, value in _OPTIONS:
        sock.setsockopt(level, option, value)


def _forbid_fast_open(sock: socket.socket) -> None:
    """Accept no connection before its handshake is complete, whatever net.ipv4.tcp_fastopen says.

    Until then the kernel counts nothing of what is sent, so that no successor could go on with the
    stream. With the sysctl's flag 0x400 listen(2) allows it, so this must come afterwards.
    """
    try:
        sock.setsockopt(socket.IPPROTO_TCP, kernel.TCP_FASTOPEN, 0)
    except OSError:
        # A kernel without it never does that.
        pass
