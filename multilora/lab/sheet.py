"""A labelled contact sheet: pictures in rows, a caption under each, a title above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, GREY, LINE = (250, 249, 246), (28, 28, 34), (112, 112, 122), (222, 220, 214)
MARGIN, GAP = 28, 18


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet, what it is (`title`) and a smaller line about it (`note`)."""

    image: Any
    title: str
    note: str = ""


def contact_sheet(
    rows: Sequence[Sequence[Cell]], *, title: str = "", subtitle: str = "", side: int = 256
) -> Image.Image:
    """Lay cells out row by row.

    rows             rows of Cells; rows may differ in length
    title, subtitle  above the pictures, wrapped to the sheet's width
    side             the shorter side of each picture on the sheet in pixels; small pictures are enlarged by whole
                     factors where that reaches it, large ones reduced

    Returns an RGB picture. Raises ValueError when there is no picture.
    """
    cells = [cell for row in rows for cell in row]
    if not cells:
        raise ValueError("a contact sheet needs at least one picture, got none")
    pictures = {id(cell): _fitted(cell.image.convert("RGB"), side) for cell in cells}
    width = max(p.width for p in pictures.values())
    height = max(p.height for p in pictures.values())
    columns = max(len(row) for row in rows)
    inner = columns * width + (columns - 1) * GAP
    big, medium, small = (ImageFont.load_default(size=s) for s in (26, 18, 14))

    head = [(line, big, INK) for line in _wrapped(title, big, inner)]
    head += [(line, medium, GREY) for line in _wrapped(subtitle, medium, inner)]
    top = MARGIN + sum(_line_height(font) for _, font, _ in head) + (GAP if head else 0)

    captions = {}
    for cell in cells:
        lines = [(line, medium, INK) for line in _wrapped(cell.title, medium, width)]
        captions[id(cell)] = lines + [(line, small, GREY) for line in _wrapped(cell.note, small, width)]
    foot = [max((sum(_line_height(f) for _, f, _ in captions[id(c)]) for c in row), default=0) for row in rows]
    total = top + sum(height + 8 + f + GAP for f in foot) - GAP + MARGIN

    sheet = Image.new("RGB", (inner + 2 * MARGIN, total), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, head, MARGIN, MARGIN)
    y = top
    for row, below in zip(rows, foot, strict=True):
        x = MARGIN
        for cell in row:
            picture = pictures[id(cell)]
            at = (x + (width - picture.width) // 2, y + (height - picture.height) // 2)
            sheet.paste(picture, at)
            draw.rectangle((at[0] - 1, at[1] - 1, at[0] + picture.width, at[1] + picture.height), outline=LINE)
            _write(draw, captions[id(cell)], x, y + height + 8)
            x += width + GAP
        y += height + 8 + below + GAP
    return sheet


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    short = min(picture.size)
    if short == side:
        return picture
    factor = side / short
    if factor > 1:
        factor = math.floor(factor) if factor < 8 else factor
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _line_height(font: Any) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent + 2


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels; a word that is longer than a line is cut with an ellipsis."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            while font.getlength(word) > width and len(word) > 2:
                word = word.removesuffix("…")[:-1] + "…"
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        if line:
            lines.append(line)
    return lines


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[tuple[str, Any, Any]], x: int, y: int) -> None:
    for text, font, colour in lines:
        draw.text((x, y), text, font=font, fill=colour)
        y += _line_height(font)
