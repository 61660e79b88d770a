"""LoRAHub and learned weights against the best Merge of a grid of weights, on the embedded world's test split, k = 3.

    python benchmarks/weigh_pictures.py JOURNAL [--pictures 200] [--budget 40] [--sets N] [--steps 25] [--table]
    python benchmarks/weigh_pictures.py JOURNAL --sets 6 --pictures 102 --part 1 --parts 2    # one of two processes

With fewer sets than all, LoRAs come about equally often in them. `--table > benchmarks/weigh_pictures.md` writes what
is kept in docs/world/weigh_pictures.jsonl.

For every set of three test-split LoRAs: weights by grid, LoRAHub and learning, from search prompts and seeds alone
(CLIP and recogniser A; learned: each LoRA's own predictions). Then pictures of the report's held-out prompts and
seeds, which no search sees, are judged by recogniser B. "merge, grid" is chosen by the same score, prompts and seeds
as LoRAHub; "merge, best grid weight by B" takes, over all pictures, the grid's weight that B likes best: a limit
that no honest choice reaches. The journal is one line per finished piece; run again to go on.
"""

import argparse
import math
from collections import Counter
from pathlib import Path

import multilora as ml
from multilora.lab.objectives_denoising import own_predictions
from multilora.lab.objectives_pictures import PictureScore, clip_and_presence
from multilora.lab.reproduce.bench import mean_interval
from multilora.lab.score.presence import load_recogniser, presence
from multilora.lab.search import own_prompts, search_prompts
from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.loras import pictures
from multilora.lab.world.report import Journal, composed_scene, sets
from multilora.method import resolve
from multilora.pipelines.load import library, load_pipeline

GRID = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
MOST = 50  # pictures of a set at most; a search sees none of their prompts
SEARCH_SEEDS = (700_000, 700_001)  # the report's pictures have seeds from 0
CHUNK = 4


def even(found, count):
    """`count` of the sets in which every LoRA comes about equally often."""
    left, chosen, uses = list(found), [], Counter()
    for _ in range(min(count, len(left))):
        chosen.append(min(left, key=lambda one: sorted((uses[name] for name in one), reverse=True)))
        left.remove(chosen[-1])
        uses.update(chosen[-1])
    return chosen


def unseen_prompts(entries, chosen):
    """Four captions for the search, none of which is among the held-out ones: streams apart can still say the same."""
    held_out = {caption(composed_scene(chosen, i), 1) for i in range(MOST)}
    found = [p for p in dict.fromkeys(search_prompts(entries, chosen, 100)) if p not in held_out]
    if len(found) < 4:
        raise ValueError(f"{'+'.join(chosen)}: {len(found)} captions are left for the search, wanted 4")
    return found[:4]


def chosen_weights(pipe, chosen, args, journal):
    """{name of a cell: weights} of a set, each from the journal or found now."""
    entries = [library()[name] for name in chosen]
    loras = [ml.load(entry["path"], base=pipe, name=entry["name"]) for entry in entries]
    wanted = {DESIGNS[name].category: name for name in chosen}
    prompts = unseen_prompts(entries, chosen)
    score = PictureScore(pipe, prompts, SEARCH_SEEDS, clip_and_presence(wanted), name="both", steps=args.search_steps)
    found = {f"merge, weight {w:g}": [w] * 3 for w in GRID} | {"uniform": [1 / 3] * 3}
    setting = f"{args.budget}/{args.search_steps}/{args.learn_steps}"

    def settled(name, work):
        key = f"weights/{name}/{'+'.join(chosen)}/{setting}"
        if key not in journal:
            journal.add(key, weights=work())
            print(f"{'+'.join(chosen)}: {name} {journal.lines[key]['weights']}", flush=True)
        found[name] = journal.lines[key]["weights"]

    def by_grid():
        losses = score(loras, [[w] * 3 for w in GRID])
        return [GRID[losses.index(min(losses))]] * 3

    def by_search():
        return list(resolve("weigh", "lorahub", budget=args.budget, l1=0.0, start=0.8)(loras, score))

    def by_gradient(**options):
        loss = own_predictions(pipe, loras, own_prompts(entries, loras, 2), steps=args.search_steps)
        return list(resolve("weigh", "learned", steps=args.learn_steps, **options)(loras, loss))

    settled("merge, grid", by_grid)
    settled("lorahub", by_search)
    settled("learned, simplex per layer", by_gradient)
    settled("learned, free per layer", lambda: by_gradient(form="free", start=0.8))
    return loras, found


