"""The command `tssync`: the copy is always a prefix of the remote file, whatever fails."""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.commands import TSSYNC, Command, closed_port, holds, kill, restart, run_client
from support.cutter import Cutter
from support.fake_server import FakeServer
from support.files import append, random_bytes
from support.processes import as_root, runs
from support.server import Serve, Server
from support.strace import needs_strace
from support.waiting import DEADLINE, eventually
from tailsrv import __version__

DATA = random_bytes(300_000)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return the path of the local copy."""
    return tmp_path / "copy"


def endpoint_of(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


def tssync(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return run_client(*TSSYNC, *arguments)


@pytest.mark.sample(1)
@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, len(DATA)])
def test_copy_is_extended(
    serve: Serve, path: Path, copy: Path, tmp_path: Path, length: int
) -> None:
    """An existing copy is extended in place and receives what is appended to the remote file."""
    path.write_bytes(DATA)
    copy.write_bytes(DATA[:length])
    inode = copy.stat().st_ino
    with Command(tmp_path, *TSSYNC, endpoint_of(serve(path)), copy) as command:
        holds(copy, DATA)
        append(path, b"new")
        holds(copy, DATA + b"new")
        assert command.end(signal.SIGINT) == 0
        assert command.errors == ""
    assert copy.stat().st_ino == inode


def test_copy_is_made(serve: Serve, path: Path, copy: Path) -> None:
    """A missing copy is created with the mode that the umask allows."""
    path.write_bytes(DATA)
    before = os.umask(0o027)
    try:
        assert tssync(endpoint_of(serve(path)), copy, "--until-idle", "0.2").returncode == 0
    finally:
        os.umask(before)
    assert copy.read_bytes() == DATA
    assert copy.stat().st_mode & 0o777 == 0o640


@pytest.mark.slow
def test_cuts_and_a_killed_server(serve: Serve, path: Path, copy: Path, tmp_path: Path) -> None:
    """The copy is exact despite lost connections and a server that is restarted."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    with (
        Cutter(server.port, cuts=15, longest=60_000) as cutter,
        Command(tmp_path, *TSSYNC, *cutter.endpoints(), copy) as command,
    ):
        holds(copy, DATA)
        kill(server)
        append(path, DATA)
        restart(serve, server, path)
        holds(copy, DATA + DATA)
        assert command.end(signal.SIGTERM) == 0


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(12, marks=pytest.mark.thorough)])
def test_kill_at_random_moments(
    serve: Serve, path: Path, copy: Path, tmp_path: Path, kills: int
) -> None:
    """Killed at any moment, tssync leaves a prefix of the file, which the next run completes."""
    # The file grows for longer than all runs need to start.
    data, rng, unfinished = kills * random_bytes(22 << 20), random.Random(1), 0
    path.write_bytes(data[: 8 << 20])
    server = serve(path)
    with growing(path, data):
        for _ in range(kills):
            before = copy.stat().st_size if copy.exists() else 0
            with Command(tmp_path, *TSSYNC, endpoint_of(server), copy) as command:
                eventually(lambda before=before: copy.exists() and copy.stat().st_size > before)  # type: ignore[misc]
                # Kill it at a random moment.
                time.sleep(rng.random() * 0.05)
                command.end(signal.SIGKILL)
                unfinished += copy.stat().st_size < path.stat().st_size
            assert data.startswith(copy.read_bytes())
    assert unfinished > 1, "each kill came after the copy was complete"
    assert tssync(endpoint_of(server), copy, "--until-idle", "0.3").returncode == 0
    assert copy.read_bytes() == path.read_bytes()


@contextmanager
def growing(path: Path, data: bytes) -> Iterator[None]:
    """Append the rest of `data` to `path` in small pieces until the end of the block."""
    end = threading.Event()

    def grow() -> None:
        size = path.stat().st_size
        while size < len(data) and not end.wait(0.001):
            append(path, data[size : size + 10_000])
            size += 10_000

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(DEADLINE)


