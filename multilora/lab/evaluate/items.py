"""The items of a batch: lines of a recipes.jsonl, each a recipe that says everything about one picture.

A line has a recipe's fields. On the embedded base `base`, `steps`, `guidance_scale`, `width` and `height` may be left
out; `loras` may also be {name: weight}. Without a `seed`, one comes from the prompt, the names of the LoRAs and
`repeat`, never from method or weights: methods are compared on the same noise. Equal lines are repeats 0, 1, 2, ...
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.method import resolve
from multilora.pipelines.load import EMBEDDED, EMBEDDED_DEFAULTS, assets, find_lora
from multilora.recipe import Recipe, RecipeError

SHOWN = 20  # complaints in one message


class BatchError(ValueError):
    """A batch that cannot be run as it was asked for; the message names file, line and field."""


@dataclass(frozen=True)
class Item:
    """One picture of a batch.

    id      the first 16 hexadecimal digits of the sha256 of the recipe's JSON; also the name of the picture's file
    line    of the file it came from, from 1
    recipe  with its seed, and the sha256 of its LoRAs' files
    """

    id: str
    line: int
    recipe: Recipe


def item(recipe: Recipe, line: int = 0) -> Item:
    """The item of a recipe, whose seed is kept."""
    return Item(hashlib.sha256(recipe.json.encode()).hexdigest()[:16], line, recipe)


def seed_of(prompt: str, loras: Iterable[str], repeat: int = 0) -> int:
    """The seed of a prompt with LoRAs of these names, in any order: 63 bits of a sha256."""
    text = json.dumps([prompt, sorted(loras), repeat], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_items(path: str | Path) -> list[Item]:
    """The items of a recipes.jsonl. Raises BatchError as items_of does, and for a file that cannot be read."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path}: cannot be read: {error}") from None
    lines, wrong = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                lines.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                wrong.append(f"line {number}: not JSON: {error}")
    _refuse(wrong, path.name, "lines that cannot be read")
    return items_of([data for _, data in lines], source=path.name, lines=[number for number, _ in lines])


def items_of(recipes: Sequence[Any], source: str = "recipes", lines: Sequence[int] | None = None) -> list[Item]:
    """The items of recipes given as dicts, checked one and all; what they are called in messages is `source`.

    Raises BatchError naming every line and field that is wrong, or every LoRA and picture that is missing, or the
    lines that ask for one picture twice.
    """
    lines = list(lines) if lines is not None else list(range(1, len(recipes) + 1))
    if not recipes:
        raise BatchError(f"{source}: no recipes in it; wanted one JSON object a line, with at least a prompt")
    wrong, found, equal = [], [], Counter()
    for number, data in zip(lines, recipes, strict=True):
        try:
            found.append((number, _checked(data, f"line {number}", equal)))
        except RecipeError as error:
            wrong.append(str(error))
    _refuse(wrong, source, "wrong lines")
    _refuse(_missing(found), source, "missing files")
    items = [item(_hashed(recipe), number) for number, recipe in found]
    first: dict[str, int] = {}
    for one in items:
        if one.id in first:
            wrong.append(f"line {one.line}: the same picture as line {first[one.id]}, with the same seed")
        first.setdefault(one.id, one.line)
    _refuse(wrong, source, "pictures asked for twice; leave `seed` out, or give each its own")
    return items


def _refuse(wrong: Sequence[str], source: str, what: str) -> None:
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise BatchError(f"{source}: {what}; no picture was made\n  " + "\n  ".join([*wrong[:SHOWN], *more]))


