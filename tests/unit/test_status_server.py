"""Tests of the server at the control sockets, with answers that take several turns."""

import os
import resource
import socket
from collections.abc import Iterator
from typing import cast

import pytest

from support.sockets import readable, recv_all
from tailsrv.control_socket import Control
from tailsrv.linux.event_loop import EventLoop
from tailsrv.supervisor.status_server import (
    ANSWER_TIMEOUT,
    Composition,
    StatusServer,
    StatusWriter,
)

# Longer than the buffers of a unix socket.
LONG = b"x" * 1_000_000
TURNS = 3


class Answers:
    """Composes long answers in place of a StatusWriter."""

    def render_status(self) -> bytes:
        """Return a long status."""
        return LONG

    def compose_listing(self) -> Composition:
        """Compose a long list in several turns."""
        for _ in range(TURNS):
            yield
        return LONG


class StatusBench:
    """A status server, its loop and a clock that the test sets."""

    def __init__(self) -> None:
        self.clock = 1.0
        self.loop = EventLoop(lambda: self.clock)
        self.name = f"status-test-{os.getpid()}:1"
        self.control = Control.lock([self.name])
        self.server = StatusServer(self.loop, self.control, cast(StatusWriter, Answers()))

    def ask(self, which: str) -> socket.socket:
        """Return a connection to the control socket whose name ends with `which`."""
        caller = socket.socket(socket.AF_UNIX)
        caller.settimeout(0)
        caller.connect(f"\0tailsrv:{self.name}{which}")
        return caller

    def turn(self) -> bool:
        """Run one turn if there is something to do, and return whether there was."""
        if not readable(self.loop.epoll.fileno()) and self.loop.timeout() != 0:
            return False
        self.loop.turn()
        return True

    def receive(self, caller: socket.socket) -> bytes:
        """Return the answer, read in small pieces."""
        answer = b""
        while True:
            self.turn()
            try:
                piece = caller.recv(10_000)
            except BlockingIOError:
                continue
            if not piece:
                return answer
            answer += piece

    def close(self) -> None:
        """Close everything."""
        self.control.close()
        self.loop.epoll.close()


def open_files() -> set[str]:
    """Return the descriptors of this process, but for the one that lists them."""
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


@pytest.fixture
def bench() -> Iterator[StatusBench]:
    """Give a status server, and check that no descriptor is left open."""
    before = open_files()
    bench = StatusBench()
    yield bench
    bench.close()
    assert open_files() == before


WHICH = pytest.mark.parametrize("which", ["", "/clients"])


@WHICH
def test_long_answer(bench: StatusBench, which: str) -> None:
    """Callers get all of a long answer, although another one has closed its connection."""
    for _ in range(2):
        with bench.ask(which) as first, bench.ask(which) as second:
            bench.ask(which).close()
            assert bench.receive(first) == LONG
            assert bench.receive(second) == LONG


def test_one_listing_at_a_time(bench: StatusBench) -> None:
    """A caller that connects while an answer is being composed waits for the next one."""
    with bench.ask("/clients") as first:
        bench.turn()
        with bench.ask("/clients") as second:
            for _ in range(TURNS):
                assert not readable(first)
                bench.turn()
            assert bench.receive(first) == LONG
            assert bench.receive(second) == LONG


@WHICH
def test_answer_that_is_not_read(bench: StatusBench, which: str) -> None:
    """After its time a caller that does not read is disconnected, and the others are not."""
    with bench.ask(which) as silent:
        while bench.turn():
            pass
        bench.clock += ANSWER_TIMEOUT / 2
        with bench.ask(which) as later:
            while bench.turn():
                pass
            bench.clock += ANSWER_TIMEOUT / 2
            while bench.turn():
                pass
            silent.setblocking(True)
            assert 0 < len(recv_all(silent)) < len(LONG)
            assert bench.receive(later) == LONG
    while bench.turn():
        pass
    assert bench.loop.timeout() is None or bench.clock


@WHICH
def test_no_descriptor_to_accept(
    bench: StatusBench, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a free descriptor the loop does not spin, and callers are answered afterwards."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with bench.ask(which) as caller:
        lowest = os.dup(caller.fileno())
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            bench.turn()
            assert not bench.turn(), "the loop spins"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        bench.clock += 1
        assert bench.receive(caller) == LONG
    [message] = caplog.messages
    assert message == (
        "out of file descriptors or memory: health checks must wait, clients are not affected: "
        "reason='Too many open files' "
        "hint='raise LimitNOFILE=, fs.file-max or the memory limit, as the reason says'"
    )
