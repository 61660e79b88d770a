"""Fisher merging of checkpoints (Matena and Raffel): intermediate tasks and domain adaptation, with their cost."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from multilora.checkpoint_merge import merge_checkpoints
from multilora.lab.journal import Journal
from multilora.lab.reproduce.bench import CHECKED, Bench, Experiment, Target, mean_interval, rate, shown
from multilora.lab.result_chart import Point, draw_points
from multilora.lab.train.fisher import estimate
from multilora.lab.train.text_other import train_whole
from multilora.lab.world.language import Example, examples, facts, statement
from multilora.lab.world.language_loras import as_texts
from multilora.lab.world.tables import table

GRID = tuple(i / 10 for i in range(11))  # the donor's weight
STEPS, RATE, BATCH = 40, 5e-4, 16  # of each fine-tuning; few_shot's rate
DONOR_STEPS = 80
SAMPLES = 48  # examples of a Fisher
# task -> (examples of it, the intermediate task)
TASKS: Mapping[str, tuple[int, str]] = {"sort_digits": (10, "sort"), "count": (20, "length")}
NEWS = 20  # questions about the new designs that are answered in training; the rest is asked
METHODS = ("fine-tuned alone", "donor alone", "plain average", "Fisher average", "donor, then fine-tuned")


class Answers(nn.Module):
    """A causal model whose mask says which positions' predictions count, not which are seen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def measure(bench: Bench) -> None:
    for seed in range(bench.size.seeds):
        for task in list(TASKS)[: bench.size.most]:
            bench.cell(f"fisher/{task}/{seed}", lambda t=task, s=seed: _intermediate(bench, t, s))
        bench.cell(f"fisher/news/{seed}", lambda s=seed: _domain(bench, s))


def _intermediate(bench: Bench, task: str, seed: int) -> dict[str, Any]:
    """A task with few examples, and a donor fine-tuned on another task with many."""
    count, donor = TASKS[task]
    own, target = Target(task).draw(count, 2_000 + seed), Target(task)
    other = examples(donor, bench.size.steps(DONOR_STEPS) * BATCH, 92_000 + seed, "train")
    check = target.draw(min(40, bench.size.asked), seed, CHECKED)
    return _merged(bench, own, as_texts(own), as_texts(other), other, check, target.held_out(bench.size.asked), seed)


def _domain(bench: Bench, seed: int) -> dict[str, Any]:
    """Questions about new designs with few answers, and a donor that read sentences about them.

    All other questions are asked; a third of them chooses the weight, the rest is reported.
    """
    rng = random.Random(f"fisher/news/{seed}")
    every = [Example("news", f"{q} =", answer) for q, answer in facts("test").items()]
    rng.shuffle(every)
    own, rest = every[:NEWS], every[NEWS:][: 3 * bench.size.asked]
    count = bench.size.steps(DONOR_STEPS) * BATCH
    sentences = [{"text": statement(rng, "test")} for _ in range(count)]
    read = [Example("statement", "", one["text"]) for one in sentences]
    third = len(rest) // 3
    return _merged(bench, own, as_texts(own), sentences, read, rest[:third], rest[third:], seed)


