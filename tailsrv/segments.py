"""The log as a sequence of segments, and which segment holds an offset. Pure: no system calls."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

# In place of the descriptor of a segment whose bytes no longer exist.
NO_FILE = -1


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of the log.

    Attributes:
        base: The log offset of the file's first byte.
        file: The descriptor of the open file, NO_FILE if its bytes no longer exist.
        size: The number of bytes that belong to the log, None while the segment is active. The file
            may be larger than that: bytes that are appended after sealing are not served.

    """

    base: int
    file: int
    size: int | None = None

    @property
    def sealed(self) -> bool:
        """Whether the segment has its final size."""
        return self.size is not None

    @property
    def end(self) -> int:
        """The log offset after the last byte. Raises ValueError if the segment is active."""
        if self.size is None:
            raise ValueError(f"the segment at {self.base} is active, its end is not fixed")
        return self.base + self.size


class Log:
    """Segments in order, without gaps. Only the last one may be active.

    Each segment begins where the one before ends. A roll is `seal` followed by `append`. Between
    the two calls the last segment is sealed. A segment that is empty when it is sealed is not kept.

    Attributes:
        active: The last segment.
        start: The earliest offset for a new stream. Segments before it have been deleted. They are
            kept as long as older streams read them.

    """

    __slots__ = ("_segments", "active", "start")

    active: Segment

    def __init__(self, segments: Iterable[Segment], start: int = 0) -> None:
        """Raise ValueError if there is no segment, or if they do not follow each other."""
        self._segments: list[Segment] = []
        for segment in segments:
            self.append(segment)
        if not self._segments:
            raise ValueError("a log has at least one segment")
        self.start = max(start, self.first)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def first(self) -> int:
        """The base offset of the first segment that is still kept."""
        return self._segments[0].base

    @property
    def sealed_segments(self) -> list[Segment]:
        """The segments before the active one."""
        return self._segments[:-1]

    def find(self, offset: int) -> Segment:
        """Return the segment that holds the byte at `offset`.

        Nearly all calls are for the active segment, so that one is compared first.

        Args:
            offset: A log offset in bytes.

        Returns:
            The segment. It is the last one for each offset from its base on, also beyond its end.

        Raises:
            ValueError: `offset` is before the first segment.

        """
        if offset >= self.active.base:
            return self.active
        if offset < self.first:
            raise ValueError(f"offset {offset} is before the first segment, at {self.first}")
        return self._segments[bisect_right(self._segments, offset, key=_base) - 1]

    def seal(self, size: int, lost: bool = False) -> Segment:
        """Give the active segment its final size in bytes, and return it.

        With `lost`, its bytes no longer exist, because the file has been truncated: no new stream
        begins before the end. Raises ValueError if the last segment is sealed already, or if `size`
        is negative.
        """
        if self.active.size is not None:
            raise ValueError(f"the segment at {self.active.base} is sealed already")
        sealed = replace(self.active, size=size, file=NO_FILE if lost else self.active.file)
        _check_size(sealed)
        self._segments[-1] = self.active = sealed
        if lost:
            self.retire(sealed.end)
        return sealed

    def append(self, segment: Segment) -> None:
        """Add the next segment, in place of the last one if that is empty.

        Raises ValueError if it does not begin at the end of a sealed one, or if its base or its
        size is negative.
        """
        _check_size(segment)
        if self._segments and segment.base != self.active.end:
            raise ValueError(
                f"a segment at {segment.base} cannot follow one that ends at {self.active.end}"
            )
        if self._segments and self.active.size == 0:
            self._segments.pop()
        self._segments.append(segment)
        self.active = segment

    def retire(self, start: int) -> None:
        """Let no new stream begin before `start`, because segments before it have been deleted."""
        self.start = max(self.start, start)

    def drop_before(self, offset: int) -> list[Segment]:
        """Remove the sealed segments that end at `offset` or before it, and are before `start`.

        Returns:
            The removed segments. The caller closes their files.

        """
        offset = min(offset, self.start)
        count = 0
        while count < len(self._segments) - 1 and self._segments[count].end <= offset:
            count += 1
        dropped = self._segments[:count]
        del self._segments[:count]
        return dropped


def _base(segment: Segment) -> int:
    return segment.base


def _check_size(segment: Segment) -> None:
    if segment.base < 0 or (segment.size is not None and segment.size < 0):
        raise ValueError(f"negative base or size: {segment}")
