"""Drawing one or several variants of a picture with one Composer, saving them, and the contact sheet."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multilora.cli.console import bars, note
from multilora.recipe import Recipe, save_png


@dataclass(frozen=True)
class Shot:
    """One variant: what it is called, which LoRAs are in it, by which method; its own prompt if it has one."""

    title: str
    members: Sequence[Any]
    method: Any
    note: str = ""
    prompt: str | None = None


@dataclass
class Taken:
    """A drawn variant: its pictures, their recipes, seconds, and the largest number of model runs in a step."""

    title: str
    note: str
    images: list[Any]
    recipes: list[Recipe]
    seconds: float
    passes: int
    paths: list[Path] = field(default_factory=list)

    @property
    def cost(self) -> str:
        """How much work it was, in words."""
        runs = f"{self.passes} run{'s' if self.passes > 1 else ''} per step, " if self.passes else ""
        return f"{runs}{self.seconds:.1f} s"


def take(composer: Any, shots: Sequence[Shot], request: dict[str, Any]) -> list[Taken]:
    """Draw every shot with the same request (prompt, seed, size, ...), with a progress bar for each."""
    steps = request.get("num_inference_steps") or composer.defaults.get("num_inference_steps", 50)
    taken = []
    with bars() as start:
        for shot in shots:
            bar = start(shot.title, steps)
            composer.loras.clear()
            for member in shot.members:
                composer.add(member)
            began = time.perf_counter()
            asked = request if shot.prompt is None else {**request, "prompt": shot.prompt}
            out = composer(**asked, method=shot.method, progress=_progress(bar))
            taken.append(_taken(shot.title, shot.note, out, time.perf_counter() - began))
    for shot in taken:
        if choice := _choice(shot):
            note(f"{shot.title} chose {choice}")
    return taken


def _choice(shot: Taken) -> str:
    made = shot.recipes[0].resolved
    return made.choice if made is not None else ""


def draw_again(composer: Any, recipe: Recipe, index: int | None) -> Taken:
    """Draw a recipe again, with a progress bar; keep picture `index` of its call, or all of them."""
    with bars() as start:
        bar = start(recipe.method, recipe.steps)
        began = time.perf_counter()
        out = composer.compose(recipe, progress=_progress(bar))
        taken = _taken(recipe.method, "", out, time.perf_counter() - began)
    if index is not None:
        taken.images, taken.recipes = [taken.images[index]], [taken.recipes[index]]
    return taken


def _progress(bar: Callable[..., None]) -> Callable[[int, int, dict], None]:
    def progress(step: int, steps: int, info: dict) -> None:
        runs = info.get("passes", 1)
        # An image-to-image picture runs fewer steps than were asked for.
        bar(step, f"{info.get('method', '')}, {runs} run{'s' if runs > 1 else ''} per step", steps)

    return progress


def _taken(title: str, text: str, out: Any, seconds: float) -> Taken:
    recipes = [out.recipe_of(i) for i in range(len(out.images))]
    return Taken(title, text, list(out.images), recipes, seconds, max(out.passes, default=0))


def save(taken: Sequence[Taken], out: Path) -> list[Path]:
    """Write every picture with its recipe. `out` is a folder, or a .png when there is one picture.

    Names come from the prompt, the method, the seed and the recipe's hash, so another request never lands on a
    picture that is there already.
    """
    paths = []
    for shot in taken:
        for image, recipe in zip(shot.images, shot.recipes, strict=True):
            path = out if out.suffix else out / f"{picture_name(recipe, shot.title)}.png"
            shot.paths.append(save_png(image, path, recipe))
            paths.append(path)
    return paths


def picture_name(recipe: Recipe, title: str) -> str:
    """A file name without suffix: prompt's first words, title, seed, hash of the request."""
    request = recipe.model_copy(update={"resolved": None})
    digest = hashlib.sha256(request.json.encode()).hexdigest()[:8]
    words = (_slug(recipe.prompt, 32), _slug(title, 24), f"{recipe.seed + recipe.index}", digest)
    return "_".join(filter(None, words))


def _slug(text: str, length: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-")


def sheet_name(compared: Sequence[Taken]) -> str:
    """A file name for the sheet of these variants; another comparison, another name."""
    requests = [shot.recipes[0].model_copy(update={"resolved": None}).json for shot in compared]
    digest = hashlib.sha256("\n".join(requests).encode()).hexdigest()[:8]
    return f"sheet_{_slug(compared[0].recipes[0].prompt, 32)}_{digest}.png"


def draw_sheet(taken: Sequence[Taken], singles: int, path: Path) -> Path:
    """The labelled contact sheet: the first `singles` shots above, the others below, one row per seed."""
    from multilora.lab.sheet import Cell, contact_sheet

    rows = []
    for group in (taken[:singles], taken[singles:]):
        for i in range(max((len(shot.images) for shot in group), default=0)):
            rows.append([Cell(s.images[i], s.title, "; ".join(filter(None, (s.note, s.cost)))) for s in group])
    r = taken[-1].recipes[0]
    seeds = f"seed {r.seed}" if r.images == 1 else f"seeds {r.seed} to {r.seed + r.images - 1}"
    subtitle = f"{seeds}, {r.steps} steps, guidance {r.guidance_scale:g}, {r.width} x {r.height}, base {r.base}"
    return save_png(contact_sheet(rows, title=r.prompt, subtitle=subtitle), path)


def differences(then: Recipe, now: Recipe) -> list[str]:
    """What decides bits and is not as it was when the recipe was written."""
    if then.resolved is None or now.resolved is None:
        return []
    old, new = then.resolved, now.resolved
    fields = [(n, getattr(old, n), getattr(new, n)) for n in ("device", "dtype", "threads", "form", "passes_per_call")]
    fields += [(n, v, new.versions.get(n)) for n, v in old.versions.items()]
    return [f"{name} was {a}, is {b}" for name, a, b in fields if a != b]


def tell_differences(then: Recipe, now: Recipe) -> None:
    """Say so when a picture that is made again need not be equal to the bit."""
    changed = differences(then, now)
    if changed:
        note(f"note: the picture may differ slightly from the first one: {'; '.join(changed)}")
