"""Tests of resuming a stream: tables, and a simulated server whose connections break anywhere."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv.client.resume import (
    CONTEXT,
    LINE_SIZE,
    GoneError,
    OffsetError,
    OtherFileError,
    PlaceError,
    Position,
    parse_line,
    position_at,
)

DATA = random.Random(1).randbytes(300_000)


def serve(header: bytes, log: bytes, first: int = 0) -> bytes:
    """Return what a server sends at once for `header`; the log's bytes before `first` are gone."""
    text = header.decode().rstrip("\n")
    number = text.removeprefix("?")
    start = max(first, len(log) + int(number)) if number.startswith("-") else int(number)
    if 0 < start < first:
        return b""
    start = max(start, first)
    line = b"%019d %019d\n" % (start, len(log)) if text.startswith("?") else b""
    return line + log[start:]


def connect(
    position: Position,
    log: bytes,
    limit: int | None = None,
    piece: int | None = None,
    first: int = 0,
    ask: bool = True,
) -> bytes:
    """Return the new bytes of one more connection.

    The connection breaks after `limit` bytes, or stays silent at the end of the log. At most
    `piece` bytes are received at once.
    """
    new, sent = b"", serve(position.header(ask), log, first)[:limit]
    while sent:
        part = sent[: min(position.wanted or len(sent), piece or len(sent))]
        new, sent = new + position.take(part), sent[len(part) :]
    return new


@pytest.mark.parametrize(
    ("offset", "header"),
    [
        (0, b"0\n"),
        (1000, b"1000\n"),
        (-1000, b"-1000\n"),
        ("-0", b"-0\n"),
        ("+7", b"7\n"),
        ("007", b"7\n"),
        (2**63 - 1, b"9223372036854775807\n"),
        (-(2**63 - 1), b"-9223372036854775807\n"),
    ],
)
def test_first_header(offset: int | str, header: bytes) -> None:
    """The first header is `?` and the offset as it was given; an old server gets it without `?`."""
    position = position_at(offset)
    assert position.header() == b"?" + header
    assert position.header(ask=False) == header
    assert position.header() == b"?" + header, "nothing was received, so `?` is tried again"


@pytest.mark.parametrize(
    "offset", ["", "-", "+-1", "abc", "1_000", "1e3", " 1", "\u0663", 2**63, -(2**64), "9" * 5000]
)
def test_bad_offset(offset: int | str) -> None:
    """A value that no header can express is refused as an offset."""
    with pytest.raises(OffsetError, match="offset"):
        position_at(offset)


@pytest.mark.parametrize(
    "line",
    [b"0" * 40, b"%019d %019d" % (1, 2), b"%020d %018d\n" % (1, 2), b"%019d\t%019d\n" % (1, 2)],
)
def test_answer_that_is_no_line(line: bytes) -> None:
    """An answer that is not a line of two offsets is an error."""
    with pytest.raises(PlaceError, match="not a tailsrv"):
        parse_line(line)


@pytest.mark.parametrize("piece", [1, 7, LINE_SIZE, None])
@pytest.mark.parametrize(
    ("offset", "start"), [(0, 0), (10, 10), (-10, 990), ("-0", 1000), (-5000, 0), (2000, 2000)]
)
def test_line_gives_the_offset(offset: int | str, start: int, piece: int | None) -> None:
    """Every stream knows its offset, and the log's end, as soon as the line has arrived."""
    position = position_at(offset)
    assert connect(position, DATA[:1000], limit=LINE_SIZE, piece=piece) == b""
    assert (position.offset, position.end, position.wanted) == (start, 1000, 0)
    assert position.header() == b"%s%d\n" % (b"" if start else b"?", start)


@pytest.mark.parametrize("received", [1, 100, CONTEXT, CONTEXT + 1, 100_000])
def test_last_bytes_are_compared(received: int) -> None:
    """After a lost connection the last bytes are requested again, compared, and left out."""
    position = position_at(10)
    assert connect(position, DATA[: 10 + received]) == DATA[10 : 10 + received]
    assert position.offset == 10 + received
    assert position.header() == b"%d\n" % (10 + received - min(received, CONTEXT))
    assert position.wanted == min(received, CONTEXT)
    assert connect(position, DATA[: 20 + received]) == DATA[10 + received : 20 + received]


@pytest.mark.parametrize("wrong", [0, 1, CONTEXT - 1])
def test_other_file_is_detected(wrong: int) -> None:
    """One different byte before the offset is an error before any new byte is returned."""
    position = position_at(CONTEXT, recall=lambda offset: DATA[offset - CONTEXT : offset])
    other = bytearray(DATA[: 2 * CONTEXT])
    other[wrong] ^= 1
    with pytest.raises(OtherFileError, match="before offset 4096"):
        connect(position, bytes(other))


