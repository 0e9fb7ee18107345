"""A server that is started from a terminal.

It ends when the terminal is closed, unless it was started with nohup(1), and job control never
stops it.
"""

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.interpreter import program, run_program
from support.processes import session
from support.server import TAILSRV, Serve, Server
from support.sockets import expect, recv_all
from support.waiting import DEADLINE

DATA, APPENDED = random_bytes(1000), b"more"

pytestmark = pytest.mark.slow


class Terminal:
    """A pseudo-terminal; the test is its screen and keyboard."""

    def __init__(self) -> None:
        # Keep the slave open: read(2) of the master fails while no process has the slave open.
        self.master, self.slave = pty.openpty()
        self.name = os.ttyname(self.slave)

    def wrapper(self, *commands: str, descriptors: str = "<") -> tuple[str, ...]:
        """Return a command that starts a program on this terminal, as the leader of its session.

        The shell runs `commands` first.
        """
        redirected = " ".join(
            f"{descriptor}{shlex.quote(self.name)}" for descriptor in descriptors.split()
        )
        return ("sh", "-c", f'exec {redirected}; {"; ".join([*commands, ""])} exec "$@"', "sh")

    def shown(self, part: str) -> str:
        """Wait until `part` is on the screen, and return all text that was read until then."""
        text = ""
        while part not in text:
            assert select.select([self.master], [], [], DEADLINE)[0], text
            text += os.read(self.master, 4096).decode()
        return text

    def close(self) -> None:
        """Close the terminal, so that the kernel sends HUP to the session's leader.

        Further calls have no effect.
        """
        if self.master >= 0:
            os.close(self.master)
            os.close(self.slave)
            self.master = -1


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """Provide a terminal that is closed at the end."""
    terminal = Terminal()
    yield terminal
    terminal.close()


@pytest.fixture(autouse=True)
def file(path: Path) -> None:
    """Create the served file."""
    path.write_bytes(DATA)


def connect_client(server: Server) -> None:
    """Connect a client that has read the whole file."""
    server.workers(1)
    expect(server.connect(b"0\n"), DATA)


@pytest.mark.parametrize("descriptors", ["<", "1<>"])
def test_the_terminal_is_closed(
    serve: Serve, path: Path, terminal: Terminal, descriptors: str
) -> None:
    """A server drains when its terminal is closed; a second HUP, from the shell, has no effect."""
    server = serve(path, wrapper=terminal.wrapper(descriptors=descriptors))
    connect_client(server)
    append(path, APPENDED)
    terminal.close()
    server.logged("draining: signal=SIGHUP grace=5 reason=", "nohup")
    if server.process.poll() is None:
        server.signal(signal.SIGHUP)
    assert recv_all(server.clients[0]) == APPENDED
    server.wait()
    assert not server.lines("upgrade")


def test_hup_while_the_terminal_is_open(serve: Serve, path: Path, terminal: Terminal) -> None:
    """HUP upgrades while the terminal is open; the new program drains when it is closed."""
    server = serve(path, wrapper=terminal.wrapper())
    connect_client(server)
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    terminal.close()
    server.logged("draining: signal=SIGHUP ")
    server.wait()


def test_terminal_that_is_not_the_controlling_one(
    serve: Serve, path: Path, terminal: Terminal
) -> None:
    """HUP upgrades a server without a controlling terminal, even if its input's terminal closed."""
    server = serve(path, wrapper=(sys.executable, program("terminal_of_others"), terminal.name))
    connect_client(server)
    terminal.close()
    for count in (1, 2):
        server.signal(signal.SIGHUP)
        server.logged("upgraded: ", count=count)
    append(path, APPENDED)
    expect(server.clients[0], APPENDED)
    assert not server.lines("draining")


@pytest.mark.sample(1)
@pytest.mark.parametrize("nohup", ["nohup", "trap"])
def test_nohup(serve: Serve, path: Path, terminal: Terminal, nohup: str) -> None:
    """A server that was started with HUP ignored survives its terminal, and HUP upgrades it."""
    wrapper = (
        (*terminal.wrapper(), "nohup") if nohup == "nohup" else terminal.wrapper("trap '' HUP")
    )
    server = serve(path, wrapper=wrapper)
    connect_client(server)
    terminal.close()
    server.logged("upgraded: ")
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ", count=2)
    append(path, APPENDED)
    expect(server.clients[0], APPENDED)
    assert not server.lines("draining")


@pytest.mark.parametrize(
    ("what", "hung_up"), [("pipe", False), ("device", False), ("socket", False), ("terminal", True)]
)
def test_only_a_closed_terminal_hangs_up(what: str, hung_up: bool) -> None:
    """Only a closed terminal counts as a hang-up, not a pipe or socket with a closed other end."""
    done = run_program("hung_up", what)
    assert (done.stdout.strip(), done.stderr) == (str(hung_up), "")


def test_background_server_is_not_stopped(path: Path, terminal: Terminal) -> None:
    """After `stty tostop`, a server in the background keeps running and logs to the terminal."""
    command = [sys.executable, program("background"), terminal.name, *TAILSRV, "-p", "0", str(path)]
    with subprocess.Popen(command, start_new_session=True) as shell:
        try:
            log = terminal.shown("worker ready: ")
            os.kill(int(log.partition("tailsrv[")[2].partition("]")[0]), signal.SIGTERM)
            terminal.shown("ended: status=0")
            assert shell.wait(DEADLINE) == 0
        finally:
            for pid in session(shell.pid):
                os.kill(pid, signal.SIGKILL)
