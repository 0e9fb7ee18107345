"""Rolls the log: seals the active segment, and continues with the next file of its name.

All workers must seal a segment at the same size, or clients would get different bytes. A roll has
three steps:

1. Freeze: each worker stops looking at the size of the active segment, and acknowledges.
2. When all have acknowledged, no client has been sent a byte beyond the size that the supervisor
   reads now. This is the sealed size.
3. Roll: each worker gets that size and the descriptor of the next file.

A worker may die at any step. Its successor inherits the log as the supervisor knows it, and is
ordered to freeze like the others while the roll is not complete. A worker that does not acknowledge
is killed, so that one that hangs delays a roll for a bounded time only.

Usually the next file is empty at first, and the active segment is complete. Then the workers freeze
early, agree on its size, and each of them rolls by itself when the next file has a byte, so that
clients wait for no other process. If anything changes before, the agreement is withdrawn: all
workers freeze anew. A worker that had rolled until then has recorded an end of the log beyond the
agreed one, even if it has died since. Then the agreed size is the sealed size.
"""

import os
from collections.abc import Sequence
from enum import Enum

from inotify_simple import flags

from tailsrv.config import Timing
from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.files import close_file, has_writers
from tailsrv.linux.inotify import Hints, steps_to
from tailsrv.log import fields, logger
from tailsrv.segments import NO_FILE, Segment
from tailsrv.served_file import ServedFile, modified_at, size_of
from tailsrv.shared_counts import SharedCounts
from tailsrv.supervisor.late_appends import LateAppends
from tailsrv.supervisor.log_store import LogStore
from tailsrv.supervisor.next_files import NextFiles
from tailsrv.supervisor.retirement import Retirement
from tailsrv.supervisor.sealing import QuietTime, quiet_at, seal_time
from tailsrv.supervisor.slot import WorkerProcess
from tailsrv.supervisor.upgrade_state import RollState
from tailsrv.supervisor.worker_pool import WorkerPool
from tailsrv.worker_channel import Agree, Freeze, Notices, Roll, Thaw

# Events after which the next file may have its first byte, or may have lost its name.
_NEXT_EVENTS = flags.MODIFY | flags.MOVE_SELF | flags.ATTRIB
# Events of a folder after which the path may name a file.
_FOLDER_EVENTS = flags.CREATE | flags.MOVED_TO


class Mode(Enum):
    """What the workers have been ordered to do."""

    # Look at the size of the active segment.
    IDLE = 0
    # Freeze, because the log will probably roll soon.
    EARLY = 1
    # Roll by themselves.
    AGREED = 2
    # Freeze anew: the agreement is withdrawn.
    WITHDRAWN = 3
    # Freeze. The log rolls when all have acknowledged.
    ROLLING = 4


