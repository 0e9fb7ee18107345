"""A small Debian with a real systemd, booted by systemd-nspawn; all its processes end with it."""

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
PACKAGES = (
    "systemd,systemd-sysv,python3-venv,procps,logrotate,netcat-openbsd,socat,nginx-light,rsyslog"
)
# The version of Python in this suite.
PYTHON = "3.11"
TOOLS = ("debootstrap", "systemd-nspawn", "nsenter", "unshare", "setpriv")

BOOTSTRAP_DEADLINE = 600.0
BOOT_DEADLINE = 60.0
COMMAND_DEADLINE = 60.0

CAP_SYS_ADMIN = 1 << 21

# A pid namespace around the machine's own. When its first process ends, the kernel ends every
# process in it; ending systemd-nspawn alone does not do that. And unshare ends when the test
# process ends, however that happens.
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

# systemd-nspawn requires its own /run where systemd is not init. The machine is not registered, its
# writes go to memory, and it has its own network, so that every port is free.
BOOT = """
for cgroup; do echo 0 >"$cgroup/cgroup.procs"; done
mount -t tmpfs tmpfs /run
exec systemd-nspawn --quiet --register=no --keep-unit --boot --private-network --volatile=overlay \
    --link-journal=no --console=pipe --machine="$MACHINE" --bind-ro="$WHEELS:/wheels" \
        --directory="$ROOT"
"""

LOGIN = ("env", "-i", "HOME=/root", "LANG=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")

# Files that a checkout of a user does not contain.
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
    """Tell whether failing to make a machine is an error: in CI, or if a folder for it was set."""
    return bool(os.environ.get("CI") or os.environ.get("TAILSRV_TEST_MACHINE"))


def reason_to_skip() -> str:
    """Return why no machine can be booted here; the empty string if one can."""
    if os.geteuid() != 0:
        return "not root"
    status = Path("/proc/self/status").read_text()
    if not int(status.partition("CapEff:")[2].split()[0], 16) & CAP_SYS_ADMIN:
        return "no CAP_SYS_ADMIN"
    return "" if is_required() else missing(*TOOLS)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other test sessions out of the folder during the block."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_root(folder: Path) -> Path:
    """Return the machine's root file system in `folder`; make it if it does not exist."""
    root, unfinished = folder / "root", folder / "unfinished"
    if not root.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        options = ("--variant=minbase", f"--include={PACKAGES}")
        # In a mount namespace of its own, because debootstrap mounts file systems in the folder.
        call(*UNSHARE, "debootstrap", *options, SUITE, str(unfinished), deadline=BOOTSTRAP_DEADLINE)
        unfinished.rename(root)
    return root


def make_wheels(folder: Path) -> Path:
    """Return a folder with all wheels that pip needs in the machine to install a checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    pip, to = (sys.executable, "-m", "pip", "--quiet"), ("--find-links", str(wheels))
    # The build requirements are the same for every Python, but PyPI has not all of them as wheels.
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
        *pip,
        "download",
        *to,
        "--dest",
        str(wheels),
        "--only-binary=:all:",
        f"--python-version={PYTHON}",
        *project["project"]["dependencies"],
        deadline=BOOTSTRAP_DEADLINE,
    )
    return wheels


def call(*command: str, deadline: float) -> None:
    """Run `command` outside of the machine. Raises NoMachineError with its output if it fails."""
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
    """Make a cgroup in each hierarchy that systemd uses, because machines must not share one."""
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
    """Remove `cgroup` and the cgroups below it; tell whether it is gone."""
    for folder, _, _ in os.walk(cgroup, topdown=False):
        with suppress(OSError):
            os.rmdir(folder)
    return not cgroup.exists()


class Machine:
    """A booted machine. `files` is its root folder; its processes have their own pids."""

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
        """End the machine at once, by its pid, and clean up."""
        with suppress(psutil.NoSuchProcess):
            for nspawn in psutil.Process(self._process.pid).children():
                # The kernel then ends every process in its namespace. unshare waits for that.
                nspawn.kill()
        try:
            self._process.wait(DEADLINE)
        finally:
            self._process.kill()
        eventually(lambda: all(remove_cgroup(cgroup) for cgroup in self._cgroups))

    def ask(
        self, *command: str, deadline: float = COMMAND_DEADLINE
    ) -> "subprocess.CompletedProcess[str]":
        """Run `command` as root after a login; return its exit status and output."""
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
        """Run `command` in the machine, where it must succeed, and return its output."""
        done = self.ask(*command, deadline=deadline)
        assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}"
        return done.stdout.strip()

    def write(self, path: str, text: str, mode: int = 0o644, group: str = "root") -> None:
        """Write the file `path`; make its folder if necessary."""
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
        """Configure the machine's pip to use the wheels, because the machine has no network."""
        # An installer would write this file.
        self.write("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
        self.write(
            "/etc/pip.conf",
            "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n",
        )

    def in_network(self, action: Callable[[], Seen]) -> Seen:
        """Return the result of `action`, called in the machine's network namespace."""

        def enter() -> Seen:
            with open(f"/proc/{self.leader}/ns/net") as namespace:
                assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) == 0, (
                    os.strerror(ctypes.get_errno())
                )
            # A network namespace belongs to one thread, and this thread ends here.
            return action()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(enter).result()

    def connect(
        self, port: int, header: bytes = b"", host: str = "127.0.0.1", receive_buffer: int = 0
    ) -> socket.socket:
        """Return a connection to a port of the machine."""
        return self.in_network(lambda: connect(port, header, host, receive_buffer))


