"""Tests of resuming a stream: tables, and a simulated server whose connections break anywhere."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv.client.resume import (
    ANCHOR,
    CONTEXT,
    WINDOWS,
    FromEnd,
    FromStart,
    LostPlaceError,
    OffsetError,
    OtherFileError,
    position_at,
)

DATA = random.Random(1).randbytes(3 << 20)


def serve(header: bytes, file: bytes) -> bytes:
    """Return what the server sends at once for `header`."""
    text = header.decode().rstrip("\n")
    return file[
        max(0, len(file) + int(text))
        if text.startswith("-") and text != "-0"
        else len(file)
        if text == "-0"
        else int(text) :
    ]


def connect(position: FromStart | FromEnd, file: bytes, limit: int | None = None) -> bytes:
    """Return the new bytes of one more connection.

    The connection breaks after `limit` bytes, or stays silent at the end of the file.
    """
    new = b""
    while True:
        sent = serve(position.header(), file)[:limit]
        while sent:
            part = sent[: position.wanted or None]
            found = position.take(part)
            if found is None:
                break
            new, sent = new + found, sent[len(part) :]
        else:
            return new + (
                after_silence(position, file)
                if isinstance(position, FromEnd) and limit is None
                else b""
            )


def after_silence(position: FromEnd, file: bytes) -> bytes:
    """Return the new bytes after a silence, for which the end of the file is requested."""
    if position.searching:
        return position.reach(file[-CONTEXT:])
    position.settle()
    return b""


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
    ],
)
def test_first_header(offset: int | str, header: bytes) -> None:
    """The first header is the offset as it was given."""
    assert position_at(offset).header() == header


@pytest.mark.parametrize(
    "offset", ["", "-", "+-1", "abc", "1_000", "1e3", " 1", "\u0663", 2**63, -(2**64), "9" * 5000]
)
def test_bad_offset(offset: int | str) -> None:
    """A value that no header can express is refused as an offset."""
    with pytest.raises(OffsetError, match="offset"):
        position_at(offset)


@pytest.mark.parametrize("received", [0, 1, 100, CONTEXT, CONTEXT + 1, 100_000])
def test_known_offset_asks_for_context(received: int) -> None:
    """With a known offset the last bytes are requested again, compared, and left out."""
    position = FromStart(10)
    assert position.take(DATA[10 : 10 + received]) == DATA[10 : 10 + received]
    assert position.offset == 10 + received
    assert position.header() == b"%d\n" % (10 + received - min(received, CONTEXT))
    assert position.wanted == min(received, CONTEXT)
    assert connect(position, DATA[: 20 + received]) == DATA[10 + received : 20 + received]


@pytest.mark.parametrize("wrong", [0, 1, CONTEXT - 1])
def test_other_file_is_detected(wrong: int) -> None:
    """One different byte before the offset is an error before any new byte is returned."""
    position = FromStart(CONTEXT, recall=lambda offset: DATA[offset - CONTEXT : offset])
    other = bytearray(DATA[: 2 * CONTEXT])
    other[wrong] ^= 1
    with pytest.raises(OtherFileError, match="before offset 4096"):
        connect(position, bytes(other))


@pytest.mark.parametrize("received", [8, 50, CONTEXT, 100_000])
@pytest.mark.parametrize("appended", [0, 1, 5000, WINDOWS[0] - 10, WINDOWS[0] + 5])
@pytest.mark.parametrize("before", [0, 10, 200_000])
def test_end_is_found_again(before: int, received: int, appended: int) -> None:
    """A stream from the end resumes after its last bytes, however much was appended meanwhile."""
    position = FromEnd(received)
    assert connect(position, DATA[: before + received]) == DATA[before : before + received]
    size = before + received + appended
    assert connect(position, DATA[:size]) == DATA[before + received : size]
    assert connect(position, DATA[: size + 9]) == DATA[size : size + 9]


@pytest.mark.parametrize(
    "file",
    [b"tick\n" * 2000, b"A" * 100 + b"B" * 100 + b"A" * 100, b"tick\n" * (WINDOWS[0] // 5 + 2000)],
)
def test_ambiguous_position(file: bytes) -> None:
    """If the last bytes occur more than once in the file, resuming fails."""
    position = FromEnd(100)
    position.take(file[-100:])
    with pytest.raises(LostPlaceError, match="more than once"):
        connect(position, file)


def test_missing_position() -> None:
    """If the last bytes are not in the widest window, resuming fails."""
    position = FromEnd(10)
    position.take(b"abcdefghij")
    with pytest.raises(LostPlaceError, match="are not in"):
        connect(position, bytes(WINDOWS[-1] + 1))


def test_first_window_is_the_smallest_one() -> None:
    """After many bytes the first window is the smallest one, 1 MiB."""
    position = FromEnd(100_000)
    connect(position, DATA[:200_000])
    assert position.header() == b"-%d\n" % WINDOWS[0]


def test_incomplete_window_is_not_searched() -> None:
    """A window is searched only when it reaches the end, as the bytes may occur again later."""
    once, between = DATA[:5000], DATA[5000:8000]
    position = FromEnd(5000)
    position.take(once)
    position.header()
    file = DATA[9000:9100] + once + between + once
    assert position.take(file[:6000]) == b""
    assert position.reach(file[-CONTEXT:]) == b"", (
        "the bytes are in the window, but not at the end of the file"
    )
    with pytest.raises(LostPlaceError, match="more than once"):
        position.take(file[6000:])


def test_window_is_searched_though_the_file_grows() -> None:
    """A window is searched when it reaches the end as it was, whatever was appended since."""
    position = FromEnd(5000)
    position.take(DATA[:5000])
    position.header()
    assert position.take(DATA[:6000]) == b""
    assert position.reach(DATA[:7000][-CONTEXT:]) == b"", (
        "the bytes up to the end of the file have not all arrived"
    )
    assert position.take(DATA[6000:6500]) == b""
    assert position.take(DATA[6500:7100]) == DATA[5000:7100]


def test_server_that_is_behind_is_waited_for() -> None:
    """If a short file does not contain the last bytes yet, the stream waits for them."""
    position = FromEnd(10)
    position.take(DATA[90:100])
    assert connect(position, DATA[:50]) == b""
    assert position.wanted > 0
    assert position.take(DATA[50:110]) == b""
    assert position.reach(DATA[50:110][-CONTEXT:]) == DATA[100:110]


@pytest.mark.parametrize("size", [0, 1, CONTEXT, ANCHOR - 1])
def test_short_file_gives_its_offset(size: int) -> None:
    """If the whole of a short file was seen, the offset is known, whatever the file contains."""
    position = FromEnd(0)
    position.header()
    position.offer(bytes(size))
    position.settle()
    known = position.known()
    assert isinstance(known, FromStart)
    assert known.offset == size
    assert connect(known, bytes(size + 5)) == bytes(5)


def test_line_is_left_out_though_the_offset_is_known() -> None:
    """The first partial line is left out also if a short file makes the offset known."""
    position = FromEnd(1, line=True)
    assert position.take(b"n") == b""
    position.offer(b"whole\nbegun")
    position.settle()
    assert position.known().take(b" and finished\nnew\n") == b"new\n"


def test_end_of_a_long_file_is_searched() -> None:
    """If nothing was received yet, the bytes before the start are used to find it again."""
    position = FromEnd(0)
    position.header()
    position.offer(DATA[1_000_000 - ANCHOR : 1_000_000])
    position.settle()
    assert position.known() is position
    assert connect(position, DATA[:1_000_100]) == DATA[1_000_000:1_000_100]


@pytest.mark.parametrize("end", [b"other", b"", b"abcd"])
def test_different_end_is_ignored(end: bytes) -> None:
    """An end of the file that differs from the last bytes received is ignored."""
    position = FromEnd(3)
    position.take(b"abc")
    position.offer(end)
    position.settle()
    assert not position.anchored


def test_end_is_ignored_after_new_bytes() -> None:
    """An end of the file is ignored if bytes arrived after it was requested."""
    position = FromEnd(0)
    position.offer(b"abc")
    position.take(b"c")
    position.settle()
    assert not position.anchored
    assert position.known() is position


@pytest.mark.parametrize("pieces", [1, 2, 100])
@pytest.mark.parametrize(
    ("sent", "given"),
    [
        (b"rest\nwhole\nmore", b"whole\nmore"),
        (b"\nwhole\n", b"whole\n"),
        (b"rest", b""),
        (b"a\n", b""),
    ],
)
def test_line_begins_after_the_first_newline(sent: bytes, given: bytes, pieces: int) -> None:
    """The bytes up to the first newline are left out, in however many pieces they arrive."""
    position = FromEnd(100, line=True)
    assert (
        b"".join(position.take(sent[i : i + pieces]) or b"" for i in range(0, len(sent), pieces))
        == given
    )


def test_line_is_left_out_across_connections() -> None:
    """If a connection breaks within the first line, the rest of that line is left out as well."""
    position = FromEnd(20, line=True)
    file = b"x" * 30 + b"0123456789abcdefghij"
    assert position.take(file[-20:]) == b""
    assert connect(position, file + b"-\nnew\n") == b"new\n"


@given(st.data())
def test_any_cuts(data: st.DataObject) -> None:
    """For any file and any breaks, a stream is exact, or ends with an error."""
    draw = data.draw
    size = draw(st.integers(0, 300))
    file = draw(st.sampled_from([DATA, b"ab" * 2000, b"\n" * 4000]))
    count = draw(st.none() | st.integers(0, 300))
    position: FromStart | FromEnd = (
        FromStart(draw(st.integers(0, 300))) if count is None else FromEnd(count)
    )
    start = position.offset if count is None else max(0, size - count)
    received = b""
    try:
        for _ in range(draw(st.integers(1, 6))):
            limit = draw(st.none() | st.integers(0, 4000))
            if isinstance(position, FromEnd) and not received:
                # Nothing has been received, so the stream starts at the end as it is now.
                start = max(0, size - position.count)
            received += connect(position, file[:size], limit)
            position = position.known() if isinstance(position, FromEnd) else position
            size += draw(st.integers(0, 300))
    except LostPlaceError:
        assert count is not None
    assert start is not None
    assert received == file[start : start + len(received)]
    assert position.offset in (None, start + len(received))
