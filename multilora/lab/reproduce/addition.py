"""Addition of LoRAs (PEM): two skills in one, and two halves of one skill's distribution."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from multilora.lab.journal import Journal
from multilora.lab.reproduce.bench import Bench, Experiment, Target, mean_interval, rate, shown
from multilora.lab.result_chart import Point, draw_points
from multilora.lab.train.text_other import train_ia3
from multilora.lab.world.language import Example, stream
from multilora.lab.world.language_loras import PLANS, TextPlan, as_texts, plan_examples
from multilora.lab.world.settings import TEXT_FULL
from multilora.lab.world.tables import share, table, wilson
from multilora.lora import Lora
from multilora.merge.factor import factor
from multilora.pipelines.text_ia3 import as_lora, combined

RANK = 4  # factor sums want one rank
SKILLS = tuple(n for n, p in PLANS.items() if p.category == "skill" and p.rank == RANK)
# pair -> the library's LoRA trained on both; "": trained here, on as many steps as the two alone together
JOINT = {("reverse", "count"): "reverse_count", ("sort", "next"): "sort_next", ("double", "korvish"): ""}
PAIRS = 15  # of the 55, drawn by a seed
JOINT_STEPS, JOINT_RATE = 300, 4e-3
GRID = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# way -> (form, weight of each); None: the weight of GRID that is best on training prompts
WAYS: Mapping[str, tuple[str, float | None]] = {
    "mean of updates": ("delta", 0.5),
    "sum of updates": ("delta", 1.0),
    "updates, weight chosen": ("delta", None),
    "mean of factors (the paper's)": ("factor", 0.5),
    "factors, weight chosen": ("factor", None),
}
IA3_SKILLS, IA3_STEPS, IA3_RATE = ("reverse", "next", "double", "sort_digits"), 60, 2e-2
# distribution generalisation: one skill, words of each length
SPREAD, LENGTHS, SPREAD_STEPS = "swap", (3, 5), 100


def pairs() -> list[tuple[str, str]]:
    """Those that a joint LoRA is there for, then others in a drawn order."""
    every = list(itertools.combinations(SKILLS, 2))
    random.Random(0).shuffle(every)
    return sorted(every, key=lambda pair: pair not in JOINT)[:PAIRS]


def measure(bench: Bench) -> None:
    chosen = pairs()[: bench.size.most]
    for name in dict.fromkeys(itertools.chain(*chosen)):
        bench.cell(f"addition/alone/{name}", lambda name=name: {"right": _rights(bench, SKILLS, [bench.lora(name)])})
    for pair in chosen:
        bench.cell(f"addition/pair/{'+'.join(pair)}", lambda pair=pair: {"ways": _ways(bench, pair)})
        if pair in JOINT:
            bench.cell(f"addition/joint/{'+'.join(pair)}", lambda pair=pair: {"right": _joint(bench, pair)})
    bench.cell("addition/ia3", lambda: _ia3(bench))
    for seed in range(bench.size.seeds):
        bench.cell(f"addition/spread/{seed}", lambda seed=seed: {"right": _spread(bench, seed)})


def _rights(bench: Bench, skills: Sequence[str], loras: Sequence[Lora], row: Any = None) -> dict[str, list[int]]:
    return {skill: bench.right(Target(skill), loras, row) for skill in skills}


def _ways(bench: Bench, pair: tuple[str, str]) -> dict[str, Any]:
    loras, found = [bench.lora(name) for name in pair], {}

    def at(form: str, weight: float) -> tuple[list[Lora], list[float]]:
        row = [weight, weight]
        return (loras, row) if form == "delta" else ([factor(loras, row, convention="pem")], [1.0])

    for way, (form, weight) in WAYS.items():
        if weight is None:
            scores = {w: sum(bench.learned(Target(s), *at(form, w)) for s in pair) for w in GRID}
            weight = max(GRID, key=lambda w: (scores[w], -w))
        found[way] = {"weight": weight, "right": _rights(bench, pair, *at(form, weight))}
    return found


def _joint(bench: Bench, pair: tuple[str, str]) -> dict[str, list[int]]:
    if JOINT[pair]:
        return _rights(bench, pair, [bench.lora(JOINT[pair])])
    name, steps = "+".join(pair), bench.size.steps(JOINT_STEPS)
    drawn = plan_examples(TextPlan("joint", "", pair), name, steps * TEXT_FULL.lora_batch, TEXT_FULL)
    lora = bench.trained(f"joint {name}", drawn, steps=steps, lr=JOINT_RATE, batch=TEXT_FULL.lora_batch)
    return _rights(bench, pair, [lora])


def _ia3(bench: Bench) -> dict[str, Any]:
    """(IA)^3 vectors of single skills, alone and of two: the paper's mean around 1, and the sum around 1."""
    steps, vectors = bench.size.steps(IA3_STEPS), {}
    for skill in IA3_SKILLS:
        drawn = plan_examples(PLANS[skill], skill, 16 * steps, TEXT_FULL)
        vectors[skill] = train_ia3(as_texts(drawn), bench.model, bench.tokenizer, steps=steps, lr=IA3_RATE, length=96)

    def rights(skills: Sequence[str], terms: Sequence[str], weight: float) -> dict[str, list[int]]:
        scales = combined([vectors[name] for name in terms], [weight] * len(terms))
        return _rights(bench, skills, [as_lora(scales, bench.model)])

    both = list(itertools.combinations(IA3_SKILLS, 2))[: bench.size.most]
    return {
        "alone": {name: rights(IA3_SKILLS, [name], 1.0) for name in IA3_SKILLS},
        "mean": {"+".join(pair): rights(pair, pair, 0.5) for pair in both},
        "sum": {"+".join(pair): rights(pair, pair, 1.0) for pair in both},
    }


