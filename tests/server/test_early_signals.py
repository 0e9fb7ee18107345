"""Signals that arrive during the start are not lost and do not wait for a name server."""

import os
import signal
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.hooks import install_hook
from support.processes import children, runs
from support.server import TAILSRV, Serve
from support.waiting import eventually

SCRIPT = (str(Path(sysconfig.get_path("scripts")) / "tailsrv"),)
NEW_PID_NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")

pytestmark = pytest.mark.slow


class Gate:
    """A breakpoint at which a program waits until the test releases it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "gate"
        os.mkfifo(self.path)
        self.opened = -1

    def wrapper(self, hook: str) -> tuple[str, ...]:
        """Return a wrapper for a program that waits at the gate in `hook`."""
        install_hook(self.folder, hook)
        return ("env", f"PYTHONPATH={self.folder}", f"TAILSRV_TEST_GATE={self.path}")

    def reached(self) -> None:
        """Wait until the program has reached the gate."""
        self.opened = eventually(self._open) or -1

    def _open(self) -> int | None:
        try:
            return os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            # The program has not opened the named pipe yet.
            return None

    def release(self) -> None:
        """Release the program."""
        if self.opened >= 0:
            os.close(self.opened)
            self.opened = -1


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Return a gate that is released at the end of the test."""
    (tmp_path / "site").mkdir()
    gate = Gate(tmp_path / "site")
    yield gate
    gate.release()


def blocked(pid: int) -> set[int]:
    """Return the signals that the process `pid` blocks: see proc_pid_status(5)."""
    line = next(
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigBlk:")
    )
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 65) if mask >> number - 1 & 1}


@pytest.mark.parametrize("program", [SCRIPT, TAILSRV], ids=["command", "module"])
def test_signals_are_blocked_before_the_program_is_imported(
    serve: Serve, path: Path, gate: Gate, program: Sequence[str]
) -> None:
    """Every signal that can be blocked is blocked before the imports, the slowest step."""
    server = serve(
        path, status=-signal.SIGTERM, wrapper=gate.wrapper("wait_at_import"), program=program
    )
    gate.reached()
    assert blocked(server.pid) == set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}
    server.signal(signal.SIGTERM)
    gate.release()
    server.wait()


@pytest.mark.parametrize("hook", ["wait_at_import", "wait_at_lookup"], ids=["import", "lookup"])
def test_sigterm_to_pid_1_during_the_start(serve: Serve, path: Path, gate: Gate, hook: str) -> None:
    """TERM to a starting PID 1 drains it, though the kernel discards it without a handler."""
    if not runs(*NEW_PID_NAMESPACE, "true"):
        pytest.skip("cannot create a PID namespace")
    path.write_bytes(b"data")
    server = serve(path, "--bind", "localhost", wrapper=(*NEW_PID_NAMESPACE, *gate.wrapper(hook)))
    gate.reached()
    (init,) = children(server.pid)
    os.kill(init, signal.SIGTERM)
    gate.release()
    server.logged("draining: signal=SIGTERM")
    server.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signals_during_the_lookup_of_a_name(
    serve: Serve, path: Path, gate: Gate, number: signal.Signals
) -> None:
    """A signal ends a server during a name lookup at once, with no traceback; USR1 does not."""
    no_cores = ("sh", "-c", 'ulimit -c 0; exec "$@"', "sh")
    server = serve(
        path,
        "--bind",
        "localhost",
        status=-number,
        wrapper=(*no_cores, *gate.wrapper("wait_at_lookup")),
    )
    gate.reached()
    server.signal(signal.SIGUSR1)
    server.signal(number)
    server.wait()
