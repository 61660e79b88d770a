"""MoLE on the embedded world (arXiv 2404.13628): gates against the best Merge of a grid on the test split, k = 2 to 5.

    python -m multilora.lab.reproduce.mole JOURNAL [--work FOLDER] [--k 2,3,4,5] [--sets 6] [--pictures 200] [--table]
    python -m multilora.lab.reproduce.mole JOURNAL --part 1 --parts 2 [--device cuda --batch 34]     # one of two jobs

For every set of test-split LoRAs a gate is trained in each of the ways of GATES, from scenes that no held-out prompt
says, and kept in the work folder. Then pictures of the report's held-out prompts and seeds are drawn in every way and
read by recogniser B, which no training sees: the LoRAs' elements, the generic elements that the prompt names as well
(the paper's motivation: does the base's own prompt following suffer?), and the CLIP score. One line of the journal per
finished piece: run again to go on. benchmarks/weigh_pictures.py measures LoRAHub and learned weights on the same sets,
prompts and seeds. `multilora reproduce mole` draws SETS sets of each k, in which LoRAs come evenly, and the first EACH
pictures of each.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from multilora import files
from multilora.lab.journal import Journal
from multilora.lab.reproduce import bench as texts
from multilora.lab.reproduce.gate_scenes import MOST, draw_references, own_captions
from multilora.lab.result_chart import Point, draw_lines
from multilora.lab.train.gates import train
from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.loras import pictures
from multilora.lab.world.report import composed_scene, even_sets, requested
from multilora.lab.world.tables import share, table
from multilora.method import resolve, unknown
from multilora.pipelines.load import library, load_pipeline
from multilora.routing import Asked, mean_shares
from multilora.trace import traced

CHUNK = 4
STEPS = 25
GRID = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
# way -> (learns from references, settings of multilora.lab.train.gates.train)
GATES: Mapping[str, tuple[bool, dict[str, Any]]] = {
    "paper: row sums to 1": (True, {"sums": "one"}),
    "no balance": (True, {"sums": "one", "balance": 0.0}),
    "own predictions": (False, {"sums": "one"}),
    "row sums to k": (True, {"sums": "count"}),
    "row sums to k per token": (True, {"sums": "count", "per": "linear", "token": True}),
}
DEFAULT = tuple(GATES)[:4]  # the fifth is of benchmarks/leaderboard.py
WAYS = ("paper: row sums to 1", "no balance", "row sums to k")  # those that the claims are about
PAPER = f"mole, {WAYS[0]}"
BASE, FULL, SHARED = "no LoRA, prompt only", "merge, weight 1", "merge, weight 1/k"
SETS, EACH, KS = 6, 8, (2, 3, 4, 5)
SETTINGS = {"per": "layer", "steps": 150, "draws": 4, "lr": 3e-4, "checkpoint_every": 50}


class Bench:
    """The embedded base with its LoRAs, its eyes and what was measured; work: trained gates and reference pictures."""

    def __init__(
        self, journal: Path, work: Path, *, steps: int = STEPS, train_steps: int = SETTINGS["steps"],
        device: str = "cpu", batch: int = CHUNK, recogniser: str = "b",
    ) -> None:  # fmt: skip
        from multilora.lab.score.clip import load_clip
        from multilora.lab.score.presence import load_recogniser

        self.pipe = load_pipeline("embedded", device=device)
        self.pipe.set_progress_bar_config(disable=True)
        self.journal, self.work, self.steps, self.train_steps = Journal(journal), work, steps, train_steps
        self.batch = batch - batch % CHUNK or CHUNK
        self.eyes, self.clip = load_recogniser(recogniser), load_clip("embedded", device)
        self.eyes.net.to(device)
        self.device = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
        self._loras: dict[str, Any] = {}

    def lora(self, name: str) -> Any:
        if name not in self._loras:
            self._loras[name] = files.load(library()[name]["path"], base=self.pipe, name=name)
        return self._loras[name]

    def gate(self, chosen: Sequence[str], way: str) -> Path:
        """The gate of a set in one of the ways of GATES, trained now where it is not in the work folder."""
        from_references, settings = GATES[way]
        settings = {**SETTINGS, **settings, "steps": self.train_steps}
        folder = self.work / "+".join(chosen)
        path = folder / f"{way.replace(':', '').replace(' ', '_')}_{self.train_steps}.safetensors"
        if not path.is_file():
            data = draw_references(chosen, folder / "references") if from_references else None
            train([self.lora(name) for name in chosen], self.pipe, path, data=data, echo=print,
                  prompts=None if from_references else own_captions(chosen), **settings)  # fmt: skip
        return path

    def left(self, name: str, chosen: Sequence[str], count: int, setting: str = "") -> list[range]:
        """The pictures of a cell that the journal does not hold, CHUNK to a line."""
        parts = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
        return [part for part in parts if self._key(name, chosen, part, setting) not in self.journal]

    def _key(self, name: str, chosen: Sequence[str], part: range, setting: str) -> str:
        return f"picture/{name}/{'+'.join(chosen)}/{part.start}+{len(part)}/{self.steps}/{setting}"

    def drawn(self, name: str, chosen: Sequence[str], indices: Sequence[int], images: Sequence[Any]) -> None:
        """What else to keep of pictures; nothing here."""

    def cell(
        self, name: str, chosen: Sequence[str], count: int, loras: Sequence[Any], weights: Sequence[float],
        method: Any = "merge", setting: str = "",
    ) -> None:  # fmt: skip
        """Pictures 0 .. count - 1 of a set by `loras` at `weights`: `batch` at once, CHUNK to a line of the journal.

        setting: what the weights or the gate depend on, for the key
        """
        wanted = {DESIGNS[n].category: n for n in chosen}
        left = self.left(name, chosen, count, setting)
        for at in range(0, len(left), self.batch // CHUNK):
            now = left[at : at + self.batch // CHUNK]
            indices = [i for part in now for i in part]
            scenes = [composed_scene(chosen, i) for i in indices]
            texts = [caption(scene, 1) for scene in scenes]
            watched, runs = traced(resolve("route", method))
            began = time.process_time()
            images = pictures(self.pipe, texts, indices, loras, watched, steps=self.steps, weights=list(weights))
            seconds = (time.process_time() - began) / len(images)
            self.drawn(name, chosen, indices, images)
            # The first run is the picture's; a stack that may be too strong is planned once more, to be looked at.
            shares, rows = shares_of(runs), [len(step.passes) for run in runs[:1] for step in run]
            read = list(zip(scenes, texts, self.eyes.labels(images), self.clip.score(images, texts), strict=True))
            for part in now:
                mine, read = read[: len(part)], read[len(part) :]
                seen = [labels for _, _, labels, _ in mine]
                each = {n: sum(one[head] == n for one in seen) for head, n in wanted.items()}
                generic = [
                    one[head] == label
                    for scene, text, one, _ in mine
                    for head, label in requested(scene, text).items()
                    if head.split("_")[0] not in wanted
                ]
                self.journal.add(
                    self._key(name, chosen, part, setting), cell=name, k=len(chosen), set=list(chosen),
                    elements=each, found=sum(each.values()), asked=len(chosen) * len(part), pictures=len(part),
                    complete=sum(all(one[head] == n for head, n in wanted.items()) for one in seen),
                    generic=[sum(generic), len(generic)], clip=[round(score, 3) for *_, score in mine],
                    shares=shares, rows=round(sum(rows) / len(rows), 3) if rows else 1.0, seconds=round(seconds, 3),
                    device=self.device,
                )  # fmt: skip


def shares_of(runs: Sequence[Any]) -> list[float] | None:
    """[k] mean share of each LoRA over a run's layers, steps and pictures; None where no gate was asked."""
    asked = [p.row for run in runs for one in run for p in one.passes if isinstance(p.row, Asked)]
    means = [mean_shares(a.shares).mean(0) for a in asked if a.shares]
    return [round(v, 4) for v in torch.stack(means).mean(0).tolist()] if means else None


