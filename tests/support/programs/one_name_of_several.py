"""Follows the servers in argv until it has waited five times before another round.

Then it prints the number of threads, and the reports.
"""

import sys
import threading

from tailsrv.client import Backoff, follow
from tailsrv.client.connector import wait

reports: list[str] = []
pauses: list[float | None] = []


class EnoughError(Exception):
    """The fifth wait between rounds has been reached."""


def count(fd: int, events: int, seconds: float | None) -> bool:
    """Wait as usual, and count the waits without a descriptor."""
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
