"""Tests of the listeners: one socket for each slot and address, all on one port."""

import errno
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from support.interpreter import environment, program
from support.processes import runs
from support.sockets import closing_all, needs_ipv6, skip_without_mptcp, wait_readable
from support.waiting import DEADLINE
from tailsrv.linux.sockets import bytes_streamed
from tailsrv.listeners import (
    EVERY_ADDRESS,
    NOTSENT_LOWAT,
    Address,
    ListenError,
    PortInUseError,
    each_once,
    endpoints,
    extend_listeners,
    open_listeners,
    resolve,
)

LOOPBACK = ["127.0.0.1"]
ACCEPTS = socket.SO_ACCEPTCONN


@contextmanager
def listening(bind: list[str], port: int, slots: int) -> Iterator[list[list[socket.socket]]]:
    """Give the listeners of each slot, and close them after the test."""
    by_slot = open_listeners(bind, port, slots)
    with closing_all([sock for listeners in by_slot for sock in listeners]):
        yield by_slot


@pytest.mark.parametrize(
    ("bind", "words"),
    [
        ([], ["*:7"]),
        (["127.0.0.1"], ["127.0.0.1:7"]),
        (["::1"], ["[::1]:7"]),
        (["[::1]"], ["[::1]:7"]),
        (["a", "b", "a"], ["a:7", "b:7"]),
    ],
)
def test_endpoints(bind: list[str], words: list[str]) -> None:
    """Each address is named once, and `*` stands for all addresses."""
    assert endpoints(bind, 7) == words


def test_resolve() -> None:
    """Names and numbers are resolved without duplicates, and no address means all addresses."""
    assert resolve([]) == list(EVERY_ADDRESS)
    assert resolve(["127.0.0.1", "127.0.0.1"]) == [Address(socket.AF_INET, "127.0.0.1")]
    assert resolve(["::1", "[::1]", "127.0.0.1"]) == [
        Address(socket.AF_INET6, "::1"),
        Address(socket.AF_INET, "127.0.0.1"),
    ]


@pytest.mark.parametrize(
    "host", ["300.0.0.1", "", "no such host", "a..b", "1.2.3.4:80", "x" * 300, "\udcff"]
)
def test_bad_address(host: str) -> None:
    """A name that is no address causes a ListenError of one line that names it."""
    with pytest.raises(ListenError) as caught:
        open_listeners([host], 0, 1)
    assert host in str(caught.value)
    assert "\n" not in str(caught.value)


def test_address_of_another_machine() -> None:
    """An address of another machine is refused, with the address and the reason."""
    with pytest.raises(ListenError, match=r"192\.0\.2\.1:0") as caught:
        open_listeners(["192.0.2.1"], 0, 1)
    assert os.strerror(errno.EADDRNOTAVAIL) in str(caught.value)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_each_slot_has_its_own_queue(slots: int) -> None:
    """Each slot has its own non-blocking listening socket on the shared port."""
    with listening(LOOPBACK, 0, slots) as by_slot:
        assert [len(listeners) for listeners in by_slot] == [1] * slots
        socks = [listeners[0] for listeners in by_slot]
        assert len({os.fstat(sock.fileno()).st_ino for sock in socks}) == slots
        assert len({sock.getsockname() for sock in socks}) == 1
        assert [sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for sock in socks] == [
            1
        ] * slots
        assert [sock.getblocking() for sock in socks] == [False] * slots


def accept_all(listener: socket.socket) -> list[socket.socket]:
    """Accept and return every connection in the queue of `listener`."""
    accepted = []
    try:
        while True:
            accepted.append(listener.accept()[0])
    except BlockingIOError:
        return accepted


def test_connections_reach_every_slot() -> None:
    """The kernel spreads connections over all slots, and each is in exactly one queue."""
    slots, connects = 3, 300
    with listening(LOOPBACK, 0, slots) as by_slot, ExitStack() as stack:
        address = by_slot[0][0].getsockname()
        fars = [stack.enter_context(socket.create_connection(address)) for _ in range(connects)]
        queues = [
            [stack.enter_context(sock) for sock in accept_all(listeners[0])]
            for listeners in by_slot
        ]
        assert sorted(sock.getpeername() for queue in queues for sock in queue) == sorted(
            far.getsockname() for far in fars
        )
        # The kernel distributes by a hash of the ports: fewer than 30 of 300 in one of three queues
        # is more than 8 standard deviations from the mean.
        assert min(len(queue) for queue in queues) >= 30