def measure_set(bench: Bench, chosen: Sequence[str], count: int, ways: Sequence[str], masked: int = 2) -> None:
    """Every cell of one set, with `masked` LoRAs at most masked out in turn; what the journal holds is not measured
    again."""
    k, loras = len(chosen), [bench.lora(name) for name in chosen]
    bench.cell(BASE, chosen, count, [], [])
    for weight in GRID:
        bench.cell(f"merge, weight {weight:g}", chosen, count, loras, [weight] * k)
    bench.cell(SHARED, chosen, count, loras, [1 / k] * k)
    gated = [(f"mole, {way}", way, loras) for way in ways]
    for i in range(min(masked, 1 if k < 3 else 2)):
        gated.append((f"mole, {ways[-1]}, LoRA {i + 1} masked out", ways[-1], loras[:i] + loras[i + 1 :]))
    for name, way, used in gated:
        if bench.left(name, chosen, count, str(bench.train_steps)):
            mole = resolve("route", "mole", gate=str(bench.gate(chosen, way)))
            bench.cell(name, chosen, count, used, [1.0] * len(used), mole, str(bench.train_steps))
    print(f"{'+'.join(chosen)}: done", flush=True)


def tables(journal: Journal) -> str:
    """The results as Markdown, k by k; LoRAHub and learning from weigh_pictures.jsonl beside the journal."""
    entries = journal.of("picture")
    own = {(len(e["set"]), e["cell"]) for e in entries}
    beside = Journal(journal.path.with_name("weigh_pictures.jsonl")).of("picture")
    ks = {k for k, _ in own}
    entries += [e for e in beside if (k := len(e["set"])) in ks and (k, e["cell"]) not in own]
    parts = []
    for k in sorted({len(e["set"]) for e in entries}):
        here = [e for e in entries if len(e["set"]) == k]
        cells = {name: [e for e in here if e["cell"] == name] for name in dict.fromkeys(e["cell"] for e in here)}
        if best := best_of_grid(cells):
            cells[f"merge, best weight of the grid by B ({best.rpartition(' ')[2]})"] = cells[best]
        rows = [[name, str(_sum(c, "pictures")), share(_sum(c, "found"), _sum(c, "asked")),
                 share(_sum(c, "complete"), _sum(c, "pictures")), _generic(c), _clip(c), _largest_share(c)]
                for name, c in cells.items() if "masked out" not in name]  # fmt: skip
        head = ["weights", "pictures", "elements present", "all present", "generic elements of the prompt"]
        head += ["CLIP score", "strongest LoRA's share"]
        drawn = Counter()
        for e in here:
            drawn[e.get("device", "CPU")] += e["pictures"]
        told = ", ".join(f"{count} on {device}" for device, count in drawn.items())
        parts.append(f"### k = {k}\n\nPictures: {told}.\n\n{table(head, rows)}")
        masked = {name: c for name, c in cells.items() if "masked out" in name}
        if masked:
            rows = [_masked(name, c, cells) for name, c in masked.items()]
            parts.append(table(["masked out", "its element", "the others", "the others without masking"], rows))
    return "\n\n".join(parts)


