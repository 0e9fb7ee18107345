"""The writer of the served log: appends to its file, rotates it, and deletes old files."""

import itertools
import os
import random
import time
from collections import deque
from io import FileIO
from pathlib import Path

from content import Content

# Old files that are kept, besides the current one.
KEEP = 4
# The largest number of bytes that are appended to the old file during a rotation, or between two
# quick rotations.
LATE = 64 << 10
# Seconds within which a server on a busy machine notices that a file was deleted.
NOTICE = 10.0
# The longest pause in seconds between two steps of a rotation. It must be much shorter than the
# second for which the server waits for late bytes.
PAUSE = 0.02


class GrowingFile:
    """The served file, and the older files of the log.

    `size` is the log offset of the end, and `oldest` that of the first byte that was not deleted.
    `delivered` is the largest offset that a client has reached. So the server has opened all files
    with a smaller base. `truncated` has the offsets whose bytes were truncated last.
    """

    def __init__(self, path: Path, content: Content) -> None:
        self.path, self.content = path, content
        self.size = self.delivered = 0
        self.truncated = range(0)
        # The log offset of the current file's first byte.
        self.base = 0
        # Base and path of the older files that were not deleted, the oldest first.
        self._older: deque[tuple[int, Path]] = deque()
        # The bases of deleted files, and the times at which they were deleted.
        self._deleted: deque[tuple[int, float]] = deque(maxlen=100)
        self._count = 0
        self._file = path.open("ab", buffering=0)
        # The descriptor of the old file of the last rotation, if it is still open.
        self._late: FileIO | None = None

    @property
    def oldest(self) -> int:
        """The log offset of the first byte of the oldest file."""
        return self._older[0][0] if self._older else self.base

    @property
    def noticed(self) -> int:
        """The log offset of the first byte that the server may not know yet to be deleted."""
        recent = time.monotonic() - NOTICE
        return min((base for base, when in self._deleted if when > recent), default=self.oldest)

    def is_base(self, offset: int) -> bool:
        """Return whether `offset` is the first byte of a file, or was it some time ago."""
        files = itertools.chain(self._older, self._deleted, [(self.base, 0)])
        return any(offset == base for base, _ in files)

    def append(self, count: int) -> None:
        """Append `count` bytes. Raises OSError."""
        self._write(self._file, self.size, count)
        self.size += count

    def _write(self, file: FileIO, offset: int, count: int) -> None:
        written = file.write(self.content.read(offset, count))
        if written != count:
            # The disk is full.
            raise OSError(f"only {written} of {count} bytes written to {self.path}")

    # Rotation

    def rotate(self, kind: str, dice: random.Random) -> None:
        """Rotate the file in one of the ways of ROTATIONS."""
        match kind:
            case "rename":
                self._rename()
            case "late":
                self._rename()
                self._append_late(dice.randrange(1, LATE))
            case "overlap":
                self._rename()
                self._overlap(dice.randrange(1, LATE), dice.randrange(1, LATE))
            case "replace":
                self._replace(dice.randrange(LATE))
            case "quick":
                for _ in range(dice.randrange(2, 4)):
                    self._rename()
                    self.append(dice.randrange(1, LATE))
                    time.sleep(dice.uniform(0.005, PAUSE))
            case "delete":
                self._delete_current(dice.randrange(LATE))
            case _:
                raise ValueError(kind)
        if dice.random() < 0.5:
            self.close_late()
        self._delete_old(KEEP)

    def _rename(self) -> None:
        """Rename the file, and create the next one. The old one stays open, without a reader."""
        os.rename(self.path, self._older_name())
        self._open_next()

    def _append_late(self, count: int) -> None:
        """Append to the old file before the new one has a byte, as slow writers do."""
        assert self._late is not None
        self._write(self._late, self.size, count)
        self.size = self.base = self.size + count

    def _overlap(self, late: int, early: int) -> None:
        """Append to the new file, and then to the old one: its bytes are the earlier ones.

        The old file stays open, so the server must wait until it has been quiet for a moment.
        """
        self.base += late
        self._write(self._file, self.base, early)
        time.sleep(PAUSE)
        assert self._late is not None
        self._write(self._late, self.size, late)
        self.size += late + early

    def _replace(self, early: int) -> None:
        """Replace the file with one that has `early` bytes. The old one has another name."""
        os.link(self.path, self._older_name())
        self._move_over(early)

    def _delete_current(self, early: int) -> None:
        """Replace the file and delete the old one, if the server has certainly opened it."""
        if self.delivered <= self.base:
            self._rename()
            return
        self._delete_all()
        self._deleted.append((self.base, time.monotonic()))
        self._move_over(early)

    def _move_over(self, early: int) -> None:
        new = self.path.with_suffix(".new")
        with new.open("ab", buffering=0) as file:
            self._write(file, self.size, early)
        os.replace(new, self.path)
        self._open_next()
        self.size += early

    def _older_name(self) -> Path:
        self._count += 1
        name = Path(f"{self.path}.{self._count}")
        self._older.append((self.base, name))
        return name

    def _open_next(self) -> None:
        if self._late is not None:
            self._late.close()
        self._late = self._file
        self._file = self.path.open("ab", buffering=0)
        self.base = self.size

    def close_late(self) -> None:
        """Close the old file of the last rotation."""
        if self._late is not None:
            self._late.close()
            self._late = None

    def truncate(self) -> None:
        """Truncate the file, after a client has received all of it."""
        self._delete_all()
        self._deleted.append((self.base, time.monotonic()))
        self._file.truncate(0)
        self.truncated = range(self.base, self.size)
        self.base = self.size

    def delete_older(self) -> None:
        """Delete all files but the current one, after clients have received its first bytes."""
        self.close_late()
        self._delete_old(0)

    def _delete_all(self) -> None:
        """Delete all older files. What was between them and the current one is gone already."""
        while self._older:
            self._delete_oldest()

    def _delete_old(self, keep: int) -> None:
        """Delete the oldest files that the server has certainly opened, except for `keep` files."""
        while len(self._older) > keep:
            following = self._older[1][0] if len(self._older) > 1 else self.base
            if self.delivered <= following:
                break
            self._delete_oldest()

    def _delete_oldest(self) -> None:
        base, path = self._older.popleft()
        self._deleted.append((base, time.monotonic()))
        path.unlink()

    def close(self) -> None:
        """Close the files."""
        self.close_late()
        self._file.close()


# The kinds of rotations.
ROTATIONS = ("rename", "late", "overlap", "replace", "quick", "delete")