def _checked(data: Any, where: str, equal: Counter) -> Recipe:
    """A line as a recipe with a seed; `equal` counts the lines without one that are equal so far."""
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: wanted an object with a recipe's fields, got {data!r:.80}")
    data = dict(data)
    repeat, seeded = data.pop("repeat", None), data.get("seed") is not None
    if repeat is not None and (seeded or type(repeat) is not int or repeat < 0):
        hint = "it makes a seed, and the line has one" if seeded else f"wanted a whole number from 0, got {repeat!r}"
        raise RecipeError(f"{where}: repeat: {hint}")
    if isinstance(data.get("loras"), dict):
        data["loras"] = [{"name": name, "weight": weight} for name, weight in data["loras"].items()]
    if data.setdefault("base", EMBEDDED) == EMBEDDED:
        data = {**_embedded(), **data}
    recipe = Recipe.checked({**data, "seed": data["seed"] if seeded else 0}, where)
    for use in recipe.loras:
        use.reference = use.reference or use.name
    names = Counter(use.name for use in recipe.loras)
    if len(names) < len(recipe.loras):
        raise RecipeError(f"{where}: loras: {names.most_common(1)[0][0]!r} is named twice")
    if recipe.images != 1:
        raise RecipeError(f"{where}: images: one line is one picture (got {recipe.images}); repeat the line instead")
    try:
        resolve("route", recipe.method, **recipe.options)
    except ValueError as error:
        raise RecipeError(f"{where}: method or options: {error}") from None
    if not seeded:
        key = recipe.json
        count = equal[key] if repeat is None else repeat
        equal[key] += repeat is None
        recipe.seed = seed_of(recipe.prompt, names, count)
    return recipe


@functools.cache
def _embedded() -> dict[str, Any]:
    """What a line for the embedded base may leave out."""
    base = assets() / "base"
    side = json.loads((base / "unet" / "config.json").read_text())["sample_size"]
    side *= 2 ** (len(json.loads((base / "vae" / "config.json").read_text())["encoder_block_out_channels"]) - 1)
    steps, guidance = EMBEDDED_DEFAULTS["num_inference_steps"], EMBEDDED_DEFAULTS["guidance_scale"]
    return {"steps": steps, "guidance_scale": guidance, "width": side, "height": side}


def _missing(found: Iterable[tuple[int, Recipe]]) -> list[str]:
    """Every base, LoRA, mask and picture that is not there, each once, with the first line that names it."""
    at: dict[tuple[str, str], tuple[int, int]] = {}
    for number, recipe in found:
        names = [("base", recipe.base), ("controlnet", recipe.controlnet)]
        names += [("LoRA", use.reference) for use in recipe.loras]
        names += [("mask", use.mask or "") for use in recipe.loras]
        names += [("picture", use.reference) for use in recipe.pictures]
        for key in dict.fromkeys(names):
            first, count = at.get(key, (number, 0))
            at[key] = (first, count + 1)
    wrong = []
    for (kind, name), (number, count) in at.items():
        reason = _reason(kind, name)
        if reason:
            others = f" and {count - 1} more" if count > 1 else ""
            wrong.append(f"line {number}{others}: {reason}")
    return wrong


def _reason(kind: str, name: str) -> str:
    """Why a named file cannot be used, or ""."""
    if kind == "picture" and not name:
        return "picture: it was in memory only; a batch needs its path"
    if not name or (kind == "base" and name == EMBEDDED):
        return ""
    if kind == "LoRA":
        try:
            find_lora(name)
        except ValueError as error:
            return str(error)
        return ""
    path = Path(name).expanduser()
    if kind == "base":
        hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
        wanted = "wanted 'embedded', the folder of a saved pipeline, or a hub id"
        return "" if hub or (path / "model_index.json").is_file() else f"base {name!r}: no pipeline there; {wanted}"
    there = path.is_dir() if kind == "controlnet" else path.is_file()
    return "" if there else f"{kind} {name!r}: no such {'folder' if kind == 'controlnet' else 'file'}"


def _hashed(recipe: Recipe) -> Recipe:
    """The recipe with the sha256 of each LoRA's file, so that a file which changes later is noticed.

    Raises BatchError for one that has a sha256 and is not that file.
    """
    for use in recipe.loras:
        path = find_lora(use.reference)[0]
        if path.is_dir():
            path /= "adapter_model.safetensors"
        if not path.is_file():  # a PEFT folder of several components has no single hash
            continue
        now = _sha256(path)
        if use.sha256 and use.sha256 != now:
            raise BatchError(
                f"LoRA {use.name!r} at {use.reference!r} is not the file of the recipe: sha256 {now[:12]}, the "
                f"recipe has {use.sha256[:12]}"
            )
        use.sha256 = now
    return recipe


def _sha256(path: Path) -> str:
    stat = path.stat()
    return _sha256_of(path, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _sha256_of(path: Path, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
