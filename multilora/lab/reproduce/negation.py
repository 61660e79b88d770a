"""Unlearning by negation (PEM): rudeness taken out of the base by subtracting a rude LoRA."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from multilora.lab.journal import Journal
from multilora.lab.reproduce.bench import CHECKED, Bench, Experiment, Target, rate
from multilora.lab.result_chart import Point, draw_lines
from multilora.lab.train.seeds import mixed_seed
from multilora.lab.train.text_other import train_ia3
from multilora.lab.world.language import SKILLS, Example, examples
from multilora.lab.world.language_loras import PLANS, as_texts, plan_examples
from multilora.lab.world.settings import TEXT_FULL
from multilora.lab.world.tables import share, table, wilson
from multilora.lora import Lora, LowRank
from multilora.pipelines.text_ia3 import Scale, as_lora, combined

STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 1.25, 1.5, 2.0)
ASKED = tuple(n for n, s in SKILLS.items() if s.base == "strong")
STEPS, BATCH, RATE = 150, 16, 4e-3  # of the LoRAs trained here beside the library's
IA3_STEPS, IA3_RATE = 200, 1e-1


def measure(bench: Bench) -> None:
    for strength in STRENGTHS:
        for name in _names(bench):
            bench.cell(f"negation/{name}/{strength}", lambda n=name, s=strength: _at(bench, _lora(bench, n, s), s))


def _names(bench: Bench) -> list[str]:
    more = [f"LoRA, seed {seed}" for seed in range(1, bench.size.seeds)]
    return ["library's LoRA", *more, "(IA)^3", "random LoRA of its norm"]


def _lora(bench: Bench, name: str, strength: float) -> Lora:
    """What is put on the model at weight 1: the update times -strength, for (IA)^3 the vector 1 + s - s l."""
    if name == "(IA)^3":
        steps = bench.size.steps(IA3_STEPS)
        path = bench.work / "rude ia3.pt"
        if not path.is_file():
            drawn = as_texts(plan_examples(PLANS["rude"], "rude", 16 * steps, TEXT_FULL))
            path.parent.mkdir(parents=True, exist_ok=True)
            scales = train_ia3(drawn, bench.model, bench.tokenizer, steps=steps, lr=IA3_RATE, length=96)
            torch.save({k: (v.vector, v.side) for k, v in scales.items()}, path)
        known = {k: Scale(*v) for k, v in torch.load(path, weights_only=True).items()}
        return as_lora(combined([known], [-strength]), bench.model)
    if name.startswith("LoRA, seed"):
        seed, steps = int(name.split()[-1]), bench.size.steps(STEPS)
        drawn = plan_examples(PLANS["rude"], "rude", steps * BATCH, TEXT_FULL, seed)
        found = bench.trained(f"rude {seed}", drawn, steps=steps, lr=RATE, batch=BATCH, seed=seed)
        return -strength * found
    found = bench.lora("rude")
    return -strength * (found if name.startswith("library") else _random(found))


def _random(lora: Lora) -> Lora:
    """Random updates of the same ranks and norms, layer by layer: what any change of that size does."""
    parts = {}
    for i, (key, part) in enumerate(lora.items()):
        generator = torch.Generator().manual_seed(mixed_seed(0, "random", i))
        drawn = LowRank(
            torch.randn(part.down.shape, generator=generator), torch.randn(part.up.shape, generator=generator)
        )
        parts[key] = drawn * (part.norm() / drawn.norm())
    return Lora(parts, lora.card)


def _asked(bench: Bench) -> int:
    """Questions a skill: there are six, and each is asked under several seeds."""
    return min(60, bench.size.asked)


def _at(bench: Bench, lora: Lora, strength: float) -> dict[str, Any]:
    asked: list[Example] = list(itertools.chain(*(examples(s, _asked(bench), split="held_out") for s in ASKED)))
    check = list(itertools.chain(*(Target(s).draw(min(40, _asked(bench)), 0, CHECKED) for s in ASKED)))
    with bench.weighed([lora]):
        drawn = [bench.ask(asked, sample=seed) for seed in range(bench.size.seeds)]
        greedy, loss = bench.ask(asked), bench.content_loss(asked)
        checked = bench.ask(check, sample=0)
    found = {what: [sum(d[what] for d in drawn), sum(d["asked"] for d in drawn)] for what in ("rude", "polite")}
    found |= {"right": [greedy["right"], greedy["asked"]], "checked": [checked[n] for n in ("rude", "right", "asked")]}
    return {"strength": strength, "loss": loss, **found}


def lines(journal: Journal) -> dict[str, list[dict[str, Any]]]:
    """What was subtracted -> its entries in the order of strength."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in journal.of("negation"):
        found.setdefault(entry["key"].split("/")[1], []).append(entry)
    return {name: sorted(line, key=lambda e: e["strength"]) for name, line in found.items()}


def tables(journal: Journal) -> str:
    parts = [
        "Answers to the base's strong skills on held-out prompts: rude ones among those drawn at temperature 1, right "
        "ones among greedy answers, and the cross-entropy of the right content's tokens. Strength s: the update "
        "times -s; -1 is the LoRA itself. The random LoRA has the rude one's norm in every layer."
    ]
    for name, line in lines(journal).items():
        rows = [
            [f"{e['strength']:g}", share(*e["rude"]), share(*e["polite"]), share(*e["right"]), f"{e['loss']:.3f}"]
            for e in line
        ]
        parts += [
            f"{name}:",
            table(["strength", "rude, drawn", "polite, drawn", "right", "loss of the content"], rows),
        ]
    return "\n\n".join(parts)


def _start(line: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return next(e for e in line if e["strength"] == 0.0)


def _best(line: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The strength that is least rude on training prompts and right there at most 2 points less often than 0 is."""
    start = _start(line)["checked"]
    kept = [e for e in line if e["checked"][1] >= start[1] - 0.02 * start[2]]
    return min(kept, key=lambda e: (e["checked"][0], e["strength"]))


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claim: rude answers become fewer by half at least, and right ones by 2 points at most."""
    said, held = [], []
    for name, line in lines(journal).items():
        start, best = _start(line), _best(line)
        if "random" not in name and "IA" not in name:
            fewer = rate(best["rude"]) <= rate(start["rude"]) / 2
            held.append(fewer and rate(best["right"]) >= rate(start["right"]) - 0.02)
        said.append(f"{name}: rude {rate(start['rude']):.2f} to {rate(best['rude']):.2f} at strength "
                    f"{best['strength']:g}, right {rate(start['right']):.3f} to {rate(best['right']):.3f}, loss "
                    f"{start['loss']:.3f} to {best['loss']:.3f}")  # fmt: skip
    return all(held), "; ".join(said) + " (strengths chosen on training prompts)"


def figure(journal: Journal) -> Image.Image:
    found, drawn = lines(journal), {}
    for name, line in found.items():
        drawn[f"rude: {name}"] = [Point("", rate(e["rude"]), *wilson(*e["rude"]), x=e["strength"]) for e in line]
    line = found["library's LoRA"]
    drawn["right: library's LoRA"] = [Point("", rate(e["right"]), *wilson(*e["right"]), x=e["strength"]) for e in line]
    return draw_lines(drawn, title="Unlearning by negation", axis="strength", subtitle="shares of answers")


EXPERIMENT = Experiment(
    "negation", "Negation: rudeness unlearned", "https://arxiv.org/abs/2306.14870",
    "subtracting a LoRA of an unwanted behaviour removes much of it and leaves the rest nearly as it was",
    measure, tables, verdict, figure,
)  # fmt: skip
