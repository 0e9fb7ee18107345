"""Tests of formatting numbers with their nouns, and durations."""

import pytest

from tailsrv.formatting import clock, counted


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 clients"), (1, "1 client"), (2, "2 clients"), (1000, "1000 clients")],
)
def test_counted(number: int, words: str) -> None:
    """Only 1 is followed by the singular."""
    assert words == counted(number, "client")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (10.6, "0:11"), (59.6, "1:00"), (754, "12:34"), (7500, "2:05:00")],
)
def test_clock(seconds: float, text: str) -> None:
    """Hours are shown only if there are any."""
    assert clock(seconds) == text