def _of_length(length: int, split: str, seed: int, count: int) -> list[Example]:
    """Examples of the skill with words of one length."""
    found, register = {}, "plain"
    for example in itertools.islice(stream(SPREAD, seed, split, register), 200 * count):
        if len(example.prompt.split()[1]) == length:
            found.setdefault(example.prompt, example)
        if len(found) == count:
            break
    return list(found.values())


def _spread(bench: Bench, seed: int) -> dict[str, dict[str, list[int]]]:
    """{trained on: {length asked: [right, asked]}}"""
    steps, loras = bench.size.steps(SPREAD_STEPS), {}
    for part in (*((n,) for n in LENGTHS), LENGTHS):
        each = 16 * steps // len(part)
        drawn = [e for n in part for e in _of_length(n, "train", 91_000 + seed, each)]
        name = "+".join(map(str, part))
        loras[name] = bench.trained(f"{SPREAD} {name} {seed}", drawn, steps=steps, lr=JOINT_RATE, batch=16, seed=seed)
    first, second, joint = loras
    cells = {
        f"length {first}": ([loras[first]], [1.0]),
        f"length {second}": ([loras[second]], [1.0]),
        "mean of updates": ([loras[first], loras[second]], [0.5, 0.5]),
        "sum of updates": ([loras[first], loras[second]], [1.0, 1.0]),
        "mean of factors (the paper's)": ([factor([loras[first], loras[second]], [0.5, 0.5])], [1.0]),
        "trained on both": ([loras[joint]], [1.0]),
    }
    found = {}
    for name, (terms, row) in cells.items():
        with bench.weighed(terms, row):
            asked = {n: _of_length(n, "held_out", 0, bench.size.asked) for n in (3, 4, 5)}
            found[name] = {str(n): Target(SPREAD).counts(bench.ask(wanted)) for n, wanted in asked.items()}
    return found


# -- what was found ------------------------------------------------------------------------------------------------


def shares_of_pairs(journal: Journal) -> dict[str, list[float]]:
    """Way -> the mean share right over both skills of each pair; with each alone (the better one on both)."""
    alone = {e["key"].split("/")[2]: e["right"] for e in _part(journal, "alone")}
    found: dict[str, list[float]] = {"own LoRA on each": [], "one LoRA on both": []}
    for entry in _part(journal, "pair"):
        a, b = pair = entry["key"].split("/")[2].split("+")
        found["own LoRA on each"].append(statistics.fmean(rate(alone[s][s]) for s in pair))
        found["one LoRA on both"].append(max(statistics.fmean(rate(alone[x][s]) for s in pair) for x in (a, b)))
        for way, cell in entry["ways"].items():
            found.setdefault(way, []).append(statistics.fmean(rate(cell["right"][s]) for s in pair))
    return found


def _part(journal: Journal, part: str) -> list[dict[str, Any]]:
    return [e for e in journal.of("addition") if e["key"].split("/")[1] == part]


