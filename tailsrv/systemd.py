"""Speaks sd_notify(3): tells the service manager what the supervisor is doing."""

import os
import socket
import time


def notify(*assignments: str) -> None:
    """Send `NAME=value` assignments to the service manager, if there is one; never waits, never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), "\0" + address[1:] if address[0] == "@" else address)
    except OSError:
        pass  # sd_notify(3): best effort


def notify_reloading() -> None:
    """Say that the service is being reloaded; `READY=1` ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
