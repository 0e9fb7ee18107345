"""Tests of the sequence of segments, with numbers in place of descriptors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailsrv.segments import NO_FILE, Log, Segment

SEGMENTS = (Segment(100, 3, 50), Segment(150, 5, 10), Segment(160, 6))


def test_segment() -> None:
    """A sealed segment has an end; an active one has none."""
    assert Segment(100, 3, 50).sealed
    assert Segment(100, 3, 50).end == 150
    assert Segment(100, 3, 0).sealed
    assert not Segment(100, 3).sealed
    with pytest.raises(ValueError, match="the segment at 100 is active"):
        _ = Segment(100, 3).end


@pytest.mark.parametrize(
    ("offset", "file"),
    [(100, 3), (149, 3), (150, 5), (159, 5), (160, 6), (161, 6), (2**62, 6)],
)
def test_find(offset: int, file: int) -> None:
    """An offset is found in the segment that has a byte there, or else in the last segment."""
    assert Log(SEGMENTS).find(offset).file == file


@pytest.mark.parametrize("offset", [-1, 0, 99])
def test_find_before_the_first(offset: int) -> None:
    """An offset before the first byte is an error, and is not found in the first segment."""
    with pytest.raises(ValueError, match=f"offset {offset} is before the first segment, at 100"):
        Log(SEGMENTS).find(offset)


@given(st.integers(0, 100), st.lists(st.integers(0, 5)))
def test_find_agrees_with_a_search(start: int, sizes: list[int]) -> None:
    """Each offset is found in the only segment whose range contains it; some are empty."""
    segments, base = [], start
    for file, size in enumerate(sizes):
        segments.append(Segment(base, file, size))
        base += size
    log = Log([*segments, Segment(base, len(sizes))])
    for offset in range(start, base):
        assert [log.find(offset)] == [part for part in segments if part.base <= offset < part.end]
    assert log.find(base) is log.active


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [Segment(0, 3, 10), Segment(11, 4)],
        [Segment(0, 3, 10), Segment(9, 4)],
        [Segment(0, 3), Segment(0, 4)],
        [Segment(-1, 3)],
        [Segment(0, 3, -1)],
        [Segment(5, 3, 5), Segment(10, 4, -5), Segment(5, 5)],
    ],
    ids=["none", "gap", "overlap", "two active", "negative base", "negative size", "backwards"],
)
def test_wrong_sequences(segments: list[Segment]) -> None:
    """Segments with a gap or an overlap are refused, and so are two active ones."""
    with pytest.raises(ValueError, match=r"segment|negative"):
        Log(segments)


def test_roll() -> None:
    """Sealing fixes the size of the active segment; the next one begins at its end."""
    log = Log([Segment(100, 3)])
    with pytest.raises(ValueError, match="active"):
        log.append(Segment(150, 4))
    with pytest.raises(ValueError, match="negative"):
        log.seal(-1)
    assert log.active == Segment(100, 3)
    assert log.seal(50) == log.active == Segment(100, 3, 50)
    with pytest.raises(ValueError, match="sealed already"):
        log.seal(60)
    assert log.find(1000).file == 3
    with pytest.raises(ValueError, match="cannot follow"):
        log.append(Segment(151, 4))
    log.append(Segment(150, 4))
    assert [*log] == [Segment(100, 3, 50), Segment(150, 4)]
    assert (log.start, log.first, log.active, len(log)) == (100, 100, Segment(150, 4), 2)
    assert log.sealed_segments == [Segment(100, 3, 50)]
    assert (log.find(149).file, log.find(150).file) == (3, 4)


@pytest.mark.parametrize("empty", [1, 3])
def test_empty_segments_are_not_kept(empty: int) -> None:
    """The next segment takes the place of an empty one, also if that is the first."""
    log = Log([Segment(100, 3)])
    for _ in range(empty):
        log.seal(0)
        assert [*log] == [Segment(100, 3, 0)]
        log.append(Segment(100, 3))
        assert ([*log], log.start, log.first) == ([Segment(100, 3)], 100, 100)
    log.seal(5)
    for file in (4, 5):
        log.append(Segment(105, file))
        log.seal(0)
    log.append(Segment(105, 6))
    assert [*log] == [Segment(100, 3, 5), Segment(105, 6)]
    assert log.active is log.find(105)


def test_lost_empty_segment() -> None:
    """An empty segment that is lost is not kept either."""
    log = Log([Segment(100, 3)])
    log.seal(0, lost=True)
    log.append(Segment(100, 4))
    assert ([*log], log.start) == ([Segment(100, 4)], 100)


def test_lost() -> None:
    """A segment that is lost has no file, and no stream begins before its end."""
    log = Log(SEGMENTS)
    assert log.seal(40, lost=True) == log.active == Segment(160, NO_FILE, 40)
    assert log.start == 200
    log.append(Segment(200, 6))
    assert [*log] == [*SEGMENTS[:2], Segment(160, NO_FILE, 40), Segment(200, 6)]
    # Clients that are behind still read the segments before it.
    assert [log.find(offset).file for offset in (100, 159, 160, 199, 200)] == [3, 5, -1, -1, 6]
    assert log.first == 100


@pytest.mark.parametrize(("given", "start"), [(0, 100), (99, 100), (100, 100), (150, 150)])
def test_start(given: int, start: int) -> None:
    """The log does not start before its first segment."""
    assert Log(SEGMENTS, given).start == start


def test_retire() -> None:
    """Retiring removes no segment, and the start never goes back."""
    log = Log(SEGMENTS)
    for start, after in ((150, 150), (100, 150), (160, 160)):
        log.retire(start)
        assert log.start == after
    assert [*log] == [*SEGMENTS]
    assert log.find(100).file == 3


@pytest.mark.parametrize(
    ("offset", "dropped"), [(0, 0), (149, 0), (150, 1), (159, 1), (160, 2), (10**6, 2)]
)
def test_drop_before(offset: int, dropped: int) -> None:
    """Retired segments that end at the offset are dropped and returned, but never the last one."""
    log = Log(SEGMENTS, start=10**7)
    assert log.drop_before(offset) == [*SEGMENTS[:dropped]]
    assert [*log] == [*SEGMENTS[dropped:]]
    assert (log.first, log.active) == (SEGMENTS[dropped].base, SEGMENTS[-1])
    assert log.drop_before(offset) == []


@pytest.mark.parametrize(("start", "dropped"), [(100, 0), (149, 0), (150, 1), (160, 2)])
def test_segments_that_are_not_retired_are_kept(start: int, dropped: int) -> None:
    """A segment in which a stream may begin is not dropped, although no client reads it."""
    log = Log(SEGMENTS, start)
    assert log.drop_before(10**6) == [*SEGMENTS[:dropped]]
    assert log.start == start


def test_the_last_segment_is_kept() -> None:
    """The last segment is not dropped, even if it is sealed and retired."""
    log = Log(SEGMENTS[:2], start=160)
    assert log.drop_before(160) == [SEGMENTS[0]]
    assert [*log] == [SEGMENTS[1]]
