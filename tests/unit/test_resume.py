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


def connect(place: FromStart | FromEnd, file: bytes, limit: int | None = None) -> bytes:
    """Return the new bytes of one more connection.

    The connection breaks after `limit` bytes, or stays silent at the end of the file.
    """
    new = b""
    while True:
        sent = serve(place.header(), file)[:limit]
        while sent:
            part = sent[: place.wanted or None]
            found = place.take(part)
            if found is None:
                break
            new, sent = new + found, sent[len(part) :]
        else:
            return new + (
                quiet(place, file) if isinstance(place, FromEnd) and limit is None else b""
            )


def quiet(place: FromEnd, file: bytes) -> bytes:
    """Return the new bytes after a silence, for which the end of the file is requested."""
    if place.searching:
        return place.reach(file[-CONTEXT:])
    place.settle()
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
def test_no_offset(offset: int | str) -> None:
    """A value that no header can express is refused as an offset."""
    with pytest.raises(OffsetError, match="offset"):
        position_at(offset)


@pytest.mark.parametrize("received", [0, 1, 100, CONTEXT, CONTEXT + 1, 100_000])
def test_known_offset_asks_for_context(received: int) -> None:
    """With a known offset the last bytes are requested again, compared, and left out."""
    place = FromStart(10)
    assert place.take(DATA[10 : 10 + received]) == DATA[10 : 10 + received]
    assert place.offset == 10 + received
    assert place.header() == b"%d\n" % (10 + received - min(received, CONTEXT))
    assert place.wanted == min(received, CONTEXT)
    assert connect(place, DATA[: 20 + received]) == DATA[10 + received : 20 + received]


@pytest.mark.parametrize("wrong", [0, 1, CONTEXT - 1])
def test_other_file_is_seen(wrong: int) -> None:
    """One different byte before the offset is an error before any new byte is returned."""
    place = FromStart(CONTEXT, recall=lambda offset: DATA[offset - CONTEXT : offset])
    other = bytearray(DATA[: 2 * CONTEXT])
    other[wrong] ^= 1
    with pytest.raises(OtherFileError, match="before offset 4096"):
        connect(place, bytes(other))


@pytest.mark.parametrize("received", [8, 50, CONTEXT, 100_000])
@pytest.mark.parametrize("appended", [0, 1, 5000, WINDOWS[0] - 10, WINDOWS[0] + 5])
@pytest.mark.parametrize("before", [0, 10, 200_000])
def test_end_is_found_again(before: int, received: int, appended: int) -> None:
    """A stream from the end resumes after its last bytes, however much was appended meanwhile."""
    place = FromEnd(received)
    assert connect(place, DATA[: before + received]) == DATA[before : before + received]
    size = before + received + appended
    assert connect(place, DATA[:size]) == DATA[before + received : size]
    assert connect(place, DATA[: size + 9]) == DATA[size : size + 9]


