"""What a client may receive of a file after changes of the file; without sockets and real files."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from support.sockets import LINE_LENGTH

# The number of bytes that are compared at a time.
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes that are no longer in the file, because they were overwritten or truncated."""

    offset: int
    old: bytes
    cut: bool

    def at(self, offset: int) -> Iterator[int]:
        """Yield what a client may still receive for the byte at `offset`.

        Such bytes may have been in flight at the time of this change.
        """
        if self.offset <= offset < self.offset + len(self.old):
            yield self.old[offset - self.offset]
            if self.cut:
                # sendfile(2) sends pages, and the kernel zeroes the truncated part of a page.
                yield 0


class History:
    """The bytes of a file, and all values that they have had."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.changes: list[Change] = []

    @property
    def size(self) -> int:
        """The current size of the file."""
        return len(self.data)

    @property
    def now(self) -> int:
        """The number of changes so far, which is a time for `since` in the other methods."""
        return len(self.changes)

    def append(self, data: bytes) -> None:
        """Add `data` at the end.

        Since a truncation, no client can have received any byte there, except for bytes in flight.
        """
        self.data += data

    def overwrite(self, offset: int, data: bytes) -> None:
        """Replace the bytes from `offset` on by `data`."""
        here = slice(offset, offset + len(data))
        assert here.stop <= self.size
        self.changes.append(Change(offset, bytes(self.data[here]), cut=False))
        self.data[here] = data

    def truncate(self, size: int) -> None:
        """Truncate the file to `size`."""
        self.changes.append(Change(size, bytes(self.data[size:]), cut=True))
        del self.data[size:]

    def versions(self, offset: int, since: int) -> set[int]:
        """Return all values of the byte at `offset` after the first `since` changes."""
        found = set(self.data[offset : offset + 1])
        for change in islice(self.changes, since, None):
            found.update(change.at(offset))
        return found

    def allows(self, offset: int, received: bytes, since: int) -> bool:
        """Tell whether a stream may have received `received` from `offset` on.

        It is known that no byte was sent before the first `since` changes.
        """
        for start in range(0, len(received), BLOCK):
            part, position = received[start : start + BLOCK], offset + start
            if part != self.data[position : position + len(part)] and not self._has_been(
                position, part, since
            ):
                return False
        return True

    def _has_been(self, offset: int, received: bytes, since: int) -> bool:
        return all(
            byte in self.versions(index, since) for index, byte in enumerate(received, offset)
        )


class LogHistory(History):
    """The bytes of an endless log. They never change, but a truncation may show through."""

    def __init__(self) -> None:
        super().__init__()
        # The truncated parts, and the number of changes before each. For bytes in flight,
        # sendfile(2) sends pages of the file. A page that contains its new end, which may be a
        # large one, then has zeros or the next appends. Later clients get none of these.
        self.uncertain: list[tuple[int, int, int]] = []

    def note_truncation(self, parts: Iterable[tuple[int, int]]) -> None:
        """Record that a file was truncated which has had the bytes of these `parts` of the log."""
        self.uncertain += [(*part, self.now) for part in parts]
        self.changes.append(Change(self.size, b"", cut=True))

    def versions(self, offset: int, since: int) -> set[int]:
        """Return all values that a client may receive for the byte at `offset`."""
        if any(start <= offset < end and since <= when for start, end, when in self.uncertain):
            return set(range(256))
        return super().versions(offset, since)


@dataclass(slots=True)
class Stream:
    """What is known from outside about a client's stream, since its header was complete."""

    # The absolute value of the number in the header.
    header: int
    from_end: bool
    # No byte of the stream was sent before that many changes of the file.
    since: int
    # Whether the header asks for the `?` line.
    with_offsets: bool = False
    # The possible starts; the time when the server reads the header is not known.
    starts: set[int] = field(default_factory=set)
    started: bool = False
    # The part of the `?` line that was received.
    line: bytes = b""
    # The number of bytes received, without those of the `?` line.
    count: int = 0
    # No byte from this offset on was sent before the last change, because the file was never
    # longer.
    reach: int = 0

    @property
    def needs_end(self) -> bool:
        """Whether the end of the file, when the header is read, determines what is received."""
        return self.from_end or self.with_offsets

    def note_size(self, size: int) -> None:
        """Record a size of the file at which the server may read the header."""
        if not self.started:
            self.starts.add(max(0, size - self.header) if self.from_end else self.header)

    def note_start(self, start: int) -> None:
        """Record the start of this stream as the server reports it."""
        assert start in self.starts, f"starts at {start}, not at one of {sorted(self.starts)}"
        self.starts, self.started = {start}, True

    def note_change(self, history: History) -> None:
        """Record that the file is about to change.

        A client that has received everything the file ever contained has no bytes in flight.
        """
        self.reach = max(self.reach, history.size)
        if self.furthest() >= self.reach and len(self.starts) == 1:
            self.since = history.now

    def due(self, size: int) -> int:
        """Return how many more bytes must be received, at least, with a file of `size` bytes."""
        left = LINE_LENGTH - len(self.line) if self.with_offsets and self.starts else 0
        return left + min((max(0, size - start - self.count) for start in self.starts), default=0)

    def furthest(self) -> int:
        """Return the highest possible position of this stream."""
        return max(self.starts, default=0) + self.count

    def stands_at(self, offset: int) -> bool:
        """Tell whether the position of this stream is certainly `offset`."""
        return {start + self.count for start in self.starts} == {offset}

    def may_be_before(self, offset: int) -> bool:
        """Tell whether the next byte of this stream may be before `offset`."""
        return any(start + self.count < offset for start in self.starts)

    def take(self, received: bytes, history: History) -> None:
        """Check and count the next received bytes.

        Raises AssertionError if they do not match the file for any possible start.
        """
        self.started = True
        if self.with_offsets and len(self.line) < LINE_LENGTH:
            left = LINE_LENGTH - len(self.line)
            self.line, received = self.line + received[:left], received[left:]
            if len(self.line) == LINE_LENGTH:
                self.note_line()
        fitting = {
            start
            for start in self.starts
            if history.allows(start + self.count, received, self.since)
        }
        assert fitting, self.describe_difference(received, history)
        self.starts = fitting
        self.count += len(received)

    def note_line(self) -> None:
        """Record the start in the `?` line, and check the end in it."""
        assert re.fullmatch(rb"[0-9]{19} [0-9]{19}\n", self.line), self.line
        start, end = map(int, self.line.split())
        assert start in self.starts, f"{self.line!r} names none of {sorted(self.starts)}"
        if self.from_end:
            assert start == max(0, end - self.header), self.line
        self.starts = {start}

    def describe_difference(self, received: bytes, history: History) -> str:
        """Describe the first difference between `received` and the file, for each start."""
        differences = [
            f"{start}: {self._first_difference(start + self.count, received, history)}"
            for start in sorted(self.starts)
        ]
        return (
            f"byte {self.count} of the stream, {len(received)} more received; by its start, "
            + "; ".join(differences)
        )

    def _first_difference(self, offset: int, received: bytes, history: History) -> str:
        for index, byte in enumerate(received, offset):
            if byte not in history.versions(index, self.since):
                here, there = (
                    received[index - offset :][:20],
                    bytes(history.data[index : index + 20]),
                )
                return (
                    f"at byte {index} of {history.size} {here!r}, not {there!r}"
                    f"{find(here, history)}"
                )
        return "no difference"


