"""A small Debian with a real systemd in it, booted by systemd-nspawn, in which nothing that it does outlives it."""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from support.checkout import ROOT
from support.sockets import connect
from support.status import ask
from support.tools import missing
from support.waiting import DEADLINE, Seen, eventually

SUITE = "bookworm"
PACKAGES = "systemd,systemd-sysv,python3-venv,procps,logrotate,netcat-openbsd,socat"
# that suite's
PYTHON = "3.11"
TOOLS = ("debootstrap", "systemd-nspawn", "nsenter", "unshare", "setpriv")

BOOTSTRAP_DEADLINE = 600.0
BOOT_DEADLINE = 60.0
COMMAND_DEADLINE = 60.0

CAP_SYS_ADMIN = 1 << 21

# A namespace of pids around the machine's own: with its first process the kernel ends all that is in it, which ending
# systemd-nspawn alone does not. And unshare ends with us, however we end.
UNSHARE = (
    "setpriv",
    "--pdeathsig=KILL",
    "unshare",
    "--mount",
    "--propagation=private",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)

# systemd-nspawn wants /run to itself where systemd is not init. The machine is registered with nobody, its writes go
# to memory, and it has a network of its own, so that every port is free.
BOOT = """
for cgroup; do echo 0 >"$cgroup/cgroup.procs"; done
mount -t tmpfs tmpfs /run
exec systemd-nspawn --quiet --register=no --keep-unit --boot --private-network --volatile=overlay \
    --link-journal=no --console=pipe --machine="$MACHINE" --bind-ro="$WHEELS:/wheels" --directory="$ROOT"
"""

LOGIN = ("env", "-i", "HOME=/root", "LANG=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")

# What is not a part of a checkout as a user would get it.
NOT_COPIED = (
    ".git",
    ".venv",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)


class NoMachineError(Exception):
    """A machine cannot be made here; the message says why."""


def is_required() -> bool:
    """Tell whether it is a fault if no machine can be made: in CI, and where somebody has given it a folder."""
    return bool(os.environ.get("CI") or os.environ.get("TAILSRV_TEST_MACHINE"))


def reason_to_skip() -> str:
    """Return why no machine can be booted here, empty if there is no reason."""
    if os.geteuid() != 0:
        return "not root"
    status = Path("/proc/self/status").read_text()
    if not int(status.partition("CapEff:")[2].split()[0], 16) & CAP_SYS_ADMIN:
        return "no CAP_SYS_ADMIN"
    return "" if is_required() else missing(*TOOLS)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other test sessions from the folder meanwhile."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_root(folder: Path) -> Path:
    """Return the machine's root file system in `folder`, made if it is not there yet."""
    root, unfinished = folder / "root", folder / "unfinished"
    if not root.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        options = ("--variant=minbase", f"--include={PACKAGES}")
        # it mounts things there
        call(*UNSHARE, "debootstrap", *options, SUITE, str(unfinished), deadline=BOOTSTRAP_DEADLINE)
        unfinished.rename(root)
    return root


def make_wheels(folder: Path) -> Path:
    """Return a folder with all wheels that the machine's pip needs to build and install the checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    pip, to = (sys.executable, "-m", "pip", "--quiet"), ("--find-links", str(wheels))
    # What builds the project is the same for every Python, but not all of it is there as wheels.
    call(
        *pip,
        "wheel",
        *to,
        "--wheel-dir",
        str(wheels),
        "wheel",
        *project["build-system"]["requires"],
        deadline=BOOTSTRAP_DEADLINE,
    )
    call(
        *pip, "download", *to, "--dest", str(wheels), "--only-binary=:all:", f"--python-version={PYTHON}",
        *project["project"]["dependencies"], deadline=BOOTSTRAP_DEADLINE,
    )  # fmt: skip
    return wheels


def call(*command: str, deadline: float) -> None:
    """Run `command` outside of the machine, which must succeed. Raises NoMachineError, with what it printed."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=deadline,
    )
    if done.returncode != 0:
        raise NoMachineError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}")


