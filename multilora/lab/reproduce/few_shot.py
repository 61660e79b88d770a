"""Few-shot transfer (uniform and learned combination of LoRAs) against LoRA and full fine-tuning from few examples."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from PIL import Image

from multilora.lab.journal import Journal
from multilora.lab.objectives_text import AnswerLoss
from multilora.lab.reproduce.bench import Bench, Experiment, Target, mean_interval, rate, shown
from multilora.lab.result_chart import Point, draw_lines
from multilora.lab.train.text_other import train_whole
from multilora.lab.world.language_loras import PLANS, as_texts
from multilora.lab.world.tables import table
from multilora.merge.linear import linear
from multilora.method import resolve

COUNTS = (1, 5, 20, 100)
POOL = tuple(n for n, p in PLANS.items() if p.split == "train" and p.category in ("skill", "register"))
TARGETS = (Target("sort_digits"), Target("mirror"), Target("reverse", "polite"))
# Chosen on "double" with 20 examples, the pool without its LoRA, from learning rates 3 times apart.
LEARN_STEPS = 15
TUNE_STEPS, TUNE_RATE, WHOLE_RATE = 50, 4e-3, 5e-4
METHODS = ("zero-shot", "uniform", "learned (the paper's)", "learned, free global", "LoRA from scratch",
           "full fine-tuning")  # fmt: skip


def measure(bench: Bench) -> None:
    for target in TARGETS[: bench.size.most]:
        bench.cell(f"few_shot/{target.name}/0", lambda t=target: {"right": _without_examples(bench, t)})
    for count, seed, target in itertools.product(COUNTS, range(bench.size.seeds), TARGETS[: bench.size.most]):
        key = f"few_shot/{target.name}/{count}/{seed}"
        bench.cell(key, lambda t=target, c=count, s=seed: {"right": _from_examples(bench, t, c, s)})


def _without_examples(bench: Bench, target: Target) -> dict[str, list[int]]:
    pool = [bench.lora(name) for name in POOL]
    return {"zero-shot": bench.right(target), "uniform": bench.right(target, pool, [1 / len(pool)] * len(pool))}


def _from_examples(bench: Bench, target: Target, count: int, seed: int) -> dict[str, list[int]]:
    """[right, asked] of each method that learns from `count` examples."""
    data, found = as_texts(target.draw(count, seed)), {}
    pool = [bench.lora(name) for name in POOL]
    loss = AnswerLoss(bench.model, bench.tokenizer, data, length=96)
    ways: dict[str, dict[str, Any]] = {
        "learned (the paper's)": {"scope": "layer", "form": "simplex", "lr": 0.6},
        "learned, free global": {"scope": "global", "form": "free", "lr": 0.2},
    }
    for way, options in ways.items():
        learn = resolve("weigh", "learned", steps=bench.size.steps(LEARN_STEPS), **options)
        merged = linear(pool, learn(pool, loss))
        found[way] = bench.right(target, [merged])
    steps, batch = bench.size.steps(TUNE_STEPS), min(count, 16)
    lora = bench.trained(
        f"few {target.name} {count} {seed}",
        target.draw(count, seed),
        steps=steps,
        lr=TUNE_RATE,
        batch=batch,
        seed=seed,
    )
    found["LoRA from scratch"] = bench.right(target, [lora])
    tuned = train_whole(
        data, bench.model, bench.tokenizer, steps=steps, lr=WHOLE_RATE, batch=batch, length=96, seed=seed
    )
    with bench.holding(tuned):
        found["full fine-tuning"] = bench.right(target)
    return found


def shares(journal: Journal) -> dict[str, dict[int, dict[str, list[float]]]]:
    """Method -> examples -> target -> share right of each seed."""
    found: dict[str, dict[int, dict[str, list[float]]]] = {m: {} for m in METHODS}
    for entry in journal.of("few_shot"):
        _, target, count, *_ = entry["key"].split("/")
        for method, cell in entry["right"].items():
            for n in COUNTS if count == "0" else (int(count),):
                found[method].setdefault(n, {}).setdefault(target, []).append(rate(cell))
    return found


def _flat(by: dict[str, list[float]]) -> list[float]:
    return [v for values in by.values() for v in values]


def tables(journal: Journal) -> str:
    found = shares(journal)
    targets = list(found["uniform"][COUNTS[0]])
    rows = [[method, *(shown(_flat(found[method][n])) for n in COUNTS)] for method in METHODS]
    each = [
        [target, method, *(f"{statistics.fmean(found[method][n][target]):.2f}" for n in COUNTS)]
        for target in targets
        for method in METHODS
    ]
    head = [f"{n} example{'s' * (n > 1)}" for n in COUNTS]
    return "\n\n".join((
        f"Share right on held-out prompts, mean over {len(targets)} tasks that no LoRA of the pool was trained on, "
        f"several draws of the examples each (n: tasks times draws, bootstrapped). Pool: {', '.join(POOL)}. LoRA "
        f"and full fine-tuning: {TUNE_STEPS} steps at rates chosen on another task; the library's LoRAs had 180 and "
        "more, and what a longer training would add was not measured.",
        table(["method", *head], rows),
        "Each task, mean over the draws:",
        table(["task", "method", *head], each),
    ))  # fmt: skip


def gains(journal: Journal, count: int) -> dict[str, tuple[float, float, float]]:
    """The paper's learned weights less each baseline at `count` examples, the same draws."""
    found = shares(journal)
    ours = _flat(found["learned (the paper's)"][count])
    return {
        base: mean_interval([a - b for a, b in zip(ours, _flat(found[base][count]), strict=True)])
        for base in ("LoRA from scratch", "full fine-tuning")
    }


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claim: with few examples (1 and 5) learned weights beat a new LoRA and full fine-tuning."""
    said, held = [], []
    for count in COUNTS:
        for base, (mean, low, high) in gains(journal, count).items():
            if count <= 5:
                held.append(low > 0)
            said.append(f"{count}: {mean:+.2f} ({low:+.2f} to {high:+.2f}) against {base}")
    found, few = shares(journal), COUNTS[0]
    names = ("learned (the paper's)", "LoRA from scratch", "full fine-tuning")
    tasks = "; ".join(
        f"{task} {' / '.join(f'{statistics.fmean(found[name][few][task]):.2f}' for name in names)}"
        for task in found[names[0]][few]
    )
    said.append(f"task by task at {few}, learned / LoRA / full: {tasks}")
    return all(held), "learned weights, examples and gain: " + "; ".join(said)


def figure(journal: Journal) -> Image.Image:
    lines = {
        method: [Point("", *mean_interval(_flat(by)), x=n) for n, by in sorted(counts.items())]
        for method, counts in shares(journal).items()
    }
    return draw_lines(
        lines, title="Few-shot transfer", axis="examples", subtitle="share right, mean of tasks", even=True
    )


EXPERIMENT = Experiment(
    "few_shot", "Few-shot transfer: weights of known LoRAs", "https://arxiv.org/abs/2402.15414",
    "with few examples, learned weights of known LoRAs beat LoRA and full fine-tuning from scratch",
    measure, tables, verdict, figure,
)  # fmt: skip
