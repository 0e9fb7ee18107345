"""Speaks with the service manager: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)."""

import os
import socket
import time
from contextlib import suppress

FIRST_SOCKET = 3  # SD_LISTEN_FDS_START
MAX_SOCKETS = 1024  # as many as there may be workers; more is no number of sockets that somebody passes


def is_managed() -> bool:
    """Tell whether a service manager wants to know how we are."""
    return os.environ.get("NOTIFY_SOCKET", "")[:1] in ("/", "@")


def is_service() -> bool:
    """Tell whether systemd has started this very process: systemd.exec(5), $SYSTEMD_EXEC_PID."""
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def notify(*assignments: str) -> None:
    """Send `NAME=value` assignments to the service manager, if there is one; never waits, never fails."""
    if not is_managed():
        return
    address = os.environ["NOTIFY_SOCKET"]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), "\0" + address[1:] if address[0] == "@" else address)
    except OSError:
        pass  # sd_notify(3): best effort


def notify_reloading() -> None:
    """Say that the service is being reloaded; `READY=1` ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_seconds() -> float | None:
    """Return how often the service manager wants to hear `WATCHDOG=1`, None if it does not."""
    microseconds, pid = _number("WATCHDOG_USEC"), os.environ.get("WATCHDOG_PID") or str(os.getpid())
    return microseconds / 1e6 if microseconds and pid == str(os.getpid()) else None


def passed_sockets() -> list[int]:
    """Return the descriptors of the sockets that the service manager has passed to this very process."""
    count = _number("LISTEN_FDS")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count > MAX_SOCKETS:
        return []
    return list(range(FIRST_SOCKET, FIRST_SOCKET + count))


def take_sockets() -> list[int]:
    """Return what passed_sockets() does, once: from now on they are nobody else's, no child's either."""
    sockets = passed_sockets()
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    for fd in sockets:
        with suppress(OSError):  # one that is not there is found out when it is used
            os.set_inheritable(fd, False)
    return sockets


def _number(name: str) -> int:
    """Return the number in an environment variable, 0 where there is none, or none that makes sense."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