def own_cgroups(name: str) -> list[Path]:
    """Make and return a cgroup of our own in each hierarchy that systemd uses: two machines must not share one."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, ours = line.split(":", 2)
        for mount in (
            ("", "unified")
            if not controllers
            else ("systemd",)
            if controllers == "name=systemd"
            else ()
        ):
            parent = Path("/sys/fs/cgroup", mount, ours.lstrip("/"))
            if (parent / "cgroup.procs").exists():
                (parent / name).mkdir()
                found.append(parent / name)
    return found


def remove_cgroup(cgroup: Path) -> bool:
    """Remove `cgroup` and those below it; tell whether it has gone."""
    for folder, _, _ in os.walk(cgroup, topdown=False):
        with suppress(OSError):
            os.rmdir(folder)
    return not cgroup.exists()


class Machine:
    """A booted machine. Its files are below `files`; its processes have their own pids."""

    def __init__(self, root: Path, wheels: Path, log: Path) -> None:
        name = f"tailsrv-test-{os.getpid()}-{log.stem}"
        self._log = log
        self._cgroups = own_cgroups(name)
        command = [*UNSHARE, "sh", "-ec", BOOT, "sh", *map(str, self._cgroups)]
        environment = {
            "PATH": os.environ["PATH"],
            "MACHINE": name,
            "ROOT": str(root),
            "WHEELS": str(wheels),
        }
        with log.open("wb") as console:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=environment
            )
        try:
            self.leader = eventually(self._find_leader, BOOT_DEADLINE)
            self.files = Path(f"/proc/{self.leader}/root")
            eventually(self._is_up, BOOT_DEADLINE)
        except BaseException:
            self.end()
            raise

    def _find_leader(self) -> int:
        assert self._process.poll() is None, self._log.read_text(errors="replace")
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.Error, OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                if (
                    status.partition("NSpid:")[2].splitlines()[0].split()[2:] == ["1"]
                    and process.name() == "systemd"
                ):
                    return int(process.pid)
        return 0

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self._log.read_text(errors="replace")
        return self.ask("systemctl", "is-system-running", "--wait").stdout.strip() in (
            "running",
            "degraded",
        )

    def end(self) -> None:
        """End it at once, by its pid, and leave nothing behind."""
        with suppress(psutil.NoSuchProcess):
            for nspawn in psutil.Process(self._process.pid).children():
                # and with it all in its namespace; then unshare ends, having waited for it
                nspawn.kill()
        try:
            self._process.wait(DEADLINE)
        finally:
            self._process.kill()
        eventually(lambda: all(remove_cgroup(cgroup) for cgroup in self._cgroups))

    def ask(
        self, *command: str, deadline: float = COMMAND_DEADLINE
    ) -> "subprocess.CompletedProcess[str]":
        """Run `command` in it as root would after logging in; return how it ended and what it printed."""
        enter = ("nsenter", f"--target={self.leader}", "--all", *LOGIN)
        return subprocess.run(
            [*enter, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=deadline,
        )

    def run(self, *command: str, deadline: float = COMMAND_DEADLINE) -> str:
        """Run `command` in it, which must succeed; return what it prints."""
        done = self.ask(*command, deadline=deadline)
        assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}"
        return done.stdout.strip()

    def write(self, path: str, text: str, mode: int = 0o644, group: str = "root") -> None:
        """Make the file `path`, and its folder if need be."""
        self.run("install", "-d", os.path.dirname(path))
        (self.files / path.lstrip("/")).write_text(text)
        self.run("chgrp", group, path)
        self.run("chmod", f"{mode:o}", path)

    def copy_checkout(self, path: str) -> None:
        """Copy the checkout to `path`, as a user would get it."""
        shutil.copytree(
            ROOT, self.files / path.lstrip("/"), ignore=shutil.ignore_patterns(*NOT_COPIED)
        )

    def use_wheels(self) -> None:
        """Have its pip take from the wheels what it would ask the network for, which is not there."""
        # an installer would
        self.write("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
        self.write(
            "/etc/pip.conf",
            "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n",
        )

    def in_network(self, action: Callable[[], Seen]) -> Seen:
        """Return what `action` returns in its network."""

        def enter() -> Seen:
            with open(f"/proc/{self.leader}/ns/net") as namespace:
                assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) == 0, (
                    os.strerror(ctypes.get_errno())
                )
            # a namespace is a thread's own, and this thread ends here
            return action()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(enter).result()

    def connect(
        self, port: int, header: bytes = b"", host: str = "127.0.0.1", receive_buffer: int = 0
    ) -> socket.socket:
        """Return a connection to a port of the machine's."""
        return self.in_network(lambda: connect(port, header, host, receive_buffer))


