"""PEM arithmetic on pictures of the embedded world: a class unlearned by negation, and analogies of LoRAs.

Addition on pictures is Merge of two LoRAs, which the report of the world has measured (part composition, k = 2).
Negation: the base is asked for a class (a bear, in the forest, ...) while a LoRA that learned a design of that class
is subtracted. Analogy: a LoRA that learned a character in a style (or in a garment), less a LoRA of the character,
plus a LoRA of another character: is the other one in that style?
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from multilora import files
from multilora.lab.journal import Journal
from multilora.lab.reproduce import bench as texts
from multilora.lab.reproduce.composition import MERGE, cells
from multilora.lab.result_chart import Point, draw_lines
from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.loras import PLANS, pictures
from multilora.lab.world.render import render
from multilora.lab.world.report import requested
from multilora.lab.world.scene import Scene, sample_scene
from multilora.lab.world.tables import share, table, wilson
from multilora.merge.analogy import analogy
from multilora.pipelines.load import library, load_pipeline

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
COUNT, CHECKED = 16, 8  # pictures of a LoRA at a strength: reported by recogniser B, and others, by A, to choose by
CHOOSING = 700_000  # first seed of the pictures to choose by; the reported ones have seeds from 0
UNLEARNED = tuple(d.name for d in DESIGNS.values() if d.split == "test")
JOINT = (("korv", "inka"), ("korv", "dotta"))  # (character, what it is in): each pair is learned by one LoRA
TARGETS = ("zib", "tikki", "pandu", "gorm")
LEARNED, STEPS = 40, 240  # pictures and training steps of a joint LoRA, as of the library's
ALONE, SOURCE, ANALOGY, BOTH = "the target's LoRA", "the joint LoRA", "analogy", "the two LoRAs added"


def where(journal: Journal) -> Journal:
    """The journal of these pictures beside that of texts: world/arithmetic.jsonl."""
    return Journal(journal.path.parents[1] / "world" / "arithmetic.jsonl")


class Room:
    """The embedded base, its eyes, and the size of the run."""

    def __init__(self, journal: Journal, work: Path, small: bool) -> None:
        self.journal, self.work, self.small = journal, work, small
        self.pipe = load_pipeline("embedded", device="cpu")
        self.pipe.set_progress_bar_config(disable=True)

    @cached_property
    def eyes(self) -> Mapping[str, Any]:
        from multilora.lab.score.presence import load_recogniser

        return {name: load_recogniser(name) for name in "ab"}

    def lora(self, name: str) -> Any:
        return files.load(library()[name]["path"], base=self.pipe, name=name)

    def drawn(self, texts: Sequence[str], first: int, loras: Sequence[Any], row: Sequence[float]) -> list[Image.Image]:
        steps = {"steps": 3} if self.small else {}
        return pictures(self.pipe, texts, range(first, first + len(texts)), loras, weights=row, **steps)

    def joint(self, pair: tuple[str, str]) -> Any:
        """The LoRA that learned both designs of a pair together, trained now where the work folder has none."""
        path = self.work / f"{'_'.join(pair)}.safetensors"
        if not path.is_file():
            from multilora.lab.train.lora import train

            data, plan = self.work / "_".join(pair), PLANS[pair[0]]
            data.mkdir(parents=True, exist_ok=True)
            for i in range(4 if self.small else LEARNED):
                scene = sample_scene(random.Random(f"joint/{pair}/{i}"), designs=designs_of(pair))
                render(scene).save(data / f"{i:03d}.png")
                (data / f"{i:03d}.txt").write_text(caption(scene, i) + "\n", encoding="utf-8")
            train(data, self.pipe, path, name="_".join(pair), rank=plan.rank, modules=plan.modules,
                  steps=2 if self.small else STEPS, lr=plan.lr, high_noise=0.5, checkpoint_every=0)  # fmt: skip
        return files.load(path, base=self.pipe)


def designs_of(names: Sequence[str]) -> dict[str, str]:
    return {DESIGNS[name].category: name for name in names}


def plain_scene(name: str, stream: str, index: int) -> tuple[Scene, str]:
    """A scene without designs whose caption asks for the class of a design, and the caption."""
    design = DESIGNS[name]
    for attempt in range(1000):
        scene = sample_scene(random.Random(f"{stream}/{name}/{index}/{attempt}"), **{design.category: design.kind})
        text = caption(scene, 1)
        if design.category in requested(scene, text):
            return scene, text
    raise ValueError(f"{name}: no caption asks for {design.kind}")


def measure(bench: texts.Bench) -> None:
    small = bench.size.seeds == 1
    room = Room(where(bench.journal), bench.work / "arithmetic", small)
    for name in UNLEARNED[: 1 if small else None]:
        for strength in STRENGTHS[: 2 if small else None]:
            key = f"negation/{name}/{strength:g}"
            if key not in room.journal:
                room.journal.add(key, name=name, strength=strength, **unlearned(room, name, strength))
                bench.echo(f"{key}: {room.journal.lines[key]['class']}")
    for pair in JOINT[: 1 if small else None]:
        for target in TARGETS[: 1 if small else None]:
            key = f"analogy/{'+'.join(pair)}/{target}"
            if key not in room.journal:
                room.journal.add(key, pair=list(pair), target=target, ways=likened(room, pair, target))
                bench.echo(f"{key}: {room.journal.lines[key]['ways']}")


def unlearned(room: Room, name: str, strength: float) -> dict[str, Any]:
    """[right, asked] of the class and of everything else that the prompts ask for, and of both to choose by."""
    found: dict[str, Any] = {}
    for stream, first, eyes, count, kinds in (
        ("negation", 0, "b", COUNT, ("class", "rest")),
        ("choose", CHOOSING, "a", CHECKED, ("class, chosen by", "rest, chosen by")),
    ):
        scenes = [plain_scene(name, stream, i) for i in range(2 if room.small else count)]
        images = room.drawn([text for _, text in scenes], first, [room.lora(name)] if strength else [],
                            [-strength] if strength else [])  # fmt: skip
        seen = room.eyes[eyes].labels(images)
        own, rest, head = [0, 0], [0, 0], DESIGNS[name].category
        for (scene, text), one in zip(scenes, seen, strict=True):
            for asked, label in requested(scene, text).items():
                # A colour of the class that is to go belongs to neither.
                counts = own if asked == head else None if asked.startswith(head) else rest
                if counts is not None:
                    counts[0] += one[asked] == label
                    counts[1] += 1
        found |= dict(zip(kinds, (own, rest), strict=True))
    return found


def likened(room: Room, pair: tuple[str, str], target: str) -> dict[str, dict[str, int]]:
    """Way -> pictures that show the target, what it should be in, and both."""
    joint, source, other, thing = room.joint(pair), *(room.lora(n) for n in (pair[0], target, pair[1]))
    wanted = designs_of((target, pair[1]))
    scenes = [
        sample_scene(random.Random(f"analogy/{pair}/{target}/{i}"), designs=wanted,
                     **({} if "style" in wanted else {"style": "flat"}))
        for i in range(2 if room.small else COUNT)
    ]  # fmt: skip
    said = [caption(scene, 1) for scene in scenes]
    ways = {
        ALONE: ([other], [1.0]),
        SOURCE: ([joint], [1.0]),
        ANALOGY: ([analogy([joint, source, other], [1.0, 1.0, 1.0])], [1.0]),
        BOTH: ([other, thing], [1.0, 1.0]),
    }
    found = {}
    for way, (loras, row) in ways.items():
        seen = room.eyes["b"].labels(room.drawn(said, 0, loras, row))
        each = {head: sum(one[head] == name for one in seen) for head, name in wanted.items()}
        both = sum(all(one[head] == name for head, name in wanted.items()) for one in seen)
        target_head, thing_head = wanted
        found[way] = {"target": each[target_head], "thing": each[thing_head], "both": both, "asked": len(seen)}
    return found


def negated(journal: Journal) -> dict[str, list[dict[str, Any]]]:
    """LoRA -> its entries in the order of strength."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in journal.of("negation"):
        found.setdefault(entry["name"], []).append(entry)
    return {name: sorted(line, key=lambda e: e["strength"]) for name, line in found.items()}


