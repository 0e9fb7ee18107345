"""Decides what to request on each connection, so that a stream resumes at the exact byte.

The first header of a stream begins with `?`. The server then sends one line before the bytes of
the log: the offset of the first byte that follows, and the offset of the log's end. From then on
the stream knows its offset. After a lost connection it requests the last bytes before its offset
again, and compares them.

This module is pure: it makes no system calls.
"""

import re
from collections.abc import Callable

from tailsrv.formatting import parse_digits

# Number of bytes before the offset that a new connection must confirm.
CONTEXT = 4096

# The line that a server sends for a header with `?`: two offsets of 19 digits.
LINE_SIZE = 40
_LINE = re.compile(rb"([0-9]{19}) ([0-9]{19})\n")

_INT64_MAX = 2**63 - 1

Recall = Callable[[int], bytes]


class OffsetError(ValueError):
    """The given value is not an offset. The message says why, in one line."""


class PlaceError(Exception):
    """The stream cannot be started or resumed at the exact byte."""


class OtherFileError(PlaceError):
    """The server has different bytes before the offset, so it has a different file now."""


class GoneError(PlaceError):
    """The log starts at `start` now, after `offset`: the bytes between them were deleted."""

    def __init__(self, offset: int, start: int, text: str = "") -> None:
        super().__init__(
            text
            or f"the bytes from offset {offset} on no longer exist: the log starts at offset"
            f" {start} now; start again with offset 0 (the earliest byte there is), or name a"
            " server that still has them"
        )
        self.offset, self.start = offset, start


