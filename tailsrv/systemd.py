"""Speaks with the service manager: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)."""

import os
import socket
import time
from contextlib import suppress

FIRST_SOCKET = 3  # SD_LISTEN_FDS_START


def is_managed() -> bool:
    """Tell whether a service manager wants to know how we are."""
    return os.environ.get("NOTIFY_SOCKET", "")[:1] in ("/", "@")


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
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID") or str(os.getpid())
    return int(microseconds) / 1e6 if _is_number(microseconds) and int(microseconds) and pid == str(os.getpid()) else None


def passed_sockets() -> list[int]:
    """Return the descriptors of the sockets that the service manager has passed to this very process."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not _is_number(count):
        return []
    return list(range(FIRST_SOCKET, FIRST_SOCKET + int(count)))


def take_sockets() -> list[int]:
    """Return what passed_sockets() does, once: from now on they are nobody else's, no child's either."""
    sockets = passed_sockets()
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    for fd in sockets:
        with suppress(OSError):  # one that is not there is found out when it is used
            os.set_inheritable(fd, False)
    return sockets


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
