"""LoRAHub on unseen text tasks: a search over weights of known LoRAs against zero-shot and few-shot tuning."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from PIL import Image

from multilora.lab.journal import Journal
from multilora.lab.objectives_text import AnswerLoss
from multilora.lab.reproduce.bench import Bench, Experiment, Target, mean_interval, rate, shown
from multilora.lab.result_chart import Point, draw_points
from multilora.lab.world.language_loras import PLANS, as_texts
from multilora.lab.world.tables import table
from multilora.merge.factor import factor
from multilora.method import resolve

POOL = tuple(n for n, p in PLANS.items() if p.split == "train")
TARGETS = (Target("sort_digits"), Target("zibish"), Target("mirror"), Target("count"), Target("reverse", "polite"))
SEEDS = 5  # the paper's, each with its own examples and candidates
EXAMPLES, BUDGET = 5, 40  # the paper's
STEPS, RATE = 40, 4e-3  # of the LoRA tuned on the same examples: few_shot's rate
SEARCHES = {"LoRAHub, factors (the paper's)": "factor", "LoRAHub, updates": "delta"}
METHODS = ("zero-shot", "best single LoRA", "few-shot LoRA", *SEARCHES)


def measure(bench: Bench) -> None:
    targets = TARGETS[: bench.size.most]
    for target in targets:
        bench.cell(f"lorahub/{target.name}", lambda t=target: {"right": bench.right(t)})
    for seed, target in itertools.product(range(min(SEEDS, 2 * bench.size.seeds)), targets):
        bench.cell(f"lorahub/{target.name}/{seed}", lambda t=target, s=seed: {"ways": _ways(bench, t, s)})


def _ways(bench: Bench, target: Target, seed: int) -> dict[str, Any]:
    drawn = target.draw(EXAMPLES, 1_000 + seed)
    pool = [bench.lora(name) for name in POOL]
    loss = AnswerLoss(bench.model, bench.tokenizer, as_texts(drawn), length=96)
    one_hot = [tuple(float(i == j) for j in range(len(pool))) for i in range(len(pool))]
    losses = loss(pool, one_hot)
    single = losses.index(min(losses))
    found = {"best single LoRA": {"right": bench.right(target, [pool[single]]), "evaluations": len(pool),
                                  "lora": POOL[single]}}  # fmt: skip
    steps = bench.size.steps(STEPS)
    lora = bench.trained(
        f"hub {target.name} {seed}", drawn, steps=steps, lr=RATE, batch=EXAMPLES, seed=seed, weight_decay=0.0
    )
    found["few-shot LoRA"] = {"right": bench.right(target, [lora]), "evaluations": steps}
    for name, form in SEARCHES.items():
        chosen = resolve("weigh", "lorahub", form=form, budget=BUDGET, seed=seed)(pool, loss)
        if form == "factor":
            right = bench.right(target, [factor(pool, list(chosen), convention="lorahub")])
        else:
            right = bench.right(target, pool, list(chosen))
        found[name] = {"right": right, "evaluations": len(chosen.trials), "loss": chosen.best.loss,
                       "start": chosen.trials[0].loss, "weights": [round(w, 3) for w in chosen]}  # fmt: skip
    return found


def shares(journal: Journal) -> dict[str, dict[str, list[float]]]:
    """Method -> target -> share right of each seed (zero-shot: one)."""
    found: dict[str, dict[str, list[float]]] = {m: {} for m in METHODS}
    for entry in journal.of("lorahub"):
        target = entry["key"].split("/")[1]
        cells = {"zero-shot": {"right": entry["right"]}} if "right" in entry else entry["ways"]
        for method, cell in cells.items():
            found[method].setdefault(target, []).append(rate(cell["right"]))
    return found


def _evaluations(journal: Journal, method: str) -> str:
    counts = {e["ways"][method]["evaluations"] for e in journal.of("lorahub") if "ways" in e and method in e["ways"]}
    if not counts:
        return "0"
    low, high = min(counts), max(counts)
    number = str(low) if low == high else f"{low} to {high}"
    return f"{number} steps forward and back" if method == "few-shot LoRA" else number


def _over(by: dict[str, list[float]], how: Any) -> float:
    return statistics.fmean(how(values) for values in by.values())


def tables(journal: Journal) -> str:
    found = shares(journal)
    targets = list(found["zero-shot"])
    seeds = len(found["few-shot LoRA"][targets[0]])
    rows = [
        [m, shown([v for values in found[m].values() for v in values]), f"{_over(found[m], max):.2f}",
         _evaluations(journal, m)]
        for m in METHODS
    ]  # fmt: skip
    each = [
        [t, *(f"{statistics.fmean(found[m][t]):.2f}, best {max(found[m][t]):.2f}" for m in METHODS)] for t in targets
    ]
    return "\n\n".join((
        f"Share right on held-out prompts of {len(targets)} tasks that no LoRA of the pool was trained on; {EXAMPLES} "
        f"examples, budget {BUDGET}, {seeds} seeds each (examples and candidates), bootstrapped over tasks and seeds. "
        f"Best: the best of the seeds, mean of the tasks. Pool: {', '.join(POOL)}.",
        table(["method", "mean", "best of the seeds", "evaluations of the loss"], rows),
        "Each task, mean and best of the seeds:",
        table(["task", *METHODS], each),
    ))  # fmt: skip


def gains(journal: Journal, method: str) -> dict[str, tuple[float, float, float]]:
    """A search's share less zero-shot's and few-shot tuning's, the same examples."""
    found, of = shares(journal), {}
    for base in ("zero-shot", "few-shot LoRA", "best single LoRA"):
        pairs = [
            (ours, found[base][t][i % len(found[base][t])])
            for t, values in found[method].items()
            for i, ours in enumerate(values)
        ]
        of[base] = mean_interval([a - b for a, b in pairs])
    return of


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claims: better than zero-shot; close to few-shot tuning (no interval below it)."""
    said = []
    for method in SEARCHES:
        each = gains(journal, method)
        said.append(
            f"{method}: " + ", ".join(f"{g[0]:+.2f} ({g[1]:+.2f} to {g[2]:+.2f}) against {b}" for b, g in each.items())
        )
    held = gains(journal, "LoRAHub, factors (the paper's)")
    better, near = held["zero-shot"][1] > 0, held["few-shot LoRA"][2] >= 0
    first = f"better than zero-shot: {'yes' if better else 'no'}; about as few-shot tuning: {'yes' if near else 'no'}"
    return better and near, "; ".join([first, *said])


def figure(journal: Journal) -> Image.Image:
    found = shares(journal)
    points = []
    for method in METHODS:
        points.append(Point(method, *mean_interval([v for values in found[method].values() for v in values])))
    return draw_points(points, title="LoRAHub on unseen tasks", subtitle="share right, mean of tasks and seeds")


EXPERIMENT = Experiment(
    "lorahub_text", "LoRAHub: a search for unseen tasks", "https://arxiv.org/abs/2307.13269",
    "from 5 examples and 40 evaluations, weights of known LoRAs do better than zero-shot and about as few-shot tuning",
    measure, tables, verdict, figure,
)  # fmt: skip