@pytest.mark.parametrize("wrong", [1, 4096])
def test_mismatch_stops(serve: Serve, path: Path, copy: Path, wrong: int) -> None:
    """One wrong byte in the last 4 KiB ends tssync with status 3 and leaves the copy unchanged."""
    path.write_bytes(DATA)
    held = bytearray(DATA[:10_000])
    held[-wrong] ^= 1
    copy.write_bytes(held)
    done = tssync(endpoint_of(serve(path)), copy)
    assert done.returncode == 3
    assert (
        done.stderr == f"tssync: {copy} is not the beginning of the remote file (was it rotated?);"
        " use --on-mismatch=restart to keep it and start a new copy\n"
    )
    assert copy.read_bytes() == held


def test_mismatch_starts_a_new_copy(serve: Serve, path: Path, copy: Path, tmp_path: Path) -> None:
    """With --on-mismatch=restart, the old copy gets an unused name and a new copy is started."""
    path.write_bytes(DATA)
    copy.write_bytes(b"old")
    (tmp_path / "copy.1").write_bytes(b"older")
    done = tssync(endpoint_of(serve(path)), copy, "--on-mismatch=restart", "--until-idle", "0.2")
    assert done.returncode == 0
    assert f"renamed it to {copy}.2" in done.stderr
    assert (
        copy.read_bytes(),
        (tmp_path / "copy.1").read_bytes(),
        (tmp_path / "copy.2").read_bytes(),
    ) == (DATA, b"older", b"old")


def test_rotation_starts_a_new_copy(serve: Serve, path: Path, copy: Path, tmp_path: Path) -> None:
    """A different remote file after a lost connection starts a new copy."""
    path.write_bytes(DATA)
    server = serve(path)
    with Command(
        tmp_path, *TSSYNC, "--on-mismatch", "restart", endpoint_of(server), copy
    ) as command:
        holds(copy, DATA)
        kill(server)
        other = DATA[::-1]
        path.write_bytes(other)
        restart(serve, server, path)
        command.says("starting a new copy")
        eventually(lambda: copy.read_bytes() == other)
        assert (tmp_path / "copy.1").read_bytes() == DATA
        assert command.end(signal.SIGINT) == 0


@pytest.mark.thorough
def test_shorter_remote_file_is_reported(
    serve: Serve, path: Path, copy: Path, tmp_path: Path
) -> None:
    """If the remote file is shorter than the copy, tssync reports that once and waits."""
    path.write_bytes(DATA[:1000])
    copy.write_bytes(DATA[:100_000])
    with Command(tmp_path, *TSSYNC, endpoint_of(serve(path)), copy) as command:
        command.says("shorter")
        append(path, DATA[1000:])
        holds(copy, DATA)
        assert command.end(signal.SIGINT) == 0
        assert command.errors.count("\n") == 1


def test_one_at_a_time(serve: Serve, path: Path, copy: Path, tmp_path: Path) -> None:
    """A second tssync on the same copy exits with status 1 and one line, and changes nothing."""
    path.write_bytes(DATA)
    server = serve(path)
    with Command(tmp_path, *TSSYNC, endpoint_of(server), copy) as command:
        holds(copy, DATA)
        done = tssync(endpoint_of(server), copy)
        assert (done.returncode, done.stderr) == (
            1,
            f"tssync: another program has locked {copy}, perhaps another tssync; "
            "stop it, or choose another FILE\n",
        )
        assert command.end(signal.SIGINT) == 0


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda copy: os.truncate(copy, 10),
            "was changed by another program: it has 10 bytes instead of ",
        ),
        (lambda copy: append(copy, b"foreign"), "was changed by another program: it has "),
        (os.unlink, "was moved or deleted by another program"),
        (
            lambda copy: copy.rename(copy.with_suffix(".away")),
            "was moved or deleted by another program",
        ),
    ],
)
def test_copy_that_is_changed_while_it_is_kept(
    serve: Serve,
    path: Path,
    copy: Path,
    tmp_path: Path,
    change: Callable[[Path], object],
    complaint: str,
) -> None:
    """A copy that another program changes or moves gets no more data, and tssync exits."""
    path.write_bytes(DATA)
    with Command(tmp_path, *TSSYNC, endpoint_of(serve(path)), copy) as command:
        holds(copy, DATA)
        change(copy)
        append(path, b"more")
        assert command.end() == 1
        assert f"{copy} {complaint}" in command.errors
    assert not any(b"more" in left.read_bytes() for left in copy.parent.glob(f"{copy.stem}*"))


