"""Lines over a logarithmic x axis as an SVG text: for plots in docs, with no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 400, 60, 50, 60
COLOURS = ("#1565c0", "#c62828", "#2e7d32", "#6a1b9a")


@dataclass(frozen=True)
class Line:
    name: str
    x: Sequence[float]
    y: Sequence[float]


def plot(title: str, x_name: str, lines: Sequence[Line]) -> str:
    """x ascending from above 0; the y axis starts at 0."""
    ticks = sorted({x for line in lines for x in line.x})
    low, high = math.log2(ticks[0]), math.log2(ticks[-1])
    top = max(max(line.y) for line in lines) * 1.05

    def across(x: float) -> float:
        return LEFT + (math.log2(x) - low) / max(high - low, 1e-9) * (WIDTH - LEFT - 20)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif"',
        f' font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for step in range(6):
        y = top / 5 * step
        parts.append(f'<path d="M{LEFT} {up(y):.1f}H{WIDTH - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.1f}</text>')
    last = -100.0
    for x in ticks:
        if across(x) - last >= 34:
            last = across(x)
            name = f"{x / 1024:g}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}"
            parts.append(f'<text x="{last:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{name}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_name)}</text>')
    for i, line in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 10}" y="{40 + 16 * i}" fill="{colour}">{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>\n"])
