"""Notices when the served file grows, shrinks, or is no longer the one that its path names.

inotify events only say that something may have changed. The worker then reads the file's size or
compares the file with its path. Where inotify cannot be used, the worker polls the file.
"""

from tailsrv.config import Timing
from tailsrv.file_identity import FileIdentity
from tailsrv.linux.event_loop import MEMORY_RETRY, EventLoop
from tailsrv.linux.inotify import Watch
from tailsrv.worker.reporter import Reporter
from tailsrv.worker.streams import Streams


class FileMonitor:
    """Passes the file's size to the streams, and reports to the supervisor when the file is gone.

    Args:
        watch: The inotify watch on the file and its path.
        streams: The worker's streams.
        reporter: The worker's reporter.
        loop: The worker's event loop.
        timing: The interval for polling, and the pauses in a rotation.
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
        insist: bool = True,
    ) -> None:
        self.gone = False
        self._timing = timing
        self._insist = insist
        # When a change of the file's size was noticed last, by the loop's clock.
        self.size_changed_at = loop.now
        self._watch, self._streams, self._reporter, self._loop = watch, streams, reporter, loop
        self._identity = FileIdentity(watch.file, watch.path)
        self._stopped = False
        if (fd := watch.fileno()) is not None:
            loop.register(fd, self.handle_inotify)

    def begin(self) -> None:
        """Check the file for the first time: the path may name another file by now."""
        self.poll_if_needed()
        self.check_path()

    def stop(self) -> None:
        """Ignore from now on what is appended to the file, and what happens to its path."""
        self._stopped = True
        if (fd := self._watch.fileno()) is not None:
            self._loop.unregister(fd)
        self._loop.timers.cancel(self.poll_file)
        self._loop.timers.cancel(self.recheck_path)

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
        """Read the file's size, and send new bytes to the caught-up clients at once.

        Except at its start, the worker reads the size nowhere else.
        """
        size, before = self._watch.size(), self._streams.size
        if self._stopped:
            size = min(size, before)
        shrunk, self._streams.shrunk = self._streams.shrunk, False
        # The file was shorter for a moment, and has its old size again. Pause before the retry, so
        # that the loop does not spin if the bytes are missing again.
        if shrunk and size == before:
            self._loop.timers.set(self.resume_after_shrinking, self._loop.now + MEMORY_RETRY)
        if size != before:
            self.size_changed_at = self._loop.now
            self._streams.set_size(size)
            if size < before:
                self._reporter.add_notice(truncated=size)

    def resume_after_shrinking(self) -> None:
        """Retry the clients whose next bytes were missing while the file was shorter."""
        self._streams.set_size(self._streams.size)

    def check_path(self) -> None:
        """Check whether the path still names the file, and report it if it does not."""
        before, gone = self.gone, self._identity.is_gone(self._loop.now)
        self.gone = bool(gone)
        if self.gone and (self._insist or not before):
            self._reporter.add_notice(gone=True)
        # Check again later, because inotify may not report the next change.
        if gone is None or (self.gone and self._insist):
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

    def settling_pause(self) -> float:
        """Return the seconds without an append after which a moved file counts as complete."""
        return self._timing.settle + (self._timing.poll_interval if self._watch.polling else 0)
