"""A server that is started from a terminal: it ends with it, but for nohup(1), and is not stopped."""

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

DATA, NEWS = random_bytes(1000), b"more"

pytestmark = pytest.mark.slow


class Terminal:
    """A pseudo-terminal, of which we are the screen and the keyboard."""

    def __init__(self) -> None:
        # We keep the slave open: read(2) fails as long as no process has it open.
        self.master, self.slave = pty.openpty()
        self.name = os.ttyname(self.slave)

    def wrapper(self, *commands: str, descriptors: str = "<") -> tuple[str, ...]:
        """Return what starts a program, the leader of its session, on this terminal.

        `commands` are for the shell to run first.
        """
        redirected = " ".join(
            f"{descriptor}{shlex.quote(self.name)}" for descriptor in descriptors.split()
        )
        return ("sh", "-c", f'exec {redirected}; {"; ".join([*commands, ""])} exec "$@"', "sh")

    def shown(self, part: str) -> str:
        """Wait until `part` is on the screen, and return all that has come with it."""
        text = ""
        while part not in text:
            assert select.select([self.master], [], [], DEADLINE)[0], text
            text += os.read(self.master, 4096).decode()
        return text

    def close(self) -> None:
        """Close it, as often as one likes: the kernel sends HUP to the session's leader."""
        if self.master >= 0:
            os.close(self.master)
            os.close(self.slave)
            self.master = -1


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """Give a terminal that is closed in the end."""
    terminal = Terminal()
    yield terminal
    terminal.close()


@pytest.fixture(autouse=True)
def file(path: Path) -> None:
    """Put the data where it is served from."""
    path.write_bytes(DATA)


def following(server: Server) -> None:
    """Have a client of the server that has read all there is."""
    server.workers(1)
    expect(server.connect(b"0\n"), DATA)


@pytest.mark.parametrize("descriptors", ["<", "1<>"])
def test_the_terminal_is_closed(
    serve: Serve, path: Path, terminal: Terminal, descriptors: str
) -> None:
    """A server on a terminal that is closed drains; one more HUP, of the shell, changes nothing."""
    server = serve(path, wrapper=terminal.wrapper(descriptors=descriptors))
    following(server)
    append(path, NEWS)
    terminal.close()
    server.logged("draining: signal=SIGHUP grace=5 reason=", "nohup")
    if server.process.poll() is None:
        server.signal(signal.SIGHUP)
    assert recv_all(server.clients[0]) == NEWS
    server.wait()
    assert not server.lines("upgrade")


def test_hup_of_a_living_terminal(serve: Serve, path: Path, terminal: Terminal) -> None:
    """HUP upgrades while the terminal is there, and the new program drains when it is closed."""
    server = serve(path, wrapper=terminal.wrapper())
    following(server)
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    terminal.close()
    server.logged("draining: signal=SIGHUP ")
    server.wait()


def test_terminal_that_is_not_its_own(serve: Serve, path: Path, terminal: Terminal) -> None:
    """A server without a controlling terminal, as setsid(1) starts it, is upgraded by HUP, be the terminal at its input closed."""
    server = serve(path, wrapper=(sys.executable, program("terminal_of_others"), terminal.name))
    following(server)
    terminal.close()
    for count in (1, 2):
        server.signal(signal.SIGHUP)
        server.logged("upgraded: ", count=count)
    append(path, NEWS)
    expect(server.clients[0], NEWS)
    assert not server.lines("draining")


@pytest.mark.sample(1)
@pytest.mark.parametrize("nohup", ["nohup", "trap"])
def test_nohup(serve: Serve, path: Path, terminal: Terminal, nohup: str) -> None:
    """A server that was started with HUP ignored survives its terminal, and HUP upgrades it."""
    wrapper = (
        (*terminal.wrapper(), "nohup") if nohup == "nohup" else terminal.wrapper("trap '' HUP")
    )
    server = serve(path, wrapper=wrapper)
    following(server)
    terminal.close()
    server.logged("upgraded: ")
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ", count=2)
    append(path, NEWS)
    expect(server.clients[0], NEWS)
    assert not server.lines("draining")


@pytest.mark.parametrize(
    ("what", "hung_up"), [("pipe", False), ("device", False), ("socket", False), ("terminal", True)]
)
def test_what_hangs_up(what: str, hung_up: bool) -> None:
    """Only a terminal that is closed counts, not a pipe or a socket whose other end is."""
    done = run_program("hung_up", what)
    assert (done.stdout.strip(), done.stderr) == (str(hung_up), "")


def test_background_server_is_not_stopped(path: Path, terminal: Terminal) -> None:
    """After `stty tostop` a server in the background writes its log to the terminal and goes on."""
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
