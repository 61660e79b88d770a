"""Every way to compose against the best Merge of a grid: embedded world, test split, recogniser B.

    python benchmarks/leaderboard.py [--k 5,4,3,2] [--pictures 200] [METHOD ...]     # measure what the journal lacks
    python benchmarks/leaderboard.py --part 1 --parts 2                              # one of two processes
    python benchmarks/leaderboard.py --table > benchmarks/leaderboard.md             # of what is there

Sets, prompts and seeds are those of multilora.lab.reproduce.mole. Each method has, for each k, the one setting that
did best on the train split by recogniser A (benchmarks/better.py, docs/world/better.jsonl); only Merge is also told
with the weight of a grid that B likes best afterwards, a limit that no honest choice exceeds. Pictures that other
benchmarks drew of the same sets, prompts and seeds (gates, LoRAHub, ZipLoRA: mole.jsonl and weigh_pictures.jsonl
beside the journal) are rows as well; `--again` draws them once more for their quality, with the weights found then and
gates, ZipLoRA and Gram matrices made anew.

Quality is the kernel distance of multilora.lab.evaluate.quality between a cell's pictures and real renders of the
scenes asked for; a cell's features lie in the work folder until all of them are there. Seconds are of pictures drawn
on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import weigh_pictures
from benchmarks.better import cells as trained
from benchmarks.better import measure, reviewed
from multilora.lab.evaluate.quality import OTHER, RENDERS, kernel_distance
from multilora.lab.evaluate.statistics import wilson
from multilora.lab.journal import Journal
from multilora.lab.reproduce.bench import mean_interval, rate
from multilora.lab.reproduce.mole import (
    CHUNK,
    SHARED,
    STEPS,
    WAYS,
    Bench,
    best_of_grid,
    by_k,
    measure_set,
    shared_out,
)  # fmt: skip
from multilora.lab.world.render import render
from multilora.lab.world.report import GUIDANCE, composed_scene
from multilora.lab.world.tables import table

WORLD = Path(__file__).resolve().parents[1] / "docs" / "world"
LEAST = 200  # pictures of a cell
GRID_BEST = "merge, best weight of six by B"
# cell of another benchmark -> what a small table calls it
TOLD = {"lorahub": "weights by LoRAHub", "mole, paper: row sums to 1": "mole, the paper's gate",
        "mole, row sums to k": "mole, rows sum to k", "ziplora": "ziplora, trained columns"}  # fmt: skip
REVIEWS = WORLD / "review_test.json"
BESIDE = ("mole.jsonl", "weigh_pictures.jsonl")


def way(arm: str) -> str:
    """What a setting is one of: the method, and how it is gated."""
    name, gate = arm.partition("@")[0], arm.partition("gate=")[2].partition(",")[0]
    return f"{name}, gate per {gate}" if gate else name


def settings(journal: Journal) -> dict[int, dict[str, str]]:
    """k -> way -> the arm that showed most of the elements on the train split, of equals over all k; where a method
    was not tried at a k, the arm of the largest k at which it was; and auto."""
    shown = {k: {arm: c["found"] / c["asked"] for arm, c in arms.items()} for k, arms in trained(journal).items()}

    def score(k: int, arm: str) -> tuple[float, float]:
        return shown[k][arm], sum(by.get(arm, 0.0) for by in shown.values())

    found = {
        k: {name: max((a for a in arms if way(a) == name), key=lambda a, k=k: score(k, a))
            for name in dict.fromkeys(map(way, arms))}
        for k, arms in shown.items()
    }  # fmt: skip
    for k in found:
        found[k] |= {"auto": "auto@1"}  # chooses for itself
        for other in sorted(found, reverse=True):
            found[k] = {**found[other], **found[k]}
    return found


class Board(Bench):
    """A bench that keeps what recogniser B reads of every picture."""

    def folder(self, name: str, chosen: Sequence[str]) -> Path:
        return self.work / "features" / name.replace(":", "_") / "+".join(chosen)

    def drawn(self, name: str, chosen: Sequence[str], indices: Sequence[int], images: Sequence[Any]) -> None:
        folder = self.folder(name, chosen)
        folder.mkdir(parents=True, exist_ok=True)
        for index, row in zip(indices, self.eyes.features(images), strict=True):
            np.save(folder / f"{index}.npy", row)

    def rows(self, name: str, places: Iterable[tuple[Sequence[str], int]]) -> list[np.ndarray] | None:
        """The features of a cell's pictures; None where some are missing."""
        paths = [self.folder(name, chosen) / f"{i}.npy" for chosen, count in places for i in range(count)]
        return [np.load(p) for p in paths] if all(p.is_file() for p in paths) else None

    def quality(self, k: int, places: Sequence[tuple[Sequence[str], int]], names: Iterable[str]) -> None:
        """One line for each cell whose pictures are all there, and the floor."""
        count = sum(n for _, n in places)
        left = [name for name in (*names, RENDERS) if f"quality/{name}/{k}/{count}" not in self.journal]
        if not left:
            return
        real, other = (
            self.eyes.features([render(composed_scene(chosen, i + more)) for chosen, n in places for i in range(n)])
            for more in (0, OTHER)
        )
        for name in left:
            found = other if name == RENDERS else self.rows(name, places)
            if found is not None:
                value = kernel_distance(np.stack(list(found)), real)
                told = {end: round(getattr(value, end), 3) for end in ("value", "low", "high")}
                self.journal.add(f"quality/{name}/{k}/{count}", cell=name, k=k, pictures=count, **told)