@pytest.mark.thorough
def test_copy_of_unexpected_length(serve: Serve, path: Path, copy: Path, tmp_path: Path) -> None:
    """A copy of unexpected length makes tssync exit when it reconnects, and gets no hole."""
    path.write_bytes(DATA)
    server = serve(path)
    with Command(tmp_path, *TSSYNC, endpoint_of(server), copy) as command:
        holds(copy, DATA)
        os.truncate(copy, 10)
        kill(server)
        restart(serve, server, path)
        assert command.end() == 1
        assert f"{copy} was changed by another program" in command.errors
    assert copy.stat().st_size == 10


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 KiB."""
    if not as_root:
        pytest.skip("needs root, to mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    if not runs("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)):
        pytest.skip("cannot mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=DEADLINE)


@pytest.mark.thorough
@pytest.mark.slow
def test_full_disk_is_waited_for(serve: Serve, path: Path, tiny_disk: Path, tmp_path: Path) -> None:
    """A full disk is reported once; when there is space, tssync continues and reports that."""
    path.write_bytes(DATA[:200_000])
    copy, ballast = tiny_disk / "copy", tiny_disk / "ballast"
    ballast.write_bytes(bytes(100 << 10))
    with Command(tmp_path, *TSSYNC, endpoint_of(serve(path)), copy) as command:
        command.says("No space left on device; waiting for free space")
        assert DATA.startswith(copy.read_bytes())
        ballast.unlink()
        holds(copy, DATA[:200_000])
        command.says("appending to ")
        assert command.end(signal.SIGINT) == 0
        assert command.errors.count("\n") == 2


def test_copy_that_may_not_grow(serve: Serve, path: Path, copy: Path) -> None:
    """A write that fails for a reason other than disk space ends tssync with an error."""
    path.write_bytes(DATA * 10)
    done = run_client(
        "prlimit", f"--fsize={len(DATA) * 5}", *TSSYNC, endpoint_of(serve(path)), copy
    )
    assert (done.stderr, done.returncode) == (
        f"tssync: cannot append to {copy}: File too large\n",
        1,
    )
    assert copy.read_bytes() == (DATA * 10)[: len(DATA) * 5]


@needs_strace
@pytest.mark.parametrize(("options", "synced"), [([], False), (["--fsync", "0.05"], True)])
def test_fsync(
    serve: Serve, path: Path, copy: Path, tmp_path: Path, options: list[str], synced: bool
) -> None:
    """With --fsync, the copy is synced soon after a write; without it, the kernel decides."""
    path.write_bytes(DATA)
    trace = tmp_path / "trace"
    traced = ("strace", "-f", "-o", trace, "-e", "trace=fdatasync,fsync")
    done = run_client(
        *traced, *TSSYNC, endpoint_of(serve(path)), copy, "--until-idle", "0.5", *options
    )
    assert done.returncode == 0
    calls = [line for line in trace.read_text().splitlines() if "sync(" in line]
    assert (len(calls) >= 2) == synced, "one sync while it waits, and one at the end"


@pytest.mark.sample(1)
@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(
    "numbers", [("TERM",), ("HUP",), ("INT", "INT"), ("TERM", "HUP"), ("HUP", "TERM", "INT", "HUP")]
)
def test_signals_leave_a_synced_copy(
    serve: Serve, path: Path, copy: Path, tmp_path: Path, numbers: tuple[str, ...]
) -> None:
    """One or several signals end tssync only after the received data is synced."""
    path.write_bytes(DATA)
    trace = tmp_path / "trace"
    traced = (
        "strace",
        "-f",
        "-o",
        trace,
        "-e",
        "trace=fdatasync",
        "-e",
        "inject=fdatasync:delay_enter=100000",
    )
    with Command(
        tmp_path, *traced, *TSSYNC, endpoint_of(serve(path)), copy, "--fsync", "1000"
    ) as command:
        holds(copy, DATA)
        # The first line of the trace is the sync at the start of tssync.
        pid = int(trace.read_text().split()[0])
        for number in numbers:
            os.kill(pid, signal.Signals[f"SIG{number}"])
        assert command.end() == 0
        assert command.errors == ""
    assert trace.read_text().count("fdatasync(") == 2


@pytest.mark.thorough
def test_nohup(serve: Serve, path: Path, copy: Path, tmp_path: Path) -> None:
    """An ignored SIGHUP stays ignored."""
    path.write_bytes(DATA)
    with Command(
        tmp_path,
        "sh",
        "-c",
        'trap "" HUP; exec "$@"',
        "sh",
        *TSSYNC,
        endpoint_of(serve(path)),
        copy,
    ) as command:
        holds(copy, DATA)
        command.process.send_signal(signal.SIGHUP)
        append(path, b"more")
        holds(copy, DATA + b"more")
        assert command.end(signal.SIGTERM) == 0


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["127.0.0.1:CLOSED", "copy", "--once"], 1, "127.0.0.1:CLOSED: Connection refused"),
        (["nosuch.invalid:4321", "copy"], 1, "nosuch.invalid:4321: "),
        (["localhost:99999", "copy"], 2, "port must be from 1 to 65535, not 99999"),
        (["localhost", "copy"], 2, "not HOST:PORT: 'localhost'"),
        (["localhost:1", "/nosuch/copy"], 1, "/nosuch/copy: No such file or directory"),
        (["localhost:1", "."], 1, ".: Is a directory"),
        (["localhost:1", "/dev/null"], 1, "/dev/null is not a regular file"),
        (["localhost:1", ""], 1, "No such file or directory"),
    ],
)
def test_error_is_one_line(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    """Each error is one line that starts with the command's name."""
    port = str(closed_port())
    script = 'cd "$1" && shift && exec "$@"'
    done = run_client(
        "sh",
        "-c",
        script,
        "sh",
        tmp_path,
        *TSSYNC,
        *(argument.replace("CLOSED", port) for argument in arguments),
    )
    assert done.returncode == status
    assert done.stderr.startswith("tssync: ")
    assert message.replace("CLOSED", port) in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["a:1"], ["a:1", "f", "--on-mismatch=panic"], ["a:1", "f", "--fsync", "never"]],
)
def test_usage_error(arguments: list[str]) -> None:
    """A wrong command line has status 2 and prints the usage."""
    done = tssync(*arguments)
    assert done.returncode == 2
    assert "usage: tssync" in done.stderr


