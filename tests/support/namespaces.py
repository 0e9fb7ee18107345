"""Hosts on one machine: network namespaces at a switch, with cables that can fail, delay and lose.

The namespaces have no names. Each exists while its descriptor is open and a process runs in it, so
that the kernel removes all of them however the tests end.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType

import psutil  # type: ignore[import-untyped]

from support.checkout import PROGRAMS
from support.tools import missing
from support.waiting import DEADLINE, Seen

TOOLS = ("ip", "nsenter")

WIRE = PROGRAMS / "lossy_link.py"

CLONE_NEWNET = 0x40000000


def reason_to_skip(*tools: str) -> str:
    """Return why no network can be made here; the empty string if one can."""
    if reason := missing(*TOOLS, *tools):
        return reason
    try:
        os.close(new_namespace())
    except PermissionError:
        return "not root, or without CAP_SYS_ADMIN"
    return ""


def in_thread(action: Callable[[], Seen]) -> Seen:
    """Return the result of `action` in a new thread: a network namespace belongs to a thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result()


def enter(namespace: int) -> None:
    """Move this thread into the network namespace whose descriptor is `namespace`."""
    checked(ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET))


def new_namespace() -> int:
    """Return a descriptor of a new network namespace."""

    def make() -> int:
        checked(ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return in_thread(make)


def checked(result: int) -> None:
    """Raise OSError if a C function that returned `result` has failed."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Namespace:
    """A network namespace, in which programs can be run."""

    def __init__(self) -> None:
        self._fd = new_namespace()
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        # nsenter execs the program, so the pid stays the same.
        self.wrapper = ("nsenter", f"--net={self.path}")
        self.ip("link set lo up")

    def ip(self, *commands: str) -> None:
        """Run commands of ip(8)."""
        done = self.run("ip", "-batch", "-", given="\n".join(commands))
        assert done.returncode == 0, done.stderr

    def run(self, *command: str, given: str = "") -> "subprocess.CompletedProcess[str]":
        """Run `command` in the namespace, and return its result."""
        return subprocess.run(
            [*self.wrapper, *command], input=given, capture_output=True, text=True, timeout=DEADLINE
        )

    def close(self) -> None:
        """End all processes in the namespace and close it, so that the kernel removes it."""
        for pid in psutil.pids():
            try:
                if os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), os.fstat(self._fd)):
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                # The process has ended in the meantime.
                pass
        os.close(self._fd)


class Host(Namespace):
    """A namespace with an address, connected to the switch by a cable."""

    def __init__(self, network: "Network", name: str, address: str) -> None:
        super().__init__()
        self.name, self.address = name, address
        self._switch = network.switch

    def cut(self) -> None:
        """Drop all packets from and to this host, without any error message to either side."""
        self._switch.ip(f"link set dev {self.name} nomaster")

    def join(self) -> None:
        """Undo `cut`."""
        self._switch.ip(f"link set dev {self.name} master switch")


class Network:
    """A switch and its hosts, which exist until it is closed."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> "Network":
        self.switch = Namespace()
        self._stack.callback(self.switch.close)
        self.switch.ip("link add switch type bridge", "link set switch up")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def host(self, name: str, address: str, loss: float = 0, delay: float = 0) -> Host:
        """Make a host.

        Its cable loses the share `loss` of the packets, and delays them by `delay` seconds.
        """
        host = Host(self, name, address)
        self._stack.callback(host.close)
        plug = name
        if loss or delay:
            plug = f"{name}.far"
            self.switch.ip(
                f"link add name {name} type veth peer name {name}.near",
                f"link set dev {name}.near up",
                f"link set dev {name} up",
            )
        self.switch.ip(
            f"link add name {plug} type veth peer name eth0 netns {host.path}",
            f"link set dev {plug} up",
            f"link set dev {name} up",
        )
        host.ip(f"addr add {address}/24 dev eth0", "link set eth0 up")
        if loss or delay:
            self._run_wire(f"{name}.near", f"{name}.far", str(loss), str(delay))
        host.join()
        return host

    def _run_wire(self, *arguments: str) -> None:
        process = subprocess.Popen(
            [*self.switch.wrapper, sys.executable, str(WIRE), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        # The program ends when its standard input is closed: here, or when the test process ends.
        self._stack.enter_context(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
