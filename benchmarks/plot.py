"""A rate over time as a picture, with marks where something happened. SVG by hand: no plotting library is needed.

Owns how it looks. Knows nothing of what is plotted.
"""

from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 900, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 24, 34
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
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    style = f'font-family="sans-serif" font-size="10" fill="{INK}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(text)}</text>'
