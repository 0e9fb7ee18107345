"""Reports that a file system has been mounted or unmounted, which inotify(7) does not."""

import os
import select
from collections.abc import Callable

from tailsrv.linux.event_loop import EventLoop
from tailsrv.linux.files import close_file

# Seconds after a report during which further changes are collected into one report. A host of
# containers may mount file systems many times a second.
REPORT_INTERVAL = 1.0


class Mounts:
    """Calls `changed()` when the mounts in this process's mount namespace have changed.

    There are at most two calls in REPORT_INTERVAL seconds. The reports come from the kernel:
    /proc/self/mountinfo has the event EPOLLPRI when the mounts have changed since the file was last
    polled (proc_pid_mountinfo(5)). If the file cannot be opened, changes are not noticed.
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
        """Close the file. A forked child must call this.

        The file stays registered, because the child shares the epoll object with its parent.
        """
        if self._file is not None:
            close_file(self._file)
            self._file = None

    def _handle(self) -> None:
        """Report a change, and ignore further ones until the next report is due.

        The file is unregistered meanwhile, so that further changes do not wake the process.
        """
        assert self._file is not None
        self._loop.unregister(self._file)
        self._loop.timers.set(self._resume, self._loop.now + REPORT_INTERVAL)
        self._changed()

    def _resume(self) -> None:
        """Wait for changes again, and report one, because the mounts may have changed meanwhile.

        It cannot be known whether they have: epoll_ctl(2) itself polls the file, and so hides
        earlier changes from the next poll.
        """
        assert self._file is not None
        try:
            self._loop.register(self._file, self._handle, events=select.EPOLLPRI)
        except OSError:
            # Epoll watches or memory have run out. Try again later.
            self._loop.timers.set(self._resume, self._loop.now + REPORT_INTERVAL)
        self._changed()
