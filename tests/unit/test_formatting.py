"""Tests of formatting numbers with their nouns."""

import pytest

from tailsrv.formatting import counted


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 clients"), (1, "1 client"), (2, "2 clients"), (1000, "1000 clients")],
)
def test_counted(number: int, words: str) -> None:
    """Only 1 is followed by the singular."""
    assert words == counted(number, "client")
