"""Creates the listening sockets, or takes those that a service manager passes.

Each slot has a socket of its own for each address, with SO_REUSEPORT, so that the kernel spreads
connections over the workers. If a service manager passes as many sockets as there are slots, each
slot gets one of them; otherwise all slots share the passed sockets.
"""

import errno
import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from tailsrv.addresses import endpoint
from tailsrv.error_hints import cannot_bind
from tailsrv.linux import libc_fallbacks
from tailsrv.linux.sockets import KEEPALIVE_OPTIONS, protocol
from tailsrv.log import fields, logger

# Length of each accept queue, in connections. When many clients reconnect at once, they fill the
# queue of a slot before its worker accepts the first. The kernel limits the length to
# net.core.somaxconn, which is 4096 by default.
BACKLOG = 4096

# Attempts to find a port that is free at all addresses, by letting the kernel choose one. If all of
# them fail, the addresses probably overlap.
PORT_TRIES = 16

# Bytes that a stalled client may hold in the kernel's memory, in addition to the bytes in flight.
# [measured: 128 KiB against no limit, 256 KiB, 512 KiB and 1 MiB. With 128 KiB, clients that read
# the file from its start are served as fast or faster (1.7 times as fast with 1000 clients). With
# 50 such clients, clients that are caught up wait a quarter as long.]
NOTSENT_LOWAT = 128 << 10

# Accepted sockets inherit these options (tcp(7) has a list; measured for all of them), so they cost
# no system call per connection. Keepalive finds clients that have vanished while the file did not
# grow. TCP_USER_TIMEOUT stays off, because it would disconnect clients that pause reading.
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    *KEEPALIVE_OPTIONS,
    (socket.IPPROTO_TCP, libc_fallbacks.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT),
)

# The errors of socket(2) and bind(2) for an address that this machine does not have.
_NO_SUCH_ADDRESS = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})


class ListenError(Exception):
    """A listening socket cannot be created or used; the message says which and why, in one line."""


class PortInUseError(ListenError):
    """A port is in use."""


