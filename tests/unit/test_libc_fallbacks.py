"""Tests of the replacements for what an interpreter built against an old C library lacks."""

import errno
from pathlib import Path

import pytest

from support.checkout import ROOT
from support.files import opened
from support.interpreter import run_program, run_python
from support.old_libc import FUNCTIONS, take_away, uses
from tailsrv.linux import libc_fallbacks

FALLBACKS_MODULE = "libc_fallbacks.py"

libraries = pytest.mark.parametrize(
    "functions", [(), FUNCTIONS], ids=["old interpreter", "old library too"]
)


def test_names_are_in_one_place() -> None:
    """Only libc_fallbacks.py uses names that an interpreter may lack."""
    found = {
        f"{module.name}:{line}": name
        for module in (ROOT / "tailsrv").rglob("*.py")
        if module.name != FALLBACKS_MODULE
        for line, name in uses(module.read_text())
    }
    assert found == {}, f"import these names from {FALLBACKS_MODULE}"


@pytest.mark.parametrize(
    "line",
    [
        "import os; os.memfd_create('x')",
        "from os import RWF_NOWAIT",
        "import socket; getattr(socket, 'TCP_NOTSENT_LOWAT', 25)",
        "import socket; socket.TCP_FASTOPEN",
        "import select; select.EPOLLEXCLUSIVE",
        "import os; os.preadv(1, [], 0, 8)",
        "import os; os.pidfd_open(1)",
        "from signal import pidfd_send_signal",
    ],
)
def test_use_is_found(line: str) -> None:
    """Each use of a name that may be missing is found, and no name that is always there."""
    assert len(list(uses(line))) == 1
    assert not list(
        uses(
            "import os, socket, select; os.preadv(1, [], 0); socket.TCP_INFO; "
            "select.EPOLLRDHUP; from os import read"
        )
    )


NUMBERS = (
    "from tailsrv.linux import libc_fallbacks; "
    "print({name: value for name, value in vars(libc_fallbacks).items() if name.isupper()})"
)


def test_numbers(tmp_path: Path) -> None:
    """The numbers that replace missing names equal those of this interpreter."""
    take_away(tmp_path)
    here, without = (
        run_python(NUMBERS),
        run_python(NUMBERS, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}),
    )
    assert "'TCP_NOTSENT_LOWAT': 25" in here.stdout
    assert (without.stdout, without.stderr) == (here.stdout, "")


@libraries
def test_reading_from_the_page_cache(tmp_path: Path, functions: tuple[str, ...]) -> None:
    """If `os` lacks preadv2(), the C library's is called; if both lack it, the error is ENOSYS."""
    take_away(tmp_path, functions)
    (tmp_path / "file").write_bytes(b"0123")
    done = run_program(
        "read_from_memory",
        str(tmp_path / "file"),
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.stderr == ""
    assert done.stdout == (f"{errno.ENOSYS}\n" if functions else "2 b'12' 0\n")


def test_errors_of_the_library(path: Path) -> None:
    """An error of a C library function becomes an OSError with its errno."""
    path.write_bytes(b"")
    with opened(path) as file:
        pass
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        libc_fallbacks._preadv2(file, bytearray(1), 0)
    assert caught.value.errno == errno.EBADF


@libraries
def test_memory_file(tmp_path: Path, functions: tuple[str, ...]) -> None:
    """An anonymous file has no name and is not inherited, with or without memfd_create(2)."""
    take_away(tmp_path, functions)
    done = run_program(
        "anonymous_file",
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.stderr == ""
    assert done.stdout == f"b'data' False 0 {not functions}\n"
