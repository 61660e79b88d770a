"""Ways to compose on the TRAIN split of the embedded world, read by recogniser A: where settings are looked for.

    OMP_NUM_THREADS=1 python benchmarks/better.py [--k 5] [--pictures 24] [ARM ...]

An arm is METHOD@WEIGHT or METHOD@WEIGHT:option=value,option=value; without arms, those of ARMS. All arms have the same
sets, prompts and noise. What is in the journal is not drawn again; the table of all that is there is written to
benchmarks/better.md after each arm. Nothing here may choose by the test split or by recogniser B.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from multilora.lab.evaluate.statistics import wilson
from multilora.lab.score.presence import presence
from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.loras import pictures
from multilora.lab.world.report import GUIDANCE, STEPS, Journal, composed_scene, sets
from multilora.method import resolve
from multilora.pipelines.composing import member
from multilora.pipelines.image import Composer

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "better.md"
ARMS = (
    "merge@1",
    "merge@0.8",
    "boosted_merge@0.8:boost=0.5",
    "boosted_merge@0.6:boost=1",
    "composite_then_merge@1:early=sum_of_differences,crossover=0.2",
    "composite_then_merge@1:early=composite,crossover=0.2",
    "sum_of_differences@1",
    "sum_of_differences@1:guard=1",
    "stale_sum@1",
    "loratorio@1",
)
BATCH = 4


def read(arm: str) -> tuple[str, float, dict[str, str]]:
    """(method, weight, options) of an arm; ValueError where the method knows no such option."""
    head, _, tail = arm.partition(":")
    name, _, weight = head.partition("@")
    options = dict(part.split("=", 1) for part in tail.split(",") if part)
    return name, float(weight or 1), resolve("route", name, **options).options


def batches(k: int, count: int) -> list[tuple[tuple[str, ...], int]]:
    """(set, first picture) of each batch: sets of the train split in a fixed random order, again when all are used."""
    found = sets("train", k)
    random.Random(f"better/{k}").shuffle(found)
    return [(found[i % len(found)], BATCH * (i // len(found))) for i in range(-(-count // BATCH))]


def measure(pipe, journal: Journal, arm: str, k: int, count: int) -> None:
    """Draw and read what the journal lacks of one arm."""
    method, weight, options = read(arm)
    for chosen, first in batches(k, count):
        key = f"{k}/{arm}/{'+'.join(chosen)}/{first}"
        if key in journal:
            continue
        scenes = [composed_scene(chosen, 500 + first + i) for i in range(BATCH)]
        began = time.process_time()
        images = pictures(
            pipe, [caption(scene, 1) for scene in scenes], range(500 + first, 500 + first + BATCH),
            [member(pipe, name) for name in chosen], method, weights=[weight] * k, **options,
        )  # fmt: skip
        seconds = time.process_time() - began
        seen = presence(images, {DESIGNS[n].category: n for n in chosen}, "a")
        pairs = list(zip(*seen.values(), strict=True))
        journal.add(
            key, arm=arm, k=k, pictures=BATCH, found=sum(map(sum, pairs)), complete=sum(map(all, pairs)),
            seconds=round(seconds, 2),
        )  # fmt: skip


def write(journal: Journal) -> None:
    lines = [
        "# Looking for better settings: train split, recogniser A\n",
        f"Written by `python benchmarks/better.py`. {STEPS} steps, guidance {GUIDANCE:g}; presence of the requested "
        "designs with its 95% Wilson interval (designs taken as independent), pictures with all of them, CPU seconds "
        "a picture relative to the first arm of that k. Small samples: intervals that overlap order nothing.\n",
        "| k | arm | presence | all of them | time | pictures |",
        "|---|---|---|---|---|---|",
    ]
    entries = list(journal.lines.values())
    for k in sorted({e["k"] for e in entries}):
        first = None
        for arm in dict.fromkeys(e["arm"] for e in entries if e["k"] == k):
            mine = [e for e in entries if e["k"] == k and e["arm"] == arm]
            count = sum(e["pictures"] for e in mine)
            found, complete = sum(e["found"] for e in mine), sum(e["complete"] for e in mine)
            low, high = wilson(found, k * count)
            pace = sum(e["seconds"] for e in mine) / count
            first = first or pace
            share = f"{found / (k * count):.2f} ({low:.2f} to {high:.2f})"
            lines.append(f"| {k} | {arm} | {share} | {complete / count:.2f} | {pace / first:.1f} | {count} |")
    TABLE.write_text("\n".join([*lines, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=list(ARMS))
    parser.add_argument("--k", type=int, nargs="+", default=[5])
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--journal", type=Path, default=ROOT / "out" / "better.jsonl")
    asked = parser.parse_args()
    for arm in asked.arms:
        read(arm)
    journal = Journal(asked.journal)
    pipe = Composer.from_pretrained("embedded", device="cpu").pipe
    pipe.set_progress_bar_config(disable=True)
    for k in asked.k:
        for arm in asked.arms:
            measure(pipe, journal, arm, k, asked.pictures)
            write(journal)
            print(f"k = {k}: {arm}", flush=True)


if __name__ == "__main__":
    main()
