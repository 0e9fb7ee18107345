"""What a client may receive of a file, whatever has happened to the file meanwhile. Pure: no socket, no file on disk."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

# bytes that are compared at a time
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes that are not in the file any more: overwritten, or cut off."""

    offset: int
    old: bytes
    cut: bool

    def at(self, place: int) -> Iterator[int]:
        """Yield what a client may still receive for the byte at `place`: it may have been on its way when this happened."""
        if self.offset <= place < self.offset + len(self.old):
            yield self.old[place - self.offset]
            if self.cut:
                # sendfile(2) sends pages, and the kernel clears what a truncation cuts off a page
                yield 0


class History:
    """The bytes of a file, and all that they have been."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.changes: list[Change] = []

    @property
    def size(self) -> int:
        """How many bytes are in the file now."""
        return len(self.data)

    @property
    def now(self) -> int:
        """The moment, for `since` in the other methods: how many changes there have been."""
        return len(self.changes)

    def append(self, data: bytes) -> None:
        """Add `data` at the end. No client can have seen anything there since it was cut, but for what was on its way."""
        self.data += data

    def overwrite(self, offset: int, data: bytes) -> None:
        """Put `data` in the place of as many bytes from `offset`."""
        here = slice(offset, offset + len(data))
        assert here.stop <= self.size
        self.changes.append(Change(offset, bytes(self.data[here]), cut=False))
        self.data[here] = data

    def truncate(self, size: int) -> None:
        """Cut off all from `size`."""
        self.changes.append(Change(size, bytes(self.data[size:]), cut=True))
        del self.data[size:]

    def versions(self, place: int, since: int) -> set[int]:
        """Return every value that the byte at `place` has had after the first `since` changes, or just before the next."""
        found = set(self.data[place : place + 1])
        for change in islice(self.changes, since, None):
            found.update(change.at(place))
        return found

    def allows(self, offset: int, received: bytes, since: int) -> bool:
        """Tell whether a stream may have `received` from `offset` on, if nothing was sent before the first `since` changes."""
        for start in range(0, len(received), BLOCK):
            part, place = received[start : start + BLOCK], offset + start
            if part != self.data[place : place + len(part)] and not self._has_been(
                place, part, since
            ):
                return False
        return True

    def _has_been(self, offset: int, received: bytes, since: int) -> bool:
        return all(
            byte in self.versions(place, since) for place, byte in enumerate(received, offset)
        )


@dataclass(slots=True)
class Stream:
    """What is known of one client's stream from the outside, from the moment when its header was whole."""

    # the number in it
    header: int
    from_end: bool
    # none of its bytes was sent before as many changes of the file
    since: int
    # where it may start: we cannot know when the header is read
    starts: set[int] = field(default_factory=set)
    started: bool = False
    # bytes received
    count: int = 0
    # no byte from here on was sent before the last change, for the file was never longer
    reach: int = 0

    def note_size(self, size: int) -> None:
        """Take in a size that the file has: the header may be read now."""
        if not self.started:
            self.starts.add(max(0, size - self.header) if self.from_end else self.header)

    def note_start(self, start: int) -> None:
        """Take in where the server says that this stream starts."""
        assert start in self.starts, f"starts at {start}, not at one of {sorted(self.starts)}"
        self.starts, self.started = {start}, True

    def note_change(self, history: History) -> None:
        """Take in that the file is about to change: whoever has received all that it ever held has nothing on its way."""
        self.reach = max(self.reach, history.size)
        if self.furthest() >= self.reach and len(self.starts) == 1:
            self.since = history.now

    def due(self, size: int) -> int:
        """Return how many bytes more must come, at least, while the file has that `size`."""
        return min((max(0, size - start - self.count) for start in self.starts), default=0)

    def furthest(self) -> int:
        """Return the last offset that this stream may stand at."""
        return max(self.starts, default=0) + self.count

    def stands_at(self, offset: int) -> bool:
        """Tell whether `offset` is where this stream is for certain."""
        return {start + self.count for start in self.starts} == {offset}

    def take(self, received: bytes, history: History) -> None:
        """Take in the next bytes received. Raises AssertionError where no stream from any possible start has them here."""
        self.started = True
        fitting = {
            start
            for start in self.starts
            if history.allows(start + self.count, received, self.since)
        }
        assert fitting, self.describe_difference(received, history)
        self.starts = fitting
        self.count += len(received)

    def describe_difference(self, received: bytes, history: History) -> str:
        """Say where `received` begins to differ from the file, for each possible start."""
        places = [
            f"{start}: {self._first_difference(start + self.count, received, history)}"
            for start in sorted(self.starts)
        ]
        return (
            f"byte {self.count} of the stream, {len(received)} more received; by its start, "
            + "; ".join(places)
        )

    def _first_difference(self, offset: int, received: bytes, history: History) -> str:
        for place, byte in enumerate(received, offset):
            if byte not in history.versions(place, self.since):
                here, there = (
                    received[place - offset :][:20],
                    bytes(history.data[place : place + 20]),
                )
                return f"at byte {place} of {history.size} {here!r}, not {there!r}{find(here, history)}"
        return "no difference"


def find(piece: bytes, history: History) -> str:
    """Say where else in the file `piece` is."""
    place = history.data.find(piece)
    return f", as from byte {place}" if place >= 0 else ""


def in_pages(data: bytes, offset: int, page: int = 4096) -> Iterable[bytes]:
    """Yield `data` in pieces none of which, written from `offset` on, reaches over the end of a page.

    Only a write(2) within a page is seen either whole or not at all by whoever asks for the file's size meanwhile.
    """
    while data:
        room = page - offset % page
        yield data[:room]
        data, offset = data[room:], offset + len(data[:room])
