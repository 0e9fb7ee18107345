"""Reports that a file system has been mounted or unmounted, which inotify(7) does not."""

import os
import select
from collections.abc import Callable

from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.files import close_file

# seconds between two reports; a host of containers may mount many times a second
REPORT_INTERVAL = 1.0


class Mounts:
    """Calls `changed()` when the mount table of our namespace has changed, at most once in INTERVAL.

    /proc/self/mountinfo can be polled (proc_pid_mountinfo(5)): it is always readable, and urgent when
    something has changed since the last poll. Where it cannot be had, mounts go unnoticed.
    """

    def __init__(self, loop: EventLoop, changed: Callable[[], None]) -> None:
        self._loop, self._changed = loop, changed
        self._file: int | None = None
        try:
            self._file = os.open("/proc/self/mountinfo", os.O_RDONLY)
            loop.register(self._file, self._handle, events=select.EPOLLPRI)
        except OSError:
            self.close()

    def close(self) -> None:
        """Close the file, in a forked child."""
        if self._file is not None:
            close_file(self._file)
            self._file = None

    def _handle(self) -> None:
        """Report the change. Those of the next second are reported as one and wake nobody before."""
        assert self._file is not None
        self._loop.unregister(self._file)
        self._loop.timers.set(self._resume, self._loop.now + REPORT_INTERVAL)
        self._changed()

    def _resume(self) -> None:
        """Wait for changes again, and report one, as there may have been some since.

        Whether there were cannot be told: epoll_ctl(2) looks at the file, which counts as a poll.
        """
        assert self._file is not None
        try:
            self._loop.register(self._file, self._handle, events=select.EPOLLPRI)
        except OSError:
            # no memory for it now
            self._loop.timers.set(self._resume, self._loop.now + REPORT_INTERVAL)
        self._changed()
