"""Tests of the header and the start of a stream: tables, each read three ways, and properties."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv.protocol import (
    MAX_HEADER,
    PEEK,
    HeaderError,
    Start,
    began_at,
    offsets_line,
    parse_header,
    resume,
)

INT64_MAX = 2**63 - 1

GOOD = [
    (b"0\n", Start(0, False)),
    (b"1000\n", Start(1000, False)),
    (b"007\n", Start(7, False)),
    (b"-5\n", Start(5, True)),
    (b"-0\n", Start(0, True)),
    (b"+0\n", Start(0, False)),
    (b"+12\n", Start(12, False)),
    (b"12\r\n", Start(12, False)),
    (b"-12\r\n", Start(12, True)),
    (b" 12\n", Start(12, False)),
    (b"12 \n", Start(12, False)),
    (b"\t 12 \t\r\n", Start(12, False)),
    (b" +12 \n", Start(12, False)),
    (b" -12 \n", Start(12, True)),
    (b"%d\n" % INT64_MAX, Start(INT64_MAX, False)),
    (b"-%d\n" % (INT64_MAX + 1), Start(INT64_MAX + 1, True)),
    (b"?0\n", Start(0, False, True)),
    (b"?17\n", Start(17, False, True)),
    (b"?+17\n", Start(17, False, True)),
    (b"?-0\n", Start(0, True, True)),
    (b"?-1000\r\n", Start(1000, True, True)),
    (b" ? 7 \n", Start(7, False, True)),
    (b"?%d\n" % INT64_MAX, Start(INT64_MAX, False, True)),
    (b"1".rjust(MAX_HEADER, b"0") + b"\n", Start(1, False)),
    (b" " * (MAX_HEADER - 1) + b"4\n", Start(4, False)),
    (b"4" + b" " * (MAX_HEADER - 2) + b"\r\n", Start(4, False)),
]

BAD_LINES = [
    b"", b" ", b"\r", b"abc", b"1_000", b"1e3", b"1.0", b"0x10", b"12abc", b"abc12", b"1 2", b"- 5",
    b"--5", b"+-5", b"-", b"+", b"5-", b"?", b"??1", b"?-", b"-?5", b"5?", b"? - 5", b"?a",
    b"1,000", b"12\r\r", b"1\r2", b"12\r ", b"\r12", b"\x0012",
    b"12\x00", b"\x0b12", b"\x0c12", b"GET / HTTP/1.1\r", "٣".encode(), "\uff11\uff12".encode(),
    "\u22125".encode(), "\u00a05".encode(), b"\xff\xfe", b"\xef\xbb\xbf12", b"%d" % (INT64_MAX + 1),
    b"-%d" % (INT64_MAX + 2), b"+%d" % (INT64_MAX + 1), b"9" * MAX_HEADER,
]  # fmt: skip


@pytest.mark.parametrize(("raw", "start"), GOOD)
def test_complete_header(raw: bytes, start: Start) -> None:
    """A complete header gives its start."""
    assert start == parse_header(raw)


@pytest.mark.parametrize(("raw", "start"), GOOD)
def test_header_byte_by_byte(raw: bytes, start: Start) -> None:
    """A header that arrives byte by byte is incomplete until its newline."""
    assert [None] * len(raw) == [parse_header(raw[:length]) for length in range(len(raw))]
    assert start == parse_header(raw)


@pytest.mark.parametrize("junk", [b"\n", b"junk", b"7\n", b"\x00\xff", b"x" * 1000])
@pytest.mark.parametrize(("raw", "start"), GOOD)
def test_header_with_junk_after_it(raw: bytes, start: Start, junk: bytes) -> None:
    """Bytes after the newline are ignored, complete or cut off by the peek."""
    assert start == parse_header(raw + junk)
    assert start == parse_header((raw + junk)[:PEEK])


@pytest.mark.parametrize(("raw", "start"), GOOD)
def test_header_then_end_of_input(raw: bytes, start: Start) -> None:
    """A half-close after the newline does not matter."""
    assert start == parse_header(raw, ended=True)


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line(line: bytes) -> None:
    """A line that is no number is refused with one printable line, whatever follows it."""
    for raw in (line + b"\n", line + b"\njunk", line + b"\n5\n"):
        with pytest.raises(HeaderError) as caught:
            parse_header(raw)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("line", BAD_LINES)
def test_incomplete_bad_line(line: bytes) -> None:
    """An incomplete line is not refused, whatever it contains, while it is short enough."""
    assert [None] * len(line) == [parse_header(line[:length]) for length in range(len(line))]


@pytest.mark.parametrize("line", BAD_LINES)
def test_end_of_input_before_the_newline(line: bytes) -> None:
    """Input that ends before a newline is refused, even if it is a valid number."""
    for raw in (line, b"5", b"-5\r"):
        with pytest.raises(HeaderError, match="ended"):
            parse_header(raw, ended=True)


@pytest.mark.parametrize("byte", [b"0", b" ", b"x", b"\x00"])
def test_header_length_limit(byte: bytes) -> None:
    """32 bytes may still become a header, and a 33rd byte that is no newline may not."""
    assert parse_header(byte * MAX_HEADER) is None
    for length in (MAX_HEADER + 1, MAX_HEADER + 2, 1000):
        with pytest.raises(HeaderError, match="too long"):
            parse_header(byte * length)
        with pytest.raises(HeaderError, match="too long"):
            parse_header(byte * length + b"\n")


def test_limits_are_as_documented() -> None:
    """The header limit is 32 bytes without the newline, and the peek reads one more."""
    assert (MAX_HEADER, PEEK) == (32, 33)


@pytest.mark.parametrize(
    ("start", "log", "offset"),
    [
        (Start(0, False), (0, 0), 0),
        (Start(0, False), (0, 100), 0),
        (Start(40, False), (0, 100), 40),
        (Start(100, False), (0, 100), 100),
        (Start(101, False), (0, 100), 101),
        (Start(INT64_MAX, False), (0, 100), INT64_MAX),
        (Start(0, True), (0, 0), 0),
        (Start(0, True), (0, 100), 100),
        (Start(40, True), (0, 100), 60),
        (Start(100, True), (0, 100), 0),
        (Start(101, True), (0, 100), 0),
        (Start(INT64_MAX + 1, True), (0, 100), 0),
        (Start(1, True), (0, INT64_MAX), INT64_MAX - 1),
        # The bytes before 60 have been deleted.
        (Start(0, False), (60, 100), 60),
        (Start(1, False), (60, 100), 1),
        (Start(59, False), (60, 100), 59),
        (Start(60, False), (60, 100), 60),
        (Start(40, True), (60, 100), 60),
        (Start(41, True), (60, 100), 60),
        (Start(INT64_MAX + 1, True), (60, 100), 60),
        (Start(0, True), (60, 60), 60),
    ],
)
def test_offset(start: Start, log: tuple[int, int], offset: int) -> None:
    """0 and a start from the end are not before the log's start; any other start may be."""
    assert offset == start.offset(*log)


