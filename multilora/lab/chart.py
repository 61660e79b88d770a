"""Charts of LoRAs: energy per block and by rank, agreement of several. One column that is readable on a phone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from multilora.compare import Comparison
from multilora.lab.sheet import GREY, INK, LINE, MARGIN, PAPER

WIDTH = 760
INNER = WIDTH - 2 * MARGIN
# Colour-blind safe (Okabe and Ito), in an order whose neighbours differ in lightness too.
COLOURS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (86, 180, 233), (204, 121, 167), (90, 90, 90),
    (150, 120, 20),
)  # fmt: skip
POSITIVE, NEGATIVE = (213, 94, 0), (0, 114, 178)
_MOST_PAIRS = 6  # columns of the table of cosines by block
_MOST_LINES = 60  # blocks with a line of their own
Matrix = Sequence[Sequence[float | None]]


def draw_comparison(found: Comparison, *, title: str = "") -> Image.Image:
    """Everything that `multilora.compare.compare` found, as one RGB picture of WIDTH pixels and any height."""
    k = len(found.names)
    names = ", ".join(found.names)
    title = title or (f"LoRAs compared: {names}" if len(names) < 80 else f"{k} LoRAs compared")
    parts = [_heading(title, 30), _legend(found.names)]
    if k > 1:
        parts += [
            _heading("Cosine of the whole updates"),
            _text("1: the same direction, 0: at right angles, -1: opposite"),
            _matrix(found.names, found.cosine),
            _heading("Cosine by block"),
            _pairs(found),
        ]
    parts += [_heading("Energy by block"), _text("share of each LoRA's own energy")]
    parts += [_bars({name: _shares(found, name) for name in found.blocks}, k)]
    parts += [_heading("Energy by rank"), _text("share held by the r largest directions of every module")]
    parts += [_curves(found.spectrum)]
    if k > 1:
        for side, words in (("in", "input"), ("out", "output")):
            chance = getattr(found, f"chance_{side}")
            usual = [c for i, row in enumerate(chance) for j, c in enumerate(row) if i != j and c is not None]
            by_chance = f"; chance alone gives {sum(usual) / len(usual):.2f}" if usual else ""
            parts += [_heading(f"Shared {words} directions"), _text(f"0: none, 1: all of the smaller{by_chance}")]
            parts += [_matrix(found.names, getattr(found, f"overlap_{side}"))]
    return _stacked(parts)


def draw_energy(name: str, energies: Mapping[str, float], spectrum: Sequence[float]) -> Image.Image:
    """One LoRA: its energy by block and by rank (multilora.compare.energies and spectrum_of)."""
    total = sum(energies.values()) or 1.0
    parts = [_heading(name, 30), _heading("Energy by block"), _text("share of the LoRA's energy")]
    parts += [_bars({block: [value / total] for block, value in energies.items()}, 1)]
    parts += [_heading("Energy by rank"), _text("share held by the r largest directions of every module")]
    return _stacked([*parts, _curves([list(spectrum)])])


def _shares(found: Comparison, block: str) -> list[float]:
    pairs = zip(found.blocks[block].norms, found.norms, strict=True)
    return [(norm / whole) ** 2 if whole else 0.0 for norm, whole in pairs]


def _font(size: int):
    return ImageFont.load_default(size=size)


def _canvas(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (WIDTH, max(1, height)), PAPER)
    return picture, ImageDraw.Draw(picture)


def _stacked(parts: Sequence[Image.Image]) -> Image.Image:
    whole, _ = _canvas(sum(p.height for p in parts) + 2 * MARGIN)
    y = MARGIN
    for part in parts:
        whole.paste(part, (0, y))
        y += part.height
    return whole


def _lines(text: str, font, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


def _text(text: str, size: int = 19, colour=GREY, above: int = 0) -> Image.Image:
    font = _font(size)
    lines = _lines(text, font, INNER)
    step = round(size * 1.3)
    picture, draw = _canvas(above + step * len(lines) + 6)
    for i, line in enumerate(lines):
        draw.text((MARGIN, above + step * i), _cut(line, font, INNER), font=font, fill=colour)
    return picture


def _heading(text: str, size: int = 24) -> Image.Image:
    return _text(text, size, INK, above=0 if size > 24 else 26)


def _cut(text: str, font, width: float) -> str:
    """The text, or as much of its beginning as fits, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _end(text: str, font, width: float) -> str:
    """As much of the text's end as fits: the end tells one block from another."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text


def _legend(names: Sequence[str]) -> Image.Image:
    font, x, y, places = _font(20), MARGIN, 4, []
    for i, name in enumerate(names):
        name = _cut(name, font, INNER - 40)
        wide = 26 + round(font.getlength(name)) + 22
        if x > MARGIN and x + wide > WIDTH - MARGIN:
            x, y = MARGIN, y + 30
        places.append((x, y, name, i))
        x += wide
    picture, draw = _canvas(y + 34)
    for x, y, name, i in places:
        draw.rectangle((x, y + 4, x + 16, y + 20), fill=COLOURS[i % len(COLOURS)])
        draw.text((x + 26, y), name, font=font, fill=INK)
    return picture


def _tint(value: float | None) -> tuple[int, int, int]:
    if value is None:
        return PAPER
    target, by = (POSITIVE if value > 0 else NEGATIVE), min(abs(value), 1.0) ** 0.7
    return tuple(round(p + (t - p) * by) for p, t in zip(PAPER, target, strict=True))


def _cell(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], value: float | None, font) -> None:
    draw.rectangle(box, fill=_tint(value), outline=LINE)
    shown = "-" if value is None else f"{value:.2f}".replace("-0.00", "0.00")
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    dark = value is not None and abs(value) > 0.6
    if font.getlength(shown) < box[2] - box[0]:
        draw.text(middle, shown, font=font, fill=PAPER if dark else INK, anchor="mm")


def _matrix(names: Sequence[str], values: Matrix) -> Image.Image:
    k, font = len(names), _font(20)
    label = min(200, max(round(font.getlength(n)) for n in names) + 14)
    side = min(110, (INNER - label) // k)
    number = _font(20 if side > 56 else 15 if side > 40 else 12)
    high = min(side, 60)
    picture, draw = _canvas(34 + high * k + 4)
    for i, name in enumerate(names):
        x, y = MARGIN + label + side * i, 34 + high * i
        draw.text((x + side / 2, 28), _cut(name, font, side - 6), font=font, fill=INK, anchor="ms")
        draw.text((MARGIN + label - 10, y + high / 2), _cut(name, font, label - 12), font=font, fill=INK, anchor="rm")
        for j in range(k):
            left = MARGIN + label + side * j
            _cell(draw, (left, y, left + side, y + high), values[i][j], number)
    return picture


def _pairs(found: Comparison) -> Image.Image:
    """Blocks down, pairs of LoRAs across, marked by the colours of the two."""
    pairs = list(itertools.combinations(range(len(found.names)), 2))
    shown = sorted(sorted(pairs, key=lambda p: -abs(found.cosine[p[0]][p[1]] or 0.0))[:_MOST_PAIRS])
    blocks = list(found.blocks)[:_MOST_LINES]
    font, number, label = _font(18), _font(17), 300
    wide, high = min(110, (INNER - label) // len(shown)), 30
    picture, draw = _canvas(30 + high * len(blocks) + 4 + (26 if len(shown) < len(pairs) else 0))
    for c, (i, j) in enumerate(shown):
        x = MARGIN + label + wide * c + wide // 2
        draw.rectangle((x - 19, 8, x - 3, 24), fill=COLOURS[i % len(COLOURS)])
        draw.rectangle((x + 3, 8, x + 19, 24), fill=COLOURS[j % len(COLOURS)])
    for r, name in enumerate(blocks):
        y = 30 + high * r
        draw.text((MARGIN, y + high / 2), _end(name, font, label - 10), font=font, fill=INK, anchor="lm")
        for c, (i, j) in enumerate(shown):
            x = MARGIN + label + wide * c
            _cell(draw, (x, y, x + wide, y + high), found.blocks[name].cosine[i][j], number)
    if len(shown) < len(pairs):
        note = f"the {len(shown)} of {len(pairs)} pairs that agree or disagree most"
        draw.text((MARGIN, 34 + high * len(blocks)), note, font=font, fill=GREY)
    return picture


def _bars(shares: Mapping[str, Sequence[float]], k: int) -> Image.Image:
    """A group of k bars for every block."""
    shown = dict(itertools.islice(shares.items(), _MOST_LINES))
    font, label = _font(18), 300
    thick = 18 if k == 1 else max(5, min(12, 36 // k))
    high = max(26, k * thick + 10)
    largest = max((s for values in shown.values() for s in values), default=0.0) or 1.0
    room = INNER - label - 66
    picture, draw = _canvas(high * len(shown) + 6)
    for r, (name, values) in enumerate(shown.items()):
        y = high * r + 4
        draw.text((MARGIN, y + k * thick / 2), _end(name, font, label - 10), font=font, fill=INK, anchor="lm")
        for i, share in enumerate(values):
            x, top = MARGIN + label, y + i * thick
            box = (x, top, x + round(room * share / largest), top + thick - 2)
            draw.rectangle(box, fill=COLOURS[i % len(COLOURS)])
        end = MARGIN + label + round(room * max(values) / largest) + 8
        draw.text((end, y + k * thick / 2), f"{max(values):.0%}", font=font, fill=GREY, anchor="lm")
    return picture


def _curves(spectra: Sequence[Sequence[float]]) -> Image.Image:
    """Share of the energy over the rank, one line a LoRA, from 0 at rank 0."""
    font, left, top, high = _font(18), MARGIN + 54, 14, 260
    wide = WIDTH - MARGIN - left - 16
    most = max((len(s) for s in spectra), default=1) or 1
    picture, draw = _canvas(top + high + 62)

    def at(rank: float, share: float) -> tuple[float, float]:
        return left + wide * rank / most, top + high * (1 - share)

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        draw.line((at(0, share), at(most, share)), fill=LINE)
        draw.text((left - 10, at(0, share)[1]), f"{share:.0%}", font=font, fill=GREY, anchor="rm")
    for rank in _ticks(most):
        draw.text((at(rank, 0)[0], top + high + 8), str(rank), font=font, fill=GREY, anchor="mt")
    draw.text((left + wide / 2, top + high + 32), "rank r of every module", font=font, fill=GREY, anchor="mt")
    for i, shares in enumerate(spectra):
        points = [at(r, s) for r, s in enumerate([0.0, *shares])]
        draw.line(points, fill=COLOURS[i % len(COLOURS)], width=4, joint="curve")
        if most <= 40:
            for x, y in points[1:]:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLOURS[i % len(COLOURS)])
    return picture


def _ticks(most: int) -> list[int]:
    by = next((n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096) if most / n <= 8), most)
    return list(range(0, most + 1, by))
