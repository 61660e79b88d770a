"""Stage: what the embedded world can do, measured on held-out seeds into a journal; tables.py puts it into a README.

Every line of the journal is one finished batch under its own key, so an interrupted report goes on where it stopped
and a larger `count` adds pictures to those that are there. Recogniser B reads the pictures. Within a cell the noise of
picture i is the same for all methods.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from multilora.lab.evaluate.readings import Readers
from multilora.lab.journal import Journal
from multilora.lab.world.caption import NOUNS, PLACES, STYLE_WORDS, caption
from multilora.lab.world.designs import CATEGORIES, DESIGNS
from multilora.lab.world.loras import alone, pictures, target
from multilora.lab.world.scene import COLOURED, Scene, sample_scene
from multilora.method import unknown

HELD_OUT = 950_000_000  # first seed of the scenes of this report: no training uses seeds from here on
STEPS, GUIDANCE = 25, 3.0
CHUNK = {2: 4, 3: 2, 4: 3, 5: 10}  # pictures of one combination in one batch, by k


@dataclass(frozen=True)
class Cell:
    """A way to draw: method, its options, the weight of every LoRA (a number, or "1/k"), steps and guidance.

    backwards: the LoRAs in the other order, the character last
    """

    name: str
    method: str = "merge"
    weight: float | str = 1.0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    steps: int = STEPS
    guidance: float = GUIDANCE
    class_words: bool = True
    backwards: bool = False


METHODS = (
    Cell("no LoRA, prompt only", weight=0.0),
    Cell("merge, weight 1"),
    Cell("merge, weight 0.8", weight=0.8),
    Cell("merge, weight 1/k", weight="1/k"),
    Cell("switch", "switch"),
    Cell("composite", "composite"),
    Cell("sum of differences", "sum_of_differences"),
)
SHORT = (("merge", "merge"), ("switch", "switch"), ("composite", "composite"),
         ("sum of differences", "sum_of_differences"))  # fmt: skip
STUDY = (
    *(Cell(f"{n}, weight {w}", m, w) for n, m in SHORT for w in (0.6, 1.0, 1.5, 2.0)),
    *(Cell(f"{n}, guidance {g:g}", m, guidance=g) for n, m in SHORT for g in (2.0, 8.0)),
    *(Cell(f"{n}, {s} steps", m, steps=s) for s in (50, 100) for n, m in SHORT),
    *(Cell(f"switch, every {e}", "switch", options={"every": e}) for e in (1, 2, 8)),
    *(Cell(f"{n}, names without class words", m, class_words=False) for n, m in SHORT),
)
# What the paper varies of Switch: how long a LoRA stays, and which is first.
ABLATION = (
    *(Cell(f"switch, every {e}", "switch", options={"every": e}) for e in (1, 2, 5, 8)),
    Cell("switch, every 5, character last", "switch", options={"every": 5}, backwards=True),
)


def sets(split: str, k: int) -> list[tuple[str, ...]]:
    """Every set of k designs of a split with one character and no category twice, as ComposLoRA forms them."""
    names = [d.name for d in DESIGNS.values() if d.split == split]
    found = []
    for chosen in combinations(names, k):
        categories = [DESIGNS[n].category for n in chosen]
        if "character" in categories and len(set(categories)) == k:
            found.append(chosen)
    return found


def even_sets(split: str, k: int, count: int) -> list[tuple[str, ...]]:
    """`count` of the sets, or all there are, in which every LoRA comes about equally often."""
    left, chosen, uses = sets(split, k), [], Counter()
    for _ in range(min(count, len(left))):
        chosen.append(min(left, key=lambda one: sorted((uses[name] for name in one), reverse=True)))
        left.remove(chosen[-1])
        uses.update(chosen[-1])
    return chosen


def composed_scene(chosen: Sequence[str], index: int) -> Scene:
    """A held-out scene that shows the designs; other categories generic, the style flat unless designed."""
    designs = {DESIGNS[n].category: n for n in chosen}
    rng = random.Random(f"report/{'+'.join(chosen)}/{index}")
    return sample_scene(rng, designs=designs, **({} if "style" in designs else {"style": "flat"}))


def requested(scene: Scene, text: str) -> dict[str, str]:
    """The generic elements that a caption asks for, by head of the recognisers: what it names, nothing else."""
    found = {}
    for category in COLOURED:
        kind = getattr(scene, category)
        if kind == "none":
            continue
        found[category] = kind
        colour = getattr(scene, f"{category}_colour")
        if colour and any(f"{colour} {noun}" in text for noun in NOUNS.get(kind, (kind,))):
            found[f"{category}_colour"] = colour
    if any(phrase in text for phrase in PLACES[scene.background]):
        found["background"] = scene.background
    if any(phrase in text for phrase in STYLE_WORDS[scene.style]):
        found["style"] = scene.style
    return found


@dataclass
class Bench:
    """What is measured: a pipeline and the assets folder with its LoRAs and eyes; where the results go.

    steps: for every picture, None for each cell's own (only a smoke run sets it).
    """

    pipe: Any
    assets: Path
    journal: Journal
    echo: Callable[[str], None] = print
    steps: int | None = None

    def recogniser(self, name: str = "b") -> Any:
        from multilora.lab.score.presence import load_recogniser

        return load_recogniser(self.assets / f"recogniser_{name}.safetensors")

    def readers(self) -> Readers:
        from multilora.lab.score.clip import clip_text

        return Readers(self.recogniser(), clip_text(model=str(self.assets / "clip" / "model.safetensors")))

    def lora(self, name: str) -> Path:
        return target(name, self.assets)

    def sets(self, split: str, k: int) -> list[tuple[str, ...]]:
        """The sets of a split whose LoRAs are all there."""
        return [chosen for chosen in sets(split, k) if all(self.lora(n).exists() for n in chosen)]


def measure_eyes(bench: Bench, count: int) -> None:
    """Recogniser accuracy per head on held-out renders, and CLIP's top-1 of 32 captions."""
    from multilora.lab.world.eyes import clip_top1, recogniser_accuracy

    held = json.loads((bench.assets / "recogniser_b.json").read_text()).get("held_back")
    if held and "held_back/b" not in bench.journal:
        bench.journal.add("held_back/b", designs=held)
    for name in ("a", "b"):
        key = f"eyes/{name}/{count}"
        if key not in bench.journal:
            found = recogniser_accuracy(bench.recogniser(name), count)
            bench.journal.add(key, recogniser=name, heads=found)
            bench.echo(f"report: recogniser {name}: {found}")
    key = f"eyes/clip/{count}"
    if key not in bench.journal:
        right, asked = clip_top1(bench.assets / "clip" / "model.safetensors", count)
        bench.journal.add(key, recogniser="clip", heads={"top-1 of 32": (right, asked)})
        bench.echo(f"report: CLIP {right}/{asked}")


