"""Tests of the control socket: lock, discovery and status."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from support.interpreter import run_program, run_python
from support.processes import as_root
from support.sockets import recv_all, wait_readable
from support.waiting import DEADLINE
from tailsrv.control_socket import (
    MAX_ENDPOINT_NAME,
    AlreadyServedError,
    Control,
    describe_holder,
    find_supervisor,
    overflow_uid,
    socket_name,
)
from tailsrv.linux.process import read_stat

STATUS = b'{"clients": 3}\n'


@pytest.fixture
def endpoint() -> str:
    """Give an endpoint that no server and no other test run uses."""
    return f"test-{os.getpid()}-{os.urandom(4).hex()}:0"


@contextmanager
def held(*names: str) -> Iterator[Control]:
    """Hold the lock for these names."""
    control = Control.lock(names)
    try:
        yield control
    finally:
        control.close()


def connect(endpoint: str) -> socket.socket:
    """Connect as a program that asks for the status does."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE)
    sock.connect(f"\0tailsrv:{endpoint}")
    return sock


def answer(control: Control, sock: socket.socket, status: bytes) -> None:
    """Send `status` to every peer that is authorized to have it."""
    for peer in control.accept_authorized(sock)[0]:
        with peer, suppress(OSError):
            peer.send(status)


def test_process_that_has_gone() -> None:
    """Parent and start time identify a process as long as it exists."""
    with subprocess.Popen(["sleep", "60"]) as child:
        stat = read_stat(child.pid)
        child.kill()
    assert stat is not None
    assert stat.parent == os.getpid()
    assert read_stat(child.pid) != stat


@pytest.mark.skipif(
    not as_root or overflow_uid() is not None,
    reason="requires root in a user namespace that maps every user",
)
@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ("0 0 4294967295", None),
        ("0 0 4294967294", 65534),
        ("1000 0 1", 65534),
        ("0 5 5\n5 10 4294967285", 65534),
        ("0 0 5\n5 5 4294967290", None),
    ],
)
def test_overflow_uid(users: str, expected: int | None) -> None:
    """The overflow uid is ambiguous only in a user namespace that does not map all users."""
    done = run_program("users_of_a_namespace", users)
    if done.returncode == 77:
        pytest.skip("this machine has no user namespaces")
    assert (done.stdout, done.stderr) == (f"None {expected}\n", "")


def test_name_too_long_for_a_socket(endpoint: str) -> None:
    """A name that is too long for a socket raises OSError, and no socket stays open."""
    with pytest.raises(OSError, match="path too long") as caught:
        Control.lock([endpoint, "x" * 200])
    assert not isinstance(caught.value, AlreadyServedError)
    assert find_supervisor(endpoint) is None


@pytest.mark.parametrize("host", ["*", "[::1]", "h" * (MAX_ENDPOINT_NAME - 2), "\u00fc" * 40])
def test_name_that_fits(host: str) -> None:
    """The socket name of an endpoint that is short enough is the endpoint itself."""
    assert socket_name(f"{host}:1") == f"{host}:1"


@pytest.mark.parametrize("letter", ["h", "\u00fc", "\U0001f4dc"])
@pytest.mark.parametrize("port", [1, 65535])
def test_long_name(letter: str, port: int) -> None:
    """A name that is too long is shortened to a unique one that keeps the port."""
    first = os.urandom(4).hex()
    hosts = [first + letter * count for count in (84, 85, 250)] + [first + letter * 84 + "x"]
    names = [f"{host}:{port}" for host in hosts]
    short = [socket_name(name) for name in names]
    assert len(set(short)) == len(names)
    assert all(name.startswith(first + letter * 14) and name.endswith(f":{port}") for name in short)
    assert [socket_name(name) for name in short] == short
    with held(*names):
        assert {find_supervisor(name) for name in names} == {os.getpid()}
        with pytest.raises(AlreadyServedError, match=f"pid {os.getpid()}"):
            Control.lock(names[:1])


def test_no_server(endpoint: str) -> None:
    """Without a server no supervisor is found."""
    assert find_supervisor(endpoint) is None


