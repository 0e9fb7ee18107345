"""Formats sizes and counts for people to read, and parses digits. Pure."""


def size(count: float | None) -> str:
    """Format a number of bytes with a binary unit, such as `1.5 MiB`; None becomes `-`."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def counted(number: int, noun: str) -> str:
    """Return the number and the noun, as in `1 client` or `2 clients`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def parse_digits(text: str) -> int | None:
    """Return the number that `text` consists of, or None if it is empty or not only digits.

    int() alone would also accept `1_000` and digits that are not ASCII. It refuses strings of
    thousands of digits, so only the first 20 are used: a number of 20 digits exceeds every limit.
    """
    return int(text.lstrip("0")[:20] or "0") if text.isascii() and text.isdigit() else None
