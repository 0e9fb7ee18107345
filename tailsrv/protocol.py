"""Parses the header and resolves it to an offset. Pure: it has never met a socket."""

import re
from dataclasses import dataclass

# bytes before the newline: 20 hold any signed 64-bit number, the rest is slack for blanks
MAX_HEADER = 32
# with the newline; whoever has this many bytes knows whether the header is good
PEEK = MAX_HEADER + 1
_INT64_MAX = 2**63 - 1

# int() alone would also take b"1_000" and other people's digits
_HEADER = re.compile(rb"[ \t]*([+-]?)([0-9]+)[ \t]*\r?")


class HeaderError(ValueError):
    """What a client sent is not a header; the message says why."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a client wants its stream to start: `count` bytes from the file's start, or before its end."""

    count: int
    from_end: bool

    def offset(self, size: int) -> int:
        """Return the absolute offset for a file that is `size` bytes long."""
        return max(0, size - self.count) if self.from_end else self.count


def parse_header(received: bytes, ended: bool = False) -> Start | None:
    """Return where the stream is to start, or None if more is needed.

    `received` holds the first bytes a client has sent, PEEK of them or all there are; `ended` says that
    no more will come. Raises HeaderError where no continuation could make it a header.
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
    sign, digits = match.groups()
    count, from_end = int(digits), sign == b"-"
    if count > _INT64_MAX + from_end:
        raise HeaderError(f"number does not fit 64 bits: {line!r}")
    return Start(count, from_end)
