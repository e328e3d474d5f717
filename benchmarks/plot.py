"""Figures as pictures: a rate over time with marks, and lines over a load that doubles. SVG by hand, no library.

Owns how it looks. Knows nothing of what is plotted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 900, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 24, 34
LEGEND = 24  # height of the line above panels
LINE, MARK, GRID, INK = "#b5522b", "#3a6ea5", "#ddd", "#444"


def rate_over_time(
    times_s: Sequence[float], marks: Sequence[tuple[float, str]], unit: str, bucket_s: float = 0.5
) -> str:
    """Events per second in buckets, from the first to the last of `times_s`; `marks` are (time, label)."""
    first_s, last_s = min(times_s), max(times_s)
    counts = [0] * (int((last_s - first_s) / bucket_s) + 1)
    for time_s in times_s:
        counts[int((time_s - first_s) / bucket_s)] += 1
    rates = [count / bucket_s for count in counts]
    highest = max(rates)

    def x(time_s: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (time_s - first_s) / (last_s - first_s)

    def y(rate: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - rate / highest)

    parts = []
    for quarter in range(5):
        rate, time_s = highest * quarter / 4, first_s + (last_s - first_s) * quarter / 4
        parts.append(f'<path d="M{LEFT} {y(rate):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 6, y(rate) + 4, f"{rate:,.0f}", "end"))
        parts.append(_text(x(time_s), HEIGHT - 18, f"{time_s - first_s:.0f}", "middle"))
    for time_s, label in marks:
        parts.append(f'<path d="M{x(time_s):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{MARK}" stroke-dasharray="2 3"/>')
        parts.append(_text(x(time_s) + 3, TOP - 6, label, "start"))
    points = " ".join(f"{x(first_s + (i + 0.5) * bucket_s):.1f},{y(rate):.1f}" for i, rate in enumerate(rates[:-1]))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{LINE}"/>')
    parts.append(_text(WIDTH / 2, HEIGHT - 4, "seconds", "middle"))
    parts.append(_text(LEFT, 10, unit, "end"))
    return _picture(parts, HEIGHT)


def _picture(parts: Sequence[str], height: int) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    style = f'font-family="sans-serif" font-size="10" fill="{INK}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(text)}</text>'


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`points` are (x, y), left to right; those without a y are left out. `crossed` are xs whose value is in doubt."""

    label: str
    color: str
    points: Sequence[tuple[float, float | None]]
    dashed: bool = False
    crossed: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Lines over one y axis, which begins at 0 unless it is logarithmic."""

    title: str
    lines: Sequence[Line]
    is_log: bool = False

    @property
    def values(self) -> list[float]:
        return [y for line in self.lines for _, y in line.points if y is not None]

    def ticks(self) -> list[float]:
        """Round values that enclose all: four steps or so from 0, or 1, 2 and 5 times powers of ten."""
        values = self.values or [1.0]
        if not self.is_log:
            step = _round_up(max(values) / 4)
            return [step * i for i in range(max(1, math.ceil(max(values) / step)) + 1)]
        rounds = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
        first = max(i for i, value in enumerate(rounds) if value <= min(values))
        last = min(i for i, value in enumerate(rounds) if value >= max(values))
        return rounds[first : max(last, first + 1) + 1]


def over_doublings(panels: Sequence[Panel], x_title: str, note: str) -> str:
    """Panels side by side over one logarithmic x axis, with a legend of the labels above and `note` beside it."""
    xs = sorted({x for panel in panels for line in panel.lines for x, _ in line.points})
    width = WIDTH / len(panels)
    parts = [part for i, panel in enumerate(panels) for part in _panel(panel, xs, i * width, width)]
    for i, panel in enumerate(panels):
        parts.append(_text(i * width + LEFT, LEGEND + 14, panel.title, "start"))
    parts.append(_text(WIDTH / 2, LEGEND + HEIGHT - 4, x_title, "middle"))
    return _picture([*_legend(panels[0].lines, note), *parts], HEIGHT + LEGEND)


def _panel(panel: Panel, xs: Sequence[float], left: float, width: float) -> list[str]:
    ticks = panel.ticks()
    low, high = ticks[0], ticks[-1]
    spread = math.log2(xs[-1] / xs[0]) or 1.0

    def x_at(x: float) -> float:
        return left + LEFT + (width - LEFT - RIGHT) * math.log2(x / xs[0]) / spread

    def y_at(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if panel.is_log else y / high
        return LEGEND + TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = []
    for tick in ticks:
        parts.append(f'<path d="M{x_at(xs[0]):.1f} {y_at(tick):.1f}H{x_at(xs[-1]):.1f}" stroke="{GRID}"/>')
        parts.append(_text(x_at(xs[0]) - 6, y_at(tick) + 4, f"{tick:,.6g}", "end"))
    parts += [_text(x_at(x), LEGEND + HEIGHT - 18, f"{x:g}", "middle") for x in xs]
    for line in panel.lines:
        parts += _line(line, [(x_at(x), y_at(y)) for x, y in line.points if y is not None])
        parts += [_cross(x_at(x), y_at(y)) for x, y in line.points if y is not None and x in line.crossed]
    return parts


def _line(line: Line, places: Sequence[tuple[float, float]]) -> list[str]:
    dashes = ' stroke-dasharray="4 3"' if line.dashed else ""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{line.color}"/>' for x, y in places]
    return [f'<polyline points="{points}" fill="none" stroke="{line.color}" stroke-width="1.5"{dashes}/>', *dots]


def _cross(x: float, y: float) -> str:
    return f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="{INK}" fill="none"/>'


def _legend(lines: Sequence[Line], note: str) -> list[str]:
    parts, x = [], float(LEFT)
    for line in lines:
        parts.append(f'<path d="M{x:.1f} 11h18" stroke="{line.color}" stroke-width="1.5"/>')
        parts.append(_text(x + 23, 14, line.label, "start"))
        x += 23 + 7 * len(line.label) + 16
    return [*parts, _text(WIDTH - RIGHT, 14, note, "end")]


def _round_up(value: float) -> float:
    """The least of 1, 2 and 5 times powers of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= value)
