"""Follows the servers in argv until it has waited five times before another round.

Prints how many threads there are then, and the reports.
"""

import sys
import threading

from tailsrv.client import Backoff, follow
from tailsrv.client.connector import wait

reports: list[str] = []
pauses: list[float | None] = []


class EnoughError(Exception):
    """There have been enough rounds."""


def count(fd: int, events: int, seconds: float | None) -> bool:
    """Wait as ever, and count the waits for time alone."""
    if fd < 0:
        pauses.append(seconds)
        if len(pauses) == 5:
            raise EnoughError
    return wait(fd, events, seconds)


with follow(
    sys.argv[1:],
    backoff=Backoff(0.01, 0.01),
    connect_timeout=0.1,
    report=reports.append,
    wait=count,
) as stream:
    try:
        next(stream)
    except EnoughError:
        print(threading.active_count(), *reports, sep="\n")