def _merged(
    bench: Bench, own: Sequence[Example], data: Any, donor_data: Any, donor_examples: Sequence[Example],
    check: Sequence[Example], asked: Sequence[Example], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Share right and CPU-seconds of each method; the donor's weight is chosen on `check`."""
    seconds: dict[str, float] = {}
    how = {"lr": RATE, "batch": BATCH, "length": 96, "seed": seed}

    def timed(name: str, work: Any) -> Any:
        began = time.process_time()
        found = work()
        seconds[name] = time.process_time() - began
        return found

    def tuned(data: Any, steps: int) -> dict[str, Tensor]:
        return train_whole(data, bench.model, bench.tokenizer, steps=bench.size.steps(steps), **how)

    def right(weights: Mapping[str, Tensor], wanted: Sequence[Example]) -> list[int]:
        with bench.holding(weights):
            scored = bench.ask(wanted)
        return [scored["right"], scored["asked"]]

    target = timed("fine-tuning", lambda: tuned(data, STEPS))
    donor = timed("donor", lambda: tuned(donor_data, DONOR_STEPS))
    with bench.holding(donor):
        after = timed("fine-tuning after the donor", lambda: tuned(data, STEPS))
    fishers = timed("both Fishers", lambda: [
        _fisher(bench, weights, found, seed) for weights, found in ((target, own), (donor, donor_examples))
    ])  # fmt: skip
    found = {"fine-tuned alone": right(target, asked), "donor alone": right(donor, asked),
             "donor, then fine-tuned": right(after, asked)}  # fmt: skip
    weights = {}
    for name, given in (("plain average", None), ("Fisher average", fishers)):

        def at(weight: float, given: Any = given) -> dict[str, Tensor]:
            return merge_checkpoints([target, donor], [1 - weight, weight], given, component="model" if given else "")

        scores = {w: right(at(w), check)[0] for w in GRID}
        weights[name] = max(GRID, key=lambda w: (scores[w], -w))
        merged = timed(name, lambda at=at, name=name: at(weights[name]))
        found[name] = right(merged, asked)
    return {"right": found, "weights": weights, "seconds": {k: round(v, 2) for k, v in seconds.items()}}


def _fisher(bench: Bench, weights: Mapping[str, Tensor], found: Sequence[Example], seed: int) -> Any:
    """The Fisher of all parameters at `weights`, over the answers' positions of some examples."""
    inputs = []
    for example in list(found)[:SAMPLES]:
        prompt = bench.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        said = example.answer if example.prompt else example.content
        whole = [*prompt, *bench.tokenizer(said, add_special_tokens=False)["input_ids"]]
        ids = torch.tensor([whole])
        mask = torch.zeros_like(ids)
        mask[0, max(len(prompt) - 1, 0) :] = 1  # the last position predicts the end token
        inputs.append({"input_ids": ids, "attention_mask": mask})
    with bench.holding(weights):
        return estimate(Answers(bench.model), None, inputs, examples=min(SAMPLES, bench.size.asked), seed=seed)


def _shares(journal: Journal) -> dict[str, dict[str, list[float]]]:
    """Method -> task -> share right of each seed."""
    found: dict[str, dict[str, list[float]]] = {m: {} for m in METHODS}
    for entry in journal.of("fisher"):
        for method, cell in entry["right"].items():
            found[method].setdefault(entry["key"].split("/")[1], []).append(rate(cell))
    return found


def _seconds(journal: Journal, *names: str) -> float:
    return statistics.fmean(sum(e["seconds"][n] for n in names) for e in journal.of("fisher"))


def tables(journal: Journal) -> str:
    found = _shares(journal)
    tasks = list(found["plain average"])
    named = {**{t: f"{t}, {n} examples; donor {d}" for t, (n, d) in TASKS.items()},
             "news": f"questions about new designs, {NEWS} answered; donor read sentences about them"}  # fmt: skip
    rows = [[m, *(shown(found[m][t]) for t in tasks)] for m in METHODS]
    costs = {
        "fine-tuned alone": ("fine-tuning",),
        "donor alone": ("donor",),
        "plain average": ("plain average",),
        "Fisher average": ("both Fishers", "Fisher average"),
        "donor, then fine-tuned": ("fine-tuning after the donor",),
    }
    cost = [[m, f"{_seconds(journal, *names):.2f}", " + ".join(names)] for m, names in costs.items()]
    return "\n\n".join((
        f"Share right on held-out prompts (news: the questions that were not answered in training), mean of "
        f"n seeds, bootstrapped over them. The donor's weight is chosen from {len(GRID)} by other questions. Full "
        "fine-tuning throughout. Before any of these figures `count` took the place of `mirror`, which few-shot "
        "transfer had shown that nothing learns from 20 examples.",
        table(["method", *(named[t] for t in tasks)], rows),
        "Cost in CPU-seconds once the checkpoints are there, mean. A sweep of the weight costs its "
        "merges and answers besides, for both averages alike.",
        table(["method", "CPU-seconds", "of"], cost),
    ))  # fmt: skip


def _gains(journal: Journal, over: str) -> tuple[float, float, float]:
    found = _shares(journal)
    return mean_interval([
        ours - theirs
        for task, values in found["Fisher average"].items()
        for ours, theirs in zip(values, found[over][task], strict=True)
    ])  # fmt: skip


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claim: Fisher merging beats the plain average and the target alone, cheaper than training on."""
    said = []
    for over in ("plain average", "fine-tuned alone", "donor, then fine-tuned"):
        mean, low, high = _gains(journal, over)
        said.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f}) against {over}")
    cost = _seconds(journal, "both Fishers", "Fisher average"), _seconds(journal, "fine-tuning after the donor")
    said.append(f"{cost[0]:.1f} CPU-seconds against {cost[1]:.1f} of fine-tuning after the donor")
    held = _gains(journal, "plain average")[1] > 0 and _gains(journal, "fine-tuned alone")[1] > 0
    return held, "Fisher average: " + ", ".join(said)


def figure(journal: Journal) -> Image.Image:
    found = _shares(journal)
    points = [
        Point(f"{t}: {m}", *mean_interval(found[m][t]))
        for t in found["plain average"]
        for m in METHODS
        if t in found[m]
    ]
    return draw_points(points, title="Fisher and plain averages of checkpoints", subtitle="share right, mean of seeds")


EXPERIMENT = Experiment(
    "fisher_text", "Fisher merging of fine-tuned checkpoints", "https://arxiv.org/abs/2111.09832",
    "Fisher-weighted averaging beats plain averaging and the target's checkpoint alone, at a fraction of the cost of "
    "training on",
    measure, tables, verdict, figure,
)  # fmt: skip