def best_of_grid(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """The Merge whose weight recogniser B likes best afterwards: a limit that no honest choice exceeds."""
    grid = [name for name in cells if name.startswith("merge, weight") and name != SHARED]
    return max(grid, key=lambda n: _sum(cells[n], "found") / max(1, _sum(cells[n], "asked")), default=None)


def _sum(entries: Sequence[Mapping[str, Any]], field: str) -> int:
    return sum(e[field] for e in entries)


def _generic(entries: Sequence[Mapping[str, Any]]) -> str:
    pairs = [e["generic"] for e in entries if "generic" in e]
    found, asked = (sum(p[i] for p in pairs) for i in (0, 1))
    return "none is asked for" if pairs and not asked else share(found, asked)


def _clip(entries: Sequence[Mapping[str, Any]]) -> str:
    scores = [s for e in entries for s in e.get("clip", ())]
    return f"{sum(scores) / len(scores):.1f}" if scores else ""


def _strongest(journal: Journal, cell: str) -> str:
    """_largest_share of a cell, k of 3 and more."""
    return _largest_share([e for e in journal.of("picture") if e["cell"] == cell and len(e["set"]) >= 3])


def _largest_share(entries: Sequence[Mapping[str, Any]]) -> str:
    """Mean over the sets of the largest mean share."""
    by_set: dict[str, list[torch.Tensor]] = {}
    for e in entries:
        if e.get("shares"):
            by_set.setdefault("+".join(e["set"]), []).append(torch.tensor(e["shares"]))
    found = [torch.stack(shares).mean(0).max().item() for shares in by_set.values()]
    return f"{sum(found) / len(found):.2f}" if found else ""


def _masked(name: str, entries: Sequence[Mapping[str, Any]], cells: Mapping[str, Any]) -> list[str]:
    """A row: how often the masked LoRA's element is there, and the others', with it masked out and without."""
    at = int(name.rpartition("LoRA ")[2].split(" ")[0]) - 1
    whole = cells[name.rpartition(", LoRA")[0]]

    def others(of: Sequence[Mapping[str, Any]]) -> str:
        found = sum(v for e in of for n, v in e["elements"].items() if n != e["set"][at])
        return share(found, sum(e["pictures"] * (len(e["set"]) - 1) for e in of))

    own = sum(e["elements"][e["set"][at]] for e in entries)
    return [name, share(own, _sum(entries, "pictures")), others(entries), others(whole)]


def where(journal: Journal) -> Journal:
    """The journal of these pictures beside that of texts: world/mole.jsonl."""
    return Journal(journal.path.parents[1] / "world" / "mole.jsonl")


def measure(bench: texts.Bench, ks: Sequence[int] = KS) -> None:
    small = bench.size.seeds == 1
    own = Bench(where(bench.journal).path, bench.work / "mole", **({"steps": 4, "train_steps": 2} if small else {}))
    for k in [k for k in ks if k in KS[:2] or not small]:
        for chosen in even_sets("test", k, 1 if small else SETS):
            measure_set(own, chosen, CHUNK if small else EACH, WAYS)


def by_k(journal: Journal) -> dict[int, dict[str, dict[str, dict[str, Any]]]]:
    """k -> cell -> set and place -> entry."""
    found: dict[int, dict[str, dict[str, dict[str, Any]]]] = {}
    for entry in journal.of("picture"):
        place = "/".join(entry["key"].removeprefix(f"picture/{entry['cell']}/").split("/")[:2])
        found.setdefault(len(entry["set"]), {}).setdefault(entry["cell"], {})[place] = entry
    return dict(sorted(found.items()))


def _gains(cells: Mapping[str, Mapping[str, Any]], name: str, base: str, generic: bool = False) -> list[float]:
    """A cell's share of elements (or of generic ones asked for) less another's, batch by batch on the same noise."""

    def rate(entry: Mapping[str, Any]) -> float:
        return texts.rate(entry["generic"] if generic else (entry["found"], entry["asked"]))

    ours, theirs = cells.get(name, {}), cells.get(base, {})
    asked = [p for p in ours if p in theirs and (not generic or ours[p]["generic"][1])]
    return [rate(ours[p]) - rate(theirs[p]) for p in asked]


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claim, of three LoRAs or more: the paper's gate shows more elements than the best Merge and than 1/k, weight
    1 costs the prompt's other elements, 1/k the LoRAs' own. Over batches of CHUNK pictures, several of each set."""
    above: dict[str, list[float]] = {}
    for k, cells in by_k(journal).items():
        best = best_of_grid({name: list(c.values()) for name, c in cells.items()})
        pairs = {
            "the paper's gate against the best Merge": (PAPER, best or FULL, False),
            "the paper's gate against weight 1/k": (PAPER, SHARED, False),
            "weight 1 against no LoRA, the prompt's other elements": (FULL, BASE, True),
            "weight 1/k against weight 1": (SHARED, FULL, False),
            "rows that sum to k against the best Merge": (f"mole, {WAYS[2]}", best or FULL, False),
        }
        for name, (ours, theirs, generic) in pairs.items():
            above.setdefault(name, []).extend(_gains(cells, ours, theirs, generic) if k >= 3 else ())
    found = {name: texts.mean_interval(values) for name, values in above.items() if values}
    said = [f"{name} {m:+.2f} ({low:+.2f} to {high:+.2f})" for name, (m, low, high) in found.items()]
    strongest = {way: _strongest(journal, f"mole, {way}") for way in WAYS[:2]}
    if all(strongest.values()):
        said.append("the strongest LoRA's share " + ", ".join(f"{s} ({way})" for way, s in strongest.items()))
    gate, shared, damage, erased, _ = above
    held = len(found) == len(above) and min(found[gate][1], found[shared][1]) > 0
    held = held and max(found[damage][2], found[erased][2]) < 0
    ks = ", ".join(str(k) for k in by_k(journal) if k >= 3)
    return held, f"at k = {ks}: " + "; ".join(said)


def figure(journal: Journal) -> Image.Image:
    names = [BASE, FULL, SHARED, *(f"mole, {way}" for way in WAYS)]
    lines = {
        name: [
            Point("", *texts.mean_interval([texts.rate((e["found"], e["asked"])) for e in cells[name].values()]), x=k)
            for k, cells in by_k(journal).items()
            if name in cells
        ]
        for name in names
    }
    return draw_lines({name: line for name, line in lines.items() if line}, title="Gates against Merge",
                      subtitle="elements present, recogniser B, test split", axis="k, LoRAs in a picture",
                      even=True)  # fmt: skip


EXPERIMENT = texts.Experiment(
    "mole", "MoLE: a gate in every layer, in pictures", "https://arxiv.org/abs/2404.13628",
    "three and more LoRAs damage the base at weight 1 and are lost at 1/k; a trained gate beats both",
    measure, tables, verdict, figure, where, {f"k = {k}": partial(measure, ks=(k,)) for k in reversed(KS)},
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--work", type=Path, default=Path("mole"), help="folder of gates and reference pictures")
    parser.add_argument("--k", default="2,3,4,5")
    parser.add_argument("--ways", default=",".join(DEFAULT), help=f"of {', '.join(GATES)}")
    parser.add_argument("--table", action="store_true", help="print what the journal holds, measure nothing")
    parser.add_argument("--device", default="cpu")
    for name, default in (("sets", SETS), ("pictures", 200), ("steps", STEPS), ("train-steps", SETTINGS["steps"]),
                          ("batch", CHUNK), ("part", 1), ("parts", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(arguments)
    ways = [way.strip() for way in args.ways.split(",")]
    for way in ways:
        if way not in GATES:
            raise unknown("way to train a gate", way, GATES)
    if not args.table:
        bench = Bench(args.journal, args.work, steps=args.steps, train_steps=args.train_steps, device=args.device,
                      batch=args.batch)  # fmt: skip
        for chosen, count in shared_out(map(int, args.k.split(",")), args):
            measure_set(bench, chosen, count, ways)
    print(tables(Journal(args.journal)))


def shared_out(
    ks: Iterable[int], args: argparse.Namespace, split: str = "test"
) -> list[tuple[tuple[str, ...], int]]:  # fmt: skip
    """(set, pictures of it) for one of several processes: args has sets, pictures, part and parts."""
    found = []
    if not 1 <= args.part <= args.parts:
        raise SystemExit(f"--part {args.part}: wanted 1 to {args.parts}")
    for k in ks:
        chosen = even_sets(split, k, args.sets)
        if args.pictures > MOST * len(chosen):
            raise SystemExit(f"--pictures {args.pictures}: {MOST} at most for each of {len(chosen)} sets of {k}")
        found += [(one, -(-args.pictures // len(chosen))) for one in chosen]
    return found[args.part - 1 :: args.parts]


if __name__ == "__main__":
    main()