class Roller:
    """Finds the next files, decides when to roll, and closes the segments that were deleted.

    Used only with --follow-name.

    Args:
        loop: The supervisor's event loop.
        pool: The workers.
        served_file: The path and the log.
        ends: The shared ends of the log, by slot.
        store: Where the log is saved, None if it is not.
        timing: The server's timing.
        handed_on: The state that an upgrade has passed on, None for a new server.

    """

    def __init__(
        self,
        loop: EventLoop,
        pool: WorkerPool,
        served_file: ServedFile,
        ends: SharedCounts,
        store: LogStore | None,
        timing: Timing,
        handed_on: RollState | None = None,
    ) -> None:
        self._loop, self._pool, self._served_file = loop, pool, served_file
        self.ends, self.store, self._timing = ends, store, timing
        self._late = LateAppends(loop, served_file, timing)
        # When the active segment was opened: the workers pass it on if the supervisor dies.
        self.opened_at = SharedCounts(1)
        self._next = NextFiles(served_file, self._late, self.opened_at)
        # The number of the last roll.
        self._number = 0
        self._mode = Mode.IDLE
        # Whether the log rolls because the file was truncated.
        self._truncated = False
        # The size of the active segment at which a worker may have rolled by itself.
        self._agreed: int | None = None
        self._quiet: QuietTime | None = None
        # When the active segment had been changed last as the workers were frozen early.
        self._changed = 0.0
        self._gone_since = 0.0
        # Whether a worker has reported that the path does not name the active segment.
        self._reported = False
        self._retirement = Retirement(pool, served_file, self._late)
        # Whether no next file has a byte yet.
        self._waiting = False
        # Whether the path names the last one of the next files.
        self._named = False
        # Whether a process has the active segment open for writing, None if that is not known.
        self._writers: bool | None = None
        self._hints: Hints | None = None
        self._watched: set[tuple[str, int]] = set()
        # Whether inotify reports every change that `_watched` asks for.
        self._complete = True
        if handed_on is not None:
            self._number = handed_on.number
            self._next.load(handed_on.next_files, handed_on.opened_at)
            self._late.load(handed_on.late)
            if served_file.log is not None:
                self._loop.timers.set(self.check, loop.now)
            self._agreed, self._truncated = handed_on.agreed, handed_on.truncated
            if (mode := Mode[handed_on.mode]) is not Mode.IDLE:
                # Start again: which workers have acknowledged is not handed on.
                self._begin(Mode.WITHDRAWN if mode is Mode.AGREED else mode)

    def save(self) -> RollState:
        """Return the state for the next version of the program."""
        return RollState(
            self._number,
            self._mode.name,
            self._truncated,
            self._agreed,
            [next_file.file for next_file in self._next],
            self._next.active_opened_at,
            self._late.save(),
        )

    def begin(self, next_files: Sequence[int] = ()) -> None:
        """Begin with the log, whose file is open now, and with files that are known to follow."""
        assert self._served_file.log is not None
        self._next.begin(next_files)
        self._loop.timers.set(self.check, self._loop.now)
        self.save_log()

    def take_over(self) -> None:
        """Begin with the log of a supervisor that has died."""
        if self._served_file.log is not None:
            if self._served_file.has_gone(self._loop.now) is False:
                # That supervisor knew which files were not in the log any more.
                self._next.exclude_older()
            self.save_log()

    def save_log(self) -> None:
        """Save the log, and try again later if that is not possible now."""
        if self.store is not None and self._served_file.log is not None:
            if self._agreed is None:
                self.store.save(self._served_file.log)
            else:
                self.store.save(self._served_file.log, self._agreed, self._next.first)
            if self.store.failed:
                self._loop.timers.set(self.save_log, self._loop.now + self._timing.save_retry)

    def close_in_child(self) -> None:
        """In a forked child, close what only the supervisor uses."""
        if self.store is not None:
            os.close(self.store.lock_file)
        self._next.close()
        self._late.close_in_child()
        if self._hints is not None:
            self._hints.close()

    def stop(self) -> None:
        """Do not roll any more: the server is ending."""
        self._mode = Mode.IDLE
        for action in (
            self.check,
            self.check_deleted,
            self._kill_silent,
            self._poll_deleted,
            self.save_log,
        ):
            self._loop.timers.cancel(action)
        if self._hints is not None:
            self._loop.unregister(self._hints.fileno())
            self._hints.close()
            self._hints = None

    def finish(self) -> None:
        """Save the log when all workers have exited: now the size of the last segment is known."""
        if self._agreed is not None and self._has_gone_on():
            self._served_file.roll(self._agreed, False, self._next.take())
        self._agreed = None
        self.save_log()

    # Before a roll

    def check(self) -> None:
        """Check whether the path names another file, and roll if it is time to."""
        self._loop.timers.cancel(self.check)
        if self.rolling or self._pool.has_predecessors():
            # The end of the roll, or of the takeover, leads to another check.
            return
        now = self._loop.now
        gone = self._served_file.has_gone(now)
        if gone:
            if self._quiet is None:
                self._note_gone()
            self._next.find(now)
            # It may have got its name back between these calls.
            gone = self._served_file.has_gone(now)
        if gone is None:
            # It is not known whether the log will roll: deliver what is appended meanwhile.
            self._thaw()
            self._loop.timers.set(self.check, now + self._timing.open_retry)
            return
        if not gone:
            if self._mode is Mode.AGREED:
                self._thaw()
            else:
                self._forget_next_files()
            return
        self._named = bool(self._next) and self._next.last.identity.is_gone(now) is False
        quiet = self._quiet_at(now)
        if (first_byte := self._next.first_byte(now)) is not None:
            self._await_seal(seal_time(first_byte, quiet, self._timing))
        else:
            self._await_first_byte(quiet)

    def _await_seal(self, when: float) -> None:
        """Roll at the time `when`: the next file has a byte."""
        if when > self._loop.now:
            self._thaw()
            self._waiting = False
            self._await_change(when)
        elif self._mode is Mode.EARLY:
            self._mode = Mode.ROLLING
            self._limit_patience()
            self.advance()
        elif self._mode is Mode.AGREED and self._is_sealed():
            self._finish()
        else:
            self._begin(Mode.ROLLING)

    def _await_first_byte(self, quiet: float) -> None:
        """Wait until the next file exists and has a byte.

        If the active segment is complete before that, the workers freeze early, so that the first
        byte has less to wait for. They thaw if the active segment changes in spite of that.
        """
        now = self._loop.now
        assert self._quiet is not None
        # Although no process has the segment open, one may append to it again.
        changed = self._quiet.since(now)
        quiet = max(quiet, changed + self._timing.settle)
        if quiet > now or not self._next or changed != self._changed:
            self._thaw()
        if quiet <= now and self._next and self._mode is Mode.IDLE:
            self._changed = changed
            self._begin(Mode.EARLY)
        self._waiting = True
        self._await_change(quiet)

    def _await_change(self, when: float) -> None:
        """Check again when a file has changed, and at the time `when` if that is in the future."""
        now = self._loop.now
        if self._update_watches():
            # Something may have changed before there was a watch for it.
            when = now
        elif not self._named or not self._complete:
            # There may be no event when a file can be opened at last.
            retry = now + self._timing.open_retry
            when = min(when, retry) if when > now else retry
        elif when <= now:
            return
        self._loop.timers.set(self.check, when)

    def _note_gone(self) -> None:
        assert self._served_file.file is not None
        self._served_file.gone = True
        self._gone_since = self._loop.now
        self._quiet = QuietTime(self._served_file.file)
        logger.info(
            "file was moved away or replaced, clients continue with the next one: %s",
            fields(path=self._served_file.path),
        )

    def _forget_next_files(self) -> None:
        """Continue with the active segment, which the path names again."""
        if any(size_of(next_file.file) for next_file in self._next):
            logger.warning(
                "file was moved back, no client gets the bytes of the file that had its name: %s",
                fields(path=self._served_file.path),
            )
        self._next.close()
        if self._served_file.gone or self._reported:
            # Workers watch the links and folders of the path that were there when they noticed
            # that the file was gone. Others may lead to it now.
            self._pool.order_all(Thaw())
        self._quiet = None
        self._mode = Mode.IDLE
        self._served_file.gone = self._waiting = self._reported = False
        self._update_watches()

    def _quiet_at(self, now: float) -> float:
        """Return when the active segment counts as complete."""
        assert self._quiet is not None
        assert self._served_file.file is not None
        # A lease does not tell about writers on other machines.
        self._writers = has_writers(self._served_file.file) if self._quiet.local else None
        return quiet_at(self._quiet.since(now), self._gone_since, self._writers, self._timing)

    # The roll

    @property
    def rolling(self) -> bool:
        """Whether a roll is under way, so that clients wait for it."""
        return self._mode in (Mode.WITHDRAWN, Mode.ROLLING)

    @property
    def truncated(self) -> bool:
        """Whether the log rolls because its active segment was truncated."""
        return self._truncated and self.rolling and self._agreed is None

    @property
    def frozen_end(self) -> int | None:
        """The end of the log at which a new worker starts frozen, None if it does not."""
        return max(self.ends) if self.truncated else self.agreed_end

    @property
    def agreed_end(self) -> int | None:
        """The end of the log at which a worker may have rolled by itself, None if none may have."""
        if self._agreed is None or self._served_file.log is None:
            return None
        return self._served_file.log.active.base + self._agreed

    def _has_gone_on(self) -> bool:
        """Return whether a worker has rolled by itself."""
        end = self.agreed_end
        return end is not None and max(self.ends) > end

    def _is_sealed(self) -> bool:
        """Return whether the active segment has the agreed size, or a worker has rolled by itself.

        If it has that size now, workers that roll by themselves later seal it at the same size.
        """
        assert self._served_file.file is not None
        return size_of(self._served_file.file) == self._agreed or self._has_gone_on()

    def _roll_truncated(self, size: int) -> None:
        """Roll because a worker has found the active segment truncated to `size` bytes."""
        if self._mode is not Mode.IDLE and self._truncated:
            # Another worker has reported it before.
            return
        logger.warning(
            "file was truncated: clients that had all of it continue with its new content, "
            "the others are disconnected: %s",
            fields(path=self._served_file.path, size=size, hint="rotate by renaming, if possible"),
        )
        self._truncated = True
        if self._mode in (Mode.IDLE, Mode.AGREED):
            self._begin(Mode.ROLLING)
        else:
            self._mode = Mode.ROLLING
            self._limit_patience()

    def _begin(self, mode: Mode) -> None:
        """Order all workers to freeze. `mode` says what for."""
        self._number += 1
        self._mode = mode
        if self.rolling:
            self._limit_patience()
        self.advance()

    def _limit_patience(self) -> None:
        """Kill the workers that do not acknowledge soon: clients wait for them from now on."""
        self._loop.timers.set(self._kill_silent, self._loop.now + self._timing.freeze_patience)

    def _thaw(self) -> None:
        """Order the workers that have been frozen early to look at the size again."""
        if self._mode is Mode.EARLY:
            self._mode = Mode.IDLE
            self._pool.order_all(Thaw())
        elif self._mode is Mode.AGREED:
            self._begin(Mode.WITHDRAWN)

    def _agree(self) -> None:
        """Allow the workers to roll by themselves, now that all of them are frozen."""
        log = self._served_file.log
        assert log is not None
        # An empty segment is not kept, so the next one would begin at the same offset.
        if not (size := size_of(log.active.file)) or (self.store and self.store.failed):
            return
        self._agreed = size
        if self._has_gone_on():
            # The file is shorter than it was: it has been truncated, which a worker will report.
            self._agreed = None
            return
        # Save before any client gets a byte of the next segment: if all processes are killed now,
        # offsets keep their meaning.
        self.save_log()
        if self.store is not None and self.store.failed:
            self._agreed = None
            return
        self._mode = Mode.AGREED

    def _withdraw(self) -> None:
        """End an agreement, now that all workers are frozen anew."""
        if self._has_gone_on():
            self._finish()
            return
        self._agreed = None
        # The active segment will grow, perhaps beyond the size that has been saved.
        self.save_log()
        self._mode = Mode.IDLE
        self._pool.order_all(Thaw())
        self._loop.timers.cancel(self._kill_silent)
        self._loop.timers.set(self.check, self._loop.now)

    def handle_notices(self, notices: Notices) -> None:
        """Handle what a worker has reported about the log."""
        self._reported = self._reported or notices.gone
        if notices.truncated is not None:
            self._roll_truncated(notices.truncated)
        if notices.needs is not None:
            self._retirement.close_unneeded()

    def advance(self) -> None:
        """Do the next step of the roll that is under way. Call this in every turn."""
        # An orphaned worker may still roll by itself.
        if self._mode is Mode.IDLE or self._pool.has_predecessors():
            return
        workers = self._pool.workers()
        for worker in workers:
            if worker.freeze_ordered != self._number:
                worker.freeze_ordered = self._number
                worker.order(Freeze(self._number))
        if not all(worker.frozen == self._number for worker in workers):
            return
        if self._mode is Mode.ROLLING:
            self._finish()
        elif self._mode is Mode.WITHDRAWN:
            self._withdraw()
        else:
            self._allow(workers)

    def _allow(self, workers: Sequence[WorkerProcess]) -> None:
        """Let the workers, which are frozen early, roll by themselves as soon as that is agreed."""
        if self._mode is Mode.EARLY:
            self._agree()
        if self._mode is Mode.AGREED:
            assert self._agreed is not None
            for worker in workers:
                if worker.allowed != self._number:
                    worker.allowed = self._number
                    worker.order(Agree(self._agreed), [self._next.first])

    def _kill_silent(self) -> None:
        """Kill the workers that have not acknowledged in time. Their successors will."""
        now, patience = self._loop.now, self._timing.freeze_patience
        for worker in self._pool.workers() if not self._pool.has_predecessors() else ():
            if worker.frozen != self._number and now - worker.spawned >= patience:
                logger.error(
                    "worker does not take part in a roll, killing it: %s",
                    fields(slot=worker.slot, pid=worker.pid),
                )
                worker.kill()
        self._loop.timers.set(self._kill_silent, now + patience)

    def _finish(self) -> None:
        """Seal the active segment, now that no worker looks at its size."""
        self._loop.timers.cancel(self._kill_silent)
        log = self._served_file.log
        assert log is not None
        truncated = self._truncated and not self._has_gone_on()
        size, lost = self._sealed_size(log.active, truncated)
        replaced, base = log.active.file, log.active.base
        agreed = not truncated and self._agreed == size
        if truncated:
            file, self._next.active_opened_at = replaced, modified_at(replaced)
        else:
            file = self._next.take()
        sealed = self._served_file.roll(size, lost, file)
        self._mode, self._agreed, self._truncated = Mode.IDLE, None, False
        self._waiting, self._quiet, self._writers = False, None, None
        # Save before any client gets a byte of the next segment, unless that is saved already.
        if not agreed:
            self.save_log()
        self._pool.order_all(Roll(base, size, lost), [file])
        if agreed:
            self.save_log()
        logger.info(
            "rolled: %s", fields(path=self._served_file.path, sealed=size, offset=log.active.base)
        )
        if not lost:
            # An empty segment is not in the log.
            self._late.begin(sealed.file, size, owned=not size)
        elif file != replaced:
            close_file(replaced)
        self._loop.timers.set(self.check_deleted, self._loop.now)
        # There may be further files, or the path may have changed meanwhile.
        self._loop.timers.set(self.check, self._loop.now)

    def _sealed_size(self, active: Segment, truncated: bool) -> tuple[int, bool]:
        """Return the size to seal `active` at, in bytes, and whether its bytes no longer exist."""
        if self._agreed is not None and (self._mode is Mode.AGREED or self._has_gone_on()):
            # In the first case, it has been checked that the segment had that size: if it grows at
            # this moment, another worker may still roll at the agreed size.
            return self._agreed, False
        acted_on = max(0, max(self.ends) - active.base)
        size = size_of(active.file)
        if truncated or (size is not None and size < acted_on):
            return acted_on, True
        return acted_on if size is None else size, False

    # What wakes the roller

    def check_deleted(self) -> None:
        """Find the segments that were deleted."""
        if self._served_file.log is not None:
            self._retirement.check()
            self._update_watches()

    def _poll_deleted(self) -> None:
        self.check_deleted()
        self._loop.timers.set(self._poll_deleted, self._loop.now + self._timing.deletion_poll)

    def _update_watches(self) -> bool:
        """Be woken when a sealed segment is deleted, or when the next file has its first byte.

        Returns whether there are other watches than before.
        """
        log = self._served_file.log
        assert log is not None
        watches = {
            (_path_of(segment.file), int(flags.ATTRIB))
            for segment in log.sealed_segments
            if segment.file != NO_FILE and segment.end > log.start
        }
        if self._waiting:
            watches |= {(_path_of(next_file.file), int(_NEXT_EVENTS)) for next_file in self._next}
        if self._quiet is not None and not self._named:
            steps = steps_to(self._served_file.path)
            watches |= {(os.path.dirname(step), int(_FOLDER_EVENTS)) for step in steps}
        if self._next and not self._waiting:
            # If it loses its name, open the one that follows: its own name may not last long.
            watches.add((_path_of(self._next.last.file), int(flags.MOVE_SELF | flags.ATTRIB)))
        if self._mode in (Mode.EARLY, Mode.AGREED):
            watches.add((_path_of(log.active.file), int(flags.MODIFY)))
        if self._next and not self._waiting and self._writers:
            # The writer may close the active segment before its time is over.
            watches.add((_path_of(log.active.file), int(flags.CLOSE_WRITE)))
        if watches == self._watched:
            return False
        self._watch(watches)
        # A segment may have been deleted before there was a watch for it.
        self._loop.timers.set(self.check_deleted, self._loop.now)
        return True

    def _watch(self, watches: set[tuple[str, int]]) -> None:
        """Wait for the events in `watches` and no others, or poll if inotify cannot be used."""
        self._watched = watches
        self._complete = not watches
        try:
            if self._hints is None and watches:
                self._hints = self._make_hints()
            if self._hints is not None:
                self._complete = self._hints.watch(watches)
        except OSError:
            # There is no inotify instance, or no epoll watch.
            pass
        if self._complete:
            self._loop.timers.cancel(self._poll_deleted)
        else:
            self._loop.timers.set(self._poll_deleted, self._loop.now + self._timing.deletion_poll)

    def _make_hints(self) -> Hints:
        """Return an inotify instance that wakes the loop. Raises OSError."""
        hints = Hints()
        try:
            self._loop.register(hints.fileno(), self._handle_hints)
        except OSError:
            hints.close()
            raise
        return hints

    def _handle_hints(self) -> None:
        assert self._hints is not None
        self._hints.clear()
        # Clients wait for the bytes of the next file, not for the second check.
        self.check()
        self._loop.timers.set(self.check_deleted, self._loop.now)


def _path_of(file: int) -> str:
    return f"/proc/self/fd/{file}"
