"""Where a stream stands, and what to ask for to come back to the exact byte. Pure: it has never met a socket.

The server sends bytes and nothing else: it tells no offset. A stream that began at an offset from the file's start always
knows where it is. One that began from the end does not: it knows its place by the bytes before it alone.
"""

from collections.abc import Callable

CONTEXT = 4096  # bytes before the place that are compared, or searched for, before a stream goes on

# What is searched for the place of a stream that began from the end; a wider window only if it is not in the narrower.
# It is held in memory. What is appended during an outage must fit into the last.
WINDOWS = (1 << 20, 64 << 20)

_INT64_MAX = 2**63 - 1


class PlaceError(Exception):
    """The stream cannot go on at the exact byte."""


class OtherFileError(PlaceError):
    """The bytes before the offset are not those that were there: it is another file now."""


class LostPlaceError(PlaceError):
    """A stream that began from the end has not found the bytes that came last, or not in one place alone."""


Recall = Callable[[int], bytes]


class FromStart:
    """The place of a stream that began at an offset from the file's start.

    `recall` returns the bytes before an offset that are to be compared; by default those that came last.
    """

    def __init__(self, offset: int, recall: Recall | None = None) -> None:
        self.offset = offset
        self._last = b""
        self._recall = recall or (lambda _: self._last)
        self._expected = b""

    def header(self) -> bytes:
        """Return what to send on a new connection."""
        self._expected = self._recall(self.offset)
        return b"%d\n" % (self.offset - len(self._expected))

    @property
    def wanted(self) -> int:
        """How many bytes `take` needs before what is new; no others may be read for it."""
        return len(self._expected)

    def take(self, data: bytes) -> bytes | None:
        """Return what is new in `data`, which has come. Raises OtherFileError."""
        if self._expected:
            if not self._expected.startswith(data):
                raise OtherFileError(f"the bytes before offset {self.offset} are others now: this is another file")
            self._expected = self._expected[len(data) :]
            return b""
        self.offset += len(data)
        self._last = (self._last + data)[-CONTEXT:] if len(data) < CONTEXT else data[-CONTEXT:]
        return data

    def skip(self, count: int) -> None:
        """Note that `count` new bytes have come, and gone another way."""
        self.offset += count

    def settle(self) -> bytes | None:
        """Return what is new, now that nothing more has come for a while."""
        return b""

    @property
    def unsure(self) -> bool:
        """Whether the place could not be found again."""
        return False


class FromEnd:
    """The place of a stream that began `count` bytes before the end; with `line`, behind the first newline from there.

    Its offset is unknown. After a lost connection it asks for the end of the file and looks in it for the last bytes that came,
    up to 4 KiB. Where they are there exactly once, it goes on behind them; else it raises LostPlaceError.
    """

    def __init__(self, count: int, line: bool = False) -> None:
        self.offset: int | None = None
        self.count = count
        self._skipping = line
        self._last = b""
        self._window: bytearray | None = None
        self._width = 0
        self._begun_empty = False
        self._offered: bytes | None = None

    def header(self) -> bytes:
        """Return what to send on a new connection."""
        self._offered = None
        if self._last:
            self._window = bytearray()
            return b"-%d\n" % WINDOWS[self._width]
        return b"0\n" if self._begun_empty else b"-%d\n" % self.count

    @property
    def wanted(self) -> int:
        """How many bytes `take` needs before what is new; no others may be read for it."""
        return 0 if self._window is None else WINDOWS[self._width] - len(self._window)

    def take(self, data: bytes) -> bytes | None:
        """Return what is new in `data`, which has come; None: connect again. Raises LostPlaceError."""
        self._offered = None
        if self._window is None:
            return self._new(data)
        self._window += data
        return b"" if self.wanted else self._search()

    def settle(self) -> bytes | None:
        """Return what is new, now that nothing more has come for a while; None: connect again. Raises LostPlaceError."""
        if self._window is not None:
            return self._search()
        if self._offered is not None:
            self._last, self._begun_empty, self._offered = self._offered, not self._offered, None
        return b""

    @property
    def unsure(self) -> bool:
        """Whether the place could not be found again: too little has come so far."""
        return self._window is None and len(self._last) < CONTEXT and not self._begun_empty

    def offer(self, end: bytes) -> None:
        """Take `end`, the file's last bytes, for those before the place, if nothing comes until the next `settle`."""
        if end.endswith(self._last):
            self._offered = end

    def _new(self, data: bytes) -> bytes:
        self._last = (self._last + data)[-CONTEXT:] if len(data) < CONTEXT else data[-CONTEXT:]
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            self._skipping = not newline
        return data

    def _search(self) -> bytes | None:
        assert self._window is not None
        window, whole = bytes(self._window), not self.wanted
        self._window = None
        first = window.find(self._last)
        if first < 0 and whole and self._width + 1 < len(WINDOWS):
            self._width += 1
            return None
        if first < 0:
            raise LostPlaceError(f"cannot find the place again: what came last is not in the last {len(window)} bytes")
        if window.find(self._last, first + 1) >= 0:
            raise LostPlaceError(f"cannot find the place again: what came last is more than once in the last {len(window)} bytes")
        self._width = 0
        return self._new(window[first + len(self._last) :])


Place = FromStart | FromEnd


def place_at(offset: int | str, recall: Recall | None = None) -> Place:
    """Return the place that an offset as in the protocol names: N, -N, or "-0", which no number can say. Raises ValueError."""
    text = str(offset)
    digits = text.removeprefix("-") if text.startswith("-") else text.removeprefix("+")
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"not an offset: {offset!r}")
    count = int(digits.lstrip("0")[:20] or "0")
    if count > _INT64_MAX:
        raise ValueError(f"offset does not fit 64 bits: {text}")
    return FromEnd(count) if text.startswith("-") else FromStart(count, recall)