class Service:
    """An instance of the unit tailsrv@.service in a machine, for the file `path`; it is started by nobody but the test."""

    def __init__(self, machine: Machine, path: str) -> None:
        self.machine, self.path = machine, path
        self.instance = machine.run("systemd-escape", "-p", "--", path)
        self.unit, self.socket_unit = (
            f"tailsrv@{self.instance}.service",
            f"tailsrv@{self.instance}.socket",
        )
        self.clients: list[socket.socket] = []

    def configure(self, **settings: str) -> None:
        """Write its file of settings."""
        # EnvironmentFile= is a pattern
        name = self.instance.replace("\\", "")
        self.machine.write(
            f"/etc/tailsrv/{name}.env",
            "".join(f"{name}={value}\n" for name, value in settings.items()),
        )

    def override(self, *lines: str, unit: str = "") -> None:
        """Write a drop-in of the service or of another `unit`."""
        self.machine.write(
            f"/etc/systemd/system/{unit or self.unit}.d/test.conf", "\n".join(lines) + "\n"
        )
        self.machine.run("systemctl", "daemon-reload")

    def create(self, data: bytes = b"", mode: int = 0o640, group: str = "adm") -> None:
        """Make the file."""
        self.machine.write(self.path, "", mode, group)
        self.append(data)

    def append(self, data: bytes) -> None:
        with (self.machine.files / self.path.lstrip("/")).open("ab", buffering=0) as file:
            assert file.write(data) == len(data)

    def start(self, succeeds: bool = True) -> None:
        """Start it and wait until it says that it is ready, or for the first failure."""
        done = self.machine.ask("systemctl", "start", self.unit)
        assert (done.returncode == 0) == succeeds, "\n".join([done.stdout, *self.log])

    def listen(self, *directives: str) -> None:
        """Start its socket, with these instead of the port that the unit has."""
        self.override("[Socket]", "ListenStream=", *directives, unit=self.socket_unit)
        self.machine.run("systemctl", "start", self.socket_unit)

    def fails(self) -> str:
        """Start it, wait until it has failed for good, and return its exit status."""
        self.machine.ask("systemctl", "start", self.unit)
        self.reaches("failed")
        return self.show("ExecMainStatus")

    def show(self, name: str) -> str:
        """Return a property of the service, as systemd knows it."""
        return self.machine.run("systemctl", "show", "--value", "--property", name, self.unit)

    def reaches(self, state: str) -> None:
        """Wait until the service is in `state`, such as `active` or `failed`."""
        eventually(lambda: self.show("ActiveState") == state, COMMAND_DEADLINE)

    @property
    def pid(self) -> int:
        """The supervisor's pid in the machine, 0 if there is none."""
        return int(self.show("MainPID"))

    def workers(self) -> list[int]:
        """Return the workers' pids in the machine."""
        return [
            int(pid)
            for pid in self.machine.ask(
                "pgrep", "-P", str(self.pid), "-f", "^tailsrv: worker "
            ).stdout.split()
        ]

    def kill(self, pid: int, number: signal.Signals) -> None:
        self.machine.run("kill", f"-{number.name.removeprefix('SIG')}", str(pid))

    @property
    def log(self) -> list[str]:
        """The lines that the program itself has logged."""
        # what has been written by now is to be found
        self.machine.run("journalctl", "--sync")
        return self.machine.run(
            "journalctl", "--quiet", "--output=cat", "--unit", self.unit, "--identifier=tailsrv"
        ).splitlines()

    def lines(self, *parts: str) -> list[str]:
        """Return the log's lines that hold all of `parts`."""
        return [line for line in self.log if all(part in line for part in parts)]

    def logged(self, *parts: str, count: int = 1) -> str:
        """Wait for `count` log lines that hold all of `parts`, and return the last."""

        def look() -> list[str]:
            found = self.lines(*parts)
            return found if len(found) >= count else []

        return eventually(look, COMMAND_DEADLINE)[-1]

    def status(self, port: int) -> Any:
        """Return what its status socket says to root."""
        return json.loads(self.machine.in_network(lambda: ask(f"*:{port}"))[0])

    def connect(self, port: int, header: bytes = b"", receive_buffer: int = 0) -> socket.socket:
        """Return a connection that is closed in the end, `header` sent."""
        sock = self.machine.connect(port, header, receive_buffer=receive_buffer)
        self.clients.append(sock)
        return sock

    def finish(self) -> None:
        """Close the clients and stop what runs of it."""
        for sock in self.clients:
            sock.close()
        self.machine.ask("systemctl", "stop", self.socket_unit, self.unit)
        self.machine.ask("systemctl", "reset-failed", self.socket_unit, self.unit)