class Position:
    """Where a stream stands: `count` bytes after the log's start, or before its end, at first.

    With `whole_lines`, a stream that begins before the end skips the rest of the line that it
    begins in.

    `recall` returns the bytes that a server must have directly before the given offset. By default
    these are the bytes that were received last. A stream with `recall` must begin exactly at its
    offset. Without it, offset 0 stands for the earliest byte of the log.

    `offset` is the offset of the next new byte, None while it is unknown. `end` is the second
    offset of the line that was received last, None before that.
    """

    def __init__(
        self, count: int, from_end: bool, recall: Recall | None = None, whole_lines: bool = False
    ) -> None:
        self.offset = None if from_end else count
        self.end: int | None = None
        # Whether the stream has begun: its offset is known, and the bytes before it were compared.
        self.settled = False
        # Whether the last header began with `?`.
        self.asked = False
        # With `whole_lines`, one more byte shows whether a line begins exactly at the offset.
        self._count = count + (from_end and whole_lines)
        self._whole_lines = from_end and whole_lines
        # Whether to discard bytes up to the first newline.
        self._skipping = False
        # Whether new bytes must follow the bytes before the offset without a gap.
        self._exact = recall is not None or count > 0
        # Whether any byte of the log was received.
        self._started = False
        self._last = b""
        self._recall = recall or (lambda _: self._last)
        # The log is known to start here. Bytes before that are not compared.
        self._log_start = 0
        # What was received of the line. None: no line is expected.
        self._line: bytes | None = None
        # The bytes before the offset that have not been received again yet.
        self._expected = b""

    def header(self, ask: bool = True) -> bytes:
        """Return the header to send on a new connection.

        Until the stream is settled, it begins with `?`, unless `ask` is false. So does one for
        offset 0, because without `?` the server does not tell which byte it starts with.
        """
        self._expected = self._compared()
        self.asked = ask and (not self.settled or self.requested == 0)
        self._line = b"" if self.asked else None
        question = b"?" if self.asked else b""
        if self.requested is None:
            return b"%s-%d\n" % (question, self._count)
        return b"%s%d\n" % (question, self.requested)

    @property
    def requested(self) -> int | None:
        """The first byte to receive on this connection. None: counted from the end."""
        return None if self.offset is None else self.offset - len(self._expected)

    @property
    def wanted(self) -> int:
        """The number of bytes to receive before the new ones, 0 if the next bytes are new."""
        return len(self._expected) if self._line is None else LINE_SIZE - len(self._line)

    @property
    def awaits_line(self) -> bool:
        """Whether the line has not arrived yet."""
        return self._line is not None

    @property
    def compares(self) -> bool:
        """Whether bytes before the offset have not been received again yet."""
        return bool(self._expected)

    @property
    def can_resume(self) -> bool:
        """Whether another connection can continue the stream."""
        return self.offset is not None or not self._started

    @property
    def needs_line(self) -> bool:
        """Whether the stream cannot begin without the line."""
        return self._whole_lines and self.offset is None

    def take(self, data: bytes) -> bytes:
        """Process the received `data`, and return the new bytes in it.

        If `wanted` is not 0, `data` must not be longer than that. Raises OtherFileError, GoneError,
        or PlaceError if the answer is not a line of offsets.
        """
        if self._line is not None:
            self._line += data
            if len(self._line) == LINE_SIZE:
                self._begin(*parse_line(self._line))
            return b""
        if self._expected:
            self._compare(data)
            return b""
        return self._new(data)

    def advance(self, count: int) -> None:
        """Advance the offset by `count` new bytes that were received without `take`."""
        assert self.offset is not None
        self.offset += count
        self._started = self.settled = True

    def starts_at(self, log_start: int) -> None:
        """Note that the log starts at `log_start` now. Raises GoneError if that is too late."""
        if self.offset is not None and log_start > self.offset:
            raise GoneError(self.offset, log_start)
        self._log_start = log_start

    def _compared(self) -> bytes:
        """Return the bytes before the offset that the server has to send again."""
        if self.offset is None:
            return b""
        expected = self._recall(self.offset)
        return expected[max(0, len(expected) - (self.offset - self._log_start)) :]

    def _begin(self, start: int, end: int) -> None:
        """Begin with the byte at `start`, as the line says."""
        self._line, self.end = None, end
        if self.offset is None:
            self._skipping = self._whole_lines and end - start == self._count
        if self.offset is None or (start > self.offset and not (self._exact or self._started)):
            self.offset = start
        elif start > self.offset:
            raise GoneError(self.offset, start)
        else:
            # The log may start after the byte at offset 0 that was requested.
            requested = self.offset - len(self._expected)
            self._expected = self._expected[max(0, start - requested) :]
        self._settle_if_complete()

    def _settle_if_complete(self) -> None:
        self.settled = self.settled or not self.wanted

    def _compare(self, data: bytes) -> None:
        if not self._expected.startswith(data):
            raise OtherFileError(
                f"the server has a different file: the bytes before offset {self.offset} differ"
                " (was the file rotated?); start again with offset 0 or -0"
            )
        self._expected = self._expected[len(data) :]
        self._settle_if_complete()

    def _new(self, data: bytes) -> bytes:
        self._started = True
        if self.offset is not None:
            self.offset += len(data)
            self.settled = True
        self._last = data[-CONTEXT:] if len(data) >= CONTEXT else (self._last + data)[-CONTEXT:]
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            self._skipping = not newline
        return data


def position_at(
    offset: int | str, recall: Recall | None = None, whole_lines: bool = False
) -> Position:
    """Return the position for an offset of the protocol. Raises OffsetError.

    The offset is N, -N, or "-0". "-0" must be text, because the integer -0 is 0.
    """
    text = str(offset)
    digits = text[1:] if text[:1] in ("-", "+") else text
    if (count := parse_digits(digits)) is None:
        raise OffsetError(f"not an offset: {text!r}; expected N, -N or -0")
    if count > _INT64_MAX:
        raise OffsetError(f"offset does not fit 64 bits: {text}")
    from_end = text.startswith("-")
    return Position(count, from_end, None if from_end else recall, whole_lines)


def parse_line(line: bytes) -> tuple[int, int]:
    """Return the two offsets of a line that a server has sent. Raises PlaceError."""
    if not (match := _LINE.fullmatch(line)):
        raise PlaceError(f"not a tailsrv: expected a line with two offsets, not {line!r}")
    return int(match[1]), int(match[2])
