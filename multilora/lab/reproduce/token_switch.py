"""LoRA-Switch for language models: one route for all layers of a token, against a router in every layer."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from PIL import Image

from multilora.gate_loramoe import experts_of
from multilora.gate_token_switch import TokenSwitchGate
from multilora.gates import read_gate
from multilora.lab.journal import Journal
from multilora.lab.reproduce.bench import Bench, Experiment, Target, mean_interval, rate, shown
from multilora.lab.result_chart import Point, draw_points
from multilora.lab.train.loramoe import train as train_loramoe
from multilora.lab.train.token_switch import train
from multilora.lab.world.language_loras import as_texts
from multilora.lab.world.tables import table
from multilora.pipelines.text import composing_text

POOLS = {
    "train split": ("reverse", "sort", "next", "double"),
    "test split": ("count", "sort_digits", "zibish", "mirror"),
}
EXAMPLES = 150  # of each skill, that routers learn from
SHARED, EACH = "token switch: one route for all layers", "a router in every layer"
SECOND = "token switch, routed by the second block's input"
ROUTERS: dict[str, dict[str, Any]] = {
    SHARED: {"per": "network"},
    SECOND: {"per": "network", "head": "model.layers.1.self_attn.q_proj"},
    EACH: {"per": "linear"},
}
# No number here was searched for.
SETTINGS = {"steps": 150, "batch": 16, "lr": 1e-2, "top_k": 2, "length": 96, "checkpoint_every": 0}
LORAMOE = "LoRAMoE, experts and routers trained together"
MOE_STEPS, MOE_RATE, MOE_RANK = 400, 4e-3, 4
UNTRAINED = ("each skill's own LoRA", "equal shares", "Arrow, top 2")


def measure(bench: Bench) -> None:
    pools = list(POOLS)[: bench.size.most]
    for pool, way in itertools.product(pools, UNTRAINED):
        bench.cell(f"token_switch/{pool}/{way}/-", lambda p=pool, w=way: _untrained(bench, p, w))
    for seed, pool in itertools.product(range(bench.size.seeds), pools):
        for way in ROUTERS:
            bench.cell(f"token_switch/{pool}/{way}/{seed}", lambda p=pool, w=way, s=seed: _routed(bench, p, w, s))
        bench.cell(f"token_switch/{pool}/{LORAMOE}/{seed}", lambda p=pool, s=seed: _loramoe(bench, p, s))


def _asked(bench: Bench, pool: str, loras: Sequence[Any], method: str, **options: Any) -> dict[str, list[int]]:
    """Skill -> [right, asked] on held-out prompts under a method."""
    with composing_text(bench.model, list(loras), method, **options):
        return {skill: _right(bench, skill) for skill in POOLS[pool]}


def _right(bench: Bench, skill: str) -> list[int]:
    target = Target(skill)
    return target.counts(bench.ask(target.held_out(bench.size.asked)))


def _untrained(bench: Bench, pool: str, way: str) -> dict[str, Any]:
    names = POOLS[pool]
    loras = [bench.lora(name) for name in names]
    if way == UNTRAINED[0]:
        return {"right": {n: bench.right(Target(n), [lora]) for n, lora in zip(names, loras, strict=True)}}
    if way == UNTRAINED[1]:
        return {"right": _asked(bench, pool, loras, "token_switch")}
    return {"right": _asked(bench, pool, loras, "arrow", top_k=2)}


def _examples(pool: str, seed: int) -> list[dict[str, str]]:
    """What routers learn from: training prompts of all the pool's skills."""
    return as_texts([e for skill in POOLS[pool] for e in Target(skill).draw(EXAMPLES, seed)])


def _routed(bench: Bench, pool: str, way: str, seed: int) -> dict[str, Any]:
    loras = [bench.lora(name) for name in POOLS[pool]]
    file = bench.work / f"token_switch_{pool}_{way}_{seed}.safetensors".replace(" ", "_").replace(":", "")
    bench.work.mkdir(parents=True, exist_ok=True)
    settings = {**SETTINGS, "steps": bench.size.steps(SETTINGS["steps"]), **ROUTERS[way]}
    train(loras, bench.model, file, data=_examples(pool, seed), tokenizer=bench.tokenizer, seed=seed, **settings)
    gate = TokenSwitchGate.of(read_gate(file))
    found = _asked(bench, pool, loras, "token_switch", gate=str(file))
    return {"right": found, "parameters": sum(t.numel() for t in gate.tensors.values())}