def measure(pipe, chosen, args, journal, count):
    loras, found = chosen_weights(pipe, chosen, args, journal)
    eyes, wanted = load_recogniser("b"), {DESIGNS[name].category: name for name in chosen}
    for name, weights in found.items():
        merged = None
        for first in range(0, count, CHUNK):
            size = min(CHUNK, count - first)
            settings = f"{args.steps}/{args.budget}/{args.search_steps}/{args.learn_steps}"
            key = f"picture/{name}/{'+'.join(chosen)}/{first}+{size}/{settings}"
            if key in journal:
                continue
            merged = merged or ml.merge(loras, weights)
            texts = [caption(composed_scene(chosen, i), 1) for i in range(first, first + size)]
            images = pictures(pipe, texts, range(first, first + size), [merged], steps=args.steps)
            seen = presence(images, wanted, eyes)
            each = [[seen[head][i] for head in wanted] for i in range(size)]
            journal.add(key, cell=name, set=list(chosen), found=sum(map(sum, each)), asked=3 * size,
                        complete=sum(map(all, each)), pictures=size)  # fmt: skip
    print(f"{'+'.join(chosen)}: done", flush=True)


def interval(found, asked):
    """Wilson's 95% interval of a share."""
    z, p = 1.959964, found / asked
    middle, root = p + z * z / (2 * asked), z * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return [(middle + s * root) / (1 + z * z / asked) for s in (-1, 1)]


def table(journal):
    cells = {}
    for entry in journal.of("picture"):
        total = cells.setdefault(entry["cell"], [0, 0, 0, 0])
        for i, field in enumerate(("found", "asked", "complete", "pictures")):
            total[i] += entry[field]
    grid = {name: c for name, c in cells.items() if name.startswith("merge, weight")}
    if grid:
        best = max(grid, key=lambda name: grid[name][0] / grid[name][1])
        cells[f"merge, best grid weight by B ({best.rpartition(' ')[2]})"] = grid[best]
    named = dict.fromkeys("+".join(entry["set"]) for entry in journal.of("picture"))
    print("# Weights for pictures: a grid, LoRAHub, learning\n\nMade by `python benchmarks/weigh_pictures.py`.\n\n"
          f"Merge of three test-split LoRAs of the embedded world ({', '.join(named)}), held-out prompts and seeds, "
          "recogniser B. `merge, grid`, LoRAHub and learning saw other prompts and seeds, CLIP and recogniser A only; "
          "the last row's weight was chosen afterwards, by B. The search begins at .8 and has 40 evaluations, the "
          "grid 6. Intervals in the table take elements as independent, those below it the sets.\n")  # fmt: skip
    print("| weights | pictures | elements present, 95% | all three present, 95% |\n|---|---|---|---|")
    for name, (found, asked, complete, count) in cells.items():
        a, b = interval(found, asked), interval(complete, count)
        print(f"| {name} | {count} | {found / asked:.2f} ({a[0]:.2f} to {a[1]:.2f}) | "
              f"{complete / count:.2f} ({b[0]:.2f} to {b[1]:.2f}) |")  # fmt: skip
    against(journal, ("lorahub", "learned, free per layer"), "merge, grid")
    if grid:
        against(journal, ("lorahub",), best)


def by_set(journal, name):
    """Set -> share of its elements present."""
    found = {}
    for entry in journal.of("picture"):
        if entry["cell"] == name:
            total = found.setdefault("+".join(entry["set"]), [0, 0])
            total[0] += entry["found"]
            total[1] += entry["asked"]
    return {chosen: total[0] / total[1] for chosen, total in found.items()}


def against(journal, names, base):
    """Lines on how much more of each set's elements a way shows than `base` does: interval over the sets."""
    theirs = by_set(journal, base)
    for name in names:
        ours = by_set(journal, name)
        gains = [ours[chosen] - theirs[chosen] for chosen in ours if chosen in theirs]
        if gains:
            mean, low, high = mean_interval(gains)
            each = ", ".join(f"{gain:+.2f}" for gain in gains)
            print(f"\n{name} less {base}: {mean:+.2f} ({low:+.2f} to {high:+.2f}, over the sets); set by set {each}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--table", action="store_true", help="print what the journal holds, measure nothing")
    for name, default in (("pictures", 200), ("budget", 40), ("sets", 100), ("steps", 25), ("search-steps", 12),
                          ("learn-steps", 60), ("part", 1), ("parts", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    journal = Journal(args.journal)
    if not args.table:
        found = even(sets("test", 3), args.sets)[args.part - 1 :: args.parts]
        if args.pictures > MOST * len(found):
            raise SystemExit(f"--pictures {args.pictures}: {MOST} at most for each of {len(found)} sets")
        pipe = load_pipeline("embedded", device="cpu")
        for chosen in found:
            measure(pipe, chosen, args, journal, -(-args.pictures // len(found)))
    table(journal)


if __name__ == "__main__":
    main()
