"""Writes figures as people read them. Pure."""


def size(count: float | None) -> str:
    """Return bytes as people read them."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def counted(number: int, noun: str) -> str:
    """Return `1 client`, `2 clients`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
