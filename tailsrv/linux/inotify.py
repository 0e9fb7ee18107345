"""One file: says grown, shrunk or gone."""

import errno
import os
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from inotify_simple import INotify, flags

from tailsrv.linux.file_system import why_poll

# ATTRIB, not DELETE_SELF: while we hold it, unlink only lowers st_nlink
_END = flags.ATTRIB | flags.MOVE_SELF
_STEP = flags.MOVE_SELF | flags.DELETE_SELF | flags.DONT_FOLLOW | flags.MASK_ADD
# room for 16 events, which have no names; more than Python's small objects hold costs a malloc(3)
_EVENTS_BYTES = 256
# as in path_resolution(7)
_MAX_LINKS = 40


class Watch:
    """The inotify watch on one open file and on what its path leads through.

    Its events are hints, the file's state is the truth: whoever wakes up asks `size()`, and if `read()` says so,
    whether the path still names the file. Where inotify cannot help, `polling` says why, and one has to look every `Timing.poll_interval`.
    """

    def __init__(self, file: int, path: str) -> None:
        self.file = file
        self.path = path
        self.polling = why_poll(file)
        self._inotify: INotify | None = None
        self.following = False
        self._size = 0
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
        """Give the inotify instance back."""
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def fileno(self) -> int | None:
        """Return the descriptor that becomes readable when there is something to look at, None if polling."""
        return self._inotify.fileno() if self._inotify is not None else None

    def follow(self, following: bool) -> None:
        """Ask to be woken by appends, or not; either way the file's end is reported. Where that is refused, one has to poll."""
        if following is not self.following:
            self.following = following
            if self._inotify is not None:
                try:
                    self._watch_file()
                except OSError as error:
                    # the file may not be read any more, for instance
                    if following:
                        self.polling = _why_refused(error)

    def size(self) -> int:
        """Return how many bytes are in the file now.

        lseek(2) knows it as fstat(2) does, and spares making a stat_result, which costs more than the system
        call [measured: a fifth of a caught-up client's latency]. The file position that it moves is used by nobody.
        """
        try:
            self._size = os.lseek(self.file, 0, os.SEEK_END)
        except OSError:
            # a file server that does not answer: it is as long as it was
            pass
        return self._size

    def read(self) -> bool:
        """Take what inotify has to say, and tell whether it may mean that the file is gone."""
        try:
            events = os.read(self._fd, _EVENTS_BYTES)
        except BlockingIOError:
            return False
        # the common case: however many appends there were, they merge into this
        if events == self._append:
            return False
        self.renew()
        return True

    def renew(self) -> None:
        """Watch the way to the file anew: a link or folder may have been replaced by one that leads to the same file."""
        try:
            if self._inotify is not None:
                self._watch_path()
        except OSError:
            # no watches left: the next change of a folder goes unnoticed, that of the file does not
            pass

    def _watch_file(self) -> None:
        # Through /proc, so that the watch is on the inode that we hold, whatever its path names by now.
        assert self._inotify is not None
        mask = _END | flags.MODIFY if self.following else _END
        watch = self._inotify.add_watch(f"/proc/self/fd/{self.file}", mask)
        # inotify(7), struct inotify_event
        self._append = struct.pack("iIII", watch, flags.MODIFY, 0, 0)

    def _watch_path(self) -> None:
        """Watch the links and folders on the way to the file: one that moves away takes the file's name with it."""
        assert self._inotify is not None
        for step in steps_to(self.path):
            try:
                self._inotify.add_watch(step, _STEP)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                # gone, which a look at the path will say; or a folder that we may pass but not read
                pass


class NoFile(Watch):
    """Stands in for the watch while the file is awaited: it is empty, and nothing happens to it."""

    def __init__(self) -> None:
        self.file, self.path, self.polling, self.following = -1, "", None, False
        self._inotify = None

    def size(self) -> int:
        """Return 0."""
        return 0


def steps_to(path: str) -> Iterator[str]:
    """Yield every name that the kernel goes through to resolve `path`, links and what they lead to, the file last."""
    try:
        whole = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
    except FileNotFoundError:
        # the folder that we started in is gone, and the file's name with it
        return
    here, names, links = "/", deque(Path(whole).parts[1:]), 0
    while names:
        step = os.path.join(here, names.popleft())
        yield step
        try:
            target = Path(os.readlink(step))
        except OSError:
            # not a link
            here = step
            continue
        links += 1
        if links > _MAX_LINKS:
            return
        if target.is_absolute():
            here = "/"
            names.extendleft(reversed(target.parts[1:]))
        else:
            names.extendleft(reversed(target.parts))


def _why_refused(error: OSError) -> str:
    """Return why inotify cannot be used, and what to change."""
    hint = (
        "; see fs.inotify.max_user_instances and max_user_watches"
        if error.errno in (errno.EMFILE, errno.ENOSPC)
        else ""
    )
    return f"no inotify: {os.strerror(error.errno or 0)}{hint}"
