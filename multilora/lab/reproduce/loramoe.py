"""LoRAMoE against plain LoRA of as many parameters: what fine-tuning on tasks leaves of what the base knows.

Fine-tuning data are right answers to six tasks, and one sample in twenty is a fact, about a quarter of the designs
that the base was trained on. Recall is asked about designs that fine-tuning never mentions. Every size is one epoch.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from multilora.attach import attached
from multilora.gate_loramoe import TYPES, LoramoeGate, experts_of
from multilora.gates import read_gate
from multilora.lab.journal import Journal
from multilora.lab.reproduce.bench import CHECKED, DRAWN, Bench, Experiment, mean_interval
from multilora.lab.result_chart import Point, draw_lines
from multilora.lab.train.loramoe import train
from multilora.lab.train.text import padding
from multilora.lab.train.text_data import padded, read_texts, tokenised
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.language import Example, examples, facts, is_right, stream
from multilora.lab.world.language_loras import as_texts
from multilora.lab.world.language_train import answer
from multilora.lab.world.tables import share, table
from multilora.pipelines.text import composing_text
from multilora.pipelines.text_load import text_lora

SIZES = (128, 512, 2048, 6144)
TASKS = ("reverse", "sort", "next", "double", "korvish", "swap")
KNOWLEDGE = 0.05  # share of the fine-tuning samples that are facts
SEEDS, BATCH = 2, 32
RATES = (1e-3, 4e-3, 1.6e-2)  # chosen from on data of the second size, by other designs and training prompts
CHOICE_SEED = 2  # of those data
EXPERTS, RANK = 6, 4
LORA_RANK = 27  # 41,472 parameters a block; six experts of rank 4 with their routers have 40,704
LORA, FREE, BOUND = "LoRA", "LoRAMoE without the constraint", "LoRAMoE with it"
METHODS: Mapping[str, float] = {LORA: 0.0, FREE: 0.0, BOUND: 0.1}  # name -> weight of the constraint, the paper's
DELTA = 0.1  # the paper's
LOSS = 0.02  # of task accuracy that still counts as "learns the tasks as well"


def designs(part: int) -> set[str]:
    """The train designs that fine-tuning mentions (0), that rates are chosen by (1), and that recall asks for (2)."""
    names = [d.name for d in DESIGNS.values() if d.split == "train"]
    return {name for i, name in enumerate(names) if min(i % 4, 2) == part}


def recall(part: int) -> list[Example]:
    """Every question about the designs of a part."""
    own = designs(part)
    return [Example("facts", f"{q} =", a) for q, a in facts("train").items() if own & set(q.split())]


def samples(count: int, seed: int) -> list[Example]:
    """Fine-tuning data, all from the train split."""
    rng, known = random.Random(f"loramoe/{seed}"), recall(0)
    tasks = itertools.cycle([stream(task, DRAWN + seed) for task in TASKS])
    return [rng.choice(known) if rng.random() < KNOWLEDGE else next(next(tasks)) for _ in range(count)]


def typed(found: Sequence[Example]) -> list[dict[str, str]]:
    """As multilora.lab.train.loramoe reads them."""
    return [text | {"type": TYPES[e.skill != "facts"]} for text, e in zip(as_texts(list(found)), found, strict=True)]


def measure(bench: Bench) -> None:
    bench.cell("loramoe/base", lambda: {"right": _asked(bench)})
    for method, rate in itertools.product((LORA, FREE), RATES):
        bench.cell(f"loramoe/rate/{method}/{rate:g}", lambda m=method, r=rate: _chosen_by(bench, m, r))
    for seed, size in itertools.product(range(min(SEEDS, bench.size.seeds)), SIZES):
        for method in METHODS:
            bench.cell(f"loramoe/{method}/{size}/{seed}", lambda m=method, n=size, s=seed: _tuned(bench, m, n, s))


def best_rate(journal: Journal, method: str) -> float:
    """The rate with the most right answers, recall and tasks counted alike; LoRAMoE's serves both of its forms."""
    method = FREE if method == BOUND else method
    return max(RATES, key=lambda r: statistics.fmean(journal.lines[f"loramoe/rate/{method}/{r:g}"]["share"]))


def _count(bench: Bench, size: int) -> int:
    return max(2 * BATCH, round(size * bench.size.training))


