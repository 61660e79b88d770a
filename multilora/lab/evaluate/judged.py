"""Methods before a judge: pictures of one prompt and one noise, drawn by different methods, compared pair by pair.

What was compared is read from the pictures themselves (every PNG carries its recipe), so that the folder of an
evaluation, of a batch or of a grid will do. Nothing is drawn here: a judge that fails costs no pictures.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from multilora.lab.evaluate.statistics import Interval, mean
from multilora.lab.score.judge import Judge, Verdict
from multilora.lab.score.record import ScoreFailed
from multilora.recipe import Recipe

AT_ONCE = 16  # pairs whose pictures are open at one time
NONE = "no LoRA"


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt and noise, and who drew them."""

    prompt: str
    seed: int
    methods: tuple[str, str]
    paths: tuple[Path, Path]


def read_pictures(folders: Sequence[Path]) -> dict[Path, Recipe]:
    """The PNGs of folders (and of their folder `pictures`) with their recipes.

    Raises ValueError when a folder is missing or holds none, RecipeError for one without a recipe.
    """
    found: dict[Path, Recipe] = {}
    for folder in folders:
        inner = folder / "pictures"
        paths = sorted((inner if inner.is_dir() else folder).glob("*.png"))
        if not paths:
            raise ValueError(
                f"{folder}: wanted a folder with pictures of an evaluation or a batch; there is no PNG in it"
            )
        found |= {path: Recipe.from_png(path) for path in paths}
    return found


def named(recipes: dict[Path, Recipe]) -> dict[Path, str]:
    """What to call the method of each picture: its name, and the settings in which pictures of that name differ."""
    settings = {path: _settings(recipe) for path, recipe in recipes.items()}
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path, own in settings.items():
        for key, value in own.items():
            values[_method(recipes[path]), key].add(str(value))
    found = {}
    for path, own in settings.items():
        name = _method(recipes[path])
        told = [f"{key} {value}" for key, value in own.items() if len(values[name, key]) > 1]
        found[path] = ", ".join([name, *told])
    return found


def _method(recipe: Recipe) -> str:
    return recipe.method if recipe.loras else NONE


def _settings(recipe: Recipe) -> dict[str, Any]:
    weights = [use.weight for use in recipe.loras]
    shared = len(weights) > 1 and all(w == weights[0] for w in weights)
    each = shared and isinstance(weights[0], float) and math.isclose(weights[0], 1 / len(weights), rel_tol=1e-4)
    weight = "1/k" if each else weights[0] if shared else tuple(weights)
    if all(w == 1 for w in weights):
        weight = 1.0
    own = dict(recipe.options) if recipe.loras else {}
    return own | {"weight": weight, "scale": recipe.scale, "steps": recipe.steps, "guidance": recipe.guidance_scale,
                  "scheduler": recipe.scheduler}  # fmt: skip


def pairs_of(recipes: dict[Path, Recipe], limit: int | None = None) -> list[Pair]:
    """Every two methods' pictures of the same prompt, seed, base and size; at most `limit` for each two methods.

    Which ones are left out is decided by a hash of the prompt and seed, so the same ones stay for every two methods.
    Raises ValueError when two pictures differ in nothing that has a name, or when nothing can be compared.
    """
    names, places = named(recipes), defaultdict(dict)
    for path, r in recipes.items():
        place = (r.base, r.prompt, r.negative_prompt, r.seed + r.index, r.width, r.height)
        if (twin := places[place].get(names[path])) is not None:
            raise ValueError(f"{twin} and {path}: both are {names[path]!r} for one prompt and seed; keep one of them")
        places[place][names[path]] = path
    order = sorted(places, key=lambda place: hashlib.sha256(repr(place).encode()).digest())
    found, counted = [], defaultdict(int)
    for place in order:
        for a, b in combinations(sorted(places[place]), 2):
            if limit is None or counted[a, b] < limit:
                counted[a, b] += 1
                found.append(Pair(place[1], place[3], (a, b), (places[place][a], places[place][b])))
    if not found:
        raise ValueError(f"{len(recipes)} pictures, and no two of different methods share prompt, seed, base and size")
    return found


def verdicts_of(judge: Judge, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Verdict]]:
    """Verdicts as they come. Raises ScoreFailed when the judge cannot be asked any more."""
    for first in range(0, len(pairs), AT_ONCE):
        part = pairs[first : first + AT_ONCE]
        opened = [(_opened(p.paths[0]), _opened(p.paths[1]), p.prompt) for p in part]
        yield from zip(part, judge.compare(opened), strict=True)


def _opened(path: Path) -> Image.Image:
    with Image.open(path, formats=("PNG",)) as image:
        return image.convert("RGB")


@dataclass(frozen=True)
class Judged:
    """What a judge said. failed: why it stopped before the end, "" when it did not."""

    rows: Sequence[tuple[Pair, Verdict]]
    failed: str = ""

    @property
    def methods(self) -> list[str]:
        return sorted({name for pair, _ in self.rows for name in pair.methods})

    def points(self, a: str, b: str) -> Interval:
        """Mean points of a against b with the 95% bootstrap interval over pairs: 0.5 is even. nan without pairs.

        Pairs without an answer are left out.
        """
        found = []
        for pair, verdict in self.rows:
            if set(pair.methods) == {a, b} and not math.isnan(verdict.points):
                found.append(verdict.points if pair.methods[0] == a else 1 - verdict.points)
        return mean(found)

    @property
    def consistent(self) -> float:
        """Share of the answered pairs whose two orders gave the same answer; nan without any."""
        answered = [verdict for _, verdict in self.rows if not math.isnan(verdict.points)]
        return sum(v.consistent for v in answered) / len(answered) if answered else math.nan


def judged(judge: Judge, pairs: Sequence[Pair], progress: Any = lambda done: None) -> Judged:
    """All verdicts, or those that were there when the judge failed. progress: called with the number of pairs done."""
    rows: list[tuple[Pair, Verdict]] = []
    try:
        for row in verdicts_of(judge, pairs):
            rows.append(row)
            progress(len(rows))
    except ScoreFailed as error:
        return Judged(rows, str(error))
    return Judged(rows)