@dataclass(frozen=True, slots=True)
class Address:
    """One numeric address to listen on.

    `host` is the address as text, and `scope` is the scope id of an IPv6 address. `name` is the
    name that this address shares with others, of which some may be missing. It is None if the
    address is required.
    """

    family: socket.AddressFamily
    host: str
    scope: int = 0
    name: str | None = field(default=None, compare=False)

    def sockaddr(self, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
        """Return the socket address for bind(2)."""
        return (
            (self.host, port, 0, self.scope)
            if self.family == socket.AF_INET6
            else (self.host, port)
        )


# The wildcard addresses share this name, so that one of them may be missing: a machine without IPv6
# has only the first.
_ALL = "*"
EVERY_ADDRESS = (
    Address(socket.AF_INET, "0.0.0.0", name=_ALL),  # noqa: S104 the default of a server
    Address(socket.AF_INET6, "::", name=_ALL),
)


def endpoints(bind: Sequence[str], port: int) -> list[str]:
    """Format the addresses of `--bind` as `ADDR:PORT`, or as `*:PORT` if there are none."""
    return [endpoint(host, port) for host in dict.fromkeys(host.strip("[]") for host in bind)] or [
        f"*:{port}"
    ]


def resolve(bind: Sequence[str]) -> list[Address]:
    """Resolve the values of `--bind` to addresses, each once; none means the wildcard addresses.

    Raises ListenError if a name cannot be resolved.
    """
    if not bind:
        return list(EVERY_ADDRESS)
    found: dict[Address, Address] = {}
    for host in bind:
        addresses = _look_up(host)
        for address in addresses:
            # An address that is also given on its own is required, so it gets no name: addresses
            # with a name may be missing.
            if len(addresses) == 1 or address not in found:
                found[address] = replace(address, name=host if len(addresses) > 1 else None)
    return list(found.values())


def _look_up(host: str) -> list[Address]:
    """Resolve `host`, a name or an address, to addresses, each once. Raises ListenError."""
    try:
        answers = socket.getaddrinfo(
            host.strip("[]"), None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ListenError(
            f"no such address: {host} ({getattr(error, 'strerror', None) or error});"
            " --bind needs an address or a host name, without a port"
        ) from error
    found = (
        Address(family, str(sockaddr[0]), int(sockaddr[3]) if len(sockaddr) > 3 else 0)
        for family, _, _, _, sockaddr in answers
    )
    return list(dict.fromkeys(found))


def open_listeners(bind: Sequence[str], port: int, slots: int) -> list[list[socket.socket]]:
    """Create the listening sockets of each slot, one for each address.

    If a host name has several addresses, those that this machine does not have are left out, with a
    warning.

    Args:
        bind: The values of `--bind`; empty for all addresses.
        port: The TCP port. 0 lets the kernel choose one that is free at all addresses.
        slots: The number of slots.

    Returns:
        A list of sockets for each slot.

    Raises:
        ListenError: A name cannot be resolved, or an address and port cannot be listened on.

    """
    addresses = resolve(bind)
    # If a port is not free at all addresses, keep its sockets open until another port is. Otherwise
    # the kernel might choose the same port again.
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


def extend_listeners(
    bind: Sequence[str], port: int, slots: int, existing: Sequence[socket.socket]
) -> tuple[list[list[socket.socket]], bool]:
    """Return the listening sockets of each slot, as far as possible from those that exist already.

    No existing socket is closed as long as its address is in `bind`: the kernel would reset the
    connections in its accept queue. If there are more of them than slots, all slots share them.

    New ones do not listen before their workers let them: if this process dies before that, no
    connection may wait in a socket that no worker has.

    Args:
        bind: The values of `--bind`; empty for all addresses.
        port: The TCP port.
        slots: The number of slots.
        existing: The sockets of the orphaned workers.

    Returns:
        The sockets of each slot, and whether all slots share the same sockets.

    Raises:
        ListenError: As for open_listeners().

    """
    addresses = resolve(bind)
    found: dict[Address, list[socket.socket]] = {}
    for sock in each_once(existing):
        if (address := _address_of(sock)) in addresses and sock.getsockname()[1] == port:
            _set_options(sock)
            found.setdefault(address, []).append(sock)
        else:
            sock.close()
    # Some of the addresses of a name may be missing on this machine.
    names = {address.name for address in addresses if address.name and address in found}
    missing = [each for each in addresses if each not in found and each.name not in names]
    firsts = _listen_at_all(missing, port, None)
    found |= {address: [sock] for address, sock in firsts.items()}
    try:
        for address, sockets in found.items():
            while len(sockets) < slots:
                sockets.append(_bind(address, port, exclusive=False))
    except OSError:
        # They belong to another user, so that the kernel lets no socket of this user join them.
        pass
    if all(len(sockets) == slots for sockets in found.values()):
        return [list(row) for row in zip(*found.values(), strict=True)], False
    return share([sock for sockets in found.values() for sock in sockets], slots)


def each_once(sockets: Iterable[socket.socket]) -> list[socket.socket]:
    """Return those of `sockets` that are not duplicates of others, and close the duplicates."""
    kept: dict[int, socket.socket] = {}
    for sock in sockets:
        if kept.setdefault(inode(sock.fileno()), sock) is not sock:
            sock.close()
    return list(kept.values())


def inode(fd: int) -> int:
    """Return the number that all descriptors of one socket have in common."""
    return os.fstat(fd).st_ino


def _address_of(sock: socket.socket) -> Address:
    """Return the address that `sock` listens at."""
    host, _, *rest = sock.getsockname()
    return Address(sock.family, host, rest[1] if rest else 0)


def _listen_at_all(
    addresses: Sequence[Address], port: int, unfit: ExitStack | None
) -> dict[Address, socket.socket]:
    """Create an exclusive listening socket for each address that this machine has.

    If the port that the kernel chose at the first address is in use at another one, return nothing
    and pass the sockets created so far to `unfit`, or raise ListenError if `unfit` is None.
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
    kind = PortInUseError if error.errno == errno.EADDRINUSE else ListenError
    return kind(f"cannot listen on {endpoint(address.host, port)}: {cannot_bind(error, port)}")


def _warn_of_missing(addresses: Iterable[Address]) -> None:
    for address in addresses:
        logger.warning(
            "this machine does not have one of the addresses of a name,"
            " clients cannot connect to it: %s",
            fields(
                name=address.name,
                address=address.host,
                hint="give --bind the address itself, or add the address to an interface",
            ),
        )


def take_listeners(passed: Sequence[int]) -> list[socket.socket]:
    """Return the listening sockets for the descriptors that a service manager has passed.

    Raises ListenError if one of them is not a listening TCP socket.
    """
    return [_take_listener(fd) for fd in passed]


def assign(
    listeners: Sequence[socket.socket], slots: int
) -> tuple[list[list[socket.socket]], bool]:
    """Distribute passed listening sockets over `slots` slots.

    If there are as many sockets as slots, all at the same address (SO_REUSEPORT), each slot gets
    one of them. A single slot gets all sockets. Otherwise each slot gets duplicates of all sockets.

    Returns the sockets of each slot, and whether all slots share the same sockets.
    """
    if len(listeners) == slots and len({sock.getsockname() for sock in listeners}) == 1:
        return [[sock] for sock in listeners], False
    if slots == 1:
        return [list(listeners)], False
    return share(listeners, slots)


def share(listeners: Sequence[socket.socket], slots: int) -> tuple[list[list[socket.socket]], bool]:
    """Return duplicates of all `listeners` for each slot, and that the slots share them.

    A slot can close its duplicates without affecting the others.
    """
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
            f"descriptor {fd}, passed by the service manager, is not a socket:"
            f" {os.strerror(error.errno or 0)}"
        ) from error
    if (
        sock.type != socket.SOCK_STREAM
        or sock.family not in (socket.AF_INET, socket.AF_INET6)
        or not listens
    ):
        raise ListenError(
            f"descriptor {fd}, passed by the service manager, is not a listening TCP socket;"
            " use ListenStream=PORT"
        )
    if (other := _other_protocol(sock)) is not None:
        raise ListenError(
            f"descriptor {fd}, passed by the service manager, is not a TCP socket but {other};"
            " use SocketProtocol=tcp"
        )
    _set_options(sock)
    _forbid_fast_open(sock)
    return sock


def _other_protocol(sock: socket.socket) -> str | None:
    """Name the protocol of `sock` if it is not TCP; return None if it is.

    With another protocol, such as MPTCP, the kernel does not tell how much of a stream has been
    sent, so that no other worker could continue it.
    """
    number = protocol(sock)
    if number == socket.IPPROTO_TCP:
        return None
    return "MPTCP" if number == libc_fallbacks.IPPROTO_MPTCP else f"protocol {number}"


def names_of(listeners: Sequence[socket.socket]) -> list[str]:
    """Format the addresses of `listeners` as `ADDR:PORT`, each once, with `*` for a wildcard."""
    names = (sock.getsockname()[:2] for sock in listeners)
    every = {address.host for address in EVERY_ADDRESS}
    return list(
        dict.fromkeys(endpoint("*" if host in every else host, port) for host, port in names)
    )


def _listen(address: Address, port: int, exclusive: bool) -> socket.socket:
    """Create a listening socket that the sockets of further slots can join (SO_REUSEPORT).

    An exclusive socket listens *before* it gets SO_REUSEPORT. So the kernel refuses a second server
    on the port, even one that starts at the same moment. If the option were set first, a second
    server would get a share of the clients.
    """
    sock = _bind(address, port, exclusive)
    try:
        listen(sock)
        if exclusive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        sock.close()
        raise
    return sock


def listen(sock: socket.socket) -> None:
    """Let `sock` listen, if it does not yet. Raises OSError."""
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.listen(BACKLOG)
        _forbid_fast_open(sock)


def _bind(address: Address, port: int, exclusive: bool) -> socket.socket:
    """Create a socket for `_listen` that does not listen yet."""
    sock = socket.socket(address.family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if (other := _other_protocol(sock)) is not None:
            raise ListenError(
                f"the kernel creates {other} sockets instead of TCP sockets;"
                " start tailsrv without mptcpize, or exclude it in the BPF program that does this"
            )
        # Without this, a restart would have to wait for connections in the state TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if not exclusive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _set_options(sock)
        sock.bind(address.sockaddr(port))
    except (OSError, ListenError):
        sock.close()
        raise
    return sock


def _set_options(sock: socket.socket) -> None:
    sock.setblocking(False)
    for level, option, value in _OPTIONS:
        sock.setsockopt(level, option, value)


def _forbid_fast_open(sock: socket.socket) -> None:
    """Disable TCP Fast Open, whatever net.ipv4.tcp_fastopen says.

    With it, a connection could be accepted before its handshake is complete. Until then the kernel
    does not count the bytes sent, so that no other worker could continue the stream. If the sysctl
    has the flag 0x400, listen(2) enables Fast Open, so call this after listen(2).
    """
    try:
        sock.setsockopt(socket.IPPROTO_TCP, libc_fallbacks.TCP_FASTOPEN, 0)
    except OSError:
        # This kernel does not support TCP Fast Open.
        pass