@pytest.mark.parametrize(
    "file",
    [b"tick\n" * 2000, b"A" * 100 + b"B" * 100 + b"A" * 100, b"tick\n" * (WINDOWS[0] // 5 + 2000)],
)
def test_place_that_could_be_another_is_no_place(file: bytes) -> None:
    """If the last bytes occur more than once in the file, resuming fails."""
    place = FromEnd(100)
    place.take(file[-100:])
    with pytest.raises(LostPlaceError, match="more than once"):
        connect(place, file)


def test_place_that_is_not_there() -> None:
    """If the last bytes are not in the widest window, resuming fails."""
    place = FromEnd(10)
    place.take(b"abcdefghij")
    with pytest.raises(LostPlaceError, match="are not in"):
        connect(place, bytes(WINDOWS[-1] + 1))


def test_first_window_is_the_narrow_one() -> None:
    """After many bytes the first window is the smallest one, 1 MiB."""
    place = FromEnd(100_000)
    connect(place, DATA[:200_000])
    assert place.header() == b"-%d\n" % WINDOWS[0]


def test_window_that_is_not_complete_is_not_searched() -> None:
    """A window is searched only when it reaches the end, as the bytes may occur again later."""
    once, between = DATA[:5000], DATA[5000:8000]
    place = FromEnd(5000)
    place.take(once)
    place.header()
    file = DATA[9000:9100] + once + between + once
    assert place.take(file[:6000]) == b""
    assert place.reach(file[-CONTEXT:]) == b"", (
        "that is in the window, but not where it is asked for"
    )
    with pytest.raises(LostPlaceError, match="more than once"):
        place.take(file[6000:])


def test_window_is_searched_though_the_file_grows() -> None:
    """A window is searched when it reaches the end as it was, whatever was appended since."""
    place = FromEnd(5000)
    place.take(DATA[:5000])
    place.header()
    assert place.take(DATA[:6000]) == b""
    assert place.reach(DATA[:7000][-CONTEXT:]) == b"", "some of it is on its way"
    assert place.take(DATA[6000:6500]) == b""
    assert place.take(DATA[6500:7100]) == DATA[5000:7100]


def test_server_that_is_behind_is_waited_for() -> None:
    """If a short file does not contain the last bytes yet, the stream waits for them."""
    place = FromEnd(10)
    place.take(DATA[90:100])
    assert connect(place, DATA[:50]) == b""
    assert place.wanted > 0
    assert place.take(DATA[50:110]) == b""
    assert place.reach(DATA[50:110][-CONTEXT:]) == DATA[100:110]


@pytest.mark.parametrize("size", [0, 1, CONTEXT, ANCHOR - 1])
def test_short_file_gives_its_offset(size: int) -> None:
    """If the whole of a short file was seen, the offset is known, whatever the file contains."""
    place = FromEnd(0)
    place.header()
    place.offer(bytes(size))
    place.settle()
    known = place.known()
    assert isinstance(known, FromStart)
    assert known.offset == size
    assert connect(known, bytes(size + 5)) == bytes(5)


def test_line_is_left_out_though_the_offset_is_known() -> None:
    """The first partial line is left out also if a short file makes the offset known."""
    place = FromEnd(1, line=True)
    assert place.take(b"n") == b""
    place.offer(b"whole\nbegun")
    place.settle()
    assert place.known().take(b" and finished\nnew\n") == b"new\n"


def test_end_of_a_long_file_is_looked_for() -> None:
    """If nothing was received yet, the bytes before the start are used to find it again."""
    place = FromEnd(0)
    place.header()
    place.offer(DATA[1_000_000 - ANCHOR : 1_000_000])
    place.settle()
    assert place.known() is place
    assert connect(place, DATA[:1_000_100]) == DATA[1_000_000:1_000_100]


@pytest.mark.parametrize("end", [b"other", b"", b"abcd"])
def test_end_that_does_not_fit_is_not_taken(end: bytes) -> None:
    """An end of the file that differs from the last bytes received is ignored."""
    place = FromEnd(3)
    place.take(b"abc")
    place.offer(end)
    place.settle()
    assert not place.anchored


def test_end_is_not_taken_when_something_came() -> None:
    """An end of the file is ignored if bytes arrived after it was requested."""
    place = FromEnd(0)
    place.offer(b"abc")
    place.take(b"c")
    place.settle()
    assert not place.anchored
    assert place.known() is place


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
def test_line_begins_behind_the_first_newline(sent: bytes, given: bytes, pieces: int) -> None:
    """The bytes up to the first newline are left out, in however many pieces they arrive."""
    place = FromEnd(100, line=True)
    assert (
        b"".join(place.take(sent[i : i + pieces]) or b"" for i in range(0, len(sent), pieces))
        == given
    )


def test_line_is_left_out_across_connections() -> None:
    """If a connection breaks within the first line, the rest of that line is left out as well."""
    place = FromEnd(20, line=True)
    file = b"x" * 30 + b"0123456789abcdefghij"
    assert place.take(file[-20:]) == b""
    assert connect(place, file + b"-\nnew\n") == b"new\n"


@given(st.data())
def test_any_cuts(data: st.DataObject) -> None:
    """For any file and any breaks, a stream is exact, or ends with an error."""
    draw = data.draw
    size = draw(st.integers(0, 300))
    file = draw(st.sampled_from([DATA, b"ab" * 2000, b"\n" * 4000]))
    count = draw(st.none() | st.integers(0, 300))
    place: FromStart | FromEnd = (
        FromStart(draw(st.integers(0, 300))) if count is None else FromEnd(count)
    )
    start = place.offset if count is None else max(0, size - count)
    received = b""
    try:
        for _ in range(draw(st.integers(1, 6))):
            limit = draw(st.none() | st.integers(0, 4000))
            if isinstance(place, FromEnd) and not received:
                # Nothing has been received, so the stream starts at the end as it is now.
                start = max(0, size - place.count)
            received += connect(place, file[:size], limit)
            place = place.known() if isinstance(place, FromEnd) else place
            size += draw(st.integers(0, 300))
    except LostPlaceError:
        assert count is not None
    assert start is not None
    assert received == file[start : start + len(received)]
    assert place.offset in (None, start + len(received))