@pytest.mark.parametrize("slots", [1, 3])
def test_second_server_is_refused(slots: int) -> None:
    """A second server on the port is refused with address and reason, and takes no connection."""
    with listening(LOOPBACK, 0, slots) as by_slot:
        port = by_slot[0][0].getsockname()[1]
        with pytest.raises(ListenError, match=rf"127\.0\.0\.1:{port}") as caught:
            open_listeners(LOOPBACK, port, slots)
        assert os.strerror(errno.EADDRINUSE) in str(caught.value)
        with socket.create_connection(by_slot[0][0].getsockname()):
            assert sum(len(accept_and_close(listeners[0])) for listeners in by_slot) == 1


def accept_and_close(listener: socket.socket) -> list[socket.socket]:
    """Accept and close every connection in the queue of `listener`, and return them."""
    accepted = accept_all(listener)
    for sock in accepted:
        sock.close()
    return accepted


def test_port_is_free_again_at_once() -> None:
    """A connection in TIME_WAIT does not keep the next server from the port."""
    with listening(LOOPBACK, 0, 2) as by_slot:
        port = by_slot[0][0].getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as far:
            assert sum(len(accept_and_close(listeners[0])) for listeners in by_slot) == 1
            # The server closed first, so its side is in TIME_WAIT.
            assert far.recv(1) == b""
    with listening(LOOPBACK, port, 2) as by_slot:
        assert by_slot[0][0].getsockname()[1] == port


def test_port_0_is_one_port_for_all_addresses() -> None:
    """The port that the kernel chooses for the first address is used for the others too."""
    with listening(["127.0.0.1", "127.0.0.2", "127.0.0.3"], 0, 2) as by_slot:
        names = [[sock.getsockname() for sock in listeners] for listeners in by_slot]
        assert names[0] == names[1]
        assert [host for host, _ in names[0]] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
        assert len({port for _, port in names[0]}) == 1
        assert names[0][0][1] > 0


def test_overlapping_addresses_have_no_port() -> None:
    """If one address covers another, no port is found, and the error says so after some tries."""
    with pytest.raises(ListenError, match=r"127\.0\.0\.1:\d+: " + os.strerror(errno.EADDRINUSE)):
        open_listeners(["0.0.0.0", "127.0.0.1"], 0, 1)


@needs_ipv6
def test_every_address_is_both_families() -> None:
    """Without an address, IPv4 and IPv6 are served on one port by separate sockets."""
    with listening([], 0, 2) as by_slot:
        assert [sock.family for listeners in by_slot for sock in listeners] == [
            socket.AF_INET,
            socket.AF_INET6,
        ] * 2
        assert len({sock.getsockname()[1] for listeners in by_slot for sock in listeners}) == 1
        port = by_slot[0][0].getsockname()[1]
        for host, which in (("127.0.0.1", 0), ("::1", 1)):
            with socket.create_connection((host, port)):
                assert sum(len(accept_and_close(listeners[which])) for listeners in by_slot) == 1


@needs_ipv6
def test_ipv6() -> None:
    """An IPv6 address is served, and the error of a second server writes it in brackets."""
    with listening(["::1"], 0, 2) as by_slot:
        port = by_slot[0][0].getsockname()[1]
        with socket.create_connection(("::1", port)):
            assert sum(len(accept_and_close(listeners[0])) for listeners in by_slot) == 1
        with pytest.raises(ListenError, match=rf"\[::1\]:{port}"):
            open_listeners(["::1"], port, 1)


@pytest.mark.parametrize("slots", [1, 2])
def test_accepted_sockets_inherit_their_options(slots: int) -> None:
    """Accepted sockets inherit the options of their listener in every slot."""
    wanted = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
        (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0),
    ]
    with listening(LOOPBACK, 0, slots) as by_slot, ExitStack() as stack:
        served = set[int]()
        # The kernel chooses the slot: connect until each slot has had a connection.
        while len(served) < slots:
            stack.enter_context(socket.create_connection(by_slot[0][0].getsockname()))
            for index, listeners in enumerate(by_slot):
                for sock in accept_all(listeners[0]):
                    with sock:
                        assert [
                            (level, option, sock.getsockopt(level, option))
                            for level, option, _ in wanted
                        ] == wanted
                    served.add(index)


def test_queue_outlives_a_copy() -> None:
    """Closing a worker's copy of a listener resets no connection in its queue."""
    with listening(LOOPBACK, 0, 1) as [[listener]]:
        copy = listener.dup()
        with socket.create_connection(listener.getsockname()) as far:
            wait_readable(copy)
            copy.close()
            [near] = accept_all(listener)
            with near:
                near.sendall(b"hello")
            assert far.recv(10) == b"hello"


