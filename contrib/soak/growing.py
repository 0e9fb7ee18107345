"""The writer of the served file: appends to it and rotates it."""

import os
import time
from pathlib import Path

from content import Content


class GrowingFile:
    """The served file. `sizes` has the size of each generation in bytes."""

    def __init__(self, path: Path, content: Content) -> None:
        self.path, self.content = path, content
        self.generation = 0
        self.sizes = [0]
        # The time of the last rotation.
        self.rotated = float("-inf")
        self._file = path.open("ab", buffering=0)

    @property
    def size(self) -> int:
        """The size of the current file in bytes."""
        return self.sizes[self.generation]

    def append(self, count: int) -> None:
        """Append `count` bytes. Raises OSError."""
        size = self.size
        written = self._file.write(self.content.read(self.generation, size, count))
        if written != count:
            # The disk is full.
            raise OSError(f"only {written} of {count} bytes written to {self.path}")
        self.sizes[self.generation] = size + count

    def rotate(self) -> None:
        """Rename the file and create a new one, as logrotate does.

        This overwrites the file that was renamed at the rotation before.
        """
        self._file.close()
        os.replace(self.path, f"{self.path}.1")
        self._file = self.path.open("ab", buffering=0)
        self.sizes.append(0)
        self.generation += 1
        self.rotated = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
