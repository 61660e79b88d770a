"""Switch and Composite against Merge on the embedded world, k = 2 to 5 (arXiv 2402.16843).

The pictures are those of `multilora world train`'s report, read by recogniser B: the same cells in the same journal.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from multilora.lab.journal import Journal
from multilora.lab.reproduce.bench import Bench, Experiment, mean_interval
from multilora.lab.result_chart import Point, draw_lines
from multilora.lab.world.report import ABLATION, METHODS
from multilora.lab.world.report import measure as measure_world
from multilora.lab.world.tables import share, table
from multilora.pipelines.load import assets

COUNT = 25  # pictures of each method for each k: 100 of each method
MERGE = "merge, weight 1"
AGAINST = ("switch", "composite")
ABLATED = 100  # pictures of each of ABLATION


def where(journal: Journal) -> Journal:
    """The journal of pictures beside that of texts: world/report.jsonl."""
    return Journal(journal.path.parents[1] / "world" / "report.jsonl")


def measure(bench: Bench) -> None:
    small = bench.size.seeds == 1
    for part, count, ks in (("composition", COUNT, (2, 3, 4, 5)), ("ablation", ABLATED, (3,))):
        measure_world(
            assets(), where(bench.journal).path, count=1 if small else count, parts=(part,),
            ks=(2, 5) if small else ks, steps=5 if small else None, echo=bench.echo,
        )  # fmt: skip


def cells(journal: Journal, name: str, k: int, part: str = "composition") -> dict[str, dict[str, Any]]:
    """Set and place -> entry of a method's cell."""
    return {e["key"].split("/", 1)[1].removeprefix(f"{name}/"): e
            for e in journal.of(part) if e["cell"] == name and e["k"] == k}  # fmt: skip


def ks_of(journal: Journal) -> list[int]:
    return sorted({e["k"] for e in journal.of("composition")})


def gains(journal: Journal, name: str, k: int, base: str = MERGE) -> list[float]:
    """Share of elements present less the base's, batch by batch on the same prompts and noise."""
    ours, theirs = cells(journal, name, k), cells(journal, base, k)
    return [
        (ours[place]["found"] - theirs[place]["found"]) / ours[place]["asked"] for place in ours if place in theirs
    ]


def tables(journal: Journal) -> str:
    ks = ks_of(journal)
    rows = [[cell.name, *(_share(list(cells(journal, cell.name, k).values())) for k in ks)] for cell in METHODS]
    parts = [
        "Share of the requested elements that recogniser B sees, test-split LoRAs, held-out prompts, the same noise "
        "for every method.",
        table(["method", *(f"k = {k}" for k in ks)], rows),
    ]
    varied = [(cell.name, [e for e in journal.of("ablation") if e["cell"] == cell.name]) for cell in ABLATION]
    if all(found for _, found in varied):
        rows = [[name, _share(found)] for name, found in varied]
        ks = sorted({e["k"] for _, found in varied for e in found})
        parts += [f"Interval and order of Switch, k = {', '.join(map(str, ks))}; else the character comes first:",
                  table(["method", "elements present"], rows)]  # fmt: skip
    return "\n\n".join(parts)


def _share(found: list[dict[str, Any]]) -> str:
    return share(sum(e["found"] for e in found), sum(e["asked"] for e in found))


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claim: Switch and Composite show more of the elements than Merge, the more so the more LoRAs there are."""
    ks, said, held = ks_of(journal), [], []
    for name in AGAINST:
        found = {k: mean_interval(gains(journal, name, k)) for k in ks}
        held.append(found[ks[-1]][1] > 0 and found[ks[-1]][0] > found[ks[0]][0])
        each = ", ".join(f"k = {k} {m:+.2f} ({low:+.2f} to {high:+.2f})" for k, (m, low, high) in found.items())
        said.append(f"{name} against Merge at weight 1: {each}")
    return all(held), "; ".join(said)


def figure(journal: Journal) -> Image.Image:
    wanted = [c.name for c in METHODS]
    lines = {
        name: [Point("", *mean_interval([e["found"] / e["asked"] for e in cells(journal, name, k).values()]), x=k)
               for k in ks_of(journal)]
        for name in wanted
    }  # fmt: skip
    return draw_lines(lines, title="Elements present, by number of LoRAs", axis="k, LoRAs in a picture",
                      subtitle="recogniser B, test split", even=True)  # fmt: skip


EXPERIMENT = Experiment(
    "composition", "Switch and Composite against Merge, in pictures", "https://arxiv.org/abs/2402.16843",
    "composing during denoising shows more of the LoRAs than merging them, the more so the more LoRAs there are",
    measure, tables, verdict, figure, where,
)  # fmt: skip
