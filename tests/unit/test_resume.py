"""Where a stream stands: tables, and a simulated server whose connections break anywhere."""

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
    """Return what is new on one more connection, which breaks after `limit` bytes, or is quiet in the end."""
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
    """Return what is new when nothing more comes, and somebody has asked for the file's end."""
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
    """What no header could say is no offset."""
    with pytest.raises(OffsetError, match="offset"):
        position_at(offset)


@pytest.mark.parametrize("received", [0, 1, 100, CONTEXT, CONTEXT + 1, 100_000])
def test_known_offset_asks_for_context(received: int) -> None:
    """Who knows its offset asks again for what came last, compares it, and goes on behind it."""
    place = FromStart(10)
    assert place.take(DATA[10 : 10 + received]) == DATA[10 : 10 + received]
    assert place.offset == 10 + received
    assert place.header() == b"%d\n" % (10 + received - min(received, CONTEXT))
    assert place.wanted == min(received, CONTEXT)
    assert connect(place, DATA[: 20 + received]) == DATA[10 + received : 20 + received]


@pytest.mark.parametrize("wrong", [0, 1, CONTEXT - 1])
def test_other_file_is_seen(wrong: int) -> None:
    """One byte that is another one before the offset is enough, wherever it is, before anything new is given."""
    place = FromStart(CONTEXT, recall=lambda offset: DATA[offset - CONTEXT : offset])
    other = bytearray(DATA[: 2 * CONTEXT])
    other[wrong] ^= 1
    with pytest.raises(OtherFileError, match="before offset 4096"):
        connect(place, bytes(other))


@pytest.mark.parametrize("received", [8, 50, CONTEXT, 100_000])
@pytest.mark.parametrize("appended", [0, 1, 5000, WINDOWS[0] - 10, WINDOWS[0] + 5])
@pytest.mark.parametrize("before", [0, 10, 200_000])
def test_end_is_found_again(before: int, received: int, appended: int) -> None:
    """Who began from the end goes on behind what came last, however much was appended meanwhile."""
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
    """Where what came last is more than once, nothing is given, rather than too much or too little."""
    place = FromEnd(100)
    place.take(file[-100:])
    with pytest.raises(LostPlaceError, match="more than once"):
        connect(place, file)


def test_place_that_is_not_there() -> None:
    """What is not in the widest window will not be found."""
    place = FromEnd(10)
    place.take(b"abcdefghij")
    with pytest.raises(LostPlaceError, match="are not in"):
        connect(place, bytes(WINDOWS[-1] + 1))


def test_first_window_is_the_narrow_one() -> None:
    """Who has seen much asks for a MiB first, though nothing had been seen at the first connection."""
    place = FromEnd(100_000)
    connect(place, DATA[:200_000])
    assert place.header() == b"-%d\n" % WINDOWS[0]


def test_window_that_is_not_complete_is_not_searched() -> None:
    """What came last may come again behind a stall: as long as the window does not reach the file's end, silence says nothing."""
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
    """It reaches far enough when it holds what was the file's end, whatever has come behind that."""
    place = FromEnd(5000)
    place.take(DATA[:5000])
    place.header()
    assert place.take(DATA[:6000]) == b""
    assert place.reach(DATA[:7000][-CONTEXT:]) == b"", "some of it is on its way"
    assert place.take(DATA[6000:6500]) == b""
    assert place.take(DATA[6500:7100]) == DATA[5000:7100]


def test_server_that_is_behind_is_waited_for() -> None:
    """A file that is short and does not hold what came last may get it."""
    place = FromEnd(10)
    place.take(DATA[90:100])
    assert connect(place, DATA[:50]) == b""
    assert place.wanted > 0
    assert place.take(DATA[50:110]) == b""
    assert place.reach(DATA[50:110][-CONTEXT:]) == DATA[100:110]


@pytest.mark.parametrize("size", [0, 1, CONTEXT, ANCHOR - 1])
def test_short_file_gives_its_offset(size: int) -> None:
    """Who has seen the whole of a short file knows the offset, whatever is in the file."""
    place = FromEnd(0)
    place.header()
    place.offer(bytes(size))
    place.settle()
    known = place.known()
    assert isinstance(known, FromStart)
    assert known.offset == size
    assert connect(known, bytes(size + 5)) == bytes(5)


def test_line_is_left_out_though_the_offset_is_known() -> None:
    """A file that is short, and ends within the line that is to be left out, changes nothing about that."""
    place = FromEnd(1, line=True)
    assert place.take(b"n") == b""
    place.offer(b"whole\nbegun")
    place.settle()
    assert place.known().take(b" and finished\nnew\n") == b"new\n"


def test_end_of_a_long_file_is_looked_for() -> None:
    """What was before the place serves to find it again where nothing has come yet."""
    place = FromEnd(0)
    place.header()
    place.offer(DATA[1_000_000 - ANCHOR : 1_000_000])
    place.settle()
    assert place.known() is place
    assert connect(place, DATA[:1_000_100]) == DATA[1_000_000:1_000_100]


@pytest.mark.parametrize("end", [b"other", b"", b"abcd"])
def test_end_that_does_not_fit_is_not_taken(end: bytes) -> None:
    """An end of the file that is not what came last was seen at another moment."""
    place = FromEnd(3)
    place.take(b"abc")
    place.offer(end)
    place.settle()
    assert not place.anchored


def test_end_is_not_taken_when_something_came() -> None:
    """What came after the question may be in the answer, or not."""
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
    """What is before the first newline is left out, in however many pieces it comes."""
    place = FromEnd(100, line=True)
    assert (
        b"".join(place.take(sent[i : i + pieces]) or b"" for i in range(0, len(sent), pieces))
        == given
    )


def test_line_is_left_out_across_connections() -> None:
    """A connection that breaks within the first line does not make its rest a line."""
    place = FromEnd(20, line=True)
    file = b"x" * 30 + b"0123456789abcdefghij"
    assert place.take(file[-20:]) == b""
    assert connect(place, file + b"-\nnew\n") == b"new\n"


@given(st.data())
def test_any_cuts(data: st.DataObject) -> None:
    """Whatever the file holds, and wherever connections break, a stream is exact or ends with an error that says so."""
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
                # it begins again
                start = max(0, size - place.count)
            received += connect(place, file[:size], limit)
            place = place.known() if isinstance(place, FromEnd) else place
            size += draw(st.integers(0, 300))
    except LostPlaceError:
        assert count is not None
    assert start is not None
    assert received == file[start : start + len(received)]
    assert place.offset in (None, start + len(received))
