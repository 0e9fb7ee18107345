"""The local copy of `tssync` on file systems and disks that lack features or fail."""

import errno
import os
from pathlib import Path

import pytest

from support.commands import TSSYNC, Command, holds, run_client
from support.files import append, random_bytes
from support.interpreter import run_program, run_python
from support.server import Serve, Server
from support.shims import build_shim
from support.strace import needs_strace
from tailsrv.client.local_copy import LocalCopy

DATA = random_bytes(300_000)

# Runs a command without coverage.py, which renames files itself.
UNMEASURED = ("env", "-u", "COVERAGE_PROCESS_START", "-u", "COVERAGE_PROCESS_CONFIG")


def endpoint_of(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


def failing(*injections: str) -> tuple[str, ...]:
    """Return the prefix of a command that makes some of its system calls fail."""
    return (
        "strace",
        "-f",
        "-o",
        os.devnull,
        *(word for injection in injections for word in ("-e", f"inject={injection}")),
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return the path of the local copy."""
    return tmp_path / "copy"


@pytest.mark.sample(1)
@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("error", ["EPERM", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EXDEV"])
def test_restart_without_hard_links(
    serve: Serve, path: Path, copy: Path, tmp_path: Path, error: str
) -> None:
    """Without hard links, the old copy still gets an unused name and no other file is touched."""
    path.write_bytes(DATA)
    copy.write_bytes(b"old")
    (tmp_path / "copy.1").write_bytes(b"another file")
    (tmp_path / "copy.2").symlink_to("nowhere")
    (tmp_path / "copy.3").mkdir()
    traced = failing(f"link,linkat:error={error}", "renameat2:error=EINVAL")
    done = run_client(
        *traced,
        *TSSYNC,
        endpoint_of(serve(path)),
        copy,
        "--on-mismatch=restart",
        "--until-idle",
        "0.2",
    )
    assert done.returncode == 0, done.stderr
    files = [found for found in tmp_path.glob("copy*") if found.is_file()]
    assert {found.name: found.read_bytes() for found in files} == {
        "copy": DATA,
        "copy.1": b"another file",
        "copy.4": b"old",
    }


@needs_strace
def test_copy_that_cannot_be_renamed(serve: Serve, path: Path, copy: Path, tmp_path: Path) -> None:
    """A copy that cannot be renamed, such as a mount point, is an error and leaves no new file."""
    path.write_bytes(DATA)
    copy.write_bytes(b"old")
    done = run_client(
        *UNMEASURED,
        *failing("rename,renameat,renameat2:error=EBUSY"),
        *TSSYNC,
        endpoint_of(serve(path)),
        copy,
        "--on-mismatch=restart",
    )
    assert (done.returncode, done.stderr) == (1, f"tssync: {copy}: Device or resource busy\n")
    assert [found.name for found in tmp_path.glob("copy*")] == ["copy"]


def test_copy_by_a_symbolic_link(tmp_path: Path) -> None:
    """With a symbolic link, the old and the new copy are in its target's folder; the link stays."""
    (tmp_path / "disk").mkdir()
    link, file = tmp_path / "link", tmp_path / "disk" / "file"
    link.symlink_to("disk/file")
    with LocalCopy(str(link)) as local_copy:
        assert file.read_bytes() == b""
        file.write_bytes(b"old")
        assert local_copy.move_aside() == f"{file}.1"
    assert (os.readlink(link), file.read_bytes(), (tmp_path / "disk" / "file.1").read_bytes()) == (
        "disk/file",
        b"",
        b"old",
    )
    assert [found.name for found in tmp_path.glob("link*")] == ["link"]


@pytest.fixture
def unstable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the started programs see file systems that report random inode numbers."""
    shim = build_shim(tmp_path, "unstable_inodes")
    monkeypatch.setenv("LD_PRELOAD", str(shim))
    if (
        run_python("import os; print(os.stat('.').st_ino == os.stat('.').st_ino)").stdout
        != "False\n"
    ):
        pytest.skip("the C library names its stat functions differently")


@pytest.mark.slow
@pytest.mark.usefixtures("unstable")
def test_inode_numbers_that_change(
    serve: Serve, path: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With changing inode numbers, the copy is kept, and its replacement is still noticed."""
    path.write_bytes(DATA)
    with monkeypatch.context() as stable:
        stable.delenv("LD_PRELOAD")
        server = serve(path)
    with Command(tmp_path, *TSSYNC, endpoint_of(server), copy) as command:
        holds(copy, DATA)
        append(path, b"more")
        holds(copy, DATA + b"more")
        copy.rename(tmp_path / "away")
        copy.write_bytes(b"another one")
        append(path, b"and more")
        assert command.end() == 1
        assert f"{copy} was moved or deleted by another program" in command.errors


@pytest.mark.slow
def test_file_that_is_replaced_at_each_attempt(copy: Path) -> None:
    """Opening the copy fails after ten attempts if the file is replaced during each of them."""
    done = run_program(
        "file_taken_away",
        str(copy),
    )
    assert (done.stdout, done.stderr) == (
        f"cannot open {copy}: another program replaced it during each of 10 attempts;"
        " stop that program, then start tssync again 4\n",
        "",
    )


@pytest.mark.sample(1)
@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
@pytest.mark.parametrize("when", [1, 2], ids=["from the socket", "into the file"])
def test_splice_that_does_not_work(
    serve: Serve, path: Path, copy: Path, error: int, when: int
) -> None:
    """If splice(2) fails for a socket or a file, or is forbidden, data is copied by other calls."""
    path.write_bytes(DATA)
    traced = failing(f"splice:error={errno.errorcode[error]}:when={when}+2")
    done = run_client(*traced, *TSSYNC, endpoint_of(serve(path)), copy, "--until-idle", "0.2")
    assert (done.returncode, done.stderr) == (0, "")
    assert copy.read_bytes() == DATA


@pytest.mark.slow
def test_interpreter_without_splice(
    serve: Serve, path: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpreter without os.splice and F_SETPIPE_SZ makes the same copy by other calls."""
    path.write_bytes(DATA)
    server = serve(path)
    (tmp_path / "sitecustomize.py").write_text(
        "import fcntl, os\ndel os.splice, fcntl.F_SETPIPE_SZ\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_python("import os; print(hasattr(os, 'splice'))").stdout == "False\n"
    done = run_client(*TSSYNC, endpoint_of(server), copy, "--until-idle", "0.2")
    assert (done.returncode, done.stderr) == (0, "")
    assert copy.read_bytes() == DATA


@pytest.mark.slow
@needs_strace
def test_full_disk_without_splice(serve: Serve, path: Path, copy: Path) -> None:
    """Data that was read from the pipe before the disk was full is not lost."""
    path.write_bytes(DATA)
    traced = failing("splice:error=EINVAL", "pwrite64:error=ENOSPC:when=1")
    done = run_client(*traced, *TSSYNC, endpoint_of(serve(path)), copy, "--until-idle", "0.2")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"tssync: cannot append to {copy}: No space left on device; waiting for free space",
        f"tssync: appending to {copy} again",
    ]
    assert copy.read_bytes() == DATA


@pytest.mark.sample(1)
@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("held", [0, 10_000])
def test_disk_that_fails(serve: Serve, path: Path, copy: Path, held: int) -> None:
    """Bytes that a failed sync may have lost are cut off in whole blocks and fetched again."""
    path.write_bytes(DATA)
    copy.write_bytes(DATA[:held])
    kept = held - held % copy.stat().st_blksize
    server = serve(path)
    done = run_client(
        *failing("fdatasync:error=EIO:when=2"),
        *TSSYNC,
        endpoint_of(server),
        copy,
        "--fsync",
        "0",
        "--until-idle",
        "20",
    )
    assert (done.returncode, done.stderr) == (
        1,
        f"tssync: cannot sync {copy}: Input/output error; it was cut to the {kept} bytes "
        "that are on the disk: start tssync again to fetch the rest\n",
    )
    assert copy.read_bytes() == DATA[:kept]
    done = run_client(*TSSYNC, endpoint_of(server), copy, "--fsync", "0", "--until-idle", "0.2")
    assert (done.returncode, copy.read_bytes()) == (0, DATA)


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(
    ("injection", "message"),
    [
        ("fdatasync:error=EIO", "some of its bytes may not be on the disk: move it away"),
        (
            "fdatasync:error=EIO:when=2+",
            "cannot be cut to the 8192 bytes that are on the disk (Input/output error): "
            "move it away",
        ),
        (
            "fdatasync:error=EIO:when=2 ftruncate:error=EROFS",
            "that are on the disk (Read-only file system): move it away",
        ),
    ],
    ids=["from the start", "still", "read-only"],
)
def test_disk_that_fails_for_good(
    serve: Serve, path: Path, copy: Path, injection: str, message: str
) -> None:
    """If the unsynced bytes are unknown or cannot be cut off, the error message says so."""
    path.write_bytes(DATA)
    copy.write_bytes(DATA[:10_000])
    if copy.stat().st_blksize != 4096:
        pytest.skip("the file system's block size is not 4096")
    done = run_client(
        *failing(*injection.split()),
        *TSSYNC,
        endpoint_of(serve(path)),
        copy,
        "--fsync",
        "0",
        "--until-idle",
        "20",
    )
    assert done.returncode == 1
    assert message in done.stderr