def test_find_supervisor(endpoint: str) -> None:
    """The supervisor's pid is found under each of its names while it lives, without its help."""
    with held(endpoint, endpoint + "1"):
        assert [find_supervisor(endpoint), find_supervisor(endpoint + "1")] == [os.getpid()] * 2
        assert find_supervisor(endpoint + "2") is None
    assert find_supervisor(endpoint) is None


def test_find_supervisor_in_another_process(endpoint: str) -> None:
    """The pid is that of the process that holds the lock, also if another process asks."""
    with held(endpoint):
        done = run_python(
            "import sys; from tailsrv.control_socket import find_supervisor; "
            "print(find_supervisor(sys.argv[1]))",
            endpoint,
        )
    assert done.stdout == f"{os.getpid()}\n"


def test_lock(endpoint: str) -> None:
    """A second server for an endpoint is refused with the first one's pid, until that one ends."""
    with held(endpoint):
        with pytest.raises(AlreadyServedError) as caught:
            Control.lock([endpoint])
        assert endpoint in str(caught.value)
        assert str(os.getpid()) in str(caught.value)
    with held(endpoint):
        assert find_supervisor(endpoint) == os.getpid()


def test_lock_is_all_or_nothing(endpoint: str) -> None:
    """A server that gets only some of its names holds none of them."""
    with held(endpoint):
        with pytest.raises(AlreadyServedError):
            Control.lock([endpoint + "1", endpoint])
        assert find_supervisor(endpoint + "1") is None


def test_lock_dies_with_its_holder(endpoint: str) -> None:
    """The kernel releases the lock of a server that was killed."""
    code = (
        "import os, sys; from tailsrv.control_socket import Control; "
        "control = Control.lock(sys.argv[1:]); os.kill(os.getpid(), 9)"
    )
    assert run_python(code, endpoint).returncode == -9
    with held(endpoint):
        assert find_supervisor(endpoint) == os.getpid()


def test_closed_copy_keeps_the_lock(endpoint: str) -> None:
    """A forked child that closes its copy of the lock leaves it to the parent."""
    done = run_program("closed_copy_of_a_lock", endpoint)
    assert (done.returncode, done.stderr) == (0, "")


def test_describe_holder(endpoint: str) -> None:
    """The holder of the lock is described with its pid if that can be found."""
    assert describe_holder(endpoint) == f"{endpoint} is served by another tailsrv"
    with held(endpoint):
        assert (
            describe_holder(endpoint)
            == f"{endpoint} is served by another tailsrv, pid {os.getpid()}"
        )


def test_answer(endpoint: str) -> None:
    """Each waiting peer gets the status once and then the end of the stream."""
    with held(endpoint) as control:
        [listener] = control.status
        answer(control, listener, STATUS)
        with connect(endpoint) as one, connect(endpoint) as two:
            wait_readable(listener)
            answer(control, listener, STATUS)
            assert [recv_all(one), recv_all(two)] == [STATUS, STATUS]
        with connect(endpoint) as three:
            answer(control, listener, b"{}\n")
            assert json.loads(recv_all(three)) == {}


def test_answer_after_a_peer_that_left(endpoint: str) -> None:
    """A peer that left without waiting does not keep the next one from its answer."""
    with held(endpoint) as control:
        connect(endpoint).close()
        with connect(endpoint) as patient:
            answer(control, control.sockets[0], STATUS)
            assert recv_all(patient) == STATUS


@pytest.mark.skipif(not as_root, reason="only root can become another user")
@pytest.mark.parametrize(
    ("server", "peer", "answer"),
    [
        (0, 0, "status"),
        (12345, 12345, "status"),
        (12345, 0, "status"),
        (0, 12345, ""),
        (12345, 12344, ""),
    ],
)
def test_answer_only_to_the_same_user_and_root(
    endpoint: str, server: int, peer: int, answer: str
) -> None:
    """Only the same user and root get the status; any other user's stream is empty."""
    done = run_program("answer_as_other_user", endpoint, str(server), str(peer))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{answer}\n")
