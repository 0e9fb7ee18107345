"""The client protocol: parses the header, resolves it to an offset, and writes the `?` line.

Pure: this module uses no socket and makes no system call.
"""

import re
from dataclasses import dataclass

# The largest number of bytes before the newline. 20 bytes hold any signed 64-bit number; the rest
# leaves room for blanks.
MAX_HEADER = 32
# MAX_HEADER and the newline. This many bytes suffice to decide whether the header is valid.
PEEK = MAX_HEADER + 1
_INT64_MAX = 2**63 - 1

# int() alone would also accept b"1_000".
_HEADER = re.compile(rb"[ \t]*(\??)[ \t]*([+-]?)([0-9]+)[ \t]*\r?")

# The `?` line: two numbers of 19 digits, which hold any offset, a blank and a newline.
_OFFSETS_LINE = b"%019d %019d\n"


class HeaderError(ValueError):
    """The bytes that a client sent are not a valid header; the message says why."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a header asks for.

    The stream starts at the log offset `count`, or `count` bytes before the log's end. If
    `with_offsets` is true, the `?` line comes before it.
    """

    count: int
    from_end: bool
    with_offsets: bool = False

    def offset(self, start: int, end: int) -> int:
        """Return the offset in a log whose bytes from `start` up to `end` still exist.

        0 stands for the earliest byte. Any other count is returned as it is, so the result may be
        before `start`: the bytes that the client asks for have been deleted.
        """
        if self.from_end:
            return max(start, end - self.count)
        return self.count or start


def parse_header(received: bytes, ended: bool = False) -> Start | None:
    """Parse the header at the beginning of what a client has sent.

    Args:
        received: The first bytes that the client has sent: PEEK of them, or all if it has sent
            fewer.
        ended: Whether the client has shut down its side, so that no more bytes will follow.

    Returns:
        The start of the stream, or None if more bytes are needed.

    Raises:
        HeaderError: The bytes are not a valid header, and no further bytes can make them one.

    """
    line, newline, _ = received[:PEEK].partition(b"\n")
    if not newline:
        if len(received) > MAX_HEADER:
            raise HeaderError("header too long")
        if ended:
            raise HeaderError(
                "input ended before the header's newline"
                if received
                else "input ended without a header"
            )
        return None
    if not (match := _HEADER.fullmatch(line)):
        raise HeaderError(f"not a number: {line!r}")
    question, sign, digits = match.groups()
    count, from_end = int(digits), sign == b"-"
    if count > _INT64_MAX + from_end:
        raise HeaderError(f"number does not fit 64 bits: {line!r}")
    return Start(count, from_end, with_offsets=bool(question))


def offsets_line(start: int, end: int) -> bytes:
    """Return the `?` line: the offset of the first byte that follows, and of the log's end."""
    return _OFFSETS_LINE % (start, end)


def resume(start: int, end: int | None, sent: int) -> tuple[bytes, int]:
    """Return what is left to send to a client: the rest of its `?` line, and the next offset.

    Args:
        start: The offset that the stream began at.
        end: The second number of the client's `?` line, None if it did not ask for one.
        sent: The number of bytes that the client has been sent, including those of the line.

    """
    line = b"" if end is None else offsets_line(start, end)
    return line[sent:], start + max(0, sent - len(line))


def began_at(offset: int, end: int | None, line: bytes, sent: int) -> int:
    """Return the offset that a stream began at: with it, resume() returns `line` and `offset`.

    Args:
        offset: The offset of the next byte to send.
        end: The second number of the client's `?` line, None if it did not ask for one.
        line: What is left to send of that line.
        sent: The number of bytes that the client has been sent, including those of the line.

    """
    if line or end is None:
        return offset if line else offset - sent
    return offset - (sent - len(offsets_line(0, end)))