def measure_base(bench: Bench, count: int, batch: int = 10) -> None:
    """How often recogniser B sees the generic elements that held-out prompts name."""
    for first in range(0, count, batch):
        key = f"base/{first}+{batch}"
        if key in bench.journal:
            continue
        scenes = [sample_scene(HELD_OUT + i) for i in range(first, first + batch)]
        texts = [caption(scene, 1) for scene in scenes]
        images = pictures(
            bench.pipe, texts, range(first, first + batch), steps=bench.steps or STEPS, guidance=GUIDANCE
        )
        heads: dict[str, list[int]] = {}
        for scene, text, seen in zip(scenes, texts, bench.recogniser().labels(images), strict=True):
            for head, label in requested(scene, text).items():
                right, asked = heads.get(head, (0, 0))
                heads[head] = [right + (seen[head] == label), asked + 1]
        bench.journal.add(key, heads=heads)
        bench.echo(f"report: base, {first + batch} of {count} pictures")


def measure_alone(bench: Bench, count: int, without: int) -> None:
    """Each LoRA alone: `count` pictures of its design with its trigger at weight 1, `without` ones of the same stream
    of prompts and noise without the LoRA."""
    for name in (n for n in DESIGNS if bench.lora(n).exists()):
        for on, size in ((True, count), (False, without)):
            key = f"alone/{name}/{'on' if on else 'off'}/{size}"
            if key in bench.journal:
                continue
            found, asked = alone(
                bench.pipe, name, bench.lora(name) if on else None, bench.recogniser(), size, stream="report",
                steps=bench.steps or STEPS,
            )  # fmt: skip
            bench.journal.add(key, name=name, on=on, found=found, asked=asked)
            bench.echo(f"report: {name} {'with' if on else 'without'} its LoRA {found}/{asked}")