def gathered(journal: Journal) -> dict[int, dict[str, dict[str, dict[str, Any]]]]:
    """k -> cell -> place -> entry, of this journal and those beside it; cells of fewer than LEAST pictures, which
    would be compared on other sets, are left out."""
    found = by_k(journal)
    for path in BESIDE:
        for k, cells in by_k(Journal(journal.path.with_name(path))).items():
            for name, entries in cells.items():
                if k in found and "masked out" not in name and not name.startswith("no LoRA"):
                    found[k].setdefault(name, {}).update(entries)
    return {k: {name: own for name, own in cells.items() if sum(e["pictures"] for e in own.values()) >= LEAST}
            for k, cells in found.items()}  # fmt: skip


def again(board: Board, chosen: Sequence[str], count: int) -> None:
    """Draw a set's cells of the benchmarks beside this one, for their features; what is counted goes nowhere else."""
    kept, board.journal = board.journal, Journal(board.work / "again.jsonl")
    board.journal.lines |= {e["key"]: e for e in Journal(kept.path.with_name(BESIDE[1])).of("weights")}
    try:
        measure_set(board, chosen, count, WAYS, masked=0)
        weigh_pictures.measure(board, chosen, weigh_pictures.options().parse_args([str(board.journal.path)]), count)
    finally:
        board.journal = kept


