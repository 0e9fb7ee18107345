"""Tests of the system calls on sockets, with real sockets."""

import errno
import os
import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from support.files import EVERY_BYTE
from support.interpreter import run_program
from support.sockets import recv_all, reset, wait_for, wait_readable
from tailsrv.linux.files import send_chunk
from tailsrv.linux.sockets import Outcome, discard, peek, poll_once, shut_down_writing, unsent
from tailsrv.protocol import PEEK
from tailsrv.worker.acceptor import ACCEPT_TRIES, accept


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Give a listening socket on loopback."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        sock.setblocking(False)
        yield sock


def test_accept(listener: socket.socket) -> None:
    """An accepted socket is non-blocking, not inheritable, and comes with its peer's address."""
    assert accept(listener) is Outcome.WOULD_BLOCK
    with socket.create_connection(listener.getsockname()) as far:
        wait_readable(listener)
        accepted = accept(listener)
        assert isinstance(accepted, tuple)
        sock, peer = accepted
        with sock:
            assert peer == far.getsockname()
            assert not sock.getblocking()
            assert not sock.get_inheritable()
            assert sock.getpeername() == far.getsockname()
    assert accept(listener) is Outcome.WOULD_BLOCK


def test_accept_over_ipv6() -> None:
    """The address of an IPv6 peer is host and port as well."""
    with socket.socket(socket.AF_INET6) as listener:
        try:
            listener.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as far:
            accepted = accept(listener)
            assert isinstance(accepted, tuple)
            accepted[0].close()
            assert accepted[1] == ("::1", far.getsockname()[1])


def test_accept_after_a_reset(listener: socket.socket) -> None:
    """A connection that was reset while queued is accepted or left out, but is no error."""
    with socket.create_connection(listener.getsockname()) as far:
        wait_readable(listener)
        reset(far)
    accepted = accept(listener)
    if isinstance(accepted, tuple):
        sock, _ = accepted
        with sock:
            assert peek(sock, PEEK) is Outcome.HUNG_UP
    else:
        assert accepted is Outcome.WOULD_BLOCK


def test_accept_without_descriptors() -> None:
    """Without descriptors accept() returns an outcome, and the connection stays in the queue."""
    done = run_program("accept_without_descriptors")
    assert (done.returncode, done.stderr) == (0, "")


class Refusing(socket.socket):
    """A listener whose accept() fails `refusals` times before it succeeds."""

    refusals = 0
    tries = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.tries += 1
        if self.tries <= self.refusals:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return super().accept()


@pytest.mark.parametrize("refusals", [ACCEPT_TRIES - 1, ACCEPT_TRIES, 10 * ACCEPT_TRIES])
def test_accept_that_always_fails(listener: socket.socket, refusals: int) -> None:
    """An error of one connection is retried, and is returned after ACCEPT_TRIES attempts."""
    with (
        Refusing(fileno=os.dup(listener.fileno())) as refusing,
        socket.create_connection(listener.getsockname()) as far,
    ):
        refusing.refusals = refusals
        wait_readable(refusing)
        accepted = accept(refusing)
        assert refusing.tries == ACCEPT_TRIES
        if refusals < ACCEPT_TRIES:
            assert isinstance(accepted, tuple)
            accepted[0].close()
            assert accepted[1] == far.getsockname()
        else:
            assert isinstance(accepted, PermissionError)


def test_peek_consumes_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    """peek() consumes nothing, and returns no more than the given number of bytes."""
    near, far = pair
    assert peek(near, PEEK) is Outcome.WOULD_BLOCK
    far.sendall(b"12")
    wait_readable(near)
    assert [peek(near, PEEK), peek(near, PEEK)] == [b"12", b"12"]
    far.sendall(b"x" * 100)
    while len(seen := near.recv(1000, socket.MSG_PEEK)) < 102:
        assert seen.startswith(b"12")
    assert peek(near, PEEK) == b"12" + b"x" * (PEEK - 2)
    assert near.recv(1000) == b"12" + b"x" * 100


def test_peek_at_the_end_of_input(pair: tuple[socket.socket, socket.socket]) -> None:
    """At the end of input peek() returns no bytes, after all earlier bytes were read."""
    near, far = pair
    far.sendall(b"12")
    far.shutdown(socket.SHUT_WR)
    wait_for(near, select.POLLRDHUP)
    assert peek(near, PEEK) == b"12"
    near.recv(2)
    assert peek(near, PEEK) == b""