def _loramoe(bench: Bench, pool: str, seed: int) -> dict[str, Any]:
    file = bench.work / f"loramoe_{pool}_{seed}.safetensors".replace(" ", "_")
    bench.work.mkdir(parents=True, exist_ok=True)
    train_loramoe(_examples(pool, seed), bench.model, file, tokenizer=bench.tokenizer, experts=len(POOLS[pool]),
                  rank=MOE_RANK, modules="all", steps=bench.size.steps(MOE_STEPS), lr=MOE_RATE, length=96, seed=seed,
                  checkpoint_every=0)  # fmt: skip
    found = _asked(bench, pool, experts_of(file), "loramoe", gate=str(file))
    return {"right": found, "parameters": sum(t.numel() for t in read_gate(file).tensors.values())}


def shares(journal: Journal) -> dict[str, dict[tuple[str, str, str], float]]:
    """Way -> (pool, skill, seed) -> share right; ways without training have the seed "-"."""
    found: dict[str, dict[tuple[str, str, str], float]] = {}
    for entry in journal.of("token_switch"):
        _, pool, way, seed = entry["key"].split("/")
        for skill, pair in entry["right"].items():
            found.setdefault(way, {})[pool, skill, seed] = rate(pair)
    return found


def tables(journal: Journal) -> str:
    found = shares(journal)
    sizes = {e["key"].split("/")[2]: e.get("parameters") for e in journal.of("token_switch")}
    ways = [way for way in (*UNTRAINED, *ROUTERS, LORAMOE) if way in found]
    pools = [pool for pool in POOLS if any(at[0] == pool for at in found[ways[0]])]
    rows = [
        [way, f"{sizes[way]:,}" if sizes.get(way) else "none",
         *(shown([v for at, v in found[way].items() if at[0] == pool]) for pool in pools)]
        for way in ways
    ]  # fmt: skip
    each = [
        [f"{skill} ({pool})", *(_mean(v for at, v in found[way].items() if at[:2] == (pool, skill)) for way in ways)]
        for pool in pools
        for skill in POOLS[pool]
    ]
    return "\n\n".join((
        f"Share right on held-out prompts of four skills, whose four LoRAs are frozen; routers learn from {EXAMPLES} "
        f"training prompts of each skill for {SETTINGS['steps']} steps and pick {SETTINGS['top_k']} LoRAs a token (n: "
        "skills times seeds, bootstrapped). Every router chooses among the same LoRAs; how many numbers the routers "
        f"themselves have, stands beside them. LoRAMoE has experts of its own, {MOE_RANK} ranks each as the LoRAs "
        f"have, from {MOE_STEPS} steps on the same prompts alone.",
        table(["way", "router's numbers", *pools], rows),
        "Each skill, mean over the seeds:",
        table(["skill", *ways], each),
        "The first layer's input is one token's embedding: the route of a letter is the same whatever the question "
        "was, and only the layers see the question. The second block's input has seen it. What a token costs in each "
        "way: benchmarks/decoding.md.",
    ))  # fmt: skip


def _mean(values: Any) -> str:
    values = list(values)
    return f"{statistics.fmean(values):.2f}" if values else ""


def difference(journal: Journal, a: str, b: str) -> tuple[float, float, float]:
    """Mean and interval of a less b, pool by pool, skill by skill, seed by seed."""
    found = shares(journal)
    pairs = [(v, found[b].get(at)) for at, v in found[a].items()]
    return mean_interval([x - y for x, y in pairs if y is not None])


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claim: one route for all layers answers as well as a router in every layer; two points less still count."""
    mean, low, high = difference(journal, SHARED, EACH)
    said = [f"one route less a router in every layer: {mean:+.2f} ({low:+.2f} to {high:+.2f})"]
    others = {
        "routed by the second block's input, less a router in every layer": (SECOND, EACH),
        "one route less LoRAMoE": (SHARED, LORAMOE),
    }
    for words, (a, b) in others.items():
        mean_of, *between = difference(journal, a, b)
        said.append(f"{words}: {mean_of:+.2f} ({between[0]:+.2f} to {between[1]:+.2f})")
    return mean >= -0.02, "; ".join(said)


def figure(journal: Journal) -> Image.Image:
    found = shares(journal)
    ways = [way for way in (*UNTRAINED, *ROUTERS, LORAMOE) if way in found]
    points = [Point(way, *mean_interval(list(found[way].values()))) for way in ways]
    return draw_points(points, title="One route for all layers", subtitle="share right on held-out prompts")


EXPERIMENT = Experiment(
    "token_switch", "Token switch: one route for all layers", "https://arxiv.org/abs/2405.17741",
    "a router at the first layer, shared by all, answers as well as a router in every layer (its speed is measured in "
    "benchmarks/decoding.md)",
    measure, tables, verdict, figure,
)  # fmt: skip
