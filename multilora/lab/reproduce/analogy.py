"""Analogy (PEM): a polite LoRA of one skill, less the skill, plus another: is the other skill polite?"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from typing import Any

from PIL import Image

from multilora.lab.journal import Journal
from multilora.lab.reproduce.bench import Bench, Experiment, Target, mean_interval, rate, shown
from multilora.lab.result_chart import Point, draw_points
from multilora.lab.world.language_loras import PLANS
from multilora.lab.world.tables import share, table
from multilora.lora import Lora
from multilora.merge.analogy import analogy
from multilora.merge.factor import factor

SKILLS = tuple(p.skills[0] for p in PLANS.values() if p.category == "pair")
# Numbers are chosen on training prompts of the pairs whose LoRAs are of the train split, and reported on the others.
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
LAMBDAS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PAPER = "factors, the paper's λ chosen"


def pairs() -> list[tuple[str, str]]:
    """(source, target) skills."""
    return list(itertools.permutations(SKILLS, 2))


def _of_train(pair: tuple[str, str]) -> bool:
    return all(PLANS[name].split == "train" for s in pair for name in (s, f"{s}_polite"))


def composed(bench: Bench, pair: tuple[str, str], form: str, number: float) -> list[Lora]:
    """The LoRA of the analogy.

    form  "delta": number * (x_polite - x + y). "factor": the published composition (methods with λ for the labelled
          source, 1 - λ for the two others): A = λ A_xp + (1 - λ)(A_y + A_x), B = λ B_xp + (1 - λ)(B_y - B_x)
    """
    source, target = pair
    polite, plain, other = (bench.lora(n) for n in (f"{source}_polite", source, target))
    if form == "delta":
        return [number * analogy([polite, plain, other], [1.0, 1.0, 1.0])]
    rest = 1.0 - number
    return [factor([polite, other, plain], [number, rest, -rest], convention="pem")]


def measure(bench: Bench) -> None:
    known = [p for p in pairs() if _of_train(p)][: bench.size.most]
    numbers = bench.cell("analogy/chosen", lambda: {
        form: _chosen(bench, known, form, grid) for form, grid in (("delta", SCALES), ("factor", LAMBDAS))
    })  # fmt: skip
    for pair in [p for p in pairs() if not _of_train(p)][: bench.size.most]:
        bench.cell(f"analogy/pair/{'-'.join(pair)}", lambda pair=pair: {"right": _ways(bench, pair, numbers)})


def _chosen(bench: Bench, known: list[tuple[str, str]], form: str, grid: tuple[float, ...]) -> dict[str, Any]:
    scores = {
        n: sum(bench.learned(Target(p[1], "polite"), composed(bench, p, form, n), [1.0]) for p in known) for n in grid
    }
    return {"number": max(grid, key=lambda n: (scores[n], -abs(1.0 - n))), "scores": [scores[n] for n in grid]}


def _ways(bench: Bench, pair: tuple[str, str], numbers: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    source, target = pair
    cells = {
        "target skill's LoRA": [bench.lora(target)],
        "source's polite LoRA": [bench.lora(f"{source}_polite")],
        "target + the polite LoRA": [bench.lora(target), bench.lora("polite")],
        "analogy of updates": composed(bench, pair, "delta", 1.0),
        "analogy of updates, scale chosen": composed(bench, pair, "delta", numbers["delta"]["number"]),
        "factors, λ = 1/2": composed(bench, pair, "factor", 0.5),
        PAPER: composed(bench, pair, "factor", numbers["factor"]["number"]),
        "trained for it": [bench.lora(f"{target}_polite")],
    }
    wanted, found = Target(target, "polite").held_out(bench.size.asked), {}
    for way, loras in cells.items():
        with bench.weighed(loras):
            found[way] = bench.ask(wanted)
    return found


def ways(journal: Journal) -> dict[str, list[dict[str, int]]]:
    """Way -> counts of each pair of the test split."""
    found: dict[str, list[dict[str, int]]] = {}
    for entry in journal.of("analogy"):
        for way, counts in entry.get("right", {}).items():
            found.setdefault(way, []).append(counts)
    return found


def _shares(cells: list[dict[str, int]], what: str) -> list[float]:
    return [rate([c[what], c["asked"]]) for c in cells]


def tables(journal: Journal) -> str:
    found, chosen = ways(journal), journal.lines["analogy/chosen"]
    rows = [
        [way, *(shown(_shares(cells, what)) for what in ("right", "polite", "exact"))] for way, cells in found.items()
    ]
    each = []
    for entry in journal.of("analogy"):
        if "right" in entry:
            source, target = entry["key"].split("/")[2].split("-")
            names = ("target skill's LoRA", "source's polite LoRA", "analogy of updates", PAPER, "trained for it")
            cells = [[entry["right"][way]["exact"], entry["right"][way]["asked"]] for way in names]
            each.append([f"{source}_polite - {source} + {target}", *(share(*cell) for cell in cells)])
    return "\n\n".join((
        f"Polite answers wanted, held-out prompts of the target skill, mean over {len(each)} analogies (bootstrapped "
        f"over them) among {', '.join(SKILLS)}. Chosen on training prompts of other pairs: scale "
        f"{chosen['delta']['number']:g}, λ {chosen['factor']['number']:g}.",
        table(["by", "right", "polite", "right and polite"], rows),
        "Right and polite, each analogy (Wilson intervals):",
        table(["analogy", "target's LoRA", "source's polite LoRA", "analogy of updates", "factors, λ chosen",
               "trained for it"], each),
    ))  # fmt: skip


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claim: better on the target, without its labelled data, than the source's labelled LoRA is."""
    found = ways(journal)
    exact = {way: _shares(cells, "exact") for way, cells in found.items()}
    source, trained = exact["source's polite LoRA"], statistics.fmean(exact["trained for it"])
    gains = {
        way: mean_interval([a - b for a, b in zip(exact[way], source, strict=True)])
        for way in ("analogy of updates, scale chosen", PAPER)
    }
    said = "; ".join(
        f"{way}: {statistics.fmean(exact[way]):.2f} right and polite, {g[0]:+.2f} ({g[1]:+.2f} to {g[2]:+.2f}) "
        "against the source's LoRA"
        for way, g in gains.items()
    )
    pairs_of = list(zip(exact["analogy of updates"], exact["trained for it"], strict=True))
    near = sum(a >= 0.5 * b for a, b in pairs_of)
    where = f"the analogy of updates has half of what training has in {near} of {len(pairs_of)}"
    return gains[PAPER][1] > 0, f"{said}; trained for it: {trained:.2f}; {where}"


def figure(journal: Journal) -> Image.Image:
    points = [Point(way, *mean_interval(_shares(cells, "exact"))) for way, cells in ways(journal).items()]
    return draw_points(points, title="Analogy: x_polite - x + y", subtitle="share right and polite, mean of the pairs")


EXPERIMENT = Experiment(
    "analogy", "Analogy: politeness carried to another skill", "https://arxiv.org/abs/2306.14870",
    "a labelled source task, less and plus LoRAs of source and target, does the target better than the source's LoRA",
    measure, tables, verdict, figure,
)  # fmt: skip
