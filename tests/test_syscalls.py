"""The edge to the kernel, tried on real sockets and files."""

import errno
import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import eventually
from unit import append, evict, opened, readable, recv_all, recv_exactly, reset, run_python, tcp_pair, wait_for, wait_readable

from tailsrv.linux.files import SMALL, is_cached, read_ahead, send_chunk, send_to_all
from tailsrv.linux.sockets import ACCEPT_TRIES, Outcome, accept, discard, finish_sending, peek, unsent
from tailsrv.protocol import PEEK

DATA = bytes(range(256)) * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of 256 KiB."""
    path = tmp_path / "log"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def file(path: Path) -> Iterator[int]:
    """Give a descriptor of that file."""
    with opened(path) as fd:
        yield fd


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give both ends of a TCP connection."""
    with tcp_pair() as ends:
        yield ends


@pytest.mark.parametrize(("offset", "count"), [(0, 1), (0, 1000), (7, 1000), (len(DATA) - 10, 10)])
def test_send_chunk(pair: tuple[socket.socket, socket.socket], file: int, offset: int, count: int) -> None:
    """The bytes that arrive are the file's from that offset, and no file position is moved."""
    near, far = pair
    assert send_chunk(near.fileno(), file, offset, count) == count
    assert recv_exactly(far, count) == DATA[offset : offset + count]
    assert os.lseek(file, 0, os.SEEK_CUR) == 0


def test_send_chunk_at_the_end(pair: tuple[socket.socket, socket.socket], path: Path, file: int) -> None:
    """At and beyond the end nothing is sent, up to the end what is there, and what is appended afterwards is there then."""
    near, far = pair
    assert send_chunk(near.fileno(), file, len(DATA), 10) == 0
    assert send_chunk(near.fileno(), file, len(DATA) + 1000, 10) == 0
    assert send_chunk(near.fileno(), file, len(DATA) - 3, 10) == 3
    append(path, b"more")
    assert send_chunk(near.fileno(), file, len(DATA), 10) == 4
    assert recv_exactly(far, 7) == DATA[-3:] + b"more"


def test_send_chunk_to_a_full_socket(pair: tuple[socket.socket, socket.socket], file: int) -> None:
    """A socket that takes no more would block; what it took is whole, and more goes when the peer has read."""
    near, far = pair
    sent = 0
    while (result := send_chunk(near.fileno(), file, 0, len(DATA))) is not Outcome.WOULD_BLOCK:
        assert isinstance(result, int)
        assert result > 0
        sent += result
    assert sent > len(DATA)
    assert len(recv_exactly(far, sent)) == sent
    wait_for(near, select.POLLOUT)
    assert isinstance(send_chunk(near.fileno(), file, 0, 10), int)


def test_send_chunk_to_a_unix_socket(file: int) -> None:
    """A full socketpair would block as well, and one whose other end is closed has hung up."""
    near, far = socket.socketpair()
    near.setblocking(False)
    with near:
        with far:
            while (result := send_chunk(near.fileno(), file, 0, len(DATA))) is not Outcome.WOULD_BLOCK:
                assert isinstance(result, int)
        assert send_chunk(near.fileno(), file, 0, 10) is Outcome.HUNG_UP


def test_send_chunk_after_a_reset(pair: tuple[socket.socket, socket.socket], file: int) -> None:
    """A peer that has reset the connection has hung up, at the first send and at every later one."""
    near, far = pair
    reset(far)
    assert wait_for(near, select.POLLIN) & select.POLLERR
    assert [send_chunk(near.fileno(), file, 0, 10) for _ in range(3)] == [Outcome.HUNG_UP] * 3


def test_send_chunk_after_our_own_end(pair: tuple[socket.socket, socket.socket], file: int) -> None:
    """A socket that we have shut down counts as hung up."""
    near, _ = pair
    near.shutdown(socket.SHUT_WR)
    assert send_chunk(near.fileno(), file, 0, 10) is Outcome.HUNG_UP


def test_send_chunk_to_one_that_has_only_half_closed(pair: tuple[socket.socket, socket.socket], file: int) -> None:
    """A peer that has shut down its sending side goes on receiving."""
    near, far = pair
    far.shutdown(socket.SHUT_WR)
    wait_readable(near)
    assert send_chunk(near.fileno(), file, 0, 10) == 10
    assert recv_exactly(far, 10) == DATA[:10]


