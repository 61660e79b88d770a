"""An evaluation: several ways to combine LoRAs, drawn on the same prompts and noise, and read.

    plan = Plan(read_library("embedded").of("test"), [arm("merge"), arm("switch")], ks=(2, 3), count=100)
    results = evaluate(plan, "out/evaluation")

The folder is a batch's: it goes on where it stopped. Pictures are drawn in rounds, one of each method and k, so that
a stop leaves as many of one as of another.
"""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from multilora.lab.evaluate.batch import Progress, run_batch
from multilora.lab.evaluate.combinations import Entry, Library, combinations
from multilora.lab.evaluate.items import Item, items_of, seed_of
from multilora.lab.evaluate.readings import Kept, Readers, Reading
from multilora.lab.evaluate.settings import Settings
from multilora.lab.evaluate.workers import ComposerRenderer, Workers
from multilora.method import Bound, methods, resolve
from multilora.recipe import CHUNK, Recipe

NONE = "none"  # the arm that draws the prompt without LoRAs
READ = 64  # pictures read at once
RUNS = "runs_per_step"


@dataclass(frozen=True)
class Arm:
    """One way to draw: a method with its options, and the weight of every LoRA (a number, or "1/k")."""

    name: str
    method: Bound
    weight: float | str = 1.0

    def weight_of(self, k: int) -> float:
        return 1 / k if self.weight == "1/k" else float(self.weight)


def arm(text: str, options: Iterable[tuple[str, Any]] = ()) -> Arm:
    """An arm of `METHOD[@WEIGHT]`, such as "switch", "merge@0.8", "merge@1/k", or "none" for the prompt alone.

    options: (key, value), as the method takes them. Raises ValueError for a bad weight, UnknownName for a method.
    """
    name, at, weight = text.strip().partition("@")
    if name == NONE:
        if at or options:
            raise ValueError(f"method {text!r}: {NONE!r} draws without LoRAs and takes no weight and no options")
        return Arm(NONE, resolve("route", "merge"), 0.0)
    value: float | str = weight if weight == "1/k" else 1.0
    if at and weight != "1/k":
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value == 0:
            raise ValueError(f"method {text!r}: wanted METHOD@WEIGHT with a number other than 0, or 1/k")
    bound = resolve("route", name, **dict(options))
    told = [f"{key} {value}" for key, value in dict(options).items()]
    return Arm(", ".join([name + (f" at {weight}" if at else ""), *told]), bound, value)


def training_free() -> list[str]:
    """The names of all methods that need nothing but the LoRAs: those without a trained gate."""
    return [name for name, record in methods("route").items() if "gate" not in {o.name for o in record.options}]


@dataclass(frozen=True)
class Wanted:
    """One picture of an evaluation: number `index` of a set of LoRAs, by an arm. Cell-mates share prompt and seed."""

    item: Item
    arm: str
    entries: tuple[Entry, ...]
    index: int

    @property
    def k(self) -> int:
        return len(self.entries)

    @property
    def place(self) -> tuple[int, tuple[str, ...], int]:
        """What pictures of different arms have in common when they may be compared."""
        return self.k, tuple(e.name for e in self.entries), self.index


@dataclass(frozen=True)
class Plan:
    """What an evaluation draws: `count` pictures of every arm for each k, spread evenly over the library's sets."""

    library: Library
    arms: Sequence[Arm]
    ks: Sequence[int] = (2, 3, 4, 5)
    count: int = 100
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        names = [a.name for a in self.arms]
        if not names or not self.ks:
            raise ValueError("an evaluation needs at least one method and one k")
        if len(set(names)) < len(names):
            raise ValueError(f"methods: {', '.join(names)}: one is named twice")
        if self.count < 1:
            raise ValueError(f"count {self.count}: wanted at least 1 picture a cell")
        if not self.settings.base:
            raise ValueError("these settings are for a base of your own: name it (--base FOLDER or hub id)")

    @cached_property
    def wanted(self) -> list[Wanted]:
        """Every picture, in rounds. Raises ValueError for a k without sets, BatchError for what cannot be drawn."""
        sets = {}
        for k in self.ks:
            sets[k] = combinations(self.library.entries, k)
            random.Random(f"sets/{k}").shuffle(sets[k])  # so that a few pictures do not all show the first character
        rows, about = [], []
        for turn in range(self.count):
            for k in self.ks:
                chosen, index = sets[k][turn % len(sets[k])], turn // len(sets[k])
                prompt = prompt_of(self.library, chosen, index, self.settings)
                for one in self.arms:
                    about.append((one.name, chosen, index))
                    rows.append(self._row(one, chosen, prompt, index))
        found = items_of(rows, source="evaluation")
        return [Wanted(item, *facts) for item, facts in zip(found, about, strict=True)]

    def _row(self, one: Arm, chosen: Sequence[Entry], prompt: str, index: int) -> dict[str, Any]:
        s, weight = self.settings, one.weight_of(len(chosen))
        row = {
            "prompt": prompt,
            "negative_prompt": s.negative,
            "base": s.base,
            "method": one.method.record.name,
            "options": {**s.options.get(one.method.record.name, {}), **one.method.options},
            "steps": s.steps,
            "guidance_scale": s.guidance,
            "scale": s.scale,
            "scheduler": s.scheduler,
            # Given here, since an arm without LoRAs must share it as well.
            "seed": seed_of(prompt, [e.name for e in chosen], index),
            "loras": [{"name": e.name, "reference": e.reference, "weight": weight} for e in chosen] if weight else [],
        }
        sizes = {name: value for name, value in (("width", s.width), ("height", s.height)) if value is not None}
        return {**row, **sizes}

    def described(self) -> dict[str, Any]:
        """The plan as JSON."""
        s = self.settings
        size = None if s.width is None else [s.width, s.height]
        return {
            "library": self.library.source, "loras": [e.name for e in self.library.entries], "base": s.base,
            "methods": {a.name: {"method": a.method.record.name, "options": a.method.options, "weight": a.weight}
                        for a in self.arms},
            "k": list(self.ks), "count": self.count, "steps": s.steps, "guidance": s.guidance, "size": size,
            "scale": s.scale, "scheduler": s.scheduler, "negative": s.negative,
        }  # fmt: skip


