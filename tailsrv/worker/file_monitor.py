"""Notices when the active segment grows, shrinks, or is no longer the file that its path names.

inotify events only say that something may have changed. The worker then reads the file's size or
compares the file with its path. Where inotify cannot be used, the worker polls the file.
"""

from tailsrv.config import Timing
from tailsrv.file_identity import FileIdentity
from tailsrv.linux.event_loop import MEMORY_RETRY, EventLoop
from tailsrv.linux.files import close_file
from tailsrv.linux.inotify import UnwatchedFile, Watch
from tailsrv.shared_counts import SharedCounts
from tailsrv.worker.reporter import Reporter
from tailsrv.worker.streams import Streams


class FileMonitor:
    """Passes the log's end to the streams, and reports to the supervisor when the file is gone.

    Args:
        watch: The inotify watch on the file of the active segment and on its path.
        streams: The worker's streams.
        reporter: The worker's reporter.
        loop: The worker's event loop.
        timing: The interval for polling.
        slot: The worker's slot.
        ends: With --follow-name, the shared ends of the log: the monitor records each end before
            the streams act on it. None without --follow-name.
        frozen_end: The end of the log at which the monitor starts frozen, None if it does not.
        insist: Report at every check that the file is gone, not only at the first. This is needed
            if the supervisor acts on the report. It ignores a report if it finds the file back at
            its path, and the file may disappear once more.

    """

    def __init__(
        self,
        watch: Watch,
        streams: Streams,
        reporter: Reporter,
        loop: EventLoop,
        timing: Timing,
        slot: int,
        ends: SharedCounts | None,
        frozen_end: int | None = None,
        insist: bool = True,
    ) -> None:
        self.gone = False
        self._timing = timing
        self._insist = insist
        # When a change of the file's size was noticed last, by the loop's clock.
        self.size_changed_at = loop.now
        self._watch, self._streams, self._reporter, self._loop = watch, streams, reporter, loop
        self._path = watch.path
        self._identity = FileIdentity(watch.file, watch.path)
        self._slot, self._ends = slot, ends
        # Whether the end of the log must not change for now, or ever again.
        self._frozen, self._stopped = frozen_end is not None, False
        # Whether other workers may have rolled at this end, so that it must not change in a drain.
        self._held = frozen_end is not None
        # The watch on the next file, and the size of the active segment at which to roll to it.
        self._next: tuple[Watch, int] | None = None
        self._register()

    def _register(self) -> None:
        if (fd := self._watch.fileno()) is not None:
            self._loop.register(fd, self.handle_inotify)

    def begin(self) -> None:
        """Check the file for the first time: it may have changed since it was opened."""
        if self._held:
            self._record(self._streams.end)
        self.deliver_appends()
        self.poll_if_needed()
        self.check_path()

    def stop(self) -> None:
        """Ignore from now on what is appended to the file, and what happens to its path."""
        if not self._held:
            self.unfreeze()
        self._go_on()
        self._withdraw()
        self._stopped = True
        self._disregard()

    def _disregard(self) -> None:
        """Do not wait for changes of the file or its path any more."""
        self._unregister(self._watch)
        self._loop.timers.cancel(self.poll_file)
        self._loop.timers.cancel(self.recheck_path)

    def _unregister(self, watch: Watch) -> None:
        if (fd := watch.fileno()) is not None:
            self._loop.unregister(fd)

    def freeze(self) -> None:
        """Do not look at the file's size until `roll` or `unfreeze`."""
        # The supervisor has seen all bytes up to now, and a worker that was slow has not. The next
        # file may be empty for hours, so its clients must get them before.
        self.deliver_appends()
        self._frozen = True
        self._withdraw()

    def hold_roll(self) -> None:
        """Do not change the end of the log any more if a roll is under way.

        The supervisor has died, and may have told another worker to roll at an end that this worker
        does not know. The next supervisor completes the roll.
        """
        self._held = self._frozen

    @property
    def agreed(self) -> tuple[int, int] | None:
        """The file to which workers may roll by themselves, and the size at which they do so."""
        return (self._next[0].file, self._next[1]) if self._next is not None else None

    def agree(self, size: int, file: int | None) -> None:
        """Roll to `file` when it has a byte, if the active segment has `size` bytes then.

        If there is no `file`, or it cannot be watched, wait for the order of the supervisor. So
        does a worker without clients: it would only compete with the others for a processor. It
        keeps the file for the next supervisor, which must know the size if another worker has
        rolled.
        """
        self._held = True
        if file is None:
            return
        watch = Watch(file, self._path) if self._watch.following else UnwatchedFile(file)
        watch.follow(True)
        self._next = watch, size
        if watch.polling is None and (fd := watch.fileno()) is not None:
            self._loop.register(fd, self.handle_next)
            self._go_on()

    def handle_next(self) -> None:
        """Roll by itself if the next file has a byte."""
        if not self._go_on() and self._next is not None:
            self._next[0].read()
            # A byte that was appended before read() has no further event.
            self._go_on()

    def _go_on(self) -> bool:
        """Roll to the next file if that has been agreed, and return whether it was possible."""
        if self._next is None or not self._next[0].size():
            return False
        watch, size = self._next
        if self._watch.size() != size:
            # The supervisor decides which bytes belong to the log.
            return False
        following, self._next = self._watch.following, None
        self._unregister(watch)
        self._replace(size, False, watch)
        self._monitor(following)
        return True

    def _withdraw(self) -> None:
        """Do not roll without an order."""
        if self._next is not None:
            watch, self._next = self._next[0], None
            self._unregister(watch)
            watch.close()
            close_file(watch.file)

    def unfreeze(self) -> None:
        """Look at the file's size again: the log does not roll, or has rolled."""
        self._withdraw()
        self._frozen = self._held = False
        self.deliver_appends()
        # Clients may have found the file shorter for a moment while it was frozen.
        self.resume_after_shrinking()

    def roll(self, size: int, lost: bool, file: int) -> None:
        """Seal the active segment at `size` bytes, and monitor `file` from now on.

        With `lost`, the bytes of the sealed segment no longer exist.
        """
        following = self._watch.following
        # Clients wait for the first bytes. Look first: to make a watch takes milliseconds.
        self._replace(size, lost, UnwatchedFile(file))
        self._withdraw()
        # If the size cannot be read now, the file must not seem to have been truncated.
        known = self._streams.end - self._streams.log.active.base
        self._watch = Watch(file, self._path, known)
        self._monitor(following)

    def _replace(self, size: int, lost: bool, watch: Watch) -> None:
        """Seal the active segment at `size` bytes, and deliver what the file of `watch` has."""
        self._streams.roll(size, lost, watch.file)
        self._disregard()
        replaced, self._watch = self._watch, watch
        self._frozen = self._held = False
        self.deliver_appends()
        replaced.close()

    def _monitor(self, following: bool) -> None:
        """Begin to use the watch on the file that has become active."""
        self._identity = FileIdentity(self._watch.file, self._path)
        self._watch.follow(following)
        self._register()
        self.begin()

    def set_following(self, following: bool) -> None:
        """Wait for appends, or stop waiting: without clients, appends need not wake the worker."""
        self._watch.follow(following)
        if following:
            self.poll_if_needed()
            # The size was not kept up to date while there were no clients.
            self.deliver_appends()

    def handle_inotify(self) -> None:
        """Deliver appends, and check the path if an event says that it may have changed."""
        # Deliver first and read the event afterwards, because clients wait for the bytes.
        self.deliver_appends()
        if self._watch.read():
            self.check_path()
        # Appends made before read() have no further event, so they must be delivered now.
        self.deliver_appends()

    def deliver_appends(self) -> None:
        """Find the log's new end, and send new bytes to the caught-up clients at once.

        Except at its start and when it rolls by itself, the worker reads the size nowhere else.
        """
        shrunk, self._streams.shrunk = self._streams.shrunk, False
        if self._frozen:
            return
        base, before, known = self._streams.log.active.base, self._streams.end, 0
        if self._ends is not None:
            # Read this before the size: then the file has had this size, whichever worker saw it.
            # The own slot is not enough, because a worker without clients does not follow the file.
            known = max(self._ends)
            self._watch.note_size(known - base)
        size = self._watch.size()
        end, self._streams.truncated = base + size, base + size < known
        if self._stopped:
            end = min(end, before)
        # The file was shorter for a moment, and has its old size again. Pause before the retry, so
        # that the loop does not spin if the bytes are missing again.
        if shrunk and end == before:
            self._loop.timers.set(self.resume_after_shrinking, self._loop.now + MEMORY_RETRY)
        if self._streams.truncated:
            self._frozen = True
            self._reporter.add_notice(truncated=size)
            # No new stream may begin before the bytes that are lost.
            self._streams.set_end(max(before, known))
            return
        if self._ends is not None:
            self._record(end)
        if end != before:
            self.size_changed_at = self._loop.now
            self._streams.set_end(end)
            if end < before:
                self._reporter.add_notice(truncated=size)

    def _record(self, end: int) -> None:
        """Record that the streams act on `end`.

        The recorded end is the largest that any worker of this slot has acted on.
        """
        assert self._ends is not None
        if end > self._ends[self._slot]:
            self._ends[self._slot] = end

    def resume_after_shrinking(self) -> None:
        """Retry the clients whose next bytes were missing while the file was shorter."""
        self._streams.set_end(self._streams.end)

    def check_path(self) -> None:
        """Check whether the path still names the file, and report it if it does not."""
        before, gone = self.gone, self._identity.is_gone(self._loop.now)
        self.gone = bool(gone)
        if self.gone and (self._insist or not before):
            self._reporter.add_notice(gone=True)
        # Check again later, because inotify may not report the next change. With --follow-name, the
        # supervisor watches the path from now on.
        if gone is None or (self.gone and self._insist and self._ends is None):
            self._loop.timers.set(self.recheck_path, self._loop.now + self._timing.poll_interval)

    def recheck_path(self) -> None:
        """Check the path again, and renew the watches on it.

        If the path exists again, it may lead through links and folders that have no watch yet.
        """
        self._watch.renew()
        self.check_path()

    def poll_if_needed(self) -> None:
        """Start to poll the file if inotify cannot be used, and report why."""
        if self._watch.polling and self.poll_file not in self._loop.timers:
            self._reporter.add_notice(polling=self._watch.polling)
            self.poll_file()

    def poll_file(self) -> None:
        """Do at each poll interval what handle_inotify does at an event."""
        self._loop.timers.set(self.poll_file, self._loop.now + self._timing.poll_interval)
        self.check_path()
        if self._watch.following:
            self.deliver_appends()