def measure_cell(bench: Bench, part: str, cell: Cell, chosen: Sequence[str], index: int, size: int) -> None:
    """One batch: pictures index .. index + size - 1 of a set of designs, drawn by one cell's method."""
    k = len(chosen)
    key = f"{part}/{cell.name}/{'+'.join(chosen)}/{index}+{size}"
    if key in bench.journal:
        return
    scenes = [composed_scene(chosen, i) for i in range(index, index + size)]
    texts = [caption(scene, 1) for scene in scenes]
    drawn = texts if cell.class_words else [_without_class_words(text, chosen) for text in texts]
    weight = 1 / k if cell.weight == "1/k" else float(cell.weight)
    loras = [bench.lora(name) for name in (chosen[::-1] if cell.backwards else chosen)] if weight else []
    began = time.process_time()
    images = pictures(
        bench.pipe, drawn, range(index, index + size), loras, cell.method if weight else "merge",
        steps=bench.steps or cell.steps, guidance=cell.guidance, weights=[weight] * len(loras),
        **(cell.options if weight else {}),
    )  # fmt: skip
    spent = time.process_time() - began
    found = bench.readers().read(images, texts, [{DESIGNS[n].category: n for n in chosen}] * size)
    bench.journal.add(
        key, cell=cell.name, k=k, set=list(chosen), found=sum(sum(one.seen.values()) for one in found),
        asked=k * size, complete=int(sum(one.complete for one in found)), pictures=size,
        clip=[round(one.clip, 3) for one in found],
        seconds=round(spent, 2),
    )  # fmt: skip


def _without_class_words(text: str, chosen: Sequence[str]) -> str:
    for name in chosen:
        text = text.replace(DESIGNS[name].trigger, name)
    return text


def batches(found: Sequence[tuple[str, ...]], count: int) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """(set, first picture, pictures) until there are `count` pictures: round after round over all the sets."""
    made, turn = 0, 0
    while found and made < count:
        for chosen in found:
            size = CHUNK[len(chosen)]
            yield chosen, turn * size, size
            made += size
            if made >= count:
                break
        turn += 1


def measure_composition(bench: Bench, count: int, ks: Sequence[int] = (2, 3, 4, 5)) -> None:
    """The composition table on the test split: every method on the same prompts and noise."""
    for k in ks:
        for chosen, index, size in batches(bench.sets("test", k), count):
            for cell in METHODS:
                measure_cell(bench, "composition", cell, chosen, index, size)
            bench.echo(f"report: composition {'+'.join(chosen)}, pictures {index} to {index + size - 1}")


def measure_ablation(bench: Bench, count: int, k: int = 3) -> None:
    """Switch's interval and order on the test split: the composition table's prompts and noise."""
    for chosen, index, size in batches(bench.sets("test", k), count):
        for cell in ABLATION:
            measure_cell(bench, "ablation", cell, chosen, index, size)
        bench.echo(f"report: ablation {'+'.join(chosen)}, pictures {index} to {index + size - 1}")


