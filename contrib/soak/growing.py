"""The file that is served, as its writer sees it."""

import os
import time
from pathlib import Path

from content import Content


class GrowingFile:
    """Appends to the file, and moves it away for a next one of its name; knows how long each generation is."""

    def __init__(self, path: Path, content: Content) -> None:
        self.path, self.content = path, content
        self.generation = 0
        self.sizes = [0]
        # when, the last time
        self.rotated = float("-inf")
        self._file = path.open("ab", buffering=0)

    @property
    def size(self) -> int:
        """The size of the file that has the name now."""
        return self.sizes[self.generation]

    def append(self, count: int) -> None:
        """Append `count` bytes."""
        size = self.size
        written = self._file.write(self.content.read(self.generation, size, count))
        if written != count:
            # the disk is full
            raise OSError(f"only {written} of {count} bytes written to {self.path}")
        self.sizes[self.generation] = size + count

    def rotate(self) -> None:
        """Rename and create, as logrotate does; the file before the last is forgotten."""
        self._file.close()
        os.replace(self.path, f"{self.path}.1")
        self._file = self.path.open("ab", buffering=0)
        self.sizes.append(0)
        self.generation += 1
        self.rotated = time.monotonic()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
