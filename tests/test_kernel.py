"""An interpreter that was built against an old C library: what it lacks is there all the same, or is done without."""

import errno
import os
import signal
from pathlib import Path

import pytest
from followers import TSCAT, TSSYNC, Command, holds
from helpers import Serve, Server, activated, append, expect, random_bytes
from old_libc import FUNCTIONS, hidden, uses, write_hook
from unit import ROOT, opened, run_python

from tailsrv.linux import kernel

DATA, MORE = random_bytes(100_000), b"more"

THE_ONE_PLACE = "kernel.py"

libraries = pytest.mark.parametrize("functions", [(), FUNCTIONS], ids=["old interpreter", "old library too"])


def test_names_are_in_one_place() -> None:
    """No module but that one uses a name that an interpreter may be without."""
    found = {
        f"{module.name}:{line}": name
        for module in (ROOT / "tailsrv").rglob("*.py")
        if module.name != THE_ONE_PLACE
        for line, name in uses(module.read_text())
    }
    assert found == {}, f"take them from {THE_ONE_PLACE}"


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
    """A use of such a name is found, however it is written, and what every interpreter has is not taken for one."""
    assert len(list(uses(line))) == 1
    assert not list(uses("import os, socket, select; os.preadv(1, [], 0); socket.TCP_INFO; select.EPOLLRDHUP; from os import read"))


NUMBERS = "from tailsrv.linux import kernel; print({name: value for name, value in vars(kernel).items() if name.isupper()})"


def test_numbers(tmp_path: Path) -> None:
    """The numbers that stand in for missing names are those that this interpreter has by these names."""
    write_hook(tmp_path)
    here, without = run_python(NUMBERS), run_python(NUMBERS, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert "'TCP_NOTSENT_LOWAT': 25" in here.stdout
    assert (without.stdout, without.stderr) == (here.stdout, "")


@libraries
def test_reading_what_is_in_memory(tmp_path: Path, functions: tuple[str, ...]) -> None:
    """The page cache is asked by way of the C library where the interpreter cannot, and where that cannot either, it is said."""
    write_hook(tmp_path, functions)
    (tmp_path / "file").write_bytes(b"0123")
    done = run_python(
        """
import sys
from tailsrv.linux.kernel import preadv_nowait
with open(sys.argv[1], "rb") as file:
    buffer = bytearray(2)
    try:
        print(preadv_nowait(file.fileno(), buffer, 1), bytes(buffer), preadv_nowait(file.fileno(), buffer, 4))
    except OSError as error:
        print(error.errno)
""",
        str(tmp_path / "file"),
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.stderr == ""
    assert done.stdout == (f"{errno.ENOSYS}\n" if functions else "2 b'12' 0\n")


def test_errors_of_the_library(path: Path) -> None:
    """What a call of the C library's fails with is the error that it says."""
    path.write_bytes(b"")
    with opened(path) as file:
        pass
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        kernel._preadv2(file, bytearray(1), 0)
    assert caught.value.errno == errno.EBADF


@libraries
def test_memory_file(tmp_path: Path, functions: tuple[str, ...]) -> None:
    """An anonymous file has no name anywhere, is not inherited, and is as good as one of memfd_create(2)."""
    write_hook(tmp_path, functions)
    done = run_python(
        """
import os
from tailsrv.linux.kernel import memory_file
fd = memory_file("name")
os.write(fd, b"data")
print(os.pread(fd, 10, 0), os.get_inheritable(fd), os.fstat(fd).st_nlink, os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:name"))
""",
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.stderr == ""
    assert done.stdout == f"b'data' False 0 {not functions}\n"


@pytest.mark.thorough
@pytest.mark.slow
@libraries
def test_server(serve: Serve, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, functions: tuple[str, ...]) -> None:
    """A server without all of these names streams, counts clients, survives a killed worker, and upgrades itself."""
    assert sum(map(len, hidden().values())) > 20
    (folder := tmp_path / "hook").mkdir()
    write_hook(folder, functions)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    path.write_bytes(DATA)
    servers = [
        serve(path, "-w", "2", "--max-clients", "10"),
        serve(path, "-p", "", "-w", "2", "--max-clients", "10", wrapper=activated("tcp4")),
    ]
    data = DATA
    for server in servers:
        data = check_server(server, path, data)
        check_clients(server, data, tmp_path)


def check_server(server: Server, path: Path, data: bytes) -> bytes:
    """Have the server do what the missing names are for; return what is in the file then."""
    clients = [server.connect(b"0\n") for _ in range(4)]
    for client in clients:
        expect(client, data)
    for worker in server.workers(2):
        os.kill(worker, signal.SIGKILL)
    server.logged("worker ready: ", count=4)
    append(path, MORE)
    server.signal(signal.SIGHUP)
    server.logged("upgraded: ", "clients=4")
    append(path, MORE)
    for client in clients:
        expect(client, MORE + MORE)
    return data + MORE + MORE


def check_clients(server: Server, data: bytes, folder: Path) -> None:
    """Have the client programs get all of it."""
    here, copy = f"127.0.0.1:{server.port}", folder / f"copy-{server.port}"
    with Command(folder, *TSCAT, here, "0", "--until-idle", "0.2") as tscat:
        assert tscat.end() == 0
        tscat.wrote(data)
    with Command(folder, *TSSYNC, here, copy, "--until-idle", "0.2") as tssync:
        assert tssync.end() == 0
        holds(copy, data)
