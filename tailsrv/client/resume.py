"""Where a stream stands, and what to ask for to come back to the exact byte. Pure: it has never met a socket.

The server sends bytes of the file and nothing else: it tells no offset. A stream that began at an offset from the file's start
always knows its own. One that began from the end knows its place only by the bytes before it, unless they are all of the file.
"""

from collections.abc import Callable

# bytes before the place that are compared, or searched for, before a stream goes on
CONTEXT = 4096

# How much of the file's end is searched for the place of a stream that began there; the wider only if it is not in the narrower.
# It is held in memory. What is appended during an outage must fit into the last.
WINDOWS = (1 << 20, 64 << 20)

# bytes of the file's end to fetch when a stream that began there is quiet; a shorter file gives its offset
ANCHOR = 64 << 10

_INT64_MAX = 2**63 - 1

Recall = Callable[[int], bytes]


class OffsetError(ValueError):
    """What was given is no offset; the message says why, in one line."""


class PlaceError(Exception):
    """The stream cannot go on at the exact byte."""


class OtherFileError(PlaceError):
    """The bytes before the offset are not those that were there: it is another file now."""


class LostPlaceError(PlaceError):
    """A stream that began from the end does not find the bytes that came last, or not in one place alone."""


class FromStart:
    """The place of a stream that knows its offset.

    `recall` returns the bytes before an offset that a server is to have; by default those that came last.
    """

    def __init__(self, offset: int, recall: Recall | None = None, last: bytes = b"") -> None:
        self.offset = offset
        self._last = last
        self._recall = recall or (lambda _: self._last)
        self._expected = b""

    def header(self) -> bytes:
        """Return what to send on a new connection."""
        self._expected = self._recall(self.offset)
        return b"%d\n" % (self.offset - len(self._expected))

    @property
    def wanted(self) -> int:
        """How many bytes must come before those that are new."""
        return len(self._expected)

    def take(self, data: bytes) -> bytes:
        """Return what is new in `data`, which has come, and is no more than `wanted` if that is not 0. Raises OtherFileError."""
        if not self._expected:
            self.offset += len(data)
            self._last = _last_of(self._last, data)
            return data
        if not self._expected.startswith(data):
            raise OtherFileError(
                f"another file is served now: the bytes before offset {self.offset} are not those that were there"
            )
        self._expected = self._expected[len(data) :]
        return b""

    def pass_by(self, count: int) -> None:
        """Note that `count` new bytes have come, and gone another way."""
        self.offset += count


class FromEnd:
    """The place of a stream that began `count` bytes before the end; with `line`, behind the first newline from there.

    After a lost connection it asks for the end of the file and searches that for the bytes that came last, up to 4 KiB.
    Where they are there exactly once, it goes on behind them. A file shorter than ANCHOR gives it its offset.
    """

    def __init__(self, count: int, line: bool = False) -> None:
        self.count = count
        self.offset: int | None = None
        # there surely are bytes before the place that it knows
        self.anchored = False
        self._skipping = line
        self._last = b""
        self._offered: bytes | None = None
        self._window: bytearray | None = None
        self._width = 0
        # the file's last bytes at a moment when the window was asked for
        self._end = b""
        # so much of the window, in vain
        self._searched = 0

    def header(self) -> bytes:
        """Return what to send on a new connection: as long as nothing has come, it begins again."""
        self._offered = None
        self._window = bytearray() if self._last else None
        self._end, self._searched = b"", 0
        if 0 < len(self._last) < CONTEXT:
            # so little may be somewhere else by chance: all of the window must say that it is not
            self._width = len(WINDOWS) - 1
        return b"-%d\n" % (WINDOWS[self._width] if self._last else self.count)

    @property
    def wanted(self) -> int:
        """How many bytes must come before those that are new."""
        return 0 if self._window is None else WINDOWS[self._width] - len(self._window)

    def take(self, data: bytes) -> bytes | None:
        """Return what is new in `data`, which has come; None: connect again. Raises LostPlaceError."""
        self._offered = None
        if self._window is None:
            return self._new(data)
        self._window += data
        return self._look(self._window, len(data))

    @property
    def searching(self) -> bool:
        """Whether it has yet to find itself in a window."""
        return self._window is not None

    @property
    def unsearched(self) -> bool:
        """Whether there is something in the window that has not been searched."""
        return self._window is not None and len(self._window) > self._searched

    def reach(self, end: bytes) -> bytes:
        """Return what is new if the window reaches to `end`, the last CONTEXT bytes of the file now. Raises LostPlaceError.

        If it does not, it does when `take` brings that. Nothing else tells that a window is complete: silence may be a slow network.
        """
        assert self._window is not None
        self._end = end
        # a full one has been searched before
        return self._look(self._window, 0) or b""

    def offer(self, end: bytes) -> None:
        """Take `end`, the last ANCHOR bytes of the file, for those before the place, if nothing comes until the next `settle`."""
        if end.endswith(self._last):
            self._offered = end

    def settle(self) -> None:
        """Note that nothing has come for a while."""
        if self._offered is not None:
            self.anchored = True
            self._last = self._offered[-CONTEXT:]
            if len(self._offered) < ANCHOR and not self._skipping:
                self.offset = len(self._offered)

    def known(self) -> "FromStart | FromEnd":
        """Return the place as one that knows its offset, if it does."""
        return self if self.offset is None else FromStart(self.offset, last=self._last)

    def _new(self, data: bytes) -> bytes:
        self._last = _last_of(self._last, data)
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            self._skipping = not newline
        return data

    def _look(self, window: bytearray, new: int) -> bytes | None:
        """Search the window if it is full, or now reaches the file's end, which is not before the last `new` bytes."""
        there = (
            self._end and window.find(self._end, max(0, len(window) - new - len(self._end))) >= 0
        )
        return self._search(window) if there or not self.wanted else b""

    def _search(self, window: bytearray) -> bytes | None:
        first = window.find(self._last)
        if first < 0 and self.wanted:
            self._end, self._searched = b"", len(window)
            # a replica may be behind
            return b""
        if first < 0 and self._width + 1 < len(WINDOWS):
            self._width += 1
            return None
        if first < 0 or window.find(self._last, first + 1) >= 0:
            how = "not there" if first < 0 else "there more than once"
            raise LostPlaceError(
                f"cannot find the place again: in the last {len(window)} bytes, what came last is {how}"
            )
        self._window, self._width = None, 0
        return self._new(bytes(window[first + len(self._last) :]))


Position = FromStart | FromEnd


def position_at(offset: int | str, recall: Recall | None = None) -> Position:
    """Return the place that an offset as in the protocol names: N, -N, or "-0", which no number can say. Raises OffsetError."""
    text = str(offset)
    digits = text[1:] if text[:1] in ("-", "+") else text
    if not (digits.isascii() and digits.isdigit()):
        raise OffsetError(f"not an offset: {text!r}")
    count = int(digits.lstrip("0")[:20] or "0")
    if count > _INT64_MAX:
        raise OffsetError(f"offset does not fit 64 bits: {text}")
    return FromEnd(count) if text.startswith("-") else FromStart(count, recall)


def _last_of(before: bytes, data: bytes) -> bytes:
    """Return the last bytes of what was and of what has come."""
    return data[-CONTEXT:] if len(data) >= CONTEXT else (before + data)[-CONTEXT:]
