"""Fixtures that several test files use, and the plugin that selects the tests of a plain run."""

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

# A shell that starts pytest in the background, and nohup, may ignore these signals. Processes
# inherit that, so every server that the tests start would ignore them as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

# The tests start more than a thousand Python processes. If these may not write compiled modules
# next to the sources, they share a temporary folder for them, because compiling the program again
# in each process would take longer than most tests.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(
        prefix="tailsrv-compiled-"
    )
    sys.dont_write_bytecode = False
    # Some of these processes run as another user.
    os.chmod(sys.pycache_prefix, 0o755)
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the file to serve; the file does not exist yet."""
    return tmp_path / "file.log"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start real servers; afterwards assert that each exited as expected and left nothing."""
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
    """Return a folder that every user may enter, which tmp_path is not."""
    folder = Path(tempfile.mkdtemp(prefix="tailsrv-"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def descriptors() -> Iterator[int]:
    """Raise the descriptor limit of this process and its children to the hard limit; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    """Return a service manager that hears from programs started with its wrapper."""
    manager = ServiceManager(tmp_path / "notify")
    yield manager
    manager.sock.close()


@pytest.fixture
def full_file(tmp_path: Path) -> Path:
    """Return the path of a file of 256 KiB."""
    path = tmp_path / "log"
    path.write_bytes(EVERY_BYTE)
    return path


@pytest.fixture
def opened_file(full_file: Path) -> Iterator[int]:
    """Return a descriptor of `full_file`."""
    with opened(full_file) as fd:
        yield fd


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return both ends of a TCP connection."""
    with tcp_pair() as ends:
        yield ends