def test_peek_after_a_reset(pair: tuple[socket.socket, socket.socket]) -> None:
    """After a reset peek() returns a hang-up."""
    near, far = pair
    reset(far)
    wait_for(near, select.POLLERR)
    assert peek(near, PEEK) is Outcome.HUNG_UP


def test_discard(pair: tuple[socket.socket, socket.socket]) -> None:
    """discard() consumes all input, and returns False while there may be more."""
    near, far = pair
    total = far.send(bytes(20_000))
    while len(near.recv(total, socket.MSG_PEEK)) < total:
        wait_readable(near)
    assert discard(near) is False
    assert peek(near, PEEK) is Outcome.WOULD_BLOCK
    assert discard(near) is False
    far.sendall(b"later")
    wait_readable(near)
    assert peek(near, PEEK) == b"later"


def test_discard_at_the_end_of_input(pair: tuple[socket.socket, socket.socket]) -> None:
    """After the last bytes, each discard() reports the end of input."""
    near, far = pair
    far.sendall(b"last")
    far.shutdown(socket.SHUT_WR)
    wait_for(near, select.POLLRDHUP)
    assert [discard(near), discard(near), discard(near)] == [False, True, True]


def test_discard_after_a_reset(pair: tuple[socket.socket, socket.socket]) -> None:
    """A reset is the end of input."""
    near, far = pair
    reset(far)
    wait_for(near, select.POLLERR)
    assert [discard(near), discard(near)] == [True, True]


def test_discard_keeps_the_stream_alive(pair: tuple[socket.socket, socket.socket]) -> None:
    """A peer that sends more than the buffers hold is never blocked while input is discarded."""
    near, far = pair
    far.setblocking(False)
    left = 32 << 20
    while left > 0:
        wait_for(far, select.POLLOUT)
        left -= far.send(bytes(1 << 20))
        discard(near)
    near.sendall(b"alive")
    far.settimeout(20)
    assert far.recv(10) == b"alive"


def test_close_after_discard_loses_nothing(
    pair: tuple[socket.socket, socket.socket], opened_file: int
) -> None:
    """After discarded input a close is no reset, which would destroy the queued bytes."""
    near, far = pair
    far.sendall(b"stray")
    wait_readable(near)
    sent = send_chunk(near.fileno(), opened_file, 0, len(EVERY_BYTE))
    assert isinstance(sent, int)
    discard(near)
    shut_down_writing(near)
    near.close()
    assert recv_all(far) == EVERY_BYTE[:sent]


def test_unsent(pair: tuple[socket.socket, socket.socket], opened_file: int) -> None:
    """unsent() counts unacknowledged bytes and the FIN, and is 0 when the peer has read all."""
    near, far = pair
    assert unsent(near) == 0
    sent = 0
    while isinstance(result := send_chunk(near.fileno(), opened_file, 0, len(EVERY_BYTE)), int):
        sent += result
    before = unsent(near)
    assert 0 < before <= sent
    shut_down_writing(near)
    assert 0 < unsent(near) <= before + 1
    assert len(recv_all(far)) == sent
    far.close()
    assert wait_for(near, select.POLLHUP) & select.POLLHUP
    assert unsent(near) == 0


def test_shut_down_writing_despite_a_duplicate(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """The peer sees the end although a duplicate is open; repeating the call is no error."""
    near, far = pair
    with near.dup():
        shut_down_writing(near)
        assert far.recv(10) == b""
        shut_down_writing(near)
        reset(far)
        wait_for(near, select.POLLHUP)
        shut_down_writing(near)


def test_poll_once() -> None:
    """A wait ends with the first event, and reports each descriptor that has one."""
    near, far = socket.socketpair()
    with near, far:
        wanted = {near.fileno(): select.POLLIN, far.fileno(): select.POLLIN, -1: select.POLLIN}
        assert poll_once(wanted, 0) == {}
        far.send(b"x")
        # poll(2) would not accept a timeout of a year.
        assert poll_once(wanted, 365 * 86400) == {near.fileno(): select.POLLIN}
        assert poll_once({**wanted, far.fileno(): select.POLLOUT}, None) == {
            near.fileno(): select.POLLIN,
            far.fileno(): select.POLLOUT,
        }


def test_poll_once_after_the_deadline() -> None:
    """A negative wait ends at once. For poll(2) itself, it would have no limit."""
    assert poll_once({}, -1.0) == {}