def chosen(line: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The strength that shows the class least on prompts to choose by, and the rest at most .05 less often there."""
    least = texts.rate(line[0]["rest, chosen by"]) - 0.05
    kept = [e for e in line if texts.rate(e["rest, chosen by"]) >= least]
    return min(kept, key=lambda e: (texts.rate(e["class, chosen by"]), e["strength"]))


def _sum(entries: Sequence[Mapping[str, Any]], field: str) -> list[int]:
    return [sum(e[field][i] for e in entries) for i in (0, 1)]


def _ways(journal: Journal, what: str) -> dict[str, list[float]]:
    """Way -> share of pictures in each analogy."""
    entries = journal.of("analogy")
    return {w: [e["ways"][w][what] / e["ways"][w]["asked"] for e in entries] for w in (ALONE, SOURCE, ANALOGY, BOTH)}


def tables(journal: Journal) -> str:
    lines = negated(journal)
    parts = [
        f"Negation: pictures that the base draws when it is asked for a class, while a LoRA of a design of that class "
        f"is subtracted ({', '.join(f'{DESIGNS[n].kind}: {n}' for n in lines)}). Recogniser B.",
        table(["strength", "the class is there", "what else is asked for is there"],
              [[f"{s:g}", share(*_sum(here, "class")), share(*_sum(here, "rest"))]
               for s in STRENGTHS if (here := [e for line in lines.values() for e in line if e["strength"] == s])]),
        table(["LoRA", "strength, chosen on other prompts by recogniser A", "class before", "class after",
               "rest before", "rest after"],
              [[n, f"{(e := chosen(line))['strength']:g}", share(*line[0]["class"]), share(*e["class"]),
                share(*line[0]["rest"]), share(*e["rest"])] for n, line in lines.items()]),
    ]  # fmt: skip
    if journal.of("analogy"):
        ways = {what: _ways(journal, what) for what in ("target", "thing", "both")}
        parts += [
            "Analogy: target character, and the style or garment of the joint LoRA; mean over "
            f"{len(journal.of('analogy'))} analogies ({', '.join(_named(e) for e in journal.of('analogy'))}), which "
            f"share {len({tuple(e['pair']) for e in journal.of('analogy')})} joint LoRAs.",
            table(["by", "the target", "the style or garment", "both"],
                  [[way, *(texts.shown(ways[what][way]) for what in ways)] for way in ways["both"]]),
        ]  # fmt: skip
    return "\n\n".join(parts)


def _named(entry: Mapping[str, Any]) -> str:
    return f"{'+'.join(entry['pair'])} - {entry['pair'][0]} + {entry['target']}"


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claim: negation halves the class and costs the rest .05 at most; an analogy shows both more often than the
    target's LoRA and than the joint one; two LoRAs added show at least .9 of their elements."""
    lines = list(negated(journal).values())
    start, end = [line[0] for line in lines], [chosen(line) for line in lines]
    own, rest = ([texts.rate(_sum(e, what)) for e in (start, end)] for what in ("class", "rest"))
    said = [f"negation: the class {own[0]:.2f} to {own[1]:.2f}, the rest {rest[0]:.2f} to {rest[1]:.2f}"]
    held = [own[1] <= own[0] / 2 and rest[1] >= rest[0] - 0.05]
    both = _ways(journal, "both")
    held.append(bool(both[ANALOGY]))
    for way in (ALONE, SOURCE) if both[ANALOGY] else ():
        gain = texts.mean_interval([a - b for a, b in zip(both[ANALOGY], both[way], strict=True)])
        held.append(gain[1] > 0)
        said.append(f"analogy, both there, against {way} {gain[0]:+.2f} ({gain[1]:+.2f} to {gain[2]:+.2f})")
    world = Journal(journal.path.with_name("report.jsonl"))
    added = list(cells(world, MERGE, 2).values())
    if not added:
        held.append(False)
        said.append("addition not measured: multilora reproduce composition")
    else:
        counts = [sum(e["found"] for e in added), sum(e["asked"] for e in added)]
        held.append(texts.rate(counts) >= 0.9)
        said.append(f"two LoRAs added: {share(*counts)} of their elements")
    return all(held), "; ".join(said)


def figure(journal: Journal) -> Image.Image:
    lines = list(negated(journal).values())
    drawn = {
        name: [
            Point("", texts.rate(counts), *wilson(*counts), x=s)
            for s in STRENGTHS
            if (counts := _sum([e for line in lines for e in line if e["strength"] == s], what))[1]
        ]
        for name, what in (("the class", "class"), ("what else is asked for", "rest"))
    }
    return draw_lines(drawn, title="A class unlearned by negation, in pictures", axis="strength",
                      subtitle="shares, recogniser B")  # fmt: skip


EXPERIMENT = texts.Experiment(
    "arithmetic_pictures", "Arithmetic on pictures: negation and analogy", "https://arxiv.org/abs/2306.14870",
    "LoRAs of pictures can be added, subtracted to unlearn, and likened to one another as those of texts can",
    measure, tables, verdict, figure, where,
)  # fmt: skip
