"""Looks at the file when there is reason to, for a worker's streams and for the supervisor."""

from tailsrv.config import Timing
from tailsrv.file_identity import FileIdentity
from tailsrv.linux.event_loop import MEMORY_RETRY, EventLoop
from tailsrv.linux.inotify import Watch
from tailsrv.worker.reporter import Reporter
from tailsrv.worker.streams import Streams


class FileMonitor:
    """Learns from the file itself what is new, when the watch says that something may be: its events are hints.

    Where inotify cannot help, the clock stands in for it. That the file is gone is reported again and again
    if the supervisor is to act on it (`insist`): it may find the file back, and the file may go once more.
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
        # when the file's size was last found to be another
        self.size_changed_at = loop.now
        self._watch, self._streams, self._reporter, self._loop = watch, streams, reporter, loop
        self._identity = FileIdentity(watch.file, watch.path)
        self._stopped = False
        if (fd := watch.fileno()) is not None:
            loop.register(fd, self.handle_inotify)

    def begin(self) -> None:
        """Look for the first time: the file may have gone since the supervisor opened it."""
        self.poll_if_needed()
        self.check_path()

    def stop(self) -> None:
        """Heed no growth of the file from now on, and nothing that happens to its name."""
        self._stopped = True
        if (fd := self._watch.fileno()) is not None:
            self._loop.unregister(fd)
        self._loop.timers.cancel(self.poll_file)
        self._loop.timers.cancel(self.recheck_path)

    def set_following(self, following: bool) -> None:
        """Heed appends, or not: without clients they are no reason to wake up."""
        self._watch.follow(following)
        if following:
            self.poll_if_needed()
            # nobody has kept the size up to date
            self.deliver_appends()

    def handle_inotify(self) -> None:
        # before anything else: somebody waits for the bytes, nobody for the event
        self.deliver_appends()
        if self._watch.read():
            self.check_path()
        # an append before the read has no event of its own any more
        self.deliver_appends()

    def deliver_appends(self) -> None:
        """Learn the file's size: the one place that does, and whoever is caught up is served at once."""
        size, before = self._watch.size(), self._streams.size
        if self._stopped:
            size = min(size, before)
        shrunk, self._streams.shrunk = self._streams.shrunk, False
        # it was shorter for a moment; whom that kept waiting gets another try
        if shrunk and size == before:
            self._loop.timers.set(self.resume_after_shrinking, self._loop.now + MEMORY_RETRY)
        if size != before:
            self.size_changed_at = self._loop.now
            self._streams.set_size(size)
            if size < before:
                self._reporter.add_notice(truncated=size)

    def resume_after_shrinking(self) -> None:
        self._streams.set_size(self._streams.size)

    def check_path(self) -> None:
        """Find out whether the path still names the file, and report it if it does not."""
        before, gone = self.gone, self._identity.is_gone(self._loop.now)
        self.gone = bool(gone)
        if self.gone and (self._insist or not before):
            self._reporter.add_notice(gone=True)
        # inotify may not report the next change
        if gone is None or (self.gone and self._insist):
            self._loop.timers.set(self.recheck_path, self._loop.now + self._timing.poll_interval)

    def recheck_path(self) -> None:
        """Look once more: what has come back since may lead through links and folders that nobody watches yet."""
        self._watch.renew()
        self.check_path()

    def poll_if_needed(self) -> None:
        if self._watch.polling and self.poll_file not in self._loop.timers:
            self._reporter.add_notice(polling=self._watch.polling)
            self.poll_file()

    def poll_file(self) -> None:
        """Do by the clock what handle_watch does where inotify cannot help."""
        self._loop.timers.set(self.poll_file, self._loop.now + self._timing.poll_interval)
        self.check_path()
        if self._watch.following:
            self.deliver_appends()

    def settling_pause(self) -> float:
        """Return the seconds without news after which a file that was moved away is taken to be complete."""
        return self._timing.settle + (self._timing.poll_interval if self._watch.polling else 0)
