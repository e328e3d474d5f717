"""The two pictures of the model card, written as SVG by hand: a loss curve and a map of expert load.

Owns how they look. Knows nothing of where the numbers come from.
"""

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_FONT = 'font-family="sans-serif" font-size="11" fill="#444"'
_LINE = "#b5522b"
_GRID = "#ddd"


def loss_curve(steps: Sequence[int], losses: Sequence[float]) -> str:
    """Loss over steps, the loss on a logarithmic axis."""
    width, height, left, top = 560, 260, 48, 16
    low, high = math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses)))

    def x(step: float) -> float:
        return left + (width - left - 16) * step / steps[-1]

    def y(loss: float) -> float:
        return top + (height - top - 36) * (high - math.log10(loss)) / (high - low)

    parts = []
    for exponent in range(low, high + 1):
        level = y(10.0**exponent)
        parts.append(f'<path d="M{left} {level:.1f}H{width - 16}" stroke="{_GRID}"/>')
        parts.append(_text(left - 6, level + 4, f"{10.0**exponent:g}", "end"))
    for quarter in range(5):
        step = steps[-1] * quarter // 4
        parts.append(_text(x(step), height - 20, f"{step:,}", "middle"))
    points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in zip(steps, losses, strict=True))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{_LINE}" stroke-width="1.5"/>')
    parts.append(_text(width / 2, height - 4, "step", "middle"))
    parts.append(_text(left + 8, top + 12, "loss per answer token", "start"))
    return _document(width, height, parts)


def expert_map(rows: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """A row of cells per name: for each MoE layer each expert's share of the tokens, as a multiple of an equal share.

    The darker, the more; black is four times an equal share and above. Layers stand side by side.
    """
    cell, left, top, gap = 9, 110, 34, 14
    layers = next(iter(rows.values()))
    num_layers, num_experts = len(layers), len(layers[0])
    block = cell * num_experts + gap
    parts = []
    for layer in range(num_layers):
        parts.append(_text(left + layer * block, 14, f"layer {2 * layer + 1}", "start"))
        parts.append(
            _text(left + layer * block, 27, f"most: {max(max(row[layer]) for row in rows.values()):.1f}", "start")
        )
    for i, (name, shares) in enumerate(rows.items()):
        y = top + i * (cell + 3)
        parts.append(_text(left - 8, y + cell, name, "end"))
        for layer, row in enumerate(shares):
            for expert, share in enumerate(row):
                x, grey = left + layer * block + expert * cell, round(255 * (1 - min(share, 4) / 4))
                parts.append(f'<path d="M{x} {y}h{cell}v{cell}h-{cell}z" fill="#{grey:02x}{grey:02x}{grey:02x}"/>')
    width, height = left + num_layers * block, top + len(rows) * (cell + 3) + 6
    return _document(width, height, parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" {_FONT}>{escape(text)}</text>'


def _document(width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>"]) + "\n"
