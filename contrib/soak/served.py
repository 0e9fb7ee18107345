"""Starts a real tailsrv, observes it from outside, and stops it."""

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

# Seconds to wait for something that takes one second on an idle machine.
PATIENCE = 30.0


class ServerError(Exception):
    """The server does not do what the run needs; the message says what."""


def until(check: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait until `check()` is true, for `patience` seconds at most.

    Raises ServerError if it is not true by then; `what` describes the condition in the message.
    """
    end = time.monotonic() + patience
    while not check():
        if time.monotonic() > end:
            raise ServerError(f"not true after {patience:g} seconds: {what}")
        time.sleep(0.02)


class Server:
    """A running server and its log."""

    def __init__(
        self, command: Sequence[str], options: Sequence[str], path: Path, log: Path
    ) -> None:
        self.command = [*command, "-p", "0", "--bind", "127.0.0.1", *options, str(path)]
        self._log = log
        log.write_bytes(b"")
        self.process = self._launch()
        self.port = 0
        # How often the supervisor was killed.
        self.deaths = 0

    def _launch(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as stderr:
            return subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """The supervisor's pid, which an upgrade does not change."""
        return self.process.pid

    @property
    def log(self) -> list[str]:
        """The lines that the server has written to standard error."""
        return self._log.read_text(errors="backslashreplace").splitlines()

    def start(self, workers: int) -> None:
        """Wait until all `workers` workers are ready. Raises ServerError."""
        until(
            lambda: self.process.poll() is not None or self._ready() >= workers,
            "the workers are ready",
        )
        listening = re.search(r"listening: .* port=(\d+)", "\n".join(self.log))
        if self.process.poll() is not None or not listening:
            raise ServerError("the server does not start:\n" + "\n".join(self.log[-5:]))
        self.port = int(listening[1])

    def kill_supervisor(self) -> None:
        """Kill the supervisor. Its workers serve on."""
        self.deaths += 1
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Start another supervisor at the same port, which takes over."""
        self.command[self.command.index("-p") + 1] = str(self.port)
        self.process = self._launch()

    @property
    def supervised(self) -> bool:
        """Whether the supervisor lives, and the takeover is complete if it is not the first one."""
        return self._count(" took over: ") == self.deaths

    def _ready(self) -> int:
        return self._count("worker ready: ")

    def _count(self, text: str) -> int:
        return sum(text in line for line in self.log)

    def workers(self) -> list[int]:
        """Return the pids of the current workers, without other children of the supervisor."""
        return [pid for pid in children(self.pid) if title(pid).startswith(b"tailsrv: worker ")]

    def processes(self) -> list[int]:
        """Return the pids of the supervisor and its workers."""
        return [self.pid, *self.workers()]

    def signal(self, number: signal.Signals, pid: int | None = None) -> bool:
        """Send a signal, by default to the supervisor; return whether the process existed."""
        try:
            os.kill(pid or self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def status(self) -> dict[str, Any]:
        """Return the status from the control socket. Raises ServerError."""
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

    def is_whole(self) -> bool:
        """Return whether every slot has a worker that is ready, and no upgrade is running."""
        status = self.status()
        # One upgrade may check several times, and ends with the supervisor if that is killed.
        steps = [
            line
            for line in self.log
            if re.search(r"upgrade: |upgrade failed|upgraded: |took over: ", line)
        ]
        return (
            not (steps and " upgrade: " in steps[-1])
            and status["state"] == "serving"
            and all(worker["ready"] for worker in status["workers"])
        )

    def check_alive(self) -> None:
        """Raise ServerError if the server has exited, other than by kill_supervisor()."""
        if (status := self.process.poll()) not in (None, -signal.SIGKILL):
            raise ServerError(f"the server has exited unexpectedly, with status {status}")

    def end(self) -> int:
        """Stop the server and return its exit status.

        The status is the negative number of a signal if that had to end the server.
        """
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
    """Return the title of a process, empty if it has exited."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
