"""Decides what to request after a lost connection, so that a stream resumes at the exact byte.

This client does not ask the server for offsets (`?`). A stream that began at an offset
from the start of the file knows its offset at all times. A stream that began at an offset from the
end knows only the last bytes before its position. If the file is short, it can fetch all of them,
and count them to learn its offset.

This module is pure: it makes no system calls.
"""

from collections.abc import Callable

# Number of bytes before the position that a new connection must confirm: they are compared or
# searched for.
CONTEXT = 4096

# How many bytes at the end of the file are searched for the position of a stream that began at an
# offset from the end. The second number is used if the position is not found with the first, or if
# fewer than CONTEXT bytes have been received. These bytes are held in memory. What is appended
# during an outage must fit into the second number.
WINDOWS = (1 << 20, 64 << 20)

# Bytes to fetch from the end of the file when a stream that began at an offset from the end is
# quiet. If the file is shorter than this, the fetch shows its size, which is the stream's offset.
ANCHOR = 64 << 10

_INT64_MAX = 2**63 - 1

Recall = Callable[[int], bytes]


class OffsetError(ValueError):
    """The given value is not an offset. The message says why, in one line."""


class PlaceError(Exception):
    """The stream cannot be resumed at the exact byte."""


class OtherFileError(PlaceError):
    """The server has different bytes before the offset, so it has a different file now."""


class LostPlaceError(PlaceError):
    """The position of a stream that began at an offset from the end cannot be found again.

    The end of the file does not contain the bytes that were received last, or contains them more
    than once.
    """


class FromStart:
    """The position of a stream that knows its offset.

    `recall` returns the bytes that a server must have directly before the given offset. By default
    these are the bytes that were received last.
    """

    def __init__(self, offset: int, recall: Recall | None = None, last: bytes = b"") -> None:
        self.offset = offset
        self._last = last
        self._recall = recall or (lambda _: self._last)
        self._expected = b""

    def header(self) -> bytes:
        """Return the header to send on a new connection."""
        self._expected = self._recall(self.offset)
        return b"%d\n" % (self.offset - len(self._expected))

    @property
    def wanted(self) -> int:
        """The number of bytes to receive before the new ones, 0 if the next bytes are new."""
        return len(self._expected)

    def take(self, data: bytes) -> bytes:
        """Process the received `data`, and return the new bytes in it. Raises OtherFileError.

        If `wanted` is not 0, `data` must not be longer than that.
        """
        if not self._expected:
            self.offset += len(data)
            self._last = _last_of(self._last, data)
            return data
        if not self._expected.startswith(data):
            raise OtherFileError(
                f"the server has a different file: the bytes before offset {self.offset} differ"
                " (was the file rotated?); start again with offset 0 or -0"
            )
        self._expected = self._expected[len(data) :]
        return b""

    def advance(self, count: int) -> None:
        """Advance the offset by `count` new bytes that were received without `take`."""
        self.offset += count


