"""Closes the segments whose files were deleted, once no client reads them any more.

Otherwise the server would hold the disk space of deleted files. The supervisor orders the workers
to begin no stream in such a segment. Each worker closes it when none of its clients reads it, and
reports that. When all of them have reported, the supervisor closes it too.
"""

import logging

from tailsrv.linux.files import close_file, is_deleted
from tailsrv.log import RateLimited, fields, logger
from tailsrv.segments import NO_FILE
from tailsrv.served_file import ServedFile
from tailsrv.supervisor.late_appends import LateAppends
from tailsrv.supervisor.segment_finder import MAX_SEGMENTS
from tailsrv.supervisor.worker_pool import WorkerPool
from tailsrv.worker_channel import Retire


class Retirement:
    """The segments that were deleted.

    Args:
        pool: The workers.
        served_file: The log.
        late: Told of each segment that is closed.

    """

    def __init__(self, pool: WorkerPool, served_file: ServedFile, late: LateAppends) -> None:
        self._pool, self._served_file, self._late = pool, served_file, late
        self._too_many = RateLimited(logging.WARNING, burst=1)

    def check(self) -> None:
        """Find the segments that were deleted, and order the workers to close them.

        No stream begins before the end of the last one of them, so that every stream is complete.
        """
        log = self._served_file.log
        if log is None:
            return
        start = max(
            (each.end for each in log.sealed_segments if _is_deleted(each.file)), default=log.start
        )
        if len(log) > MAX_SEGMENTS:
            oldest_kept = list(log)[-MAX_SEGMENTS]
            start = max(start, oldest_kept.base)
            self._too_many(
                "too many segments are open: closing the oldest ones once no client reads them",
                segments=len(log),
                limit=MAX_SEGMENTS,
                hint="keep fewer rotated files",
            )
        if start > log.start:
            log.retire(start)
            self._pool.order_all(Retire(start))
            logger.info("log begins later, segments were deleted: %s", fields(start=start))
        self.close_unneeded()

    def close_unneeded(self) -> None:
        """Close the deleted segments that no worker needs."""
        log = self._served_file.log
        assert log is not None
        # A slot without a worker may have clients that read any segment.
        needed = min(
            (
                slot.worker.needs if slot.worker is not None else 0
                for slot in self._pool.slots
                if slot.worker is not None or slot.client_table.clients
            ),
            default=log.start,
        )
        for segment in log.drop_before(needed):
            if segment.file != NO_FILE:
                self._late.end(segment.file)
                close_file(segment.file)


def _is_deleted(file: int) -> bool:
    """Return whether a sealed segment cannot be read again once it is closed."""
    return file == NO_FILE or is_deleted(file)
