"""Counts in words."""

import pytest

from tailsrv.formatting import counted


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 clients"), (1, "1 client"), (2, "2 clients"), (1000, "1000 clients")],
)
def test_counted(number: int, words: str) -> None:
    """One is singular, and nothing else is."""
    assert words == counted(number, "client")
