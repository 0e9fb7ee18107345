"""Pings the workers for systemd's watchdog, and kills a worker that does not answer.

The service manager is notified (WATCHDOG=1) only if every worker has answered. If the supervisor
itself hangs, or a killed worker does not exit, the notifications stop and systemd ends the service.
"""

from tailsrv.linux import systemd
from tailsrv.linux.event_loop import EventLoop
from tailsrv.log import fields, logger
from tailsrv.supervisor.worker_pool import WorkerPool

# Shortest time between pings, in seconds. A healthy worker may need some milliseconds to answer.
MIN_PING_INTERVAL = 0.1
# Pings in one interval of the service manager. If a worker hangs, one ping finds that out, and its
# replacement answers a later one in time for the notification.
PINGS_PER_INTERVAL = 3


class Watchdog:
    """Pings every worker `PINGS_PER_INTERVAL` times in `interval` seconds.

    It is created only if the service manager has a watchdog for the service: otherwise, the pings
    would wake up an idle server without need.
    """

    def __init__(self, loop: EventLoop, pool: WorkerPool, interval: float) -> None:
        self._loop, self._pool = loop, pool
        self._pause = max(interval / PINGS_PER_INTERVAL, MIN_PING_INTERVAL)

    def ping(self) -> None:
        """Kill the workers that have not answered the last ping, then ping all workers again."""
        now = self._loop.now
        hung = False
        for worker in self._pool.workers():
            if worker.ping_sent is None or (silent := now - worker.ping_sent) < self._pause:
                continue
            hung = True
            # A worker that still exists although it was killed is in an uninterruptible sleep, for
            # example waiting for a disk.
            if not worker.dead:
                logger.error(
                    "worker does not answer, killing it: %s",
                    fields(slot=worker.slot, pid=worker.pid, seconds=f"{silent:.1f}"),
                )
                worker.kill()
        if not hung:
            systemd.notify("WATCHDOG=1")
        self._pool.ping_workers()
        self._loop.timers.set(self.ping, now + self._pause)
