"""Talks to the service manager: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)."""

import errno
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

# The descriptor of the first passed socket (SD_LISTEN_FDS_START of sd_listen_fds(3)).
FIRST_SOCKET = 3
# Largest number of passed sockets. If $LISTEN_FDS is larger, it is ignored.
MAX_PASSED_SOCKETS = 1024
# Errors of `notify` after which a retry may succeed.
_RETRYABLE = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE})


def is_managed() -> bool:
    """Return whether a service manager expects notifications from this process.

    vsock addresses (sd_notify(3)) do not count: they are for the first process of a virtual
    machine.
    """
    return os.environ.get("NOTIFY_SOCKET", "")[:1] in ("/", "@")


def is_service() -> bool:
    """Return whether systemd started this process directly ($SYSTEMD_EXEC_PID, systemd.exec(5))."""
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def notify(*assignments: str) -> bool:
    """Send `NAME=value` assignments to the service manager, if there is one.

    This never waits, and never raises. It returns False if the message was not sent but a retry may
    succeed, because the queue of the service manager's socket is full, or memory or descriptors
    have run out.
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
        return error.errno not in _RETRYABLE
    return True


class Lifecycle:
    """Tells the service manager that the service is ready, reloading or stopping.

    Messages that could not be sent are sent later, in the same order. If READY=1 were lost, the
    service manager would end a working service, or show it as reloading forever.

    `plan(action, when)` must make `action()` be called at the time `when`, in seconds of
    time.monotonic().
    """

    # Seconds until a message is sent again.
    RETRY = 0.1

    def __init__(self, plan: Callable[[Callable[[], object], float], None]) -> None:
        self._plan = plan
        self._unsent: list[str] = []

    def reloading(self) -> None:
        """Report that a reload has begun. `ready` ends it. This replaces all unsent messages."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._unsent = [f"RELOADING=1\nMONOTONIC_USEC={microseconds}"]
        self._send()

    def ready(self) -> None:
        """Report that the service is ready, or that its reload is complete."""
        self._unsent = [message for message in self._unsent if message != "READY=1"] + ["READY=1"]
        self._send()

    def stopping(self) -> None:
        """Report that the service is ending. This replaces all unsent messages."""
        self._unsent = ["STOPPING=1"]
        self._send()

    def _send(self) -> None:
        while self._unsent:
            if not notify(self._unsent[0]):
                self._plan(self._send, time.monotonic() + self.RETRY)
                return
            del self._unsent[0]


def watchdog_seconds() -> float | None:
    """Return the service manager's limit on the seconds between two `WATCHDOG=1` messages.

    The result is None if the service manager does not expect such messages.
    """
    microseconds = _read_number("WATCHDOG_USEC")
    pid = os.environ.get("WATCHDOG_PID") or str(os.getpid())
    return microseconds / 1e6 if microseconds and pid == str(os.getpid()) else None


def passed_sockets() -> list[int]:
    """Return the descriptors of the sockets that the service manager has passed to this process."""
    count = _read_number("LISTEN_FDS")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count > MAX_PASSED_SOCKETS:
        return []
    return list(range(FIRST_SOCKET, FIRST_SOCKET + count))


def take_sockets() -> list[int]:
    """Return the same as `passed_sockets`, and make the sockets private to this process.

    Children do not inherit them any more, and further calls return an empty list.
    """
    sockets = passed_sockets()
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    for fd in sockets:
        # If the descriptor is not open, the first use of the socket will show it.
        with suppress(OSError):
            os.set_inheritable(fd, False)
    return sockets


def _read_number(name: str) -> int:
    """Return the number in an environment variable, or 0 if it is not set or not a number."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
