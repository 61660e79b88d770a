"""LoRA against full fine-tuning: quality, trainable share, and what the merged model costs (arXiv 2106.09685)."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from multilora.attach import attached
from multilora.lab.journal import Journal
from multilora.lab.reproduce.bench import Bench, Experiment, Target, mean_interval, rate, shown
from multilora.lab.result_chart import Point, draw_points
from multilora.lab.train.text_other import train_whole
from multilora.lab.world.language_loras import as_texts
from multilora.lab.world.tables import table

TARGETS = (Target("sort_digits"), Target("mirror"), Target("reverse", "polite"))  # the base does them poorly
EXAMPLES, STEPS, BATCH = 400, 150, 16
# Both chosen on "double", as in the few-shot experiment.
LORA_RATE, WHOLE_RATE, RANK = 4e-3, 5e-4, 4
MARGIN = 0.05  # how far behind full fine-tuning still counts as equal
ROUNDS, TOKENS = 7, 24  # of the timing: interleaved rounds, tokens that are decoded in each


def measure(bench: Bench) -> None:
    for target, seed in itertools.product(TARGETS[: bench.size.most], range(bench.size.seeds)):
        bench.cell(f"lora/{target.name}/{seed}", lambda t=target, s=seed: _both(bench, t, s))
    bench.cell("lora/cost", lambda: _cost(bench))


def _both(bench: Bench, target: Target, seed: int) -> dict[str, Any]:
    steps = bench.size.steps(STEPS)
    drawn = target.draw(EXAMPLES, seed)
    name = f"lora {target.name} {seed}"
    lora = bench.trained(name, drawn, steps=steps, lr=LORA_RATE, batch=BATCH, seed=seed, rank=RANK)
    whole = train_whole(
        as_texts(drawn), bench.model, bench.tokenizer, steps=steps, lr=WHOLE_RATE, batch=BATCH, length=96, seed=seed
    )
    with bench.holding(whole):
        full = bench.right(target)
    ours = sum(t.numel() for part in lora.values() for t in (part.down, part.up))
    return {
        "right": {"base": bench.right(target), "LoRA": bench.right(target, [lora]), "full fine-tuning": full},
        "trainable": [ours, sum(p.numel() for p in bench.model.parameters())],
    }


class _Counted(TorchDispatchMode):
    """How many operations run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _cost(bench: Bench) -> dict[str, Any]:
    """Operations and seconds of greedy decoding: the base twice, a merged LoRA, the same LoRA beside the weights."""
    target = TARGETS[0]
    lora = bench.trained("lora cost", target.draw(BATCH, 0), steps=2, lr=LORA_RATE, batch=BATCH, rank=RANK)
    ids = bench.tokenizer(target.held_out(1)[0].prompt, return_tensors="pt", return_token_type_ids=False)

    def decode() -> None:
        bench.model.generate(**ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    def on(form: str) -> Callable[[], tuple[int, float]]:
        def run() -> tuple[int, float]:
            with attached(bench.model, [lora], form=form) as bank:
                bank.row = [1.0]
                return timed()

        return run

    def timed() -> tuple[int, float]:
        decode()  # what the first call sets up
        with _Counted() as counted:
            decode()
        began = time.perf_counter()
        decode()
        return counted.count, time.perf_counter() - began

    ways = {"base": timed, "merged": on("rebuilt"), "beside": on("side"), "base again": timed}
    found: dict[str, list[tuple[int, float]]] = {way: [] for way in ways}
    for _ in range(ROUNDS if bench.size.seeds > 1 else 1):
        for way, run in ways.items():
            found[way].append(run())
    base = [seconds for _, seconds in found["base"]]
    ratios = {
        way: round(statistics.median(s / b for (_, s), b in zip(runs, base, strict=True)), 3)
        for way, runs in found.items()
    }
    return {"operations": {way: runs[0][0] for way, runs in found.items()}, "ratios": ratios}


def gains(journal: Journal) -> list[float]:
    """LoRA's share right less full fine-tuning's, task by task and seed by seed."""
    return [rate(e["right"]["LoRA"]) - rate(e["right"]["full fine-tuning"]) for e in _runs(journal)]


def _runs(journal: Journal) -> list[dict[str, Any]]:
    return [e for e in journal.of("lora") if "right" in e]


def _cost_of(journal: Journal) -> dict[str, Any]:
    return next(e for e in journal.of("lora") if e["key"] == "lora/cost")


def tables(journal: Journal) -> str:
    runs, cost = _runs(journal), _cost_of(journal)
    methods = list(runs[0]["right"])
    tasks = list(dict.fromkeys(e["key"].split("/")[1] for e in runs))
    rows = [
        [method, shown([rate(e["right"][method]) for e in runs]),
         *(f"{statistics.fmean(rate(e['right'][method]) for e in runs if e['key'].split('/')[1] == t):.2f}"
           for t in tasks)]
        for method in methods
    ]  # fmt: skip
    ways = [[way, str(cost["operations"][way]), f"{cost['ratios'][way]:.2f}"] for way in cost["operations"]]
    return "\n\n".join((
        f"Share right on held-out prompts after {EXAMPLES} examples and {STEPS} steps, {len(tasks)} tasks times seeds "
        f"(n, bootstrapped), and the mean of each task. LoRA of rank {RANK} on every linear.",
        table(["trained", "all", *tasks], rows),
        f"Decoding {TOKENS} tokens: operations that PyTorch runs, and time as a ratio to the base, the median of "
        "interleaved rounds (base again: what this machine's noise makes of nothing).",
        table(["model", "operations", "time"], ways),
    ))  # fmt: skip


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claims: as good as full fine-tuning (no more than MARGIN behind, by the interval), with few of the
    parameters (a tenth at most), and no operation more than the base once merged."""
    mean, low, high = mean_interval(gains(journal))
    ours, all_of_them = _runs(journal)[0]["trainable"]
    counts = _cost_of(journal)["operations"]
    as_good, small, free = low > -MARGIN, ours <= all_of_them / 10, counts["merged"] == counts["base"]
    why = (
        f"LoRA less full fine-tuning {mean:+.2f} ({low:+.2f} to {high:+.2f}), with {ours / all_of_them:.1%} of the "
        f"parameters trained; decoding runs {counts['merged']} operations merged, {counts['base']} in the base, "
        f"{counts['beside']} with the LoRA beside the weights"
    )
    return as_good and small and free, why


def figure(journal: Journal) -> Image.Image:
    runs = _runs(journal)
    points = [Point(m, *mean_interval([rate(e["right"][m]) for e in runs])) for m in runs[0]["right"]]
    return draw_points(points, title="LoRA and full fine-tuning", subtitle="share right on held-out prompts")


EXPERIMENT = Experiment(
    "lora", "LoRA: as good as full fine-tuning, free once merged", "https://arxiv.org/abs/2106.09685",
    "LoRA is as good as full fine-tuning with a small share of the parameters, and costs nothing once merged",
    measure, tables, verdict, figure,
)  # fmt: skip
