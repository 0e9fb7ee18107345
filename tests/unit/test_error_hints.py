"""Tests of the hints that errors give to operators."""

import errno
import os
from pathlib import Path

import pytest

from support.interpreter import run_program
from support.processes import as_root
from tailsrv.error_hints import cannot_bind, cannot_open, cannot_see


def error(number: int) -> OSError:
    """Return the exception for an error number."""
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("number", "port", "hint"),
    [
        (
            errno.EADDRINUSE,
            99,
            "Address already in use; choose another port, or find the process that uses this one: "
            "sudo ss -tanp sport = :99",
        ),
        (
            errno.EADDRINUSE,
            0,
            "Address already in use; no port of net.ipv4.ip_local_port_range is free",
        ),
        (
            errno.EACCES,
            80,
            "Permission denied; choose a port above 1023, or let systemd listen for the service "
            "(tailsrv@.socket)",
        ),
        (errno.EACCES, 8080, "Permission denied"),
        (
            errno.EADDRNOTAVAIL,
            1,
            "Cannot assign requested address; no interface of this machine has this address "
            "(see: ip addr)",
        ),
        (errno.EMFILE, 1, "Too many open files"),
    ],
)
def test_cannot_bind(number: int, port: int, hint: str) -> None:
    """The message starts with the kernel's words, and ends with a hint where one is known."""
    assert cannot_bind(error(number), port) == hint


def test_port_of_a_connection() -> None:
    """For a port of the ephemeral range the hint says that an outgoing connection may use it."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    end = (
        "; an outgoing connection may use it, as the port is in net.ipv4.ip_local_port_range "
        f"({first} to {last})"
    )
    for port in (first, last):
        assert cannot_bind(error(errno.EADDRINUSE), port).endswith(f"ss -tanp sport = :{port}{end}")
    for port in (first - 1, last + 1):
        assert cannot_bind(error(errno.EADDRINUSE), port).endswith(f"ss -tanp sport = :{port}")


def test_cannot_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message for an unreadable file gives its mode, its owner and the process's user."""
    monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
    path = tmp_path / "log"
    path.touch()
    path.chmod(0o640)
    assert cannot_open(str(path), error(errno.EIO)) == "Input/output error"
    hint = cannot_open(str(path), error(errno.EACCES))
    assert hint.startswith("Permission denied; it has mode 0640, user ")
    assert "and tailsrv runs as user " in hint


@pytest.mark.skipif(not as_root, reason="only root can become another user")
def test_closed_folder(open_folder: Path) -> None:
    """If a folder cannot be entered, the message names the outermost such folder."""
    (open_folder / "a" / "b" / "c").mkdir(parents=True)
    (open_folder / "a" / "b").chmod(0o700)
    done = run_program(
        "closed_folder", str(open_folder / "a" / "b" / "c" / "log"), env={"SYSTEMD_EXEC_PID": ""}
    )
    assert (
        f"; {open_folder}/a/b may not be entered, "
        "and tailsrv runs as user 65534 with groups 65534: " in done.stdout
    )


@pytest.mark.parametrize(
    ("path", "setting"),
    [
        ("/home/me/log", "ProtectHome=read-only"),
        ("/root/log", "ProtectHome=read-only"),
        ("/run/user/1000/log", "ProtectHome=read-only"),
        ("/tmp/log", "BindReadOnlyPaths=/tmp"),
        ("/var/tmp/a/log", "BindReadOnlyPaths=/var/tmp/a"),
        ("/var/log/../tmp/log", "BindReadOnlyPaths=/var/tmp"),
        ("/var/log/app.log", None),
        ("/homes/log", None),
        ("/run/log", None),
    ],
)
def test_cannot_see(path: str, setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under systemd, the hint for a path that the sandbox hides names the setting to change."""
    monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
    assert "set " not in (cannot_see(path) or "")
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    hint = cannot_see(path) or ""
    assert ("set " in hint, f"set {setting} " in hint) == (setting is not None, setting is not None)


def test_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the folder is missing as well, the message says so, as the path may be mistyped."""
    monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
    assert cannot_see(str(tmp_path / "log")) is None
    assert cannot_see(str(tmp_path / "lost" / "log")) == f"there is no folder {tmp_path}/lost"


def test_user_database_is_not_asked(tmp_path: Path) -> None:
    """Users and groups are printed as numbers, as a slow user database would block the loop."""
    path = tmp_path / "log"
    path.touch(0o600)
    done = run_program("no_user_database", str(path))
    assert (
        f"mode 0600, user {os.geteuid()} and group {path.stat().st_gid}, "
        f"and tailsrv runs as user {os.geteuid()} with" in done.stdout
    ), done.stderr