class Service:
    """An instance of tailsrv@.service in a machine for the file `path`; only the test starts it."""

    def __init__(self, machine: Machine, path: str) -> None:
        self.machine, self.path = machine, path
        self.instance = machine.run("systemd-escape", "-p", "--", path)
        self.unit, self.socket_unit = (
            f"tailsrv@{self.instance}.service",
            f"tailsrv@{self.instance}.socket",
        )
        self.clients: list[socket.socket] = []

    def configure(self, **settings: str) -> None:
        """Write the environment file of the instance."""
        # EnvironmentFile= is a glob pattern, so the name has no backslashes.
        name = self.instance.replace("\\", "")
        self.machine.write(
            f"/etc/tailsrv/{name}.env",
            "".join(f"{name}={value}\n" for name, value in settings.items()),
        )

    def override(self, *lines: str, unit: str = "") -> None:
        """Write a drop-in for the service, or for another `unit`."""
        self.machine.write(
            f"/etc/systemd/system/{unit or self.unit}.d/test.conf", "\n".join(lines) + "\n"
        )
        self.machine.run("systemctl", "daemon-reload")

    def create(self, data: bytes = b"", mode: int = 0o640, group: str = "adm") -> None:
        """Create the file."""
        self.machine.write(self.path, "", mode, group)
        self.append(data)

    def append(self, data: bytes) -> None:
        with (self.machine.files / self.path.lstrip("/")).open("ab", buffering=0) as file:
            assert file.write(data) == len(data)

    def start(self, succeeds: bool = True) -> None:
        """Start the service and wait until it is ready, or until its first failure."""
        done = self.machine.ask("systemctl", "start", self.unit)
        assert (done.returncode == 0) == succeeds, "\n".join([done.stdout, *self.log])

    def listen(self, *directives: str) -> None:
        """Start its socket with `directives` instead of the port in the unit."""
        self.override("[Socket]", "ListenStream=", *directives, unit=self.socket_unit)
        self.machine.run("systemctl", "start", self.socket_unit)

    def fails(self) -> str:
        """Start the service, wait until it has failed for good, and return its exit status."""
        self.machine.ask("systemctl", "start", self.unit)
        self.reaches("failed")
        return self.show("ExecMainStatus")

    def show(self, name: str) -> str:
        """Return a property of the service from `systemctl show`."""
        return self.machine.run("systemctl", "show", "--value", "--property", name, self.unit)

    def reaches(self, state: str) -> None:
        """Wait until the service is in `state`, such as `active` or `failed`."""
        eventually(lambda: self.show("ActiveState") == state, COMMAND_DEADLINE)

    @property
    def pid(self) -> int:
        """The pid of the supervisor in the machine, 0 if there is none."""
        return int(self.show("MainPID"))

    def workers(self) -> list[int]:
        """Return the pids of the workers in the machine."""
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
        # After this, the journal contains everything that has been logged.
        self.machine.run("journalctl", "--sync")
        return self.machine.run(
            "journalctl", "--quiet", "--output=cat", "--unit", self.unit, "--identifier=tailsrv"
        ).splitlines()

    def lines(self, *parts: str) -> list[str]:
        """Return the lines of the log that contain all of `parts`."""
        return [line for line in self.log if all(part in line for part in parts)]

    def logged(self, *parts: str, count: int = 1) -> str:
        """Wait for `count` log lines that contain all of `parts`, and return the last one."""

        def look() -> list[str]:
            found = self.lines(*parts)
            return found if len(found) >= count else []

        return eventually(look, COMMAND_DEADLINE)[-1]

    def status(self, port: int) -> Any:
        """Return the status that the control socket sends to root."""
        return json.loads(self.machine.in_network(lambda: ask(f"*:{port}"))[0])

    def connect(self, port: int, header: bytes = b"", receive_buffer: int = 0) -> socket.socket:
        """Return a connection on which `header` has been sent; `finish` closes it."""
        sock = self.machine.connect(port, header, receive_buffer=receive_buffer)
        self.clients.append(sock)
        return sock

    def finish(self) -> None:
        """Close the clients, and stop the units of the service that run, and orphaned workers."""
        for sock in self.clients:
            sock.close()
        # A unit that systemd has unloaded has no processes.
        self.machine.ask("systemctl", "stop", self.socket_unit)
        self.machine.ask("systemctl", "kill", "--signal=KILL", self.unit)
        self.machine.ask("systemctl", "stop", self.unit)
        self.machine.ask("systemctl", "reset-failed", self.socket_unit, self.unit)