@contextlib.contextmanager
def tuned(bench: Bench, method: str, size: int, seed: int, rate: float) -> Iterator[Path | None]:
    """The model fine-tuned on one epoch of `size` samples, for a block; the gate's file of a LoRAMoE."""
    found = samples(_count(bench, size), seed)
    given = {"steps": len(found) // BATCH, "lr": rate, "batch": BATCH, "seed": seed, "modules": "feed_forward"}
    name = f"loramoe {method} {size} {seed} {rate:g}"
    if method == LORA:
        with bench.weighed([bench.trained(name, found, rank=LORA_RANK, **given)]):
            yield None
        return
    path = bench.work / f"{name}.safetensors"
    if not path.is_file():
        bench.work.mkdir(parents=True, exist_ok=True)
        train(typed(found), bench.model, path, tokenizer=bench.tokenizer, experts=EXPERTS, rank=RANK,
              balance=METHODS[method], delta=DELTA, length=96, checkpoint_every=0, **given)  # fmt: skip
    with composing_text(bench.model, experts_of(path), "loramoe", gate=str(path)):
        yield path


def _rights(bench: Bench, wanted: Sequence[Example]) -> str:
    """One "1" or "0" per question."""
    said = answer(bench.model, bench.tokenizer, [e.prompt for e in wanted])
    return "".join("01"[is_right(e, a)] for e, a in zip(wanted, said, strict=True))


def _asked(bench: Bench) -> dict[str, str]:
    """Recall and each task -> rights on held-out prompts."""
    most = bench.size.asked
    asked = {"recall": recall(2)} | {t: examples(t, most, split="held_out") for t in TASKS}
    return {name: _rights(bench, wanted if most >= 100 else wanted[:most]) for name, wanted in asked.items()}


def _chosen_by(bench: Bench, method: str, rate: float) -> dict[str, Any]:
    """[recall, tasks] shares right on what rates are chosen by."""
    each = min(20, bench.size.asked)
    with tuned(bench, method, SIZES[1], CHOICE_SEED, rate):
        known = _rights(bench, recall(1)[: 5 * each])
        done = "".join(_rights(bench, examples(task, each, CHECKED)) for task in TASKS)
    return {"share": [round(_share(known), 4), round(_share(done), 4)]}


def _tuned(bench: Bench, method: str, size: int, seed: int) -> dict[str, Any]:
    rate = best_rate(bench.journal, method)
    with tuned(bench, method, size, seed, rate) as path:
        found: dict[str, Any] = {"rate": rate, "right": _asked(bench)}
    if path is not None:
        found["use"] = _use(bench, path)
    return found


def _use(bench: Bench, path: Path) -> dict[str, list[float]]:
    """Type -> [experts] mean share over tokens and layers, of questions with their right answers."""
    each, found = min(16, bench.size.asked), {}
    experts = [text_lora(bench.model, folder) for folder in experts_of(path)]
    gate = LoramoeGate.of(read_gate(path), experts)
    tasks = [e for task in TASKS for e in examples(task, each, split="held_out")]
    for kind, wanted in zip(TYPES, (recall(2), tasks), strict=True):
        tokens = tokenised(read_texts(as_texts(wanted)), bench.tokenizer, seq2seq=False, length=96)
        batch = padded(tokens, padding(bench.tokenizer))
        mask = batch["attention_mask"].bool()
        with torch.no_grad(), attached(bench.model, experts, form="side") as bank:
            bank.gate = asked = gate.asked()
            bench.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        mean = torch.stack([s[mask].mean(0) for s in asked.shares.values()]).mean(0)
        found[kind] = [round(v, 4) for v in mean.tolist()]
    return found


# -- what was found ------------------------------------------------------------------------------------------------


def _share(bits: str) -> float:
    return bits.count("1") / len(bits) if bits else 0.0


def _bits(entry: Mapping[str, Any], what: str) -> str:
    right = entry["right"]
    return right["recall"] if what == "recall" else "".join(right[task] for task in TASKS)


def cells(journal: Journal, method: str, size: int) -> list[dict[str, Any]]:
    """The seeds that were measured."""
    found = (journal.lines.get(f"loramoe/{method}/{size}/{seed}") for seed in range(SEEDS))
    return [entry for entry in found if entry]


def by_question(entries: Sequence[Mapping[str, Any]], what: str) -> list[float]:
    """[questions] the share of seeds that answer each right; what is "recall" or "tasks"."""
    return [statistics.fmean(map(int, bits)) for bits in zip(*(_bits(e, what) for e in entries), strict=True)]


def gain(journal: Journal, method: str, other: str, size: int, what: str) -> tuple[float, float, float]:
    """What a method has over another ("base" too), bootstrapped over the questions, which both were asked."""
    theirs = [journal.lines["loramoe/base"]] if other == "base" else cells(journal, other, size)
    pairs = zip(by_question(cells(journal, method, size), what), by_question(theirs, what), strict=True)
    return mean_interval([a - b for a, b in pairs])


def half(entry: Mapping[str, Any], kind: str) -> float:
    """The share of the first half of the experts, the knowledge samples' own, on samples of a type."""
    return sum(entry["use"][kind][: EXPERTS // 2])


def tables(journal: Journal) -> str:
    base, rows, use = journal.lines["loramoe/base"], [], []
    both = ("recall", "tasks")
    rows.append(["base", "none", *(share(_bits(base, w).count("1"), len(_bits(base, w))) for w in both)])
    for method, size in itertools.product(METHODS, SIZES):
        found = cells(journal, method, size)
        pooled = ["".join(_bits(e, what) for e in found) for what in both]
        rows.append([method, f"{size}", *(share(bits.count("1"), len(bits)) for bits in pooled)])
        if method != LORA:
            for e in found:
                seed = e["key"].rpartition("/")[2]
                use.append([method, f"{size}", seed, *(f"{half(e, kind):.3f}" for kind in TYPES),
                            f"{max(max(e['use'][kind]) for kind in TYPES):.2f}"])  # fmt: skip
    rates = [[m, *(f"{r:g}: {' and '.join(f'{v:.2f}' for v in journal.lines[f'loramoe/rate/{m}/{r:g}']['share'])}"
                   for r in RATES), f"{best_rate(journal, m):g}"] for m in (LORA, FREE)]  # fmt: skip
    return "\n\n".join((
        f"Closed-book recall: all {len(_bits(base, 'recall'))} questions about {len(designs(2))} designs that "
        "fine-tuning never mentions (unlike elsewhere on this page the base's own training saw most of them: that is "
        f"what is recalled). Tasks: {', '.join(TASKS)}, held-out prompts. Samples: one epoch, one in "
        f"{round(1 / KNOWLEDGE)} a fact about {len(designs(0))} other designs. All on the feed-forward linears: one "
        f"LoRA of rank {LORA_RANK} against {EXPERTS} experts of rank {RANK} with their routers, as many parameters. "
        f"Training seeds: {len(cells(journal, LORA, SIZES[0]))}, pooled; intervals are over questions, and know "
        "little of what another seed would give.",
        table(["trained", "samples", "closed-book recall", "tasks"], rows),
        f"Learning rates, chosen at {SIZES[1]} samples by recall of {len(designs(1))} further designs and by training "
        "prompts of the tasks (recall and tasks of each). The grid is coarse, and how much is forgotten goes with the "
        "rate: a finer grid, or one rate for each size, could change who forgets more:",
        table(["trained", *(["rate: shares right"] * len(RATES)), "chosen"], rates),
        "Expert use by sample type: the share of the first half of the experts, the knowledge samples' own half, on "
        "questions about facts and on tasks, answers included; mean over tokens and layers (0.5 where routers do not "
        "tell). The constraint at its least gives a sample's own half "
        f"{(1 - DELTA) / 2:.2f}, so knowledge {(1 - DELTA) / 2:.2f} and tasks {(1 + DELTA) / 2:.2f}.",
        table(["trained", "samples", "seed", *TYPES, "largest share of one expert"], use),
    ))  # fmt: skip


def verdict(journal: Journal) -> tuple[bool, str]:
    """The claim, at the largest size: plain LoRA forgets (its recall is below the base's), LoRAMoE with the constraint
    recalls more than it does, and is no more than LOSS behind on the tasks. Intervals decide the first two."""
    most = SIZES[-1]
    lost = gain(journal, LORA, "base", most, "recall")
    kept = {m: gain(journal, m, LORA, most, "recall") for m in (FREE, BOUND)}
    tasks = {m: gain(journal, m, LORA, most, "tasks") for m in (FREE, BOUND)}

    def said(found: tuple[float, float, float]) -> str:
        return f"{found[0]:+.2f} ({found[1]:+.2f} to {found[2]:+.2f})"

    apart = [statistics.fmean(half(e, TYPES[1]) - half(e, TYPES[0]) for e in cells(journal, m, most))
             for m in (FREE, BOUND)]  # fmt: skip
    forgets, keeps, learns = lost[2] < 0, kept[BOUND][1] > 0, tasks[BOUND][0] >= -LOSS
    why = (
        f"after {most} samples plain LoRA's recall against the base's is {said(lost)}, so it "
        f"{'forgets' if forgets else 'does not measurably forget'}; against LoRA, recall of LoRAMoE with the "
        f"constraint {said(kept[BOUND])} and without {said(kept[FREE])}, tasks {said(tasks[BOUND])} and "
        f"{said(tasks[FREE])}; the halves' shares differ between the types by {apart[1]:+.3f} with the "
        f"constraint (its least loss {DELTA:+.3f}) and {apart[0]:+.3f} without"
    )
    return forgets and keeps and learns, why


def figure(journal: Journal) -> Image.Image:
    lines = {
        f"{method}, {what}": [Point("", *mean_interval(by_question(cells(journal, method, size), what)), x=size)
                              for size in SIZES]
        for what in ("recall", "tasks") for method in METHODS
    }  # fmt: skip
    return draw_lines(
        lines, title="LoRAMoE and plain LoRA of as many parameters", axis="fine-tuning samples", even=True,
        subtitle="share right: recall of designs that fine-tuning does not mention, and the tasks it trains",
    )  # fmt: skip


EXPERIMENT = Experiment(
    "loramoe", "LoRAMoE: world knowledge kept through fine-tuning", "https://arxiv.org/abs/2312.09979",
    "fine-tuning on many samples makes plain LoRA forget what the base knows; LoRAMoE with its balancing constraint "
    "keeps it and learns the tasks as well",
    measure, tables, verdict, figure,
)  # fmt: skip
