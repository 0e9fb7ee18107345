"""The fixtures that several files of tests use, and what a plain run of pytest leaves out."""

import atexit
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.files import EVERY_BYTE, opened
from support.server import TAILSRV, Serve, Server
from support.service_manager import ServiceManager
from support.sockets import tcp_pair

pytest_plugins = ["support.selection"]

# Tests that are started in the background or by nohup may inherit that these are ignored, and so would all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

# The tests start more than a thousand Pythons. If those may not leave compiled modules beside the sources, they share
# a folder for them while the tests run: to compile the program anew takes each of them longer than most tests.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(
        prefix="tailsrv-compiled-"
    )
    sys.dont_write_bytecode = False
    # some of them run as another user
    os.chmod(sys.pycache_prefix, 0o755)
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the served file is to be; it does not exist yet."""
    return tmp_path / "file.log"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start real servers, and at the end assert that each ended as expected and left nothing behind."""
    with ExitStack() as stack:
        started: list[Server] = []

        def start(
            path: str | bytes | Path,
            *options: str,
            status: int = 0,
            wrapper: Sequence[str] = (),
            program: Sequence[str] = TAILSRV,
        ) -> Server:
            command = [*wrapper, *program, "-p", "0", *options, path]
            server = Server(command, tmp_path / f"stderr-{len(started)}", status)
            started.append(server)
            stack.callback(server.finish)
            return server

        yield start


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that every user may enter, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp(prefix="tailsrv-"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def descriptors() -> Iterator[int]:
    """Raise the limit of this process, and of what it starts, as far as that goes; return how many may be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    """Listen as a service manager does; what is started by way of its wrapper tells it."""
    manager = ServiceManager(tmp_path / "notify")
    yield manager
    manager.sock.close()


@pytest.fixture
def full_file(tmp_path: Path) -> Path:
    """Give a file of 256 KiB."""
    path = tmp_path / "log"
    path.write_bytes(EVERY_BYTE)
    return path


@pytest.fixture
def opened_file(full_file: Path) -> Iterator[int]:
    """Give a descriptor of that file."""
    with opened(full_file) as fd:
        yield fd


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give both ends of a TCP connection."""
    with tcp_pair() as ends:
        yield ends
