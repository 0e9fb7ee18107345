"""Process titles when the environment has too little room for them."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.files import append
from support.processes import title
from support.server import TAILSRV, Serve, activated, run_tailsrv
from support.sockets import expect
from support.waiting import eventually

# A title writes each newline as two bytes, so it needs more room than the command line has.
LONG = "\n" * 200
COMMAND = (str(Path(sys.executable).with_name("tailsrv")),)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "name", "variables"),
    [
        (TAILSRV, "log", []),
        (COMMAND, LONG, ["A=b"]),
        # Python sets LC_CTYPE to a new value, which is stored at another address than the old one.
        (TAILSRV, "log", ["LC_CTYPE=", "A=b"]),
        (COMMAND, LONG, []),
    ],
)
def test_titles_with_a_small_environment(
    serve: Serve, tmp_path: Path, program: Sequence[str], name: str, variables: list[str]
) -> None:
    """Titles are complete with a small environment, also after an upgrade."""
    path = tmp_path / name
    path.write_bytes(b"first")
    server = serve(
        path, "-w", "2", "--bind", "127.0.0.1", wrapper=("env", "-i", *variables), program=program
    )
    endpoint, shown = (
        f"127.0.0.1:{server.port}",
        str(path) if str(path).isprintable() else ascii(str(path)),
    )
    eventually(
        lambda: server.title() == f"tailsrv: supervisor {endpoint} {shown} [2 workers, 0 clients]"
    )
    assert [title(pid) for pid in server.workers(2)] == [
        f"tailsrv: worker {slot} {endpoint} [0 clients]" for slot in (0, 1)
    ]
    client = server.connect(b"0\n")
    expect(client, b"first")
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ")
    append(path, b"second")
    expect(client, b"second")
    eventually(
        lambda: server.title() == f"tailsrv: supervisor {endpoint} {shown} [2 workers, 1 client]"
    )


@pytest.mark.slow
def test_passed_sockets_survive_the_exec_for_titles(serve: Serve, tmp_path: Path) -> None:
    """Passed sockets are used although the program executed itself to make room for titles."""
    path = tmp_path / LONG
    path.write_bytes(b"first")
    server = serve(path, "-p", "", wrapper=("env", "-i", *activated("tcp4")))
    expect(server.connect(b"0\n"), b"first")
    eventually(
        lambda: (
            server.title()
            == f"tailsrv: supervisor 127.0.0.1:{server.port} {str(path)!a} [1 worker, 1 client]"
        )
    )


@pytest.mark.parametrize("arguments", [("--version",), ("--no-such-option",)])
def test_commands_without_a_title(arguments: Sequence[str]) -> None:
    """A small environment changes nothing for a command that exits at once."""
    small, usual = (
        run_tailsrv(*arguments, wrapper=("env", "-i", "COLUMNS=100")),
        run_tailsrv(*arguments, wrapper=("env", "COLUMNS=100")),
    )
    assert (small.returncode, small.stdout, small.stderr) == (
        usual.returncode,
        usual.stdout,
        usual.stderr,
    )