def prompt_of(library: Library, chosen: Sequence[Entry], index: int, settings: Settings) -> str:
    """Of the embedded world a caption of a held-out scene, another one for each index; else the trigger words."""
    if not library.world:
        return settings.prompt.format(triggers=", ".join(t for e in chosen for t in e.triggers))
    from multilora.lab.evaluate.quality import scene_of
    from multilora.lab.world.caption import caption

    return caption(scene_of([e.name for e in chosen], index), 1)


@dataclass(frozen=True)
class Shown:
    """A picture that is there, with what was read from it. runs: model runs per step; seconds: of drawing it."""

    wanted: Wanted
    path: Path
    reading: Reading
    seconds: float
    runs: float

    @property
    def arm(self) -> str:
        return self.wanted.arm

    @property
    def k(self) -> int:
        return self.wanted.k


@dataclass(frozen=True)
class Results:
    """What an evaluation has so far. failed: (arm, error) of pictures that could not be drawn."""

    plan: Plan
    shown: Sequence[Shown]
    read_by: dict[str, str]
    failed: Sequence[tuple[str, str]] = ()
    stopped: bool = False

    @property
    def arms(self) -> list[str]:
        return [a.name for a in self.plan.arms]

    def of(self, arm: str | None = None, k: int | None = None) -> list[Shown]:
        """The pictures of an arm, of a k, or of a cell."""
        return [s for s in self.shown if arm in (None, s.arm) and k in (None, s.k)]

    def paired(self, a: str, b: str, k: int | None = None) -> list[tuple[Shown, Shown]]:
        """The pictures that both arms have drawn, side by side."""
        other = {s.wanted.place: s for s in self.of(b, k)}
        return [(s, other[s.wanted.place]) for s in self.of(a, k) if s.wanted.place in other]


class CountingRenderer(ComposerRenderer):
    """A ComposerRenderer that writes into a picture's recipe how often the model ran in a step."""

    def __call__(self, recipe: Recipe, cancel: Any = None) -> tuple[Any, Recipe]:
        out = self.composed(recipe, cancel)
        runs = round(sum(out.passes) / recipe.steps, 3) if out.passes else 1.0
        made = out.recipe.model_copy(update={"extra": {**out.recipe.extra, RUNS: runs}})
        return out.images[recipe.index], made


def evaluate(
    plan: Plan,
    out: str | Path,
    *,
    readers: Readers | None = None,
    make: Callable[[], Any] | None = None,
    settings: dict[str, Any] | None = None,
    workers: Callable[..., Workers] | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] | None = None,
    retry_failed: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Results:
    """Draw what is missing in the folder, read what was not read yet.

    readers  who reads; default recogniser B and the embedded CLIP scorer for the embedded world
    make     makes a renderer, default CountingRenderer on the CPU with one thread
    others   as run_batch takes them

    Raises what run_batch raises. A stop leaves results of what is there.
    """
    out, wanted = Path(out), plan.wanted
    readers = readers or Readers.load("b" if plan.library.world else None)
    summary = run_batch(
        [w.item for w in wanted], out, make or partial(CountingRenderer, "cpu", 1), settings=settings,
        workers=workers, stop=stop, progress=progress, retry_failed=retry_failed, note=note,
    )  # fmt: skip
    (out / "evaluation.json").write_text(json.dumps({**plan.described(), "read by": readers.names}, indent=1) + "\n")
    by_id = {w.item.id: w for w in wanted}
    rows = [row for row in summary.rows if row["status"] == "done"]
    shown = read_rows(rows, by_id, Kept(out / "readings.jsonl", readers))
    failed = [(by_id[row["id"]].arm, row["error"] or "") for row in summary.rows if row["status"] == "failed"]
    return Results(plan, shown, readers.names, failed, summary.stopped)


def read_rows(rows: Sequence[dict[str, Any]], by_id: dict[str, Wanted], kept: Kept) -> list[Shown]:
    """The pictures of a batch's rows, read; those that were read before are only opened for their text."""
    shown = []
    for first in range(0, len(rows), READ):
        part, new, runs = rows[first : first + READ], {}, {}
        for row in part:
            with Image.open(row["path"]) as image:
                image.load()
                runs[row["id"]] = float(json.loads(image.text[CHUNK])["extra"].get(RUNS, 1.0))
                if row["sha256"] not in kept:
                    new[row["id"]] = (row["sha256"], image.convert("RGB"))
        if new:
            wanted = [by_id[id] for id in new]
            kept.read(
                [key for key, _ in new.values()], [image for _, image in new.values()],
                [w.item.recipe.prompt for w in wanted], [{e.category: e.name for e in w.entries} for w in wanted],
            )  # fmt: skip
        shown += [
            Shown(by_id[r["id"]], Path(r["path"]), kept[r["sha256"]], float(r["seconds"] or math.nan), runs[r["id"]])
            for r in part
        ]
    return shown
