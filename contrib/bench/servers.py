"""The servers that are measured: how to start and stop each one, and what it cannot do."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import processes

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = "import inotify_simple, setproctitle, psutil"
# Seconds within which a server must start. It must exit within half of this time.
PATIENCE = 15.0

# socat needs two processes for each client. Thousands of processes would measure the scheduler, if
# the machine could run them at all.
SOCAT_CLIENTS = 100


class ServerError(Exception):
    """A server cannot be started; the message says why."""


@dataclass(frozen=True)
class Server:
    """One of the servers that are compared.

    `command` is split into words like a shell command; then `{port}` and `{file}` are replaced.
    `most_clients` is the largest number of clients it is measured with; None means no limit.
    `is_ours` says that it is a tailsrv, whose workers may be killed. If `bare` is not 0 there is no
    server, but this many threads of the load generator that do nothing but send.
    """

    name: str
    command: str = ""
    workers: int = 1
    most_clients: int | None = None
    is_ours: bool = False
    bare: int = 0


class Running:
    """A server that has been started, and listens on `port` or will soon."""

    def __init__(self, server: Server, file: Path, log: Path) -> None:
        self.server, self.port, self._log = server, _free_port(), log
        argv = [
            word.replace("{port}", str(self.port)).replace("{file}", str(file))
            for word in shlex.split(server.command)
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        with log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env=environment,
                )
            except OSError as error:
                raise ServerError(f"cannot run {argv[0]}: {error.strerror}") from None

    def wait_until_ready(self) -> None:
        """Wait until a client receives a byte and all workers have started. Raises ServerError."""
        deadline = time.monotonic() + PATIENCE
        while not self._answers() or (
            self.server.is_ours and len(self.workers()) < self.server.workers
        ):
            if self._process.poll() is not None:
                raise ServerError(
                    f"exited with status {self._process.returncode}: {self._last_line()}"
                )
            if time.monotonic() > deadline:
                raise ServerError(f"not ready after {PATIENCE:g} seconds: {self._last_line()}")
            time.sleep(0.02)

    def look(self) -> processes.Look:
        """Return what all processes of the server have used so far."""
        return processes.look(processes.session(self._process.pid))

    def workers(self) -> list[int]:
        """Return the pids of the server's children: the workers, if it is a tailsrv."""
        return processes.children(self._process.pid)

    def stop(self) -> None:
        """Stop the server and all processes that it has started."""
        self._process.terminate()
        try:
            self._process.wait(PATIENCE / 2)
        except subprocess.TimeoutExpired:
            pass
        for pid in processes.session(self._process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                # The process has just exited.
                pass
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as sock:
                # Close with a reset. The server notices a reset at once, and does not count this
                # connection as a client any more.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.sendall(b"0\n")
                return bool(sock.recv(1))
        except OSError:
            return False

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it printed nothing"


@contextmanager
def running(server: Server, file: Path) -> Iterator[Running]:
    """Start `server` for the `with` statement, ready to serve `file`. Raises ServerError."""
    started = Running(server, file, file.with_name("server.log"))
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


def tailsrv(workers: int) -> Server:
    """Return the tailsrv of this checkout.

    Raises ServerError if no Python has the packages that it needs.
    """
    command = (
        f"{shlex.quote(_python())} -m tailsrv -q --bind 127.0.0.1 -p {{port}} -w {workers} {{file}}"
    )
    return Server(f"tailsrv -w {workers}", command, workers=workers, is_ours=True)


def socat() -> Server | None:
    """Return a server made of socat and `tail -f`, or None if socat or tail is not installed."""
    if not (shutil.which("socat") and shutil.which("tail")):
        return None
    listen = "TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork,backlog=4096"
    return Server(
        "socat + tail -f",
        f"socat {listen} 'EXEC:tail -c +1 -f {{file}}'",
        most_clients=SOCAT_CLIENTS,
    )


def bare(threads: int) -> Server:
    """Return the bare sender, which shows the limit of what can be measured.

    A server with as many workers as `threads` is compared with it.
    """
    return Server(f"bare sender, {threads}", bare=threads)


def _python() -> str:
    """Return a Python that has the packages of tailsrv: this one, or that of the checkout's .venv.

    Raises ServerError if neither has them.
    """
    for python in (sys.executable, str(ROOT / ".venv/bin/python")):
        try:
            if subprocess.run([python, "-c", REQUIRED], capture_output=True).returncode == 0:
                return python
        except OSError:
            # There is no such environment.
            pass
    raise ServerError(
        "the packages that tailsrv needs are not installed; run in the checkout:"
        " python3 -m venv .venv && .venv/bin/pip install ."
    )


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
