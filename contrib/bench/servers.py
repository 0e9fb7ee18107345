"""The servers that are measured: how each is started, what it cannot do, and its processes."""

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
# seconds that a server may take to start, and half as long to end
PATIENCE = 15.0

# two processes for each: thousands would measure the scheduler, if the machine let them be
SOCAT_CLIENTS = 100


class ServerError(Exception):
    """A server does not start, or cannot; the message says why."""


@dataclass(frozen=True)
class Server:
    """One of those that are compared.

    `command` is split as a shell would, then `{port}` and `{file}` are filled in. `most_clients` is as many as it can
    be asked to serve. `is_ours`: a tailsrv, whose workers may be killed. `bare`: no server, but that many threads in
    the load generator that do nothing but send.
    """

    name: str
    command: str = ""
    workers: int = 1
    most_clients: int | None = None
    is_ours: bool = False
    bare: int = 0


class Running:
    """A server that has been started, and listens on `port`."""

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
        """Wait until a client gets a byte, and all workers are there."""
        deadline = time.monotonic() + PATIENCE
        while not self._answers() or (
            self.server.is_ours and len(self.workers()) < self.server.workers
        ):
            if self._process.poll() is not None:
                raise ServerError(
                    f"ended with status {self._process.returncode}: {self._last_words()}"
                )
            if time.monotonic() > deadline:
                raise ServerError(f"not ready after {PATIENCE:g} seconds: {self._last_words()}")
            time.sleep(0.02)

    def look(self) -> processes.Look:
        """Return what it has used so far."""
        return processes.look(processes.session(self._process.pid))

    def workers(self) -> list[int]:
        """Return the pids of its workers, if it is a tailsrv."""
        return processes.children(self._process.pid)

    def stop(self) -> None:
        """End it, and whatever it has started."""
        self._process.terminate()
        try:
            self._process.wait(PATIENCE / 2)
        except subprocess.TimeoutExpired:
            pass
        for pid in processes.session(self._process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                # it has just ended
                pass
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as sock:
                # Gone without a farewell: the server learns it at once, and does not count us as a client for ever.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.sendall(b"0\n")
                return bool(sock.recv(1))
        except OSError:
            return False

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"


@contextmanager
def running(server: Server, file: Path) -> Iterator[Running]:
    """Give the server, started and ready. Raises ServerError."""
    started = Running(server, file, file.with_name("server.log"))
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


def tailsrv(workers: int) -> Server:
    """Return this checkout's tailsrv. Raises ServerError if no Python has what it needs."""
    command = (
        f"{shlex.quote(_python())} -m tailsrv -q --bind 127.0.0.1 -p {{port}} -w {workers} {{file}}"
    )
    return Server(f"tailsrv -w {workers}", command, workers=workers, is_ours=True)


def socat() -> Server | None:
    """Return what people do today, None where socat is not installed."""
    if not (shutil.which("socat") and shutil.which("tail")):
        return None
    listen = "TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork,backlog=4096"
    return Server(
        "socat + tail -f",
        f"socat {listen} 'EXEC:tail -c +1 -f {{file}}'",
        most_clients=SOCAT_CLIENTS,
    )


def bare(threads: int) -> Server:
    """Return the limit of what can be measured against a server of as many workers."""
    return Server(f"bare sender, {threads}", bare=threads)


def _python() -> str:
    """Return an interpreter that has what tailsrv needs: this one, or that of the checkout's environment."""
    for python in (sys.executable, str(ROOT / ".venv/bin/python")):
        try:
            if subprocess.run([python, "-c", REQUIRED], capture_output=True).returncode == 0:
                return python
        except OSError:
            # there is no such environment
            pass
    raise ServerError(
        "tailsrv cannot run: in the checkout, python3 -m venv .venv && .venv/bin/pip install ."
    )


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
