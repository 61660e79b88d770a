"""Charts of results with intervals: points in rows, and lines over a number. One column, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from multilora.lab.chart import COLOURS, WIDTH, _canvas, _cut, _font, _heading, _legend, _stacked, _text
from multilora.lab.schedule_chart import _nice
from multilora.lab.sheet import GREY, INK, LINE, MARGIN

_NAMES = 300  # room for the names of rows
_LEFT = MARGIN + 60


@dataclass(frozen=True)
class Point:
    """A number with its interval; `name` of its row, or `x` its place on the axis."""

    name: str
    value: float
    low: float
    high: float
    x: float = 0.0


def draw_points(points: Sequence[Point], *, title: str, subtitle: str = "") -> Image.Image:
    """A row for each point: dot and interval on a common axis, which holds 0. Raises ValueError without points."""
    if not points:
        raise ValueError("a chart of points has at least one")
    low, high, by = _axis([v for p in points for v in (p.low, p.high, p.value)])
    font, tall = _font(18), 34
    left, wide = MARGIN + _NAMES, WIDTH - 2 * MARGIN - _NAMES - 70
    picture, draw = _canvas(tall * len(points) + 40)

    def at(value: float) -> float:
        return left + wide * (value - low) / (high - low)

    bottom = tall * len(points)
    for i in range(round((high - low) / by) + 1):
        x = at(low + i * by)
        draw.line((x, 0, x, bottom), fill=LINE)
        draw.text((x, bottom + 8), f"{round(low + i * by, 9) + 0.0:.4g}", font=font, fill=GREY, anchor="mt")
    for r, point in enumerate(points):
        y, colour = tall * r + tall / 2, COLOURS[0]
        draw.text((MARGIN, y), _cut(point.name, font, _NAMES - 14), font=font, fill=INK, anchor="lm")
        draw.line((at(point.low), y, at(point.high), y), fill=colour, width=4)
        draw.ellipse((at(point.value) - 6, y - 6, at(point.value) + 6, y + 6), fill=colour)
        draw.text((WIDTH - MARGIN, y), f"{point.value:.2f}", font=font, fill=GREY, anchor="rm")
    return _stacked([_heading(title, 30), *([_text(subtitle)] if subtitle else []), picture])


def draw_lines(
    lines: Mapping[str, Sequence[Point]], *, title: str, axis: str, subtitle: str = "", even: bool = False
) -> Image.Image:
    """A line for each name through its points in the order of x, with intervals.

    even  the values of x stand at equal distances, whatever they are. Raises ValueError without points.
    """
    if not lines or not all(lines.values()):
        raise ValueError("a chart of lines has at least one point a line")
    every = [p for line in lines.values() for p in line]
    low, high, by = _axis([v for p in every for v in (p.low, p.high, p.value)])
    places = sorted({p.x for p in every})
    first, last = places[0], places[-1] if places[-1] > places[0] else places[0] + 1
    font, top, tall = _font(18), 14, 300
    wide = WIDTH - MARGIN - _LEFT - 24
    picture, draw = _canvas(top + tall + 62)

    def across(x: float) -> float:
        share = places.index(x) / max(1, len(places) - 1) if even else (x - first) / (last - first)
        return _LEFT + 12 + (wide - 24) * share

    def at(x: float, value: float) -> tuple[float, float]:
        return across(x), top + tall * (1 - (value - low) / (high - low))

    for i in range(round((high - low) / by) + 1):
        y = at(first, low + i * by)[1]
        draw.line((_LEFT, y, _LEFT + wide, y), fill=LINE)
        draw.text((_LEFT - 10, y), f"{round(low + i * by, 9) + 0.0:.4g}", font=font, fill=GREY, anchor="rm")
    for x in places[:: max(1, len(places) // 10)]:
        draw.text((across(x), top + tall + 8), f"{x:g}", font=font, fill=GREY, anchor="mt")
    draw.text((_LEFT + wide / 2, top + tall + 34), axis, font=font, fill=GREY, anchor="mt")
    for i, line in enumerate(lines.values()):
        colour = COLOURS[i % len(COLOURS)]
        points = sorted(line, key=lambda p: p.x)
        draw.line([at(p.x, p.value) for p in points], fill=colour, width=4, joint="curve")
        for p in points:
            x, y = at(p.x, p.value)
            draw.line((*at(p.x, p.low), *at(p.x, p.high)), fill=colour, width=2)
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
    head = [_heading(title, 30), *([_text(subtitle)] if subtitle else [])]
    return _stacked([*head, _legend(list(lines)), picture])


def _axis(values: Sequence[float]) -> tuple[float, float, float]:
    """(lowest, highest, step) of an axis that holds the values and 0."""
    low, high = min(0.0, *values), max(0.0, *values)
    high = high if high > low else low + 1.0
    by = _nice((high - low) / 5)
    return math.floor(low / by + 1e-9) * by, math.ceil(high / by - 1e-9) * by, by