@dataclass(slots=True)
class LogStream(Stream):
    """The same for a log that may begin later than at offset 0."""

    # The possible ends and starts of the log when the server read the header.
    ends: set[int] = field(default_factory=set)
    log_starts: set[int] = field(default_factory=set)

    def note_log(self, log_starts: set[int], ends: set[int]) -> None:
        """Record the possible starts and ends of the log at a moment before the stream starts."""
        if not self.started:
            self.log_starts |= log_starts
            self.ends |= ends
            self.starts |= self._possible(self.ends)

    def _possible(self, ends: set[int]) -> set[int]:
        if self.from_end:
            return {max(first, end - self.header) for first in self.log_starts for end in ends}
        if self.header == 0:
            return set(self.log_starts)
        return {self.header} if self.header >= min(self.log_starts, default=0) else set()

    @property
    def may_be_refused(self) -> bool:
        """Whether the header may name a byte that no longer exists."""
        beyond = max(self.log_starts, default=0)
        return not self.from_end and 0 < self.header < beyond and not (self.line or self.count)

    def note_line(self) -> None:
        """Record the start in the `?` line, and check the end in it."""
        assert re.fullmatch(rb"[0-9]{19} [0-9]{19}\n", self.line), self.line
        start, end = map(int, self.line.split())
        assert end in self.ends, f"{self.line!r} names none of the ends {sorted(self.ends)}"
        possible = self.starts & self._possible({end})
        assert start in possible, f"{self.line!r} names none of {sorted(possible)}"
        self.starts = {start}


def find(piece: bytes, history: History) -> str:
    """Describe where in the file `piece` occurs."""
    offset = history.data.find(piece)
    return f", as from byte {offset}" if offset >= 0 else ""


def in_pages(data: bytes, offset: int, page: int = 4096) -> Iterable[bytes]:
    """Yield `data` in pieces that do not cross the end of a page when written from `offset` on.

    Only a write(2) within a page is atomic for a process that reads the file's size meanwhile.
    """
    while data:
        room = page - offset % page
        yield data[:room]
        data, offset = data[room:], offset + len(data[:room])
