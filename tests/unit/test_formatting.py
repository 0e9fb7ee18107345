"""Tests of formatting numbers with their nouns, and of parsing digits."""

import pytest

from tailsrv.formatting import counted, parse_digits


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 clients"), (1, "1 client"), (2, "2 clients"), (1000, "1000 clients")],
)
def test_counted(number: int, words: str) -> None:
    """Only 1 is followed by the singular."""
    assert words == counted(number, "client")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("007", 7),
        ("18446744073709551616", 2**64),
        ("1" * 5000, int("1" * 20)),
        ("0" * 5000 + "5", 5),
        ("", None),
        ("+1", None),
        ("-1", None),
        (" 1", None),
        ("1\n", None),
        ("1_000", None),
        ("0x1", None),
        ("\u0663", None),
        ("\u00b2", None),
    ],
)
def test_parse_digits(text: str, number: int | None) -> None:
    """Only ASCII digits are a number, and any amount of them is accepted."""
    assert parse_digits(text) == number