def _joint_rows(journal: Journal) -> list[list[str]]:
    alone = {e["key"].split("/")[2]: e["right"] for e in _part(journal, "alone")}
    rows = []
    for entry in _part(journal, "joint"):
        name = entry["key"].split("/")[2]
        pair, ways = name.split("+"), journal.lines[f"addition/pair/{name}"]["ways"]
        for skill in pair:
            other = next(s for s in pair if s != skill)
            rows.append([name, skill, *(share(*cell) for cell in (
                alone[skill][skill], alone[other][skill], entry["right"][skill],
                *(ways[w]["right"][skill] for w in ("sum of updates", "mean of factors (the paper's)")),
            ))])  # fmt: skip
    return rows


def _spread_shares(journal: Journal) -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = {}
    for entry in _part(journal, "spread"):
        for name, by in entry["right"].items():
            found.setdefault(name, []).append([sum(by[n][i] for n in ("3", "5")) for i in (0, 1)])
    return found


def tables(journal: Journal) -> str:
    found = shares_of_pairs(journal)
    ia3 = journal.lines["addition/ia3"]
    own = {s: ia3["alone"][s][s] for s in ia3["alone"]}
    vector_rows = [["each alone, own skill", shown([rate(v) for v in own.values()])]]
    for way in ("mean", "sum"):
        vector_rows.append(
            [f"{way} of two, around 1", shown([rate(c) for p in ia3[way].values() for c in p.values()])]
        )
    spread = _spread_shares(journal)
    return "\n\n".join((
        f"Share right on held-out prompts of both skills, mean over {len(found['own LoRA on each'])} pairs of skills "
        "with bootstrapped intervals over the pairs. \"One LoRA on both\" is the better of the two alone.",
        table(["two skills by", "share right"], [[way, shown(values)] for way, values in found.items()]),
        "Against training one LoRA on both (Wilson intervals):",
        table(["pair", "skill", "own LoRA", "the other's LoRA", "trained on both", "sum of updates",
               "mean of factors"], _joint_rows(journal)),
        "(IA)^3 vectors in place of LoRAs, the same arithmetic:",
        table(["vectors", "share right"], vector_rows),
        f"Distribution generalisation: `{SPREAD}` learned on words of 3 or of 5 letters only, asked on both, "
        f"{len(_part(journal, 'spread'))} training seeds:",
        table(["LoRA", "words of 3 and 5 letters"],
              [[name, share(*(sum(c[i] for c in cells) for i in (0, 1)))] for name, cells in spread.items()]),
    ))  # fmt: skip


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claim: the sum knows both skills better than either LoRA alone."""
    found = shares_of_pairs(journal)
    paper, best = "mean of factors (the paper's)", "sum of updates"
    gains = {w: [x - y for x, y in zip(found[w], found["one LoRA on both"], strict=True)] for w in (paper, best)}
    mean, low, high = mean_interval(gains[paper])
    ours = mean_interval(gains[best])
    spread = {name: [sum(c[i] for c in cells) for i in (0, 1)] for name, cells in _spread_shares(journal).items()}
    half = max((cell for name, cell in spread.items() if name.startswith("length")), key=rate)
    wider = wilson(*spread[paper])[0] > wilson(*half)[1]
    said = (
        f"two skills by the paper's mean of factors: {_yes(low > 0)}, {mean:+.2f} ({low:+.2f} to {high:+.2f}) against "
        f"the better LoRA alone on both; by the sum of updates: {_yes(ours[1] > 0)}, {ours[0]:+.2f} ({ours[1]:+.2f} "
        f"to {ours[2]:+.2f}); one skill's two distributions by the mean of factors: {_yes(wider)}, "
        f"{rate(spread[paper]):.2f} right against {rate(half):.2f} of the better half alone"
    )
    return low > 0, said


def _yes(held: bool) -> str:
    return "yes" if held else "no"


def figure(journal: Journal) -> Image.Image:
    points = [Point(way, *mean_interval(values)) for way, values in shares_of_pairs(journal).items()]
    count = len(_part(journal, "pair"))
    return draw_points(
        points, title="Two skills by adding LoRAs", subtitle=f"share right on both, mean of {count} pairs"
    )


EXPERIMENT = Experiment(
    "addition", "Addition: two skills in one LoRA", "https://arxiv.org/abs/2306.14870",
    "adding the parameters of two LoRAs gives one that does both tasks better than either alone",
    measure, tables, verdict, figure,
)  # fmt: skip