def test_version_and_help() -> None:
    """--version prints the version, and --help shows examples."""
    assert tssync("--version").stdout == f"tssync {__version__}\n"
    assert "examples:" in tssync("--help").stdout


@pytest.mark.parametrize("length", [0, 100, len(DATA)])
def test_no_follow(serve: Serve, path: Path, copy: Path, length: int) -> None:
    """With --no-follow, tssync copies what there is, and ends."""
    path.write_bytes(DATA)
    copy.write_bytes(DATA[:length])
    done = tssync(endpoint_of(serve(path)), copy, "--no-follow")
    assert (done.stderr, done.returncode) == ("", 0)
    assert copy.read_bytes() == DATA


def test_no_follow_compares(serve: Serve, path: Path, copy: Path) -> None:
    """With --no-follow, a copy of another file is an error, also if it is as long."""
    path.write_bytes(DATA)
    copy.write_bytes(bytes(len(DATA)))
    assert tssync(endpoint_of(serve(path)), copy, "--no-follow").returncode == 3


@needs_strace
def test_no_follow_syncs(serve: Serve, path: Path, copy: Path, tmp_path: Path) -> None:
    """With --no-follow, the copy is on the disk when tssync ends, also without --fsync."""
    path.write_bytes(DATA)
    trace = tmp_path / "trace"
    run_client(
        "strace", "-o", trace, "-e", "trace=fdatasync",
        *TSSYNC, endpoint_of(serve(path)), copy, "--no-follow",
    )  # fmt: skip
    assert trace.read_text().count("fdatasync(") == 1


@pytest.mark.parametrize("length", [0, 100, 10_000])
def test_bytes_that_are_gone(copy: Path, length: int) -> None:
    """A copy that cannot be continued, because bytes are gone, is an error and is not changed."""
    copy.write_bytes(DATA[:length])
    with FakeServer(DATA, first=20_000) as server:
        done = tssync(server.endpoint, copy)
    assert done.returncode == 3
    assert done.stderr == (
        f"tssync: {copy} cannot be continued: it ends at offset {length}, but the remote log starts"
        " at offset 20000 now; the bytes between them were deleted; name a server that still has"
        " them\n"
    )
    assert copy.read_bytes() == DATA[:length]