def outcome(received: bytes, ended: bool = False) -> Start | str | None:
    """Return what parse_header() returns for `received`, or its error message."""
    try:
        return parse_header(received, ended)
    except HeaderError as error:
        return str(error)


def feed(pieces: list[bytes]) -> Start | str | None:
    """Return the first result for a reader that peeks after each piece."""
    received = b""
    for piece in pieces:
        received += piece
        if (result := outcome(received[:PEEK])) is not None:
            return result
    return None


numbers = st.integers(-INT64_MAX - 1, INT64_MAX)
lines = st.one_of(
    numbers.map(lambda number: b"%d\n" % number),
    st.from_regex(rb"[ \t+\-0-9\r\n_x]{0,40}", fullmatch=True),
    st.binary(max_size=80),
)


@given(lines, st.lists(st.integers(0, 80)))
def test_split_anywhere(raw: bytes, cuts: list[int]) -> None:
    """The result does not depend on how the network splits the header."""
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    assert outcome(raw[:PEEK]) == feed([raw[start:end] for start, end in pairwise(edges)])


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_at_all(raw: bytes, ended: bool) -> None:
    """Any bytes are a start within the limits, a refusal, or incomplete, but not at their end."""
    try:
        result = parse_header(raw, ended)
    except HeaderError:
        return
    if result is None:
        assert not ended
        assert b"\n" not in raw
        return
    assert 0 <= result.count <= INT64_MAX + result.from_end
    assert raw.index(b"\n") < PEEK


@given(lines, st.binary(max_size=100))
def test_junk_changes_nothing(line: bytes, junk: bytes) -> None:
    """Bytes after the first newline do not change the result."""
    raw = line.partition(b"\n")[0] + b"\n"
    assert outcome(raw) == outcome(raw + junk) == outcome(raw + junk, ended=True)


@given(
    numbers,
    st.sampled_from([b"", b" ", b"\t", b"  "]),
    st.sampled_from([b"", b" ", b"\t"]),
    st.sampled_from([b"", b"\r"]),
)
def test_numbers_round_trip(
    number: int, before: bytes, after: bytes, carriage_return: bytes
) -> None:
    """Every number of 64 bits is parsed, with blanks around it."""
    raw = before + b"%d" % number + after + carriage_return + b"\n"
    assert Start(abs(number), number < 0) == parse_header(raw)


@given(st.integers(0, INT64_MAX), st.integers(0, INT64_MAX), st.integers(0, INT64_MAX))
def test_offset_from_the_end_is_in_the_log(count: int, start: int, size: int) -> None:
    """The last N bytes of a log start N bytes before its end, or at its start if it is shorter."""
    offset = Start(count, from_end=True).offset(start, start + size)
    assert start <= offset <= start + size
    assert min(count, size) == start + size - offset


@pytest.mark.parametrize(
    ("start", "end", "line"),
    [
        (0, 0, b"0000000000000000000 0000000000000000000\n"),
        (5, 1234, b"0000000000000000005 0000000000000001234\n"),
        (INT64_MAX, 7, b"9223372036854775807 0000000000000000007\n"),
    ],
)
def test_offsets_line(start: int, end: int, line: bytes) -> None:
    """The `?` line has 40 bytes: two numbers of 19 digits, a blank and a newline."""
    assert offsets_line(start, end) == line
    assert len(line) == 40


@pytest.mark.parametrize(
    ("end", "sent", "rest", "offset"),
    [
        (None, 0, b"", 100),
        (None, 7, b"", 107),
        (200, 0, offsets_line(100, 200), 100),
        (200, 1, offsets_line(100, 200)[1:], 100),
        (200, 39, b"\n", 100),
        (200, 40, b"", 100),
        (200, 41, b"", 101),
        (0, 140, b"", 200),
    ],
)
def test_resume(end: int | None, sent: int, rest: bytes, offset: int) -> None:
    """The bytes of the `?` line are sent once, and do not count as bytes of the file."""
    assert resume(100, end, sent) == (rest, offset)


@given(
    start=st.integers(0, 1 << 40),
    end=st.none() | st.integers(0, 1 << 40),
    sent=st.integers(0, 1 << 41) | st.integers(0, 50),
)
def test_began_at(start: int, end: int | None, sent: int) -> None:
    """began_at() is the inverse of resume()."""
    line, offset = resume(start, end, sent)
    assert began_at(offset, end, line, sent) == start