def test_position_on_an_mptcp_socket() -> None:
    """The position of a stream on an MPTCP socket is unknown, and reported as None."""
    skip_without_mptcp()
    kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    with socket.socket(*kind) as listener, socket.socket(*kind) as far:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        far.connect(listener.getsockname())
        near, _ = listener.accept()
        with near:
            near.send(b"data")
            assert bytes_streamed(near) is None


FORCED_FAST_OPEN = (
    "unshare", "--net", "--map-root-user", "sh", "-c",
    'ip link set lo up && echo 0x607 >/proc/sys/net/ipv4/tcp_fastopen && exec "$@"', "sh",
)  # fmt: skip


def test_no_fast_open() -> None:
    """A connection is accepted only after the handshake, even if the system forces Fast Open."""
    if not runs(*FORCED_FAST_OPEN, "true"):
        pytest.skip("a network namespace cannot be created")
    command = [*FORCED_FAST_OPEN, sys.executable, program("fast_open")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE, env=environment()
    )
    assert (done.stdout.split(), done.stderr) == (["1", "1", "1"], "")


# Listeners of orphaned workers


def inodes(sockets: list[socket.socket]) -> set[int]:
    """Return what identifies the sockets."""
    return {os.fstat(sock.fileno()).st_ino for sock in sockets}


@contextmanager
def extended(
    existing: list[socket.socket], bind: list[str], port: int, slots: int
) -> Iterator[tuple[list[list[socket.socket]], bool]]:
    """Yield what extend_listeners() returns, and close the sockets."""
    rows, shared = extend_listeners(bind, port, slots, existing)
    with closing_all([sock for row in rows for sock in row]):
        yield rows, shared


@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 3), (3, 2), (2, 1)])
def test_extend(before: int, after: int) -> None:
    """No listener is lost, each slot has one for each address, and a connection reaches a slot."""
    both = ["127.0.0.1", "127.0.0.2"]
    existing = [sock for row in open_listeners(both, 0, before) for sock in row]
    port, known = existing[0].getsockname()[1], inodes(existing)
    with extended(existing, both, port, after) as (rows, shared):
        assert shared is (before > after)
        assert known <= inodes([sock for row in rows for sock in row])
        for row in rows:
            assert {sock.getsockname()[0] for sock in row} == set(both)
            assert len(row) == (2 * before if shared else 2)
        every = [sock for row in rows for sock in row]
        listening = [sock for sock in every if sock.getsockopt(socket.SOL_SOCKET, ACCEPTS)]
        # The others wait for their workers.
        assert inodes(listening) == known
        for host in both:
            with socket.create_connection((host, port)), ready(rows) as listener:
                listener.accept()[0].close()


@contextmanager
def ready(rows: list[list[socket.socket]]) -> Iterator[socket.socket]:
    """Yield a listener at which a connection waits."""
    found, _, _ = select.select([sock for row in rows for sock in row], [], [], DEADLINE)
    yield found[0]


def test_extend_by_an_address() -> None:
    """Addresses may be added and taken away."""
    existing = [sock for row in open_listeners(["127.0.0.1", "127.0.0.2"], 0, 2) for sock in row]
    port = existing[0].getsockname()[1]
    with extended(existing, ["127.0.0.2", "127.0.0.3"], port, 2) as (rows, shared):
        assert not shared
        for row in rows:
            assert {sock.getsockname()[0] for sock in row} == {"127.0.0.2", "127.0.0.3"}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_extend_without_ipv6() -> None:
    """One of the wildcard addresses may be missing, as at the start."""
    existing = [sock for row in open_listeners(["0.0.0.0"], 0, 2) for sock in row]
    port = existing[0].getsockname()[1]
    with extended(existing, [], port, 2) as (rows, shared):
        assert not shared
        assert [len(row) for row in rows] == [1, 1]


def test_each_once() -> None:
    """Duplicates of one socket are closed."""
    ((first,), (second,)) = open_listeners(LOOPBACK, 0, 2)
    with first, second, first.dup() as copy:
        assert each_once([first, second, copy]) == [first, second]
        assert copy.fileno() == -1
        assert first.fileno() != -1


def test_port_in_use() -> None:
    """A port in use has an error of its own."""
    with listening(LOOPBACK, 0, 1) as ((sock,),), pytest.raises(PortInUseError):
        open_listeners(LOOPBACK, sock.getsockname()[1], 1)