def test_send_chunk_of_what_is_no_file(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    """An error that is not about the peer is handed on."""
    near, _ = pair
    with opened(tmp_path) as folder:
        sent = send_chunk(near.fileno(), folder, 0, 10)
    assert isinstance(sent, OSError)
    assert sent.errno == errno.EINVAL


@pytest.mark.parametrize("count", [1, SMALL, SMALL + 1, 100_000])
def test_send_to_all(file: int, count: int) -> None:
    """Everybody gets the same bytes, whether there are few or many; who has hung up, or has no room, is told apart."""
    with ExitStack() as stack:
        pairs = [stack.enter_context(tcp_pair()) for _ in range(4)]
        near = [pair[0] for pair in pairs]
        reset(pairs[1][1])
        wait_for(near[1], select.POLLIN)
        while send_chunk(near[2].fileno(), file, 0, len(DATA)) is not Outcome.WOULD_BLOCK:
            pass
        short = send_to_all([sock.fileno() for sock in near], file, 7, count)
        assert short == {near[1].fileno(): Outcome.HUNG_UP, near[2].fileno(): Outcome.WOULD_BLOCK}
        for index in (0, 3):
            assert recv_exactly(pairs[index][1], count) == DATA[7 : 7 + count]


def test_send_to_all_of_what_has_gone(pair: tuple[socket.socket, socket.socket], file: int) -> None:
    """Where the file has shrunk, a client is sent what is left of it, and none is nothing."""
    near, far = pair
    assert send_to_all([near.fileno()], file, len(DATA) - 5, 10) == {near.fileno(): 5}
    assert recv_exactly(far, 5) == DATA[-5:]
    assert send_to_all([near.fileno()], file, len(DATA), 10) == {near.fileno(): 0}


def test_send_to_all_of_what_cannot_be_read(pair: tuple[socket.socket, socket.socket], path: Path) -> None:
    """A file that does not let itself be read is each client's own error."""
    near, far = pair
    file = os.open(path, os.O_WRONLY)
    try:
        short = send_to_all([near.fileno()], file, 0, 10)
    finally:
        os.close(file)
    [error] = short.values()
    assert isinstance(error, OSError)
    assert error.errno == errno.EBADF
    assert not readable(far)


def test_disk_that_cannot_be_asked() -> None:
    """What does not tell what it has in memory, or cannot read ahead, is for sendfile(2) to try."""
    reader, writer = os.pipe()
    try:
        assert is_cached(reader, 0, 10, 10)
        read_ahead(reader, 0, 10)
    finally:
        os.close(reader)
        os.close(writer)


def test_is_cached(tmp_path: Path) -> None:
    """Bytes that have been written are in memory, until the kernel lets them go; read ahead, they soon are again."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with opened(path) as file:
        assert is_cached(file, 0, len(DATA), 4096)
        assert is_cached(file, len(DATA), 10, 10)  # nothing is there to wait for
        evict(file)
        if is_cached(file, 0, len(DATA), 4096):
            pytest.skip("this file system keeps its files in memory, or does not tell")
        read_ahead(file, 0, len(DATA))
        eventually(lambda: is_cached(file, 0, len(DATA), 4096))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Give a listening socket on loopback."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        sock.setblocking(False)
        yield sock


def test_accept(listener: socket.socket) -> None:
    """A connection comes non-blocking, not inheritable, and with the peer's address and port; without one it would block."""
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
    """An IPv6 peer is an address and a port, too."""
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


def test_accept_of_one_that_is_gone_already(listener: socket.socket) -> None:
    """A connection that was reset while it waited is accepted, or left out, but is no error."""
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
    """Out of descriptors is an outcome, and the connection is still there when one is free again; nobody needs none."""
    done = run_python("""
import os, resource, socket
from tailsrv.linux.sockets import ACCEPT_TRIES, Outcome, accept
with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
    listener.setblocking(False)
    spare = os.open("/", os.O_RDONLY)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))
    assert accept(listener) is Outcome.NO_DESCRIPTOR
    assert accept(listener) is Outcome.NO_DESCRIPTOR
    os.close(spare)
    accept(listener)[0].close()
    assert accept(listener) is Outcome.WOULD_BLOCK
    spare = os.open("/", os.O_RDONLY)
    assert accept(listener) is Outcome.WOULD_BLOCK
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))  # who measures coverage needs some at the end
""")
    assert (done.returncode, done.stderr) == (0, "")


class Refusing(socket.socket):
    """A listener from which no connection can be taken, until it has been tried `refusals` times."""

    refusals = 0
    tries = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.tries += 1
        if self.tries <= self.refusals:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return super().accept()


@pytest.mark.parametrize("refusals", [ACCEPT_TRIES - 1, ACCEPT_TRIES, 10 * ACCEPT_TRIES])
def test_accept_that_always_fails(listener: socket.socket, refusals: int) -> None:
    """An error that says nothing about the listener is passed over, but not for ever: then it does say something."""
    with Refusing(fileno=os.dup(listener.fileno())) as refusing, socket.create_connection(listener.getsockname()) as far:
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


def test_peek_header_leaves_it_there(pair: tuple[socket.socket, socket.socket]) -> None:
    """What has come can be seen again and again, and no more of it than a header can be."""
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


def test_peek_header_at_the_end_of_input(pair: tuple[socket.socket, socket.socket]) -> None:
    """The end of input is no bytes, behind what has come before it."""
    near, far = pair
    far.sendall(b"12")
    far.shutdown(socket.SHUT_WR)
    wait_for(near, select.POLLRDHUP)
    assert peek(near, PEEK) == b"12"
    near.recv(2)
    assert peek(near, PEEK) == b""


def test_peek_header_after_a_reset(pair: tuple[socket.socket, socket.socket]) -> None:
    """A reset is a hang-up."""
    near, far = pair
    reset(far)
    wait_for(near, select.POLLERR)
    assert peek(near, PEEK) is Outcome.HUNG_UP


def test_discard(pair: tuple[socket.socket, socket.socket]) -> None:
    """All that has come is thrown away, and that is no end; then nothing is there, and that is none either."""
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
    """The end of input is told of behind the last bytes, as often as it is asked for."""
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
    """A peer that sends more than the buffers hold never blocks as long as we discard."""
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


def test_close_after_discard_loses_nothing(pair: tuple[socket.socket, socket.socket], file: int) -> None:
    """Input that was discarded does not turn the close into a reset that destroys what is queued."""
    near, far = pair
    far.sendall(b"stray")
    wait_readable(near)
    sent = send_chunk(near.fileno(), file, 0, len(DATA))
    assert isinstance(sent, int)
    discard(near)
    finish_sending(near)
    near.close()
    assert recv_all(far) == DATA[:sent]


def test_unsent(pair: tuple[socket.socket, socket.socket], file: int) -> None:
    """What the peer has not acknowledged is counted, our FIN among it, and when it has read all it is 0."""
    near, far = pair
    assert unsent(near) == 0
    sent = 0
    while isinstance(result := send_chunk(near.fileno(), file, 0, len(DATA)), int):
        sent += result
    before = unsent(near)
    assert 0 < before <= sent
    finish_sending(near)
    assert 0 < unsent(near) <= before + 1
    assert len(recv_all(far)) == sent
    far.close()
    assert wait_for(near, select.POLLHUP) & select.POLLHUP
    assert unsent(near) == 0


def test_finish_sending_reaches_the_peer_past_a_duplicate(pair: tuple[socket.socket, socket.socket]) -> None:
    """The peer sees the end although somebody else holds the socket, and it may be said twice or too late."""
    near, far = pair
    with near.dup():
        finish_sending(near)
        assert far.recv(10) == b""
        finish_sending(near)
        reset(far)
        wait_for(near, select.POLLHUP)
        finish_sending(near)


def test_memory_without_room() -> None:
    """An anonymous file that does not get its data is closed again."""
    done = run_python("""
import errno, os, resource
from tailsrv.linux.files import memory
with open(memory(b"data"), "rb") as file:
    assert file.read() == b"data"
before = os.listdir("/proc/self/fd")
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, unlimited[1]))
try:
    memory(b"x" * 11)
except OSError as error:
    assert error.errno == errno.EFBIG
else:
    raise AssertionError("it had room")
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
assert os.listdir("/proc/self/fd") == before
""")
    assert (done.returncode, done.stderr) == (0, "")