class FromEnd:
    """The position of a stream that began `count` bytes before the end of the file.

    With `line`, the stream begins after the first newline from there.

    After a lost connection it requests the end of the file, called the window, and searches it for
    the last bytes before the position, up to CONTEXT. If the window contains them exactly once, the
    stream continues after them. If the file is shorter than ANCHOR, the stream learns its offset.
    """

    def __init__(self, count: int, line: bool = False) -> None:
        self.count = count
        self.offset: int | None = None
        # Whether the bytes before the position have been fetched into `_last`, up to CONTEXT.
        self.anchored = False
        # Whether to discard bytes up to the first newline.
        self._skipping = line
        self._last = b""
        # What `offer` has proposed. None: nothing, or data has arrived since.
        self._offered: bytes | None = None
        # The part of the window that was received so far. None: the position is known.
        self._window: bytearray | None = None
        # The index in WINDOWS of the window's full length.
        self._width = 0
        # The last bytes of the file at some time after the window was requested.
        self._end = b""
        # The length of the window when it was last searched without success.
        self._searched = 0

    def header(self) -> bytes:
        """Return the header to send on a new connection.

        As long as nothing has been received, this is the header that began the stream.
        """
        self._offered = None
        self._window = bytearray() if self._last else None
        self._end, self._searched = b"", 0
        if 0 < len(self._last) < CONTEXT:
            # So few bytes may occur a second time by chance: search the largest window for them.
            self._width = len(WINDOWS) - 1
        return b"-%d\n" % (WINDOWS[self._width] if self._last else self.count)

    @property
    def wanted(self) -> int:
        """The number of bytes to receive before the new ones, 0 if the next bytes are new."""
        return 0 if self._window is None else WINDOWS[self._width] - len(self._window)

    def take(self, data: bytes) -> bytes | None:
        """Process the received `data`, and return the new bytes in it. Raises LostPlaceError.

        Returns None if a new connection is needed, to request a larger window.
        """
        self._offered = None
        if self._window is None:
            return self._new(data)
        self._window += data
        return self._search_if_complete(self._window, len(data))

    @property
    def searching(self) -> bool:
        """Whether the position has not been found in the window yet."""
        return self._window is not None

    @property
    def unsearched(self) -> bool:
        """Whether the window contains bytes that have not been searched."""
        return self._window is not None and len(self._window) > self._searched

    def reach(self, end: bytes) -> bytes:
        """Return the new bytes if the window contains `end`, else b"". Raises LostPlaceError.

        `end` is the last CONTEXT bytes of the file at present. If the window does not contain them
        yet, it is searched as soon as `take` has added them. There is no other sign that the window
        of a short file is complete: if nothing arrives, the network may only be slow.
        """
        assert self._window is not None
        self._end = end
        # The result is never None here: that is for a full window, which `take` has searched.
        return self._search_if_complete(self._window, 0) or b""

    def offer(self, end: bytes) -> None:
        """Propose `end`, the last ANCHOR bytes of the file, as the bytes before the position.

        They are used by the next `settle` if no data arrives before.
        """
        if end.endswith(self._last):
            self._offered = end

    def settle(self) -> None:
        """Use the bytes proposed by `offer`, because nothing has arrived since then."""
        if self._offered is not None:
            self.anchored = True
            self._last = self._offered[-CONTEXT:]
            if len(self._offered) < ANCHOR and not self._skipping:
                self.offset = len(self._offered)

    def known(self) -> "FromStart | FromEnd":
        """Return this position, as a `FromStart` if the offset is known by now."""
        return self if self.offset is None else FromStart(self.offset, last=self._last)

    def _new(self, data: bytes) -> bytes:
        self._last = _last_of(self._last, data)
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            self._skipping = not newline
        return data

    def _search_if_complete(self, window: bytearray, new: int) -> bytes | None:
        """Search the window if it is full, or if it reaches the end of the file.

        `new` is the number of bytes that were added to the window. The bytes before them were
        compared with the end of the file when they were added.
        """
        reached = (
            self._end and window.find(self._end, max(0, len(window) - new - len(self._end))) >= 0
        )
        return self._search(window) if reached or not self.wanted else b""

    def _search(self, window: bytearray) -> bytes | None:
        first = window.find(self._last)
        if first < 0 and self.wanted:
            self._end, self._searched = b"", len(window)
            # The server may be a replica that lags behind: wait for more.
            return b""
        if first < 0 and self._width + 1 < len(WINDOWS):
            self._width += 1
            return None
        if first < 0 or window.find(self._last, first + 1) >= 0:
            found, reason = (
                ("not", "it was rotated, or it grew too much during the outage")
                if first < 0
                else ("more than once", "its content repeats")
            )
            raise LostPlaceError(
                f"position lost: the bytes received last are {found} in the file's last"
                f" {len(window)} bytes ({reason}); start again with offset 0, -0 or a known one"
            )
        self._window, self._width = None, 0
        return self._new(bytes(window[first + len(self._last) :]))


Position = FromStart | FromEnd


def position_at(offset: int | str, recall: Recall | None = None) -> Position:
    """Return the position for an offset of the protocol. Raises OffsetError.

    The offset is N, -N, or "-0". "-0" must be text, because the integer -0 is 0.
    """
    text = str(offset)
    digits = text[1:] if text[:1] in ("-", "+") else text
    if not (digits.isascii() and digits.isdigit()):
        raise OffsetError(f"not an offset: {text!r}; expected N, -N or -0")
    count = int(digits.lstrip("0")[:20] or "0")
    if count > _INT64_MAX:
        raise OffsetError(f"offset does not fit 64 bits: {text}")
    return FromEnd(count) if text.startswith("-") else FromStart(count, recall)


def _last_of(before: bytes, data: bytes) -> bytes:
    """Return the last CONTEXT bytes of `before` followed by `data`."""
    return data[-CONTEXT:] if len(data) >= CONTEXT else (before + data)[-CONTEXT:]
