"""The LoRAMoE experiment: what it asks was never shown, parameters are equal, numbers and verdicts by hand."""

import pytest
import torch

from multilora.lab.journal import Journal
from multilora.lab.reproduce import loramoe
from multilora.lab.reproduce.bench import SMOKE, Bench
from multilora.lab.train.loramoe import fresh_experts
from multilora.lab.world.language import examples, split_of
from multilora.pipelines.text_load import load_text


def test_what_is_asked_is_never_shown():
    groups = [loramoe.designs(i) for i in range(3)]
    assert sum(map(len, groups)) == len(set.union(*groups)) >= 15
    shown = loramoe.samples(3000, 0) + loramoe.samples(3000, 1) + loramoe.samples(3000, loramoe.CHOICE_SEED)
    prompts = {e.prompt for e in shown}
    for part in (1, 2):
        asked = loramoe.recall(part)
        assert len(asked) >= 40
        assert prompts.isdisjoint(e.prompt for e in asked)
        assert not any(groups[part] & set(p.split()) for p in prompts)
    for task in loramoe.TASKS:
        assert prompts.isdisjoint(e.prompt for e in examples(task, 100, split="held_out"))
    assert all(split_of(e.prompt) == "train" for e in shown if e.skill != "facts")
    share = sum(e.skill == "facts" for e in shown) / len(shown)
    assert share == pytest.approx(loramoe.KNOWLEDGE, abs=0.02)
    kinds = {e.skill: text["type"] for e, text in zip(shown, loramoe.typed(shown), strict=True)}
    assert kinds == {"facts": "knowledge"} | dict.fromkeys(loramoe.TASKS, "task")


def test_as_many_parameters():
    model, _ = load_text("embedded", device="cpu")
    paths = [p for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".mlp." in p]
    experts, widths = fresh_experts(model, paths, loramoe.EXPERTS, loramoe.RANK, 0)
    ours = sum(t.numel() for lora in experts for p in lora.values() for t in (p.down, p.up))
    ours += sum(loramoe.EXPERTS * width for width in widths.values())
    plain = sum(loramoe.LORA_RANK * sum(model.get_submodule(p).weight.shape) for p in paths)
    one_less = plain - plain // loramoe.LORA_RANK
    assert one_less < ours <= plain


def _journal(path, lora, bound, use):
    """A journal of made-up answers: recall of 10 questions and 10 of each task."""
    journal = Journal(path)

    def rights(recall, tasks):
        return {"recall": recall} | dict.fromkeys(loramoe.TASKS, tasks)

    journal.add("loramoe/base", right=rights("1" * 10, "0" * 10))
    for method in (loramoe.LORA, loramoe.FREE):
        for i, rate in enumerate(loramoe.RATES):
            journal.add(f"loramoe/rate/{method}/{rate:g}", share=[0.5, 0.9 if i == 1 else 0.2])
    for size in loramoe.SIZES:
        for method, right in ((loramoe.LORA, lora), (loramoe.FREE, lora), (loramoe.BOUND, bound)):
            for seed in range(loramoe.SEEDS):
                journal.add(f"loramoe/{method}/{size}/{seed}", right=rights(*right), use=use, rate=0.1)
    return journal


USE = {"knowledge": [0.1, 0.2, 0.15, 0.15, 0.2, 0.2], "task": [0.2, 0.2, 0.15, 0.15, 0.15, 0.15]}


@pytest.mark.parametrize(
    ("lora", "bound", "held", "words"),
    [
        (("0" * 8 + "11", "1" * 10), ("1" * 10, "1" * 10), True, "so it forgets"),
        (("1" * 10, "1" * 10), ("1" * 10, "1" * 10), False, "does not measurably forget"),
        (("0" * 8 + "11", "1" * 10), ("0" * 8 + "11", "1" * 10), False, "so it forgets"),
        (("0" * 8 + "11", "1" * 10), ("1" * 10, "1" * 9 + "0"), False, "so it forgets"),
    ],
)
def test_verdicts_follow_the_numbers(tmp_path, lora, bound, held, words):
    journal = _journal(tmp_path / "j.jsonl", lora, bound, USE)
    holds, why = loramoe.verdict(journal)
    assert holds is held
    assert words in why
    assert "differ between the types by +0.100" in why
    assert loramoe.best_rate(journal, loramoe.BOUND) == loramoe.RATES[1]
    mean, low, high = loramoe.gain(journal, loramoe.BOUND, loramoe.LORA, loramoe.SIZES[-1], "recall")
    assert mean == pytest.approx((bound[0].count("1") - lora[0].count("1")) / 10)
    assert low <= mean <= high
    if held:
        said = loramoe.tables(journal)
        assert "0.450 | 0.550" in said
        seeds = loramoe.SEEDS
        assert f"{10 * seeds} of {10 * seeds}" in said
        assert f"{2 * seeds} of {10 * seeds}" in said
        assert loramoe.figure(journal).height > 300


@pytest.mark.long
def test_it_runs_small(tmp_path):
    bench = Bench.embedded(tmp_path / "report.jsonl", tmp_path / "work", SMOKE, echo=lambda line: None)
    loramoe.measure(bench)
    assert len(bench.journal.of("loramoe")) == 1 + 2 * len(loramoe.RATES) + 3 * len(loramoe.SIZES)
    assert loramoe.tables(bench.journal)
    assert set(bench.journal.lines[f"loramoe/{loramoe.BOUND}/{loramoe.SIZES[0]}/0"]["use"]) == {"knowledge", "task"}
