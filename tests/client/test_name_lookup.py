"""A silent name service delays only the connections to the names that are being looked up."""

import signal
import socket
import subprocess
from pathlib import Path

import pytest

from support.commands import TSCAT, TSSYNC, Command, answering, closed_port, run_client, started
from support.fake_server import offsets_line
from support.files import random_bytes
from support.interpreter import run_program
from support.server import Serve
from support.shims import build_shim
from support.waiting import DEADLINE, eventually
from tailsrv.client.connector import NAME_SERVICE_SILENT
from tailsrv.client.name_lookup import Lookup

DATA = random_bytes(10_000)

NAME = "logserver.test"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library that makes the name service silent."""
    return build_shim(tmp_path_factory.mktemp("shim"), "silent_name_service")


@pytest.fixture
def silence(tmp_path: Path, shim: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give clients a simulated name service; return the folder whose files control it."""
    folder = tmp_path / "silence"
    folder.mkdir()
    monkeypatch.setenv("LD_PRELOAD", str(shim))
    monkeypatch.setenv("SILENCE", str(folder))
    return folder


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def named(server: str) -> str:
    """Return the HOST:PORT of `server` with a name that has to be looked up."""
    return f"{NAME}:{server.rpartition(':')[2]}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sync_and_signals_do_not_wait_for_names(
    silence: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """While a name is looked up again, received data is synced and a signal ends the client."""
    before = 0

    def answer(sock: socket.socket) -> None:
        nonlocal before
        before = size(silence / "synced")
        (silence / "silent").touch()
        sock.sendall(offsets_line(0, len(DATA)) + DATA)
        sock.shutdown(socket.SHUT_WR)

    with (
        answering(answer) as server,
        Command(tmp_path, *TSSYNC, named(server), tmp_path / "copy", "--fsync", "0.2") as command,
    ):
        command.says("the server closed the connection")
        eventually(lambda: size(silence / "asked") == 2)
        eventually(lambda: size(silence / "synced") > before)
        assert command.end(number) == 0
        assert (tmp_path / "copy").read_bytes() == DATA


@pytest.mark.slow
def test_idle_time_does_not_wait_for_names(silence: Path) -> None:
    """A silent name service does not extend --until-idle, and its silence is the error."""
    (silence / "silent").touch()
    done = run_client(*TSCAT, f"{NAME}:1", "--until-idle", "0.2")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        f"tscat: {NAME}:1: {NAME_SERVICE_SILENT}",
    )


@pytest.mark.slow
def test_closed_output_does_not_wait_for_names(silence: Path) -> None:
    """If the output's reader exits while a name is looked up, the client exits at once."""
    (silence / "silent").touch()
    with started(*TSCAT, f"{NAME}:1", stdout=subprocess.PIPE) as process:
        eventually((silence / "asked").exists)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(DEADLINE) == 0


@pytest.mark.slow
def test_name_that_is_found_late(serve: Serve, path: Path, silence: Path, tmp_path: Path) -> None:
    """The result of a slow lookup is used when it arrives."""
    (silence / "silent").touch()
    path.write_bytes(DATA)
    with Command(tmp_path, *TSCAT, f"{NAME}:{serve(path).port}") as command:
        eventually((silence / "asked").exists)
        (silence / "silent").unlink()
        command.wrote(DATA)
        assert command.end(signal.SIGINT) == 0
        assert command.errors == ""


@pytest.mark.slow
def test_other_names_are_tried_meanwhile(silence: Path) -> None:
    """A pending lookup needs one thread and one wait; each round still tries other servers."""
    (silence / "silent").touch()
    endpoint = f"127.0.0.1:{closed_port()}"
    done = run_program("one_name_of_several", f"{NAME}:1", endpoint)
    assert (done.stdout, done.stderr) == (
        f"2\n{NAME}:1: {NAME_SERVICE_SILENT}, {endpoint}: Connection refused; retrying\n",
        "",
    )
    assert size(silence / "asked") == 1


@pytest.mark.slow
def test_lookup_without_a_thread() -> None:
    """If no thread can be started, names are looked up without one."""
    done = run_program("lookup_without_thread")
    assert (done.stdout, done.stderr) == ("True 1\n", "")


def test_lookup_without_a_descriptor() -> None:
    """If no descriptor is left, the lookup reports that as its error."""
    # Without coverage.py, which could not write its data without a descriptor.
    done = run_program(
        "lookup_without_descriptor",
        env={"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""},
    )
    assert (done.stdout, done.stderr) == ("Too many open files None\n", "")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "a" * 64])
def test_addresses_and_impossible_names_need_no_lookup(host: str) -> None:
    """Numeric addresses and impossible names need no lookup."""
    assert Lookup(host, 1).fileno() is None
