"""Speaks with the service manager: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)."""

import errno
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

# SD_LISTEN_FDS_START
FIRST_SOCKET = 3
# as many as there may be workers; more is no number of sockets that somebody passes
MAX_PASSED_SOCKETS = 1024


def is_managed() -> bool:
    """Tell whether a service manager wants to know how we are.

    Addresses of the vsock family, sd_notify(3), count as none: they are for the first process of
    a virtual machine.
    """
    return os.environ.get("NOTIFY_SOCKET", "")[:1] in ("/", "@")


def is_service() -> bool:
    """Tell whether systemd has started this very process: systemd.exec(5), $SYSTEMD_EXEC_PID."""
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def notify(*assignments: str) -> bool:
    """Send `NAME=value` assignments to the service manager, if there is one. Never wait or fail.

    Returns False if they were not sent and a retry may succeed: the queue of its socket is full,
    or memory or descriptors are short.
    """
    if not is_managed():
        return True
    address = os.environ["NOTIFY_SOCKET"]
    message = "\n".join(assignments).encode(errors="backslashreplace")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(message, "\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        return error.errno not in _TEMPORARY
    return True


_TEMPORARY = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE})


class Lifecycle:
    """Tells the service manager that the service is ready, reloading or stopping.

    A message that could not be sent is retried, and the order is kept: without READY=1 the service
    manager would end a service that serves, or show it as reloading for ever. `plan(action, when)`
    must call `action` at the time `when`, in seconds of time.monotonic().
    """

    # seconds
    RETRY = 0.1

    def __init__(self, plan: Callable[[Callable[[], object], float], None]) -> None:
        self._plan = plan
        self._unsent: list[str] = []

    def reloading(self) -> None:
        """Say that the service is being reloaded, until `ready`. This replaces all unsent messages."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._unsent = [f"RELOADING=1\nMONOTONIC_USEC={microseconds}"]
        self._send()

    def ready(self) -> None:
        """Say that the service is ready, or has been reloaded."""
        self._unsent = [message for message in self._unsent if message != "READY=1"] + ["READY=1"]
        self._send()

    def stopping(self) -> None:
        """Say that the service is ending. This replaces all unsent messages."""
        self._unsent = ["STOPPING=1"]
        self._send()

    def _send(self) -> None:
        while self._unsent:
            if not notify(self._unsent[0]):
                self._plan(self._send, time.monotonic() + self.RETRY)
                return
            del self._unsent[0]


def watchdog_seconds() -> float | None:
    """Return how often the service manager wants to hear `WATCHDOG=1`, None if it does not."""
    microseconds, pid = _number("WATCHDOG_USEC"), os.environ.get("WATCHDOG_PID") or str(os.getpid())
    return microseconds / 1e6 if microseconds and pid == str(os.getpid()) else None


def passed_sockets() -> list[int]:
    """Return the descriptors of the sockets that the service manager has passed to this very process."""
    count = _number("LISTEN_FDS")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count > MAX_PASSED_SOCKETS:
        return []
    return list(range(FIRST_SOCKET, FIRST_SOCKET + count))


def take_sockets() -> list[int]:
    """Return what passed_sockets() does, once: from now on they are nobody else's, no child's either."""
    sockets = passed_sockets()
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    for fd in sockets:
        # one that is not there is found out when it is used
        with suppress(OSError):
            os.set_inheritable(fd, False)
    return sockets


def _number(name: str) -> int:
    """Return the number in an environment variable, 0 where there is none, or none that makes sense."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
