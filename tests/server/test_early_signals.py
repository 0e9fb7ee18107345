"""Signals that come while the server starts are not lost, and do not wait for a name server."""

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
    """A place at which a program waits until the test lets it go on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "gate"
        os.mkfifo(self.path)
        self.opened = -1

    def wrapper(self, hook: str) -> tuple[str, ...]:
        """Return what starts a program that waits where that hook says."""
        install_hook(self.folder, hook)
        return ("env", f"PYTHONPATH={self.folder}", f"TAILSRV_TEST_GATE={self.path}")

    def reached(self) -> None:
        """Wait until the program waits."""
        self.opened = eventually(self._open) or -1

    def _open(self) -> int | None:
        try:
            return os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            # the program has not opened it yet
            return None

    def go_on(self) -> None:
        """Let the program go on."""
        if self.opened >= 0:
            os.close(self.opened)
            self.opened = -1


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Give a gate that is open in the end."""
    (tmp_path / "site").mkdir()
    gate = Gate(tmp_path / "site")
    yield gate
    gate.go_on()


def blocked(pid: int) -> set[int]:
    """Return the signals that the process `pid` holds back: proc_pid_status(5)."""
    line = next(
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigBlk:")
    )
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 65) if mask >> number - 1 & 1}


@pytest.mark.parametrize("program", [SCRIPT, TAILSRV], ids=["command", "module"])
def test_signals_are_held_back_before_the_program_is_imported(
    serve: Serve, path: Path, gate: Gate, program: Sequence[str]
) -> None:
    """Before the imports, which take longest, signals wait: all that can."""
    server = serve(
        path, status=-signal.SIGTERM, wrapper=gate.wrapper("wait_at_import"), program=program
    )
    gate.reached()
    assert blocked(server.pid) == set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}
    server.signal(signal.SIGTERM)
    gate.go_on()
    server.wait()


@pytest.mark.parametrize("place", ["wait_at_import", "wait_at_lookup"], ids=["import", "lookup"])
def test_init_of_a_container_is_ended_while_it_starts(
    serve: Serve, path: Path, gate: Gate, place: str
) -> None:
    """TERM for PID 1, which the kernel discards if there is no handler, drains the server."""
    if not runs(*NEW_PID_NAMESPACE, "true"):
        pytest.skip("no new PID namespace can be had")
    path.write_bytes(b"data")
    server = serve(path, "--bind", "localhost", wrapper=(*NEW_PID_NAMESPACE, *gate.wrapper(place)))
    gate.reached()
    (init,) = children(server.pid)
    os.kill(init, signal.SIGTERM)
    gate.go_on()
    server.logged("draining: signal=SIGTERM")
    server.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_name_server_does_not_answer(
    serve: Serve, path: Path, gate: Gate, number: signal.Signals
) -> None:
    """A server that looks up a name ends at once and without a traceback; USR1 does not end it."""
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