def measure_study(bench: Bench, count: int, k: int = 3) -> None:
    """What decides composition, on sets of the train split: strength, guidance, steps, every, class words."""
    found = bench.sets("train", k)
    chosen_sets = random.Random("study").sample(found, min(len(found), max(1, -(-count // 4))))
    for cell in STUDY:
        for chosen in chosen_sets:
            measure_cell(bench, "study", cell, chosen, 0, 4)
        bench.echo(f"report: study, {cell.name}")


def measure_speed(bench: Bench, repeats: int = 3) -> None:
    """Median wall seconds per picture: 25 steps, guidance, one picture, all threads; none and 4 LoRAs by method."""
    found = bench.sets("test", 4) or bench.sets("test", 2)
    if not found:
        return
    prompt = caption(composed_scene(found[0], 0), 1)
    for name, method in (("no LoRA", None), *SHORT[:3]):
        key = f"speed/{name}"
        if key in bench.journal:
            continue
        loras = [bench.lora(n) for n in found[0]] if method else []
        taken = []
        for i in range(repeats + 1):
            began = time.perf_counter()
            pictures(bench.pipe, [prompt], [i], loras, method or "merge", steps=bench.steps or STEPS)
            taken.append(time.perf_counter() - began)
        seconds = round(statistics.median(taken[1:]), 3)
        bench.journal.add(key, name=name, seconds=seconds, threads=torch.get_num_threads(), loras=len(found[0]))
        bench.echo(f"report: {name}: {seconds} s a picture")


PARTS = ("eyes", "base", "alone", "composition", "ablation", "study", "speed")


def measure(
    assets: Path,
    journal_path: Path,
    *,
    count: int = 100,
    renders: int = 2048,
    base_count: int = 200,
    alone_count: int = 80,
    without_count: int = 400,
    study_count: int = 16,
    parts: Sequence[str] = PARTS,
    ks: Sequence[int] = (2, 3, 4, 5),
    steps: int | None = None,
    echo: Callable[[str], None] = print,
) -> Journal:
    """Measure what the journal does not hold yet: `parts`, with `count` pictures a cell of the composition table.

    Raises UnknownName for a part that does not exist.
    """
    from multilora.pipelines.load import load_pipeline

    for part in parts:
        if part not in PARTS:
            raise unknown("part of the report", part, PARTS)
    pipe = load_pipeline(assets / "base", torch_dtype=torch.float32, device="cpu")
    bench = Bench(pipe, assets, Journal(journal_path), echo, steps)
    if "eyes" in parts:
        measure_eyes(bench, renders)
    if "base" in parts:
        measure_base(bench, base_count)
    if "alone" in parts:
        measure_alone(bench, alone_count, without_count)
    if "composition" in parts:
        measure_composition(bench, count, ks)
    if "ablation" in parts:
        measure_ablation(bench, count, 3 if 3 in ks else ks[0])
    if "study" in parts:
        measure_study(bench, study_count)
    if "speed" in parts:
        measure_speed(bench)
    return bench.journal


def categories_in_order() -> tuple[str, ...]:
    """The heads in the order of the tables: each category, then its colour."""
    return tuple(h for c in CATEGORIES for h in ((c, f"{c}_colour") if c in COLOURED else (c,)))


def stage(out: Path, settings: Any, echo: Callable[[str], None]) -> None:
    """As multilora.lab.world.stages calls it: measure the assets in `out` and write their README."""
    from multilora.lab.world import tables

    small = {
        "count": 4,
        "renders": 32,
        "base_count": 10,
        "alone_count": 2,
        "without_count": 2,
        "study_count": 4,
        "steps": 2,
        "ks": (2,),
    }
    journal = measure(Path(out) / "assets", Path(out) / "report.jsonl", echo=echo,
                      **(small if settings.scenes < 1000 else {}))  # fmt: skip
    tables.write(journal, Path(out) / "assets" / "README.md")
