"""Chart of a picture's schedule: every LoRA's weight over the steps, and which LoRA acts when."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from PIL import Image

from multilora.lab.chart import COLOURS, WIDTH, _canvas, _cut, _font, _heading, _legend, _stacked, _text, _ticks
from multilora.lab.sheet import GREY, INK, LINE, MARGIN, PAPER
from multilora.trace import Seen

_LEFT = MARGIN + 54
_NAMES = 130  # room for names left of the lanes
DASHES = ((1, 0), (14, 8), (4, 6), (18, 6), (9, 9), (3, 9))  # (drawn, left out) pixels: lines that lie on each other


def draw_schedule(
    names: Sequence[str], runs: Mapping[str, Sequence[Seen]], *, title: str, subtitle: str = ""
) -> Image.Image:
    """One RGB picture of WIDTH pixels and any height.

    names  [loras]
    runs   what was drawn, method's title -> its steps (multilora.trace.by_step); the weights are those of the first

    Raises ValueError when there is no run or one has no steps.
    """
    if not runs or not all(runs.values()):
        raise ValueError("a schedule to draw has at least one run of at least one step")
    first = next(iter(runs.values()))
    parts = [_heading(title, 30), *([_text(subtitle)] if subtitle else []), _legend(names)]
    parts += [_heading("Weight of each LoRA over the steps"), _weights([s.weights for s in first])]
    for name, seen in runs.items():
        most = max(len(s.passes) for s in seen)
        words = f"{most} run{'s' if most > 1 else ''} of the model per step; numbers: weight in a run times its share"
        parts += [_heading(f"What acts in each step: {name}"), _text(words)]
        effects = [s.effects for s in seen]
        if any(e is None for e in effects):
            parts += [_text("A gate decides for every token or sample; no weight holds for a whole step.")]
        else:
            parts += [_lanes(names, effects)]
    return _stacked(parts)


def _weights(weights: Sequence[Sequence[float]], axis: str = "step") -> Image.Image:
    """Lines over the steps: a mark at every step, since a weight holds for a whole step."""
    font, top, high, steps = _font(18), 14, 260, len(weights)
    wide = WIDTH - MARGIN - _LEFT - 16
    values = [v for line in weights for v in line]
    low, peak = min(0.0, *values), max(0.0, *values)
    peak = peak if peak > low else low + 1.0
    by = _nice((peak - low) / 4)
    low, peak = math.floor(low / by + 1e-9) * by, math.ceil(peak / by - 1e-9) * by
    picture, draw = _canvas(top + high + 62)

    def at(step: float, value: float) -> tuple[float, float]:
        share = step / (steps - 1) if steps > 1 else 0.5
        return _LEFT + 8 + (wide - 16) * share, top + high * (1 - (value - low) / (peak - low))

    for i in range(round((peak - low) / by) + 1):
        value = low + i * by
        y = at(0, value)[1]
        draw.line((_LEFT, y, _LEFT + wide, y), fill=GREY if abs(value) < 1e-9 and low < 0 else LINE)
        draw.text((_LEFT - 10, y), f"{round(value, 9) + 0.0:.4g}", font=font, fill=GREY, anchor="rm")
    for step in _ticks(max(1, steps - 1)):
        if step < steps:
            draw.text((at(step, 0)[0], top + high + 8), str(step), font=font, fill=GREY, anchor="mt")
    draw.text((_LEFT + wide / 2, top + high + 32), axis, font=font, fill=GREY, anchor="mt")
    for i in range(len(weights[0])):
        colour = COLOURS[i % len(COLOURS)]
        points = [at(step, line[i]) for step, line in enumerate(weights)]
        _dashed(draw, points, colour, DASHES[i % len(DASHES)])
        if steps <= 60:
            for x, y in points:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    return picture


def _dashed(draw, points: Sequence[tuple[float, float]], colour: tuple[int, int, int], dash: tuple[int, int]) -> None:
    on, off = dash
    travelled = 0.0
    for (x, y), (u, v) in itertools.pairwise(points):
        length = math.hypot(u - x, v - y)
        if not off:
            draw.line((x, y, u, v), fill=colour, width=4)
            continue
        done = 0.0
        while done < length:
            place = travelled % (on + off)
            piece = min((on if place < on else on + off) - place, length - done)
            if place < on:
                a, b = done / length, (done + piece) / length
                draw.line((x + (u - x) * a, y + (v - y) * a, x + (u - x) * b, y + (v - y) * b), fill=colour, width=4)
            done, travelled = done + max(piece, 1e-6), travelled + max(piece, 1e-6)


def _lanes(names: Sequence[str], effects: Sequence[Sequence[float]]) -> Image.Image:
    """A lane for each LoRA, a cell for each step: the stronger the effect, the fuller the colour."""
    font, small, high = _font(18), _font(14), 34
    left, steps, k = MARGIN + _NAMES, len(effects), len(names)
    wide = (WIDTH - MARGIN - left - 16) / steps
    most = max((abs(e) for line in effects for e in line), default=0.0) or 1.0
    picture, draw = _canvas(high * k + 58)
    for i, name in enumerate(names):
        y, colour = high * i, COLOURS[i % len(COLOURS)]
        draw.text((MARGIN, y + high / 2), _cut(name, font, _NAMES - 12), font=font, fill=INK, anchor="lm")
        draw.line((left, y + high - 3, left + wide * steps, y + high - 3), fill=LINE)
        for step, line in enumerate(effects):
            by = abs(line[i]) / most
            if not by:
                continue
            x = left + wide * step
            draw.rectangle((round(x), y + 3, max(round(x), round(x + wide) - 1), y + high - 4), fill=_tint(colour, by))
        for start, stop in _same([line[i] for line in effects]):
            value = effects[start][i]
            shown = f"{value:.2g}"
            if value and small.getlength(shown) < (stop - start) * wide - 4:
                red, green, blue = _tint(colour, abs(value) / most)
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 130
                middle = (left + wide * (start + stop) / 2, y + high / 2)
                draw.text(middle, shown, font=small, fill=PAPER if dark else INK, anchor="mm")
    for step in _ticks(max(1, steps - 1)):
        if step < steps:
            draw.text((left + wide * (step + 0.5), high * k + 6), str(step), font=font, fill=GREY, anchor="mt")
    draw.text((left + wide * steps / 2, high * k + 30), "step", font=font, fill=GREY, anchor="mt")
    return picture


def _tint(colour: tuple[int, int, int], by: float) -> tuple[int, int, int]:
    red, green, blue = (round(p + (c - p) * (0.15 + 0.85 * by)) for p, c in zip(PAPER, colour, strict=True))
    return red, green, blue


def _same(values: Sequence[float]) -> list[tuple[int, int]]:
    """(first, last + 1) of the stretches of one value."""
    edges = [i for i in range(1, len(values)) if values[i] != values[i - 1]]
    return list(zip([0, *edges], [*edges, len(values)], strict=True))


def _nice(step: float) -> float:
    """The step of 1, 2, 2.5 or 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((n * power for n in (1.0, 2.0, 2.5, 5.0) if n * power >= step * (1 - 1e-9)), 10.0 * power)
