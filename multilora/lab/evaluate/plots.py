"""Plots of a report as inline SVG: lines over k with intervals, and what a method costs against what it shows.

Colours are the page's custom properties --c0 ... --c7, so that they follow its light and dark theme; every method has
a mark of its own shape as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 380, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 40
COLOURS = 8
_SHAPES = (
    '<circle cx="{x}" cy="{y}" r="4.5"/>',
    '<rect x="{a}" y="{b}" width="8" height="8"/>',
    '<path d="M{x} {t}L{r} {u}L{l} {u}Z"/>',
    '<path d="M{x} {t}L{r} {y}L{x} {u}L{l} {y}Z"/>',
    '<path d="M{l} {t}L{r} {t}L{x} {u}Z"/>',
)


def mark(i: int, x: float, y: float) -> str:
    """The mark of method i, centred at x, y."""
    at = {"x": x, "y": y, "a": x - 4, "b": y - 4, "l": x - 5.5, "r": x + 5.5, "t": y - 5, "u": y + 5}
    shape = _SHAPES[i % len(_SHAPES)].format(**{name: f"{value:.1f}" for name, value in at.items()})
    return f'<g class="s{i % COLOURS}">{shape}</g>'


def swatch(i: int) -> str:
    """The mark of method i as a small picture for legends and tables."""
    return f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{mark(i, 7, 7)}</svg>'


def over_k(
    title: str, unit: str, arms: Sequence[str], ks: Sequence[int], rows: Sequence[Mapping[str, Any]], is_share: bool
) -> str:
    """Lines of every arm over k with their intervals. rows: those of report.cells for one measure."""
    found = {(r["method"], r["k"]): r for r in rows if r["k"] is not None and not math.isnan(r["value"])}
    top = 1.0 if is_share else _round_up(max((r["high"] for r in found.values()), default=1.0))
    between = (WIDTH - LEFT - RIGHT) / len(ks)

    def x(k: int, i: int) -> float:  # side by side, so that the intervals can be told apart
        room = min(between * 0.6, 9.0 * len(arms))
        return LEFT + between * (ks.index(k) + 0.5) + room * ((i + 0.5) / len(arms) - 0.5)

    parts = _axes(top, is_share)
    parts += [_text(LEFT + between * (n + 0.5), HEIGHT - BOTTOM + 16, str(k), "middle") for n, k in enumerate(ks)]
    parts += [_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 6, "LoRAs in a picture", "middle")]
    for i, arm in enumerate(arms):
        mine = [(k, found[arm, k]) for k in ks if (arm, k) in found]
        at = [(x(k, i), _y(r["value"], top)) for k, r in mine]
        drawn = [f'<polyline class="line" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in at)}"/>']
        for (k, r), (a, b) in zip(mine, at, strict=True):
            drawn.append(f'<path class="line" d="M{a:.1f} {_y(r["low"], top):.1f}V{_y(r["high"], top):.1f}"/>')
            shown = f"{100 * r['value']:.0f}%" if is_share else f"{r['value']:.1f}"
            drawn.append(f"<g><title>{escape(arm)}, k = {k}: {shown}</title>{mark(i, a, b)}</g>")
        parts.append(f'<g class="s{i % COLOURS}">{"".join(drawn)}</g>')
    return _figure(title, unit, parts)


def against_cost(title: str, unit: str, points: Sequence[tuple[str, float, float]], is_share: bool) -> str:
    """One mark a method: (name, model runs a step, value)."""
    points = [p for p in points if not (math.isnan(p[1]) or math.isnan(p[2]))]
    most = max((cost for _, cost, _ in points), default=1.0)
    top = 1.0 if is_share else _round_up(max((value for _, _, value in points), default=1.0))
    right = math.ceil(most + 0.25)
    parts = _axes(top, is_share)

    def x(cost: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * cost / right

    ticks = range(right + 1) if right <= 8 else range(0, right + 1, math.ceil(right / 6))
    parts += [_text(x(n), HEIGHT - BOTTOM + 16, str(n), "middle") for n in ticks]
    parts += [_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 6, "model runs a step, mean", "middle")]
    for i, (name, cost, value) in enumerate(points):
        title_of = f"<title>{escape(name)}: {cost:.1f} runs a step</title>"
        parts.append(f"<g>{title_of}{mark(i, x(cost), _y(value, top))}</g>")
    return _figure(title, unit, parts)


def _round_up(value: float) -> float:
    """The end of an axis whose quarters are round numbers."""
    step = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(n * step for n in (1, 2, 4, 6, 8, 10) if n * step >= value)


def _y(value: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(value, 0.0), top) / top)


def _axes(top: float, is_share: bool) -> list[str]:
    parts = []
    for n in range(5):
        value = top * n / 4
        y = _y(value, top)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{100 * value:.0f}%" if is_share else f"{value:g}", "end"))
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, unit: str, parts: Sequence[str]) -> str:
    drawn = "".join(parts)
    return (
        f"<figure><figcaption><b>{escape(title)}</b><br>{escape(unit)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{drawn}</svg></figure>'
    )