def seen(entries: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    entries = list(entries)
    return sum(e["found"] for e in entries), sum(e["asked"] for e in entries)


def gain(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Elements shown above another cell, with the interval over the sets and that over pictures in batches."""
    common = [p for p in ours if p in theirs]
    if not common:
        return ""
    each = [rate(seen([ours[p]])) - rate(seen([theirs[p]])) for p in common]
    sets: dict[str, list[float]] = {}
    for p, value in zip(common, each, strict=True):
        sets.setdefault(p.split("/")[0], []).append(value)
    mean, low, high = mean_interval(each)
    _, least, most = mean_interval([sum(v) / len(v) for v in sets.values()])
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f}; sets {least:+.2f} to {most:+.2f})"


def spread(found: int, asked: int) -> str:
    low, high = wilson(found, asked)
    return f"{found / asked:.2f} ({low:.2f} to {high:.2f})"


def page(journal: Journal) -> str:
    parts = [
        "# Leaderboard\n\nMade by `python benchmarks/leaderboard.py`.\n\n"
        f"LoRAs of the embedded world's test split, held-out prompts and seeds, {STEPS} steps, guidance {GUIDANCE:g}; "
        "the same noise for all. METHOD@WEIGHT:options; the setting of each k was chosen on the train split by "
        "recogniser A (better.md), Auto's by reviewers, the best Merge afterwards by B. Elements and complete "
        "pictures by B, elements taken as independent; gains over the best Merge on the same noise, over batches of "
        "pictures and over the sets. Quality: kernel distance of B's features to real renders, in thousandths, less "
        "is better. "
        "Rows: runs of the model a step. Seconds: CPU time of a picture, one thread, beside "
        "other processes."
    ]
    for k, cells in gathered(journal).items():
        best = best_of_grid({n: list(c.values()) for n, c in cells.items()})
        quality = {e["cell"]: e for e in journal.of("quality") if e["k"] == k}
        rows = []
        for name, own in sorted(cells.items(), key=lambda item: -rate(seen(item[1].values()))):
            if name.startswith("merge, weight") and name not in (best, SHARED):
                continue
            entries = list(own.values())
            count = sum(e["pictures"] for e in entries)
            clip = [c for e in entries for c in e.get("clip", ())]
            timed = [e for e in entries if "seconds" in e and e.get("device", "CPU") == "CPU"]
            told = f"**{name}, the grid's best by B**" if name == best else name
            rows.append([
                told, str(count), spread(*seen(entries)), spread(sum(e["complete"] for e in entries), count),
                "" if name == best or best is None else gain(own, cells[best]),
                f"{sum(clip) / len(clip):.1f}" if clip else "",
                f"{quality[name]['value']:.0f} ({quality[name]['low']:.0f} to {quality[name]['high']:.0f})"
                if name in quality else "",
                f"{sum(e['rows'] * e['pictures'] for e in entries) / count:.2f}",
                f"{sum(e['seconds'] * e['pictures'] for e in timed) / sum(e['pictures'] for e in timed):.2f}"
                if timed else "",
            ])  # fmt: skip
        head = ["way", "pictures", "elements", "complete", "gain", "CLIP", "quality", "rows", "seconds"]
        floor = quality.get(RENDERS)
        parts.append(f"## k = {k}\n\n{table(head, rows)}\n\n{drawn_on(cells)}")
        if floor:
            parts.append(f"Quality of {RENDERS}: {floor['value']:.0f} ({floor['low']:.0f} to {floor['high']:.0f}).")
    if REVIEWS.is_file():
        parts.append(
            "## What reviewers see\n\nLanguage models that see, given the designs and numbered pictures, neither "
            "prompts nor methods; other scenes of the same LoRAs, drawn by `multilora eval`, 25 steps, guidance 3."
        )
        parts += reviews()
    return "\n\n".join(parts)


def drawn_on(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The cells of which another device than a CPU drew some pictures, and which."""
    found = {}
    for name, own in cells.items():
        for e in own.values():
            if e.get("device", "CPU") != "CPU":
                found.setdefault(e["device"], Counter())[name] += e["pictures"]
    each = [f"{device}: " + ", ".join(f"{count} of {name}" for name, count in own.items())
            for device, own in found.items()]  # fmt: skip
    return f"Drawn on a CPU but for these pictures. {'; '.join(each)}." if each else "Drawn on a CPU."


def compact(journal: Journal) -> str:
    """One row a way: elements with their interval, share of complete pictures, pictures, for each k."""
    found, tuned = gathered(journal), settings(Journal(journal.path.with_name("better.jsonl")))
    ks = sorted(found)
    shown: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for k, cells in found.items():
        best = best_of_grid({n: list(c.values()) for n, c in cells.items()})
        for cell, own in cells.items():
            name = next((n for n, arm in tuned[k].items() if arm == cell and n != "merge"), "")
            name = GRID_BEST if cell == best else name or TOLD.get(cell, "")
            if name:
                shown.setdefault(name, {})[k] = list(own.values())
    rows = []
    # Those that have all k first, from best to worst; the order of the others says nothing.
    for name, by in sorted(
        shown.items(), key=lambda s: (len(s[1]) < len(ks), -sum(rate(seen(e)) for e in s[1].values()) / len(s[1]))
    ):
        entries = [e for own in by.values() for e in own]
        cost = sum(e["rows"] * e["pictures"] for e in entries) / sum(e["pictures"] for e in entries)
        rows.append([name, f"{cost:.1f}", *(_told(by[k]) if k in by else "" for k in ks)])
    return table(["way", "runs a step", *(f"k = {k}" for k in ks)], rows)


def reviews() -> list[str]:
    """What blind reviewers saw in pictures of the test split, beside recogniser B: one table a review."""
    found = []
    for name, by_k_ in json.loads(REVIEWS.read_text(encoding="utf-8")).items():
        ks = sorted(by_k_)
        arms = {arm: [by_k_[k].get(arm, [0] * 4) for k in ks] for k in ks for arm in by_k_[k]}
        rows = []
        for arm, cells in sorted(arms.items(), key=lambda item: -sum(c[1] for c in item[1])):
            asked, theirs, its, pictures = (sum(c[i] for c in cells) for i in range(4))
            rows.append([arm, str(pictures), spread(theirs, asked), f"{its / asked:.2f}",
                         *(f"{c[1] / c[0]:.2f} / {c[2] / c[0]:.2f}" if c[0] else "" for c in cells)])  # fmt: skip
        head = ["way", "pictures", "elements, reviewers", "B", *(f"k = {k}, reviewers / B" for k in ks)]
        found.append(f"### {name}\n\n{table(head, rows)}")
    return found


def _told(entries: Sequence[Mapping[str, Any]]) -> str:
    count = sum(e["pictures"] for e in entries)
    return f"{spread(*seen(entries))}, {sum(e['complete'] for e in entries) / count:.2f}, n {count}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="of these only, by name")
    parser.add_argument("--k", default="5,4,3,2")
    parser.add_argument("--journal", type=Path, default=WORLD / "leaderboard.jsonl")
    parser.add_argument("--work", type=Path, default=Path("out") / "leaderboard")
    parser.add_argument("--review", nargs=4, help="keep a blind review: NAME EVALUATION SEALED ANSWERS")
    parser.add_argument("--table", action="store_true", help="print what the journal holds, measure nothing")
    parser.add_argument("--again", action="store_true", help="also what other benchmarks drew, for its quality")
    parser.add_argument("--device", default="cpu")
    for name, default in (("sets", 6), ("pictures", 200), ("batch", CHUNK), ("part", 1), ("parts", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.review:
        name, *files = args.review
        kept = json.loads(REVIEWS.read_text(encoding="utf-8")) if REVIEWS.is_file() else {}
        REVIEWS.write_text(json.dumps({**kept, name: reviewed(*map(Path, files))}, indent=1) + "\n")
    elif not args.table:
        chosen = settings(Journal(WORLD / "better.jsonl"))
        board = Board(args.journal, args.work, device=args.device, batch=args.batch)
        for k in map(int, args.k.split(",")):
            arms = {n: arm for n, arm in chosen[k].items() if not args.methods or n.partition(",")[0] in args.methods}
            for one, count in shared_out([k], args):
                measure(board, one, count, arms.values())
                if args.again:
                    again(board, one, count)
            whole = argparse.Namespace(**{**vars(args), "part": 1, "parts": 1})
            names = {**dict.fromkeys(arms.values()), **(gathered(board.journal).get(k, {}) if args.again else {})}
            board.quality(k, shared_out([k], whole), names)
    print(page(Journal(args.journal)))


if __name__ == "__main__":
    main()
