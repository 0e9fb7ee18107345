"""Watches one file with inotify(7): whether it has changed, and whether its path may have changed.

The file itself is watched by its inode, for appends and for a change of its name. Every link and
folder on its path is watched as well, because moving or replacing one changes what the path names.
"""

import errno
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from inotify_simple import INotify, flags

from tailsrv.linux.file_system_type import why_poll

# Events of the file itself after which its path might no longer name it. ATTRIB reports that the
# file is deleted. DELETE_SELF does not, because unlink(2) of an open file only lowers its link
# count.
_FILE_EVENTS = flags.ATTRIB | flags.MOVE_SELF
# Events of a link or folder on the path to the file, and how to add such a watch.
_PATH_EVENTS = flags.MOVE_SELF | flags.DELETE_SELF | flags.DONT_FOLLOW | flags.MASK_ADD
# Size of the buffer for events, in bytes: 16 events, because none of these events has a name. A
# larger buffer would not be one of Python's small objects, so each read would cost a malloc(3).
_EVENTS_BYTES = 256
# The same for events in a folder, which have names: room for the largest one (inotify(7)).
_HINTS_BYTES = 4096
# What an operator can change when inotify(7) refuses an instance or a watch. EMFILE is also the
# error of a process that has no descriptor left.
_HINTS = {
    errno.EMFILE: "raise fs.inotify.max_user_instances (LimitNOFILE= if descriptors ran out)",
    errno.ENOSPC: "raise fs.inotify.max_user_watches",
}
# The kernel follows at most this many links in one path (path_resolution(7)).
_MAX_LINKS = 40


class Watch:
    """The inotify watches on one open file, and on the links and folders of its path.

    An event is only a hint that something may have changed. After each one, the caller calls
    `read()` and `size()`. If `read()` returns True, it checks whether the path still names the
    file.

    If inotify cannot be used, or may miss changes, `polling` says why, and the caller has to check
    the file at regular intervals. Otherwise `polling` is None.
    """

    def __init__(self, file: int, path: str, size: int = 0) -> None:
        """Watch `file`. `size` is what `size()` returns until the real size can be read."""
        self.file = file
        self.path = path
        self.polling = why_poll(file)
        self._inotify: INotify | None = None
        self.following = False
        self._size = size
        if self.polling is None:
            try:
                self._inotify = INotify(nonblocking=True)
                self._fd = self._inotify.fileno()
                self._watch_file()
                self._watch_path()
            except OSError as error:
                self.polling = _why_refused(error)
                self.close()

    def close(self) -> None:
        """Close the inotify instance. The file stays open."""
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def fileno(self) -> int | None:
        """Return the descriptor that is readable when there are events, or None without inotify."""
        return self._inotify.fileno() if self._inotify is not None else None

    def follow(self, following: bool) -> None:
        """Report appends from now on, or stop reporting them if `following` is False.

        Changes of the file's name are reported in either case. If the kernel refuses a watch for
        appends, `polling` says why.
        """
        if following is not self.following:
            self.following = following
            if self._inotify is not None:
                try:
                    self._watch_file()
                except OSError as error:
                    # For instance, this process has no permission to read the file any more.
                    if following:
                        self.polling = _why_refused(error)

    def size(self) -> int:
        """Return the current size of the file, in bytes.

        This uses lseek(2) instead of fstat(2): making a stat_result costs more than the system call
        [measured: a fifth of the time from an append to its delivery]. Nothing else uses the file
        position that lseek(2) changes.
        """
        try:
            self._size = os.lseek(self.file, 0, os.SEEK_END)
        except OSError:
            # The file is on a server that does not answer. Return the last known size.
            pass
        return self._size

    def note_size(self, size: int) -> None:
        """Let `size()` return at least `size`, which the file has had, if it cannot be read."""
        self._size = max(self._size, size)

    def read(self) -> bool:
        """Read the pending events, and return whether the path might no longer name the file.

        If so, this also calls `renew`.
        """
        try:
            events = os.read(self._fd, _EVENTS_BYTES)
        except BlockingIOError:
            return False
        # The common case: the kernel merges any number of appends into one event.
        if events == self._append_event:
            return False
        self.renew()
        return True

    def renew(self) -> None:
        """Watch the links and folders of the path again.

        One of them may have been replaced by another that leads to the same file.
        """
        try:
            if self._inotify is not None:
                self._watch_path()
        except OSError:
            # No watches are left. The next change of a folder will not be noticed, but a change of
            # the file itself will.
            pass

    def _watch_file(self) -> None:
        # The name in /proc leads to the inode that is open. The path may name another file by now.
        assert self._inotify is not None
        mask = _FILE_EVENTS | flags.MODIFY if self.following else _FILE_EVENTS
        watch = self._inotify.add_watch(f"/proc/self/fd/{self.file}", mask)
        # struct inotify_event of inotify(7).
        self._append_event = struct.pack("iIII", watch, flags.MODIFY, 0, 0)

    def _watch_path(self) -> None:
        """Watch the links and folders of the path. Those that cannot be watched are left out."""
        assert self._inotify is not None
        for step in steps_to(self.path):
            try:
                self._inotify.add_watch(step, _PATH_EVENTS)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                # Either this name does not exist, which the caller finds out when it checks the
                # path. Or it is a folder that this process may pass through but not read.
                pass


