"""Tells the service manager that all is well while every worker answers, and kills the one that does not."""

import os
import signal

from tailsrv.linux import systemd
from tailsrv.linux.event_loop import EventLoop
from tailsrv.log import fields, logger
from tailsrv.supervisor.worker_pool import WorkerPool

# seconds; a healthy worker may take some milliseconds to answer
MIN_PING_INTERVAL = 0.1
# in the service manager's interval: one to notice that a worker hangs, one for its successor to answer
PINGS_PER_INTERVAL = 3


class Watchdog:
    """Asks every worker on its channel whether it still turns, `BEATS` times in `interval` seconds.

    Nobody is asked where the service manager does not want to know: a quiet server sleeps.
    """

    def __init__(self, loop: EventLoop, pool: WorkerPool, interval: float) -> None:
        self._loop, self._pool = loop, pool
        self._pause = max(interval / PINGS_PER_INTERVAL, MIN_PING_INTERVAL)
        self._killed: set[int] = set()

    def ping(self) -> None:
        """Act on the answers to the last question, and ask again."""
        now = self._loop.now
        hung = [
            slot
            for slot in self._pool.running()
            if slot.ping_sent is not None and now - slot.ping_sent >= self._pause
        ]
        self._killed &= {slot.pid for slot in hung if slot.pid is not None}
        for slot in hung:
            assert slot.pid is not None
            assert slot.ping_sent is not None
            # else it waits for a disk, and cannot even be killed
            if slot.pid not in self._killed:
                logger.error(
                    "worker does not answer, killing it: %s",
                    fields(slot=slot.index, pid=slot.pid, seconds=f"{now - slot.ping_sent:.1f}"),
                )
                # ours until we reap it
                os.kill(slot.pid, signal.SIGKILL)
                self._killed.add(slot.pid)
        if not hung:
            systemd.notify("WATCHDOG=1")
        self._pool.ping_workers()
        self._loop.timers.set(self.ping, now + self._pause)
