"""How near the stale route methods come to the exact ones, on final latents of the embedded world.

    OMP_NUM_THREADS=1 python benchmarks/stale.py [--prompts 64] [--split test] [--rows 2 1] [--tune] [--journal FILE]

A prompt has two to five LoRAs of the split, in turn, and its own noise. For each sampler it is drawn without LoRAs, by
the exact method, and by its stale form; the ratio is

    ||stale - exact|| / ||exact - base||         of the final latents.

--near 1.05 also draws the exact sum of differences with changes 1.05 times as strong: where so small a change of the
sum leads far away, reuse that errs by as much does too.

What is in the journal is not drawn again: stop it and go on at any time. The table of all that is there is written to
benchmarks/stale.md after each prompt; --prompts 0 only writes it. --tune draws a grid of settings on the train split.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from multilora.lab.journal import Journal
from multilora.lab.world.caption import caption
from multilora.lab.world.report import composed_scene, sets
from multilora.pipelines.composing import composing, member
from multilora.pipelines.image import Composer

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "stale.md"
STEPS, GUIDANCE, SEED = 50, 3.0, 9000
EXACT = {"stale_sum": "sum_of_differences", "stale_composite": "composite"}
DEFAULT = {"extrapolate": 0.75}
GRID = (
    *({"extrapolate": x} for x in (0.0, 0.5, 0.75, 1.0)),
    *({"extrapolate": 0.75, "exact": share} for share in (0.1, 0.2)),
)


def prompts(split: str, count: int) -> list[tuple[str, tuple[str, ...]]]:
    """(prompt, names of LoRAs): sets of 2, 3, 4, 5, 2, ... spread over all sets of a size."""
    found = []
    for index in range(count):
        k = 2 + index % 4
        known = sets(split, k)
        turn = index // 4
        chosen = known[(turn * 7) % len(known)]
        found.append((caption(composed_scene(chosen, turn), turn), chosen))
    return found


def sampler(pipe: Any, name: str) -> Any:
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    cls = {"DPM++": DPMSolverMultistepScheduler, "Euler": EulerDiscreteScheduler}[name]
    return cls.from_config(pipe.scheduler.config)


@torch.no_grad()
def drawn(pipe: Any, members: list, prompt: str, seed: int, method: str, options: dict) -> tuple[Any, float, float]:
    """(final latents, rows a step, CPU seconds)"""
    began = time.process_time()
    with composing(pipe, members, method, **options) as conductor:
        latents = pipe(
            prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        rows = 1.0 if conductor is None else sum(conductor.passes) / STEPS
    return latents, rows, time.process_time() - began


def measure(
    pipe: Any, journal: Journal, part: str, prompt: str, chosen: tuple, seed: int, name: str, runs: list
) -> None:
    """Draw the runs (method, options) that the journal lacks for one prompt and sampler."""
    keys = {f"{part}/{name}/{seed}/{m}/{sorted(o.items())}": (m, o) for m, o in runs}
    missing = {key: run for key, run in keys.items() if key not in journal}
    if not missing:
        return
    pipe.scheduler = sampler(pipe, name)
    members = [member(pipe, lora) for lora in chosen]
    base, _, _ = drawn(pipe, [], prompt, seed, "merge", {})
    exact: dict[str, tuple] = {}
    for key, (method, options) in missing.items():
        goal = EXACT.get(method, "sum_of_differences")
        if goal not in exact:
            exact[goal] = drawn(pipe, members, prompt, seed, goal, {})
        wanted, exact_rows, exact_seconds = exact[goal]
        latents, rows, seconds = drawn(pipe, members, prompt, seed, method, options)
        journal.add(
            key, prompt=prompt, loras=list(chosen), k=len(chosen), sampler=name, method=method, options=options,
            ratio=float((latents - wanted).norm() / (wanted - base).norm()), rows=rows, seconds=seconds,
            exact_rows=exact_rows, exact_seconds=exact_seconds,
        )  # fmt: skip


def table(entries: list[dict]) -> list[str]:
    """A row for every sampler, method and setting; the mean ratio by k, and over all with its standard error."""
    cells: dict[tuple, list[dict]] = collections.defaultdict(list)
    for e in entries:
        cells[e["sampler"], e["method"], tuple(sorted(e["options"].items()))].append(e)
    head = ("sampler", "method", "options", "k = 2", "3", "4", "5", "all", "largest", "runs a step", "time", "prompts")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (name, method, options), found in sorted(cells.items()):
        ratios = [e["ratio"] for e in found]
        error = f" ± {statistics.stdev(ratios) / len(ratios) ** 0.5:.3f}" if len(ratios) > 1 else ""
        by_k = []
        for k in (2, 3, 4, 5):
            some = [e["ratio"] for e in found if e["k"] == k]
            by_k.append(f"{statistics.mean(some):.3f}" if some else "-")
        told = ", ".join(f"{key}={value:g}" for key, value in options) or "-"
        cost = statistics.mean(e["rows"] for e in found), statistics.mean(e["exact_rows"] for e in found)
        pace = sum(e["seconds"] for e in found) / sum(e["exact_seconds"] for e in found)
        lines.append(
            f"| {name} | {method} | {told} | {' | '.join(by_k)} | {statistics.mean(ratios):.3f}{error} | "
            f"{max(ratios):.3f} | {cost[0]:.2f} for {cost[1]:.2f} | {pace:.2f} | {len(found)} |"
        )
    return lines


def write(journal: Journal) -> None:
    text = [
        "# Stale forms against exact ones\n\nWritten by `python benchmarks/stale.py`.\n",
        f"||stale - exact|| / ||exact - base|| of final latents, embedded world, {STEPS} steps, guidance {GUIDANCE:g},"
        " weights 1, one picture a prompt; mean ± standard error. Runs a step: of the stale form, for those of the "
        f"exact one; time is CPU time relative to it (torch {torch.__version__}, {torch.get_num_threads()} thread). "
        "`merge` is measured against the sum of differences: what one run a step is without reuse; so is the exact "
        "sum at another strength: what so small an error in every step leads to.\n",
    ]
    for part, title in (("test", "LoRAs of the test split, default settings"), ("train", "LoRAs of the train split"),
                        ("tune", "Settings, on the train split")):  # fmt: skip
        entries = journal.of(part)
        if entries:
            text += [f"## {title}\n", *table(entries), ""]
    TABLE.write_text("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--samplers", nargs="+", default=["DPM++", "Euler"])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 1], help="1 also draws merge, to compare")
    parser.add_argument("--near", type=float, nargs="*", default=[], help="also the exact sum at this strength")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--journal", type=Path, default=ROOT / "docs" / "world" / "stale.jsonl")
    asked = parser.parse_args()
    journal = Journal(asked.journal)
    pipe = Composer.from_pretrained("embedded", device="cpu").pipe
    pipe.set_progress_bar_config(disable=True)
    split = "train" if asked.tune else asked.split
    grid = GRID if asked.tune else (DEFAULT,)
    runs = [(m, {"rows": r, **own}) for m in EXACT for r in asked.rows for own in grid]
    if 1 in asked.rows:
        runs.append(("merge", {}))
    runs += [("sum_of_differences", {"strength": s}) for s in asked.near]
    for index, (prompt, chosen) in enumerate(prompts(split, asked.prompts)):
        for name in asked.samplers:
            measure(pipe, journal, "tune" if asked.tune else split, prompt, chosen, SEED + index, name, runs)
        write(journal)
        print(f"{index + 1} of {asked.prompts}: {prompt}", flush=True)
    write(journal)


if __name__ == "__main__":
    main()
