"""LoRAHub, learned weights, ZipLoRA and RegMean against the best Merge of a grid: embedded world, test split.

    python benchmarks/weigh_pictures.py JOURNAL [--k 2,3,4,5] [--sets 6] [--pictures 200] [--budget 40] [--table]
    python benchmarks/weigh_pictures.py JOURNAL --part 1 --parts 2 [--device cuda --batch 34]    # one of two processes

`--table > benchmarks/weigh_pictures.md` writes what is kept in docs/world/weigh_pictures.jsonl. Sets, prompts and
seeds are those of multilora.lab.reproduce.mole, whose table shows these beside its own.

For every set of test-split LoRAs: weights by grid, LoRAHub and learning, from search prompts and seeds alone (CLIP and
recogniser A; learned and ZipLoRA: each LoRA's own predictions; RegMean: Gram matrices of each LoRA's inputs, of its
own prompts). Then pictures of the report's held-out prompts and seeds, which no search sees, are judged by recogniser
B. "merge, grid" is chosen by the same score, prompts and seeds as LoRAHub; "merge, best grid weight by B" takes, over
all pictures, the grid's weight that B likes best: a limit that no honest choice reaches. The journal is one line per
finished piece; run again to go on.
"""

import argparse
import math
from pathlib import Path

import multilora as ml
from multilora.lab.journal import Journal
from multilora.lab.objectives_denoising import own_predictions
from multilora.lab.objectives_pictures import PictureScore, clip_and_presence
from multilora.lab.reproduce.bench import mean_interval
from multilora.lab.reproduce.mole import CHUNK, GRID, MOST, SHARED, STEPS, Bench, best_of_grid, shared_out
from multilora.lab.search import own_prompts, search_prompts
from multilora.lab.train.gram import grams
from multilora.lab.train.ziplora import train
from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.loras import pictures
from multilora.lab.world.report import composed_scene
from multilora.method import resolve
from multilora.pipelines.load import library

SEARCH_SEEDS = (700_000, 700_001)  # the report's pictures have seeds from 0
GRID_CHOSEN, HUB, SIMPLEX, FREE = "merge, grid", "lorahub", "learned, simplex per layer", "learned, free per layer"
ZIP, REGMEAN = "ziplora", "regmean, weight 2/k"
BALANCED = "balanced, mean 1"  # in the journal only
REGMEAN_TOTAL = 2.0  # sum of the weights: best of 1, 2 and 3 in a try of 24 pictures, train split, k = 5, recogniser A


def unseen_prompts(entries, chosen):
    """Four captions for the search, none of which is among the held-out ones: streams apart can still say the same."""
    held_out = {caption(composed_scene(chosen, i), 1) for i in range(MOST)}
    found = [p for p in dict.fromkeys(search_prompts(entries, chosen, 100)) if p not in held_out]
    if len(found) < 4:
        raise ValueError(f"{'+'.join(chosen)}: {len(found)} captions are left for the search, wanted 4")
    return found[:4]


def chosen_weights(bench, chosen, args):
    """{name of a cell: weights} of a set, each from the journal or found now."""
    entries, loras = [library()[name] for name in chosen], [bench.lora(name) for name in chosen]
    k, pipe, journal = len(chosen), bench.pipe, bench.journal
    wanted = {DESIGNS[name].category: name for name in chosen}
    prompts = unseen_prompts(entries, chosen)
    score = PictureScore(pipe, prompts, SEARCH_SEEDS, clip_and_presence(wanted), name="both", steps=args.search_steps)
    found = {}

    def settled(name, work):
        key = f"weights/{name}/{'+'.join(chosen)}/{args.budget}/{args.search_steps}/{args.learn_steps}"
        if key not in journal:
            journal.add(key, weights=[rounded(w) for w in work()])
            print(f"{'+'.join(chosen)}: {name} {str(journal.lines[key]['weights'])[:80]}", flush=True)
        found[name] = journal.lines[key]["weights"]

    def by_grid():
        losses = score(loras, [[w] * k for w in GRID])
        return [GRID[losses.index(min(losses))]] * k

    def by_search():
        return list(resolve("weigh", "lorahub", budget=args.budget, l1=0.0, start=0.8)(loras, score))

    def by_gradient(**options):
        loss = own_predictions(pipe, loras, own_prompts(entries, loras, 2), steps=args.search_steps)
        return list(resolve("weigh", "learned", steps=args.learn_steps, **options)(loras, loss))

    settled(GRID_CHOSEN, by_grid)
    settled(HUB, by_search)
    settled(SIMPLEX, by_gradient)
    settled(FREE, lambda: by_gradient(form="free", start=0.8))
    return loras, found


def grams_of(bench, name):
    """The file of a LoRA's Gram matrices, collected now where there is none: its own prompts, 10 steps."""
    path = bench.work / "grams" / f"{name}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        lora = bench.lora(name)
        (texts,) = own_prompts([library()[name]], [lora], 8)
        with grams(bench.pipe, lora) as collected:
            pictures(bench.pipe, texts, [SEARCH_SEEDS[0] + i for i in range(len(texts))], [lora], steps=10)
        collected.save(path)
    return str(path)


def rounded(weight):
    """A number, or one per layer, to 4 digits: what the pictures are drawn with."""
    return {path: round(w, 4) for path, w in weight.items()} if isinstance(weight, dict) else round(weight, 4)