def test_line_is_requested_until_the_bytes_were_compared() -> None:
    """A server that lags behind tells an end, but the next server is asked for the line again."""
    position = position_at(100, recall=lambda offset: DATA[:offset])
    connect(position, DATA[:50])
    assert (position.end, position.wanted, position.settled) == (50, 50, False)
    assert connect(position, DATA[:120]) == DATA[100:120]
    assert (position.end, position.settled) == (120, True)


def test_earliest_byte() -> None:
    """Offset 0 is the earliest byte of the log, as long as nothing was received."""
    position = position_at(0)
    connect(position, DATA[:1000], limit=LINE_SIZE)
    assert connect(position, DATA[:1000], first=700) == DATA[700:1000]
    assert position.offset == 1000


@pytest.mark.parametrize("length", [0, 5])
def test_copy_does_not_begin_at_a_later_byte(length: int) -> None:
    """A stream with `recall` fails if the log starts after its offset, even if that is 0."""
    position = position_at(length, recall=lambda offset: DATA[:offset])
    with pytest.raises(GoneError, match="starts at offset 700 now") as caught:
        connect(position, DATA[:1000], first=700)
    assert (caught.value.offset, caught.value.start) == (length, 700)


def test_only_bytes_that_exist_are_compared() -> None:
    """If only bytes before the offset were deleted, the rest of them is compared."""
    position = position_at(0)
    connect(position, DATA[:5000])
    position.header()
    position.starts_at(4500)
    assert connect(position, DATA[:6000], first=4500) == DATA[5000:6000]
    with pytest.raises(GoneError, match="bytes from offset 6000 on"):
        position.starts_at(6001)
    position.starts_at(6000)
    assert position.header() == b"6000\n"


def test_short_copy_is_compared_from_the_earliest_byte() -> None:
    """If byte 0 is requested for the comparison, and deleted, the bytes from the start count."""
    position = position_at(500, recall=lambda offset: DATA[:offset])
    assert connect(position, DATA[:1000], first=400) == DATA[500:1000]


@pytest.mark.parametrize("piece", [1, 7, None])
@pytest.mark.parametrize(
    ("count", "given"),
    [
        (0, b""),
        (3, b""),
        (4, b"new\n"),
        (5, b"new\n"),
        (10, b"new\n"),
        (11, b"a line\nnew\n"),
        (99, b"a line\nnew\n"),
    ],
)
def test_line_begins_after_the_first_newline(count: int, given: bytes, piece: int | None) -> None:
    """With `whole_lines`, the rest of a line is skipped, and counts for the offset."""
    log = b"a line\nnew\n"
    position = position_at(f"-{count}", whole_lines=True)
    assert connect(position, log, piece=piece) == given
    assert position.offset == len(log)


def test_line_is_left_out_across_connections() -> None:
    """If a connection breaks within the first line, the rest of that line is left out as well."""
    log = b"x" * 30 + b"0123456789abcdefghij"
    position = position_at(-20, whole_lines=True)
    assert connect(position, log) == b""
    assert connect(position, log + b"-\nnew\n") == b"new\n"


def test_old_server() -> None:
    """Without `?`, a stream from the end cannot resume once it has bytes; others can."""
    position = position_at(-10)
    assert connect(position, DATA[:100], ask=False) == DATA[90:100]
    assert (position.offset, position.can_resume) == (None, False)
    position = position_at(10)
    assert connect(position, DATA[:100], ask=False) == DATA[10:100]
    assert position.header() == b"10\n", "an old server must not be asked again"
    assert connect(position, DATA[:120]) == DATA[100:120]


def test_only_whole_lines_from_the_end_need_the_line() -> None:
    """A server without `?` can start at a whole line only with an offset from the start."""
    assert position_at(-1, whole_lines=True).needs_line
    assert not position_at(1, whole_lines=True).needs_line
    assert not position_at(-1).needs_line


@given(st.data())
def test_any_cuts(data: st.DataObject) -> None:
    """For any log, any breaks and any deletion, a stream is exact, or its bytes are gone."""
    draw = data.draw
    size = draw(st.integers(0, 300))
    log = draw(st.sampled_from([DATA, b"ab" * 4000, b"\n" * 8000]))
    position = position_at(draw(st.sampled_from(["-", ""])) + str(draw(st.integers(0, 300))))
    received, start, first = b"", None, 0
    gone: GoneError | None = None
    try:
        for _ in range(draw(st.integers(1, 6))):
            limit = draw(st.none() | st.integers(0, 4000))
            received += connect(position, log[:size], limit, draw(st.none() | st.just(9)), first)
            if position.offset is not None and received:
                start = position.offset - len(received) if start is None else start
            size += draw(st.integers(0, 300))
            first = draw(st.integers(first, min(first + 100, size)))
            if position.header() and position.requested and position.requested < first:
                position.starts_at(first)
    except GoneError as error:
        gone = error
    assert gone is None or gone.start > gone.offset == position.offset
    if received:
        assert start is not None
        assert received == log[start : start + len(received)]
        assert position.offset == start + len(received)
