"""Draws a line on a terminal while a copy catches up: how much there is, and how fast it grows."""

import sys

from tailsrv.units import size

PATIENCE = 0.5  # seconds before there is a line: most catching up is done by then
PAUSE = 0.2  # seconds from one line to the next
ERASE = "\r\x1b[K"


class Progress:
    """The line; `name` is what grows. It is drawn only where standard error is a terminal."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = bool(sys.stderr and sys.stderr.isatty())
        self._begun: tuple[float, int] | None = None  # when, and how long it was then
        self._drawn: float | None = None

    def grow(self, length: int, now: float) -> None:
        """Note that what grows has reached `length`."""
        if self._begun is None:
            self._begun = now, length
        begun, first = self._begun
        if self._terminal and now - begun >= PATIENCE and now - (self._drawn or begun) >= PAUSE:
            self._drawn = now
            self._write(f"{ERASE}{self._name}: {size(length)}, {size((length - first) / (now - begun))}/s")

    def rest(self) -> None:
        """Take the line away: it is caught up, or something else is to be said."""
        if self._drawn is not None:
            self._write(ERASE)
        self._begun = self._drawn = None

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            self._terminal = False  # it has gone