class UnwatchedFile(Watch):
    """Stands for a `Watch` that is still to be made: it tells the size, and there are no events."""

    def __init__(self, file: int) -> None:
        self.file, self.path, self.polling, self.following = file, "", None, False
        self._inotify, self._size = None, 0


class NoFile(UnwatchedFile):
    """Stands for a `Watch` until there is a file: the size is 0, and there are no events."""

    def __init__(self) -> None:
        super().__init__(-1)

    def size(self) -> int:
        """Return 0, the size of a file that does not exist yet."""
        return 0


class Hints:
    """Wakes a loop when one of several files or folders may have changed.

    Raises OSError if there is no inotify instance left.
    """

    def __init__(self) -> None:
        self._inotify = INotify(nonblocking=True)
        # Each path and its events, with the number of the watch.
        self._watches: dict[tuple[str, int], int] = {}

    def watch(self, wanted: Iterable[tuple[str, int]]) -> bool:
        """Watch exactly these paths, each for its events (`inotify_simple.flags`).

        Returns whether every watch could be added.
        """
        wanted = set(wanted)
        unwanted = {self._watches.pop(key) for key in self._watches.keys() - wanted}
        # Two names of one file share a watch.
        for number in unwanted - set(self._watches.values()):
            with suppress(OSError):
                # The kernel has removed the watch if the file does not exist any more.
                self._inotify.rm_watch(number)
        for key in wanted - self._watches.keys():
            with suppress(OSError):
                self._watches[key] = self._inotify.add_watch(*key)
        return self._watches.keys() == wanted

    def fileno(self) -> int:
        """Return the descriptor that is readable when something may have changed."""
        return int(self._inotify.fileno())

    def clear(self) -> None:
        """Read all pending events, and ignore what they say."""
        try:
            while os.read(self.fileno(), _HINTS_BYTES):
                pass
        except OSError:
            # There are no more events, or the kernel has no memory for them now.
            pass

    def close(self) -> None:
        """Close the inotify object."""
        self._inotify.close()


def steps_to(path: str) -> Iterator[str]:
    """Yield every name that the kernel looks up when it resolves `path`, in that order.

    These are the names of links, of what they lead to, and of folders. The last one is the file.
    """
    try:
        whole = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
    except FileNotFoundError:
        # The current folder has been removed, so the relative path names nothing.
        return
    folder, names, links = "/", deque(Path(whole).parts[1:]), 0
    while names:
        step = os.path.join(folder, names.popleft())
        yield step
        try:
            target = Path(os.readlink(step))
        except OSError:
            # The name is not a link.
            folder = step
            continue
        links += 1
        if links > _MAX_LINKS:
            return
        if target.is_absolute():
            folder = "/"
            names.extendleft(reversed(target.parts[1:]))
        else:
            names.extendleft(reversed(target.parts))


def _why_refused(error: OSError) -> str:
    """Return why inotify cannot be used, and what to change."""
    reason = f"inotify cannot be used: {os.strerror(error.errno or 0)}"
    hint = _HINTS.get(error.errno or 0)
    return f"{reason}; {hint}" if hint else reason
