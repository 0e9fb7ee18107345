"""A real tailsrv: started, watched from outside, and brought to its end."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# seconds for what takes one on a quiet machine
PATIENCE = 30.0


class ServerError(Exception):
    """The server does not do what is needed to go on; the message says what."""


def until(check: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait until `check()` is true. Raises ServerError, with `what` was waited for."""
    end = time.monotonic() + patience
    while not check():
        if time.monotonic() > end:
            raise ServerError(f"{what}: not within {patience:g} seconds")
        time.sleep(0.02)


class Server:
    """A running server and its log."""

    def __init__(
        self, command: Sequence[str], options: Sequence[str], path: Path, log: Path
    ) -> None:
        self.command = [*command, "-p", "0", "--bind", "127.0.0.1", *options, str(path)]
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )
        self.port = 0

    @property
    def pid(self) -> int:
        """The supervisor's, also after an upgrade."""
        return self.process.pid

    @property
    def log(self) -> list[str]:
        """The lines that it has written to standard error."""
        return self._log.read_text(errors="backslashreplace").splitlines()

    def start(self, workers: int) -> None:
        """Wait until all `workers` serve."""
        until(
            lambda: self.process.poll() is not None or self._ready() >= workers,
            "the workers are ready",
        )
        listening = re.search(r"listening: .* port=(\d+)", "\n".join(self.log))
        if self.process.poll() is not None or not listening:
            raise ServerError("the server does not start:\n" + "\n".join(self.log[-5:]))
        self.port = int(listening[1])

    def _ready(self) -> int:
        return sum("worker ready: " in line for line in self.log)

    def workers(self) -> list[int]:
        """Return the pids of the workers that are there now; a child of another kind is none."""
        return [pid for pid in children(self.pid) if title(pid).startswith(b"tailsrv: worker ")]

    def processes(self) -> list[int]:
        """Return the pids of the supervisor and its workers."""
        return [self.pid, *self.workers()]

    def signal(self, number: signal.Signals, pid: int | None = None) -> bool:
        """Send a signal, to the supervisor by default, and tell whether there was somebody to get it."""
        try:
            os.kill(pid or self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def status(self) -> dict[str, Any]:
        """Return what the control socket says. Raises ServerError."""
        received = b""
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(f"\0tailsrv:127.0.0.1:{self.port}")
                while some := sock.recv(1 << 16):
                    received += some
            answer: dict[str, Any] = json.loads(received)
        except (OSError, ValueError) as error:
            raise ServerError(f"no status: {error}") from error
        return answer

    def whole(self) -> bool:
        """Tell whether every slot has a worker that is ready, and no upgrade is going on."""
        status = self.status()
        upgrading = len(children(self.pid)) > len(status["workers"])
        return (
            not upgrading
            and status["state"] == "serving"
            and all(worker["ready"] for worker in status["workers"])
        )

    def check_alive(self) -> None:
        """Raise ServerError if it has ended."""
        if (status := self.process.poll()) is not None:
            raise ServerError(f"the server has ended by itself, with status {status}")

    def end(self) -> int:
        """End it and return its exit status, negative for a signal's number: then it had to be killed."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            for pid in self.processes():
                self.signal(signal.SIGKILL, pid)
            return self.process.wait()


def children(pid: int) -> list[int]:
    """Return the pids of the children of `pid`."""
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def title(pid: int) -> bytes:
    """Return the title of a process, empty if it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
