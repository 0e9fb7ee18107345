"""Replaces the workers of the previous version after an upgrade, one after another."""

from tailsrv.supervisor.slot import State
from tailsrv.supervisor.worker_pool import WorkerPool


class RollingRestart:
    """The replacement of all workers that are OUTDATED.

    Args:
        pool: The workers.
        under_way: Whether there is one. Without workers, it lasts until all slots have new ones.

    """

    def __init__(self, pool: WorkerPool, under_way: bool) -> None:
        self._pool, self.under_way = pool, under_way

    def advance(self) -> bool:
        """Replace the next worker, if all replacements so far are ready.

        Call this whenever a worker is ready. Returns whether the restart has ended now.
        """
        if not self.under_way:
            return False
        outdated = [slot for slot in self._pool.slots if slot.state is State.OUTDATED]
        replaced = [slot.worker for slot in self._pool.slots if slot not in outdated]
        if all(
            worker is not None and worker.ready and worker.state is State.SERVING
            for worker in replaced
        ):
            if outdated:
                self._pool.replace(outdated[0])
            else:
                self.under_way = False
        return not self.under_way

    def is_stuck(self) -> bool:
        """Return whether a slot waits for its next worker, because the last one has died."""
        return self.under_way and any(slot.state is State.DUE for slot in self._pool.slots)

    def cancel(self) -> None:
        """Replace no more workers, because the server ends."""
        self.under_way = False
