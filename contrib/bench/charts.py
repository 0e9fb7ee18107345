"""Draws line charts as SVG, without a library, which would be the benchmark's only dependency."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle

Series = Mapping[str, Sequence[tuple[float, float]]]

WIDTH, HEIGHT = 720, 420
# The margins around the plot.
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 84, 56

# The charts have no background, and colors of medium lightness, so they are readable on white and
# on black.
COLOURS = ("#2f81f7", "#e5534b", "#3fa34d", "#b87ae0", "#d08a1d", "#1fa3a3")
TEXT = "#7d8590"
GRID = f'stroke="{TEXT}" stroke-opacity="0.25"'
FONT = "system-ui, sans-serif"


@dataclass(frozen=True)
class Axis:
    """One axis of a chart, with its label and the values of its ticks."""

    label: str
    ticks: tuple[float, ...]
    log: bool

    def place(self, value: float) -> float:
        """Return the position of `value`: 0 at the first tick, 1 at the last one."""
        scale = math.log10 if self.log else float
        low, high = scale(self.ticks[0]), scale(self.ticks[-1])
        return (scale(value) - low) / (high - low)


def log_axis(label: str, values: Iterable[float]) -> Axis:
    """Return a logarithmic axis whose ticks are powers of ten around `values`, all above 0."""
    values = list(values)
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return Axis(label, tuple(10.0**power for power in range(low, max(high, low + 1) + 1)), log=True)


def linear_axis(label: str, values: Iterable[float]) -> Axis:
    """Return an axis from 0 to beyond all `values`, with five to eleven steps of a round size."""
    highest = max([1e-9, *values])
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(power * share for share in (0.1, 0.2, 0.5, 1, 2) if highest / (power * share) <= 10)
    return Axis(label, tuple(step * i for i in range(math.floor(highest / step) + 2)), log=False)


def count_axis(label: str, values: Iterable[float]) -> Axis:
    """Return an axis with ticks at whole numbers: at each one, or at fewer if there are many."""
    highest = max(2, math.ceil(max(values)))
    step = math.ceil(highest / 10)
    return Axis(label, tuple(float(i) for i in range(0, highest + step, step)), log=False)


def draw(title: str, subtitle: str, x: Axis, y: Axis, series: Series) -> str:
    """Return the chart as an SVG document."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' font-family="{FONT}" font-size="13" fill="{TEXT}">',
        f"<title>{escape(title)}</title>",
        _text(16, 26, title, 'font-size="17" font-weight="600"'),
        _text(16, 45, subtitle),
        *_grid(x, y),
        *_legend(series),
    ]
    for (name, points), colour in zip(series.items(), cycle(COLOURS), strict=False):
        parts += _line(
            name, [(_across(x, first), _down(y, second)) for first, second in points], colour
        )
    return "\n".join([*parts, "</svg>", ""])


def _across(axis: Axis, value: float) -> float:
    return round(LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT), 1)


def _down(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM), 1)


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" {more}>{escape(text)}</text>'


def _grid(x: Axis, y: Axis) -> Iterable[str]:
    bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    for tick in y.ticks:
        down = _down(y, tick)
        yield f'<path d="M{LEFT} {down}H{WIDTH - RIGHT}" {GRID}/>'
        yield _text(LEFT - 8, down + 4, f"{tick:,g}", 'text-anchor="end"')
    for tick in x.ticks:
        across = _across(x, tick)
        yield f'<path d="M{across} {TOP}V{bottom}" {GRID}/>'
        yield _text(across, bottom + 18, f"{tick:,g}", 'text-anchor="middle"')
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x.label, 'text-anchor="middle"')
    yield _text(20, middle, y.label, f'text-anchor="middle" transform="rotate(-90 20 {middle})"')


def _legend(series: Series) -> Iterable[str]:
    across = float(LEFT)
    for name, colour in zip(series, cycle(COLOURS), strict=False):
        yield f'<path d="M{across} {TOP - 18}h18" stroke="{colour}" stroke-width="3"/>'
        yield _text(across + 24, TOP - 14, name)
        across += 44 + 7 * len(name)


def _line(name: str, points: Sequence[tuple[float, float]], colour: str) -> Iterable[str]:
    path = "L".join(f"{across} {down}" for across, down in points)
    yield (
        f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.5">'
        f"<title>{escape(name)}</title></path>"
    )
    for across, down in points:
        yield f'<circle cx="{across}" cy="{down}" r="4" fill="{colour}"/>'