def measure(bench, chosen, args, count):
    loras, found = chosen_weights(bench, chosen, args)
    k, setting = len(chosen), f"{args.budget}/{args.search_steps}/{args.learn_steps}"
    for weight in GRID:
        bench.cell(f"merge, weight {weight:g}", chosen, count, loras, [weight] * k)
    bench.cell(SHARED, chosen, count, loras, [1 / k] * k)
    for name, weights in found.items():
        bench.cell(name, chosen, count, [ml.merge(loras, weights)], [1.0], setting=setting)
    if ZIP not in args.leave and bench.left(ZIP, chosen, count, str(args.zip_steps)):
        path = bench.work / "zipped" / f"{'+'.join(chosen)}_{args.zip_steps}.safetensors"
        if not path.is_file():
            train(chosen, bench.pipe, path, steps=args.zip_steps, echo=print)
        bench.cell(ZIP, chosen, count, [ml.load(path, base=bench.pipe)], [1.0], setting=str(args.zip_steps))
    if bench.left(REGMEAN, chosen, count):
        known = ",".join(grams_of(bench, name) for name in chosen)
        merged = resolve("merge", "regmean", grams=known)(loras, [REGMEAN_TOTAL / k] * k)
        bench.cell(REGMEAN, chosen, count, [merged], [1.0])
    print(f"{'+'.join(chosen)}: done", flush=True)


def interval(found, asked):
    """Wilson's 95% interval of a share."""
    z, p = 1.959964, found / asked
    middle, root = p + z * z / (2 * asked), z * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return [(middle + s * root) / (1 + z * z / asked) for s in (-1, 1)]


def table(journal):
    print("# Weights for pictures: a grid, LoRAHub, learning, ZipLoRA, RegMean\n\n"
          "Made by `python benchmarks/weigh_pictures.py`.\n\n"
          "Merge of k test-split LoRAs of the embedded world, held-out prompts and seeds, recogniser B. `merge, "
          "grid`, LoRAHub and whatever is learned saw other prompts and seeds, CLIP and recogniser A only, ZipLoRA "
          "and RegMean no score at all (RegMean's 2 was chosen on the train split); the last row's weight was chosen "
          "afterwards, by B. The search begins at .8 and has 40 evaluations, the grid 6. Intervals in the table take "
          "elements as independent, those below it the sets.\n\n"
          "`balanced` was tried and is not in the tree any more (commit d89cfff has it): weights at which every LoRA "
          "keeps the same share of its own effect on the predictions.")  # fmt: skip
    beside = Journal(journal.path.with_name("mole.jsonl"))  # the grid's pictures, where both were drawn
    found = {e["key"]: e for own in (journal, beside) for e in own.of("picture")}
    kept = [e for e in found.values() if not e["cell"].startswith(("mole", "no LoRA"))]
    for k in sorted({e["k"] for e in kept}):
        cells = {}
        for entry in kept:
            if entry["k"] == k:
                cells.setdefault(entry["cell"], []).append(entry)
        if best := best_of_grid(cells):
            cells[f"merge, best grid weight by B ({best.rpartition(' ')[2]})"] = cells[best]
        named = ", ".join(dict.fromkeys("+".join(e["set"]) for e in kept if e["k"] == k))
        print(f"\n## k = {k}\n\n{named}.\n")
        scored = any(e.get("clip") for entries in cells.values() for e in entries)
        head = ["weights", "pictures", "elements present, 95%", "all present, 95%"] + ["CLIP score"] * scored
        print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
        for name, entries in cells.items():
            found, asked, complete, count = (sum(e[f] for e in entries)
                                             for f in ("found", "asked", "complete", "pictures"))  # fmt: skip
            a, b = interval(found, asked), interval(complete, count)
            row = [name, str(count), f"{found / asked:.2f} ({a[0]:.2f} to {a[1]:.2f})",
                   f"{complete / count:.2f} ({b[0]:.2f} to {b[1]:.2f})"]  # fmt: skip
            if scored:
                clip = [score for e in entries for score in e.get("clip", ())]
                row.append(f"{sum(clip) / len(clip):.1f}" if clip else "")
            print(f"| {' | '.join(row)} |")
        against(cells, (HUB, BALANCED, FREE, ZIP, REGMEAN), GRID_CHOSEN)
        if best:
            against(cells, (HUB, BALANCED, REGMEAN), best)


def by_set(entries):
    """Set -> share of its elements present."""
    found = {}
    for entry in entries:
        total = found.setdefault("+".join(entry["set"]), [0, 0])
        total[0] += entry["found"]
        total[1] += entry["asked"]
    return {chosen: total[0] / total[1] for chosen, total in found.items()}


def against(cells, names, base):
    """Lines on how much more of each set's elements a way shows than `base` does: interval over the sets."""
    theirs = by_set(cells.get(base, ()))
    for name in names:
        ours = by_set(cells.get(name, ()))
        gains = [ours[chosen] - theirs[chosen] for chosen in ours if chosen in theirs]
        if gains:
            mean, low, high = mean_interval(gains)
            each = ", ".join(f"{gain:+.2f}" for gain in gains)
            print(f"\n{name} less {base}: {mean:+.2f} ({low:+.2f} to {high:+.2f}, over the sets); set by set {each}.")


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--table", action="store_true", help="print what the journal holds, measure nothing")
    parser.add_argument("--k", default="2,3,4,5")
    parser.add_argument("--leave", nargs="*", default=(), help=f"what not to train now, such as {ZIP}")
    parser.add_argument("--device", default="cpu")
    numbers = {"pictures": 200, "budget": 40, "sets": 6, "steps": STEPS, "search-steps": 12, "learn-steps": 60,
               "zip-steps": 100, "batch": CHUNK, "part": 1, "parts": 1}  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def main():
    args = options().parse_args()
    if not args.table:
        bench = Bench(args.journal, args.journal.parent, steps=args.steps, device=args.device, batch=args.batch)
        for chosen, count in shared_out(map(int, args.k.split(",")), args):
            measure(bench, chosen, args, count)
    table(Journal(args.journal))


if __name__ == "__main__":
    main()
