"""A grid: one picture per value of one or two fields of a recipe, with its readings under each.

A field is one of the recipe (steps, guidance_scale, scheduler, prompt, ...), `weight` of all LoRAs, `NAME.weight` (or
another field of the LoRA NAME), `size`, or an option of the method (every).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from multilora.lab.evaluate.batch import Progress, run_batch
from multilora.lab.evaluate.items import items_of
from multilora.lab.evaluate.readings import Kept, Readers, Reading, told
from multilora.lab.evaluate.workers import ComposerRenderer
from multilora.lab.sheet import Cell, contact_sheet
from multilora.method import methods, unknown
from multilora.recipe import LoraUse, Recipe, save_png

MOST = 400  # cells of a grid
SHORT = {"guidance": "guidance_scale", "negative": "negative_prompt"}
# These are the grid's own to set, or describe what came out.
CLOSED = {"version", "loras", "options", "resolved", "extra", "images", "index", "pictures", "task", "base_family"}


@dataclass(frozen=True)
class Axis:
    """A field and its values, as they were typed."""

    field: str
    values: tuple[str, ...]

    def label(self, value: str) -> str:
        return value if self.field in ("method", "prompt", "scheduler") else f"{self.field.replace('_', ' ')} {value}"


def axis(text: str) -> Axis:
    """An Axis from `FIELD=A,B,C`; with a `|` among the values, that parts them: `prompt=a fox, sitting|a cat`.

    Raises ValueError without a field or values, and for a value that comes twice.
    """
    field, equals, rest = text.partition("=")
    values = tuple(v.strip() for v in rest.split("|" if "|" in rest else ","))
    field = field.strip()
    if not equals or not field or not all(values):
        raise ValueError(f"axis {text!r}: wanted FIELD=VALUE,VALUE such as method=merge,switch or weight=0.6,1")
    if len(set(values)) < len(values):
        raise ValueError(f"axis {text!r}: {Counter(values).most_common(1)[0][0]!r} is there twice")
    return Axis(SHORT.get(field, field), values)


@dataclass(frozen=True)
class Square:
    """One picture of a grid: its values on the axes, its file, what was read from it."""

    x: str
    y: str
    path: Path
    recipe: Recipe
    reading: Reading


@dataclass(frozen=True)
class Grid:
    """squares: [rows, columns], None where the picture failed or was not drawn any more; sheet: the contact sheet."""

    squares: Sequence[Sequence[Square | None]]
    sheet: Path | None
    read_by: Mapping[str, str]
    errors: Sequence[str] = ()
    stopped: bool = False


def rows_of(row: Mapping[str, Any], x: Axis, y: Axis | None = None) -> list[list[dict[str, Any]]]:
    """The recipes of a grid, [rows, columns], from the one that they share (fields of a recipe, `loras` as dicts).

    An option goes to the methods that have it. Raises ValueError for a field that no cell has, for both axes on one
    field, and for more than MOST cells.
    """
    if y is not None and x.field == y.field:
        raise ValueError(f"both axes are {x.field}: wanted two different fields")
    if len(x.values) * (len(y.values) if y else 1) > MOST:
        raise ValueError(f"{len(x.values)} x {len(y.values) if y else 1} cells: wanted at most {MOST}")
    axes = sorted([(x, 0), *([(y, 1)] if y else [])], key=lambda pair: pair[0].field != "method")  # it has the options
    names = [value for each, _ in axes if each.field == "method" for value in each.values] or [row["method"]]
    made = []
    for down in y.values if y else ("",):
        line = []
        for across in x.values:
            one = {**row, "options": dict(row.get("options") or {}), "loras": [dict(u) for u in row.get("loras", [])]}
            for each, which in axes:
                one = _with(one, each.field, (across, down)[which], names)
            line.append(one)
        made.append(line)
    return made


def _with(row: dict[str, Any], field: str, value: str, names: Sequence[str]) -> dict[str, Any]:
    """The row with a field set. names: the methods of the grid."""
    uses = {use["name"]: use for use in row["loras"]}
    owner, dot, own = field.rpartition(".")
    if field == "weight" or (dot and owner in uses):
        if not uses:
            raise ValueError("axis weight: there are no LoRAs; give --lora")
        if dot and own not in LoraUse.model_fields:
            raise unknown(f"field of LoRA {owner}", own, LoraUse.model_fields)
        for use in [uses[owner]] if dot else row["loras"]:
            use[own] = _read(value)
        return row
    if field == "size":
        width, _, height = value.lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise ValueError(f"axis size={value}: wanted WIDTHxHEIGHT, such as 128x96")
        return {**row, "width": int(width), "height": int(height)}
    known = methods("route")
    if field == "method":
        if value not in known:
            raise unknown("method", value, known)
        fitting = {o.name for o in known[value].options}
        return {**row, "method": value, "options": {k: v for k, v in row["options"].items() if k in fitting}}
    if field in Recipe.model_fields and field not in CLOSED:
        text = Recipe.model_fields[field].annotation in (str, str | None)
        return {**row, field: value if text else _read(value)}
    option = field.removeprefix("options.")
    options = {n: {o.name for o in known[n].options} for n in names}
    takers = [n for n in names if option in options[n]]
    if not takers:
        fields = {*Recipe.model_fields} - CLOSED | {"weight", "size"} | set().union(*options.values())
        raise unknown("field of an axis", field, fields | {f"{name}.weight" for name in uses})
    if row["method"] in takers:
        row["options"][option] = value
    return row


def _read(value: str) -> Any:
    """A typed value: a number where it is one, else the text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def draw_grid(
    row: Mapping[str, Any],
    x: Axis,
    y: Axis | None,
    out: str | Path,
    *,
    readers: Readers | None = None,
    elements: Mapping[str, str] | None = None,
    make: Callable[[], Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Grid:
    """Draw a grid in a folder, as a batch that goes on where it stopped, and its sheet.

    elements  category -> design of the embedded world, for the recogniser; nothing is looked for without
    others    as multilora.lab.evaluate.evaluation.evaluate takes them

    Raises ValueError for axes that do not fit, and what run_batch raises.
    """
    out, made = Path(out), rows_of({"seed": 0, **row}, x, y)
    readers = readers or Readers()
    # An option that only some methods have makes equal recipes: one picture for all of them.
    keys = [[json.dumps(one, sort_keys=True) for one in line] for line in made]
    unique = {key: one for line, ones in zip(keys, made, strict=True) for key, one in zip(line, ones, strict=True)}
    items = dict(zip(unique, items_of(list(unique.values()), source="grid"), strict=True))
    summary = run_batch(
        list(items.values()), out, make or partial(ComposerRenderer, "cpu", 1), settings=settings, stop=stop,
        progress=progress,
    )  # fmt: skip
    done = {r["id"]: r for r in summary.rows if r["status"] == "done"}
    kept = Kept(out / "readings.jsonl", readers)
    new = {r["sha256"]: r for r in done.values() if r["sha256"] not in kept}
    if new:
        prompts = {item.id: item.recipe.prompt for item in items.values()}
        images = [Image.open(r["path"]).convert("RGB") for r in new.values()]
        kept.read(list(new), images, [prompts[r["id"]] for r in new.values()], [elements or {}] * len(new))
    squares: list[list[Square | None]] = []
    for down, line in zip(y.values if y else ("",), keys, strict=True):
        squares.append([])
        for across, key in zip(x.values, line, strict=True):
            item, found = items[key], done.get(items[key].id)
            square = found and Square(across, down, Path(found["path"]), item.recipe, kept[found["sha256"]])
            squares[-1].append(square or None)
    errors = [r["error"] or "" for r in summary.rows if r["status"] == "failed"]
    sheet = _sheet(squares, x, y, out / "grid.png", readers) if done else None
    return Grid(squares, sheet, readers.names, errors, summary.stopped)


def _sheet(squares: Sequence[Sequence[Square | None]], x: Axis, y: Axis | None, path: Path, readers: Readers) -> Path:
    lines = []
    for line in squares:
        cells = []
        for square in line:
            if square is None:
                cells.append(Cell(Image.new("RGB", (8, 8), (222, 220, 214)), "failed"))
                continue
            title = ", ".join([x.label(square.x), *([y.label(square.y)] if y else [])])
            cells.append(Cell(Image.open(square.path), title, told(square.reading)))
        lines.append(cells)
    one = next(square for line in squares for square in line if square is not None).recipe
    shared = {"method": one.method, "seed": f"seed {one.seed}", "steps": f"{one.steps} steps",
              "guidance_scale": f"guidance {one.guidance_scale:g}"}  # fmt: skip
    for each in (x, y) if y else (x,):
        shared.pop(each.field, None)
    read = "; ".join(f"{what} by {who}" for what, who in readers.names.items() if who != "not measured")
    prompt = "" if "prompt" in (x.field, y and y.field) else one.prompt
    return save_png(contact_sheet(lines, title=prompt, subtitle="\n".join([", ".join(shared.values()), read])), path)


def folder_of(row: Mapping[str, Any], x: Axis, y: Axis | None) -> str:
    """A folder name for this grid; another grid, another name."""
    text = json.dumps([dict(row), x.field, x.values, y and [y.field, y.values]], sort_keys=True)
    return f"grid_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
