"""The MoLE experiment: it learns from other prompts than it is measured on; its tables say what the journal holds."""

import pytest
import torch

from multilora.lab.journal import Journal
from multilora.lab.reproduce import page
from multilora.lab.reproduce.gate_scenes import gate_scene
from multilora.lab.reproduce.mole import (
    BASE,
    EXPERIMENT,
    FULL,
    GATES,
    MOST,
    PAPER,
    SHARED,
    WAYS,
    main,
    shares_of,
    tables,
    verdict,
)  # fmt: skip
from multilora.lab.world.caption import caption
from multilora.lab.world.report import composed_scene, sets
from multilora.plan import Pass
from multilora.routing import Asked, Uniform
from multilora.trace import Seen

CHOSEN = ("pandu", "flamo", "heto")


def test_no_reference_says_a_held_out_prompt():
    held_out = {caption(composed_scene(CHOSEN, i), 1) for i in range(MOST)}
    found = [caption(gate_scene(CHOSEN, i), 1) for i in range(30)]
    assert not held_out & set(found)
    assert len(set(found)) > 10
    assert all(all(name in text for name in CHOSEN) for text in found)


def test_shares_are_means_over_layers_and_steps():
    a, b = Asked(Uniform()), Asked(Uniform())
    a.shares = {"x": torch.tensor([[1.0, 0.0], [0.5, 0.5]]), "y": torch.tensor([0.25, 0.75])}
    b.shares = {"x": torch.tensor([[0.0, 1.0]])}
    steps = [Seen(0, 2, (1.0, 1.0), (Pass(a),)), Seen(1, 2, (1.0, 1.0), (Pass(b),))]
    assert shares_of([steps]) == [0.25, 0.75]
    assert shares_of([[Seen(0, 1, (1.0, 1.0), (Pass((1.0, 1.0)),))]]) is None


def _entry(journal, cell, found, elements, **more):
    journal.add(
        f"picture/{cell}/{len(journal.lines)}", cell=cell, set=list(CHOSEN), found=found, asked=30, pictures=10,
        complete=found // 3, elements=dict(zip(CHOSEN, elements, strict=True)), generic=[4, 5],
        clip=[50.0, 60.0], **more,
    )  # fmt: skip


def test_the_tables(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    _entry(journal, "merge, weight 0.8", 20, (8, 6, 6))
    _entry(journal, "merge, weight 1", 24, (9, 8, 7))
    _entry(journal, "merge, weight 1/k", 29, (10, 10, 9))
    _entry(journal, "mole, own predictions", 15, (5, 5, 5), shares=[0.2, 0.5, 0.3])
    _entry(journal, "mole, own predictions, LoRA 2 masked out", 11, (6, 0, 5))
    said = tables(journal)
    assert "### k = 3" in said
    assert "| merge, best weight of the grid by B (1) | 10 | 0.80" in said
    row = next(line for line in said.splitlines() if line.startswith("| mole, own predictions |"))
    assert "0.50 (" in row
    assert row.endswith("| 55.0 | 0.50 |")
    masked = next(line for line in said.splitlines() if "LoRA 2 masked out" in line)
    assert "0 of 10" in masked
    assert "11 of 20" in masked
    assert "10 of 20" in masked
    with pytest.raises(ValueError, match="unknown way to train a gate 'best'"):
        main([str(tmp_path / "j.jsonl"), "--ways", "best"])


def test_every_test_set_has_k_loras_and_no_category_twice():
    assert [len(sets("test", k)) for k in (2, 3, 4, 5)] == [10, 18, 14, 4]
    assert len(GATES) == 5


def made_up(path, found, generic=(4, 3)):
    """A journal of 6 batches of each cell, k = 2 and 3: elements found of 12, generic ones (base, others) of 5."""
    journal = Journal(path)
    for k in (2, 3):
        for cell, count in found.items():
            for i in range(6):
                journal.add(
                    f"picture/{cell}/set{i}+{k}/0+4", cell=cell, set=list(CHOSEN[:k]), found=count + i % 2, asked=12,
                    pictures=4, complete=0, elements={}, clip=[50.0], shares=[0.5, 0.3, 0.2],
                    generic=[generic[0] if cell == BASE else generic[1], 5],
                )  # fmt: skip
    return journal


@pytest.mark.parametrize(
    ("gate", "generic", "held"), [(9, (4, 3), True), (7, (4, 3), False), (4, (4, 3), False), (9, (3, 3), False)]
)
def test_the_verdict_follows_the_numbers(tmp_path, gate, generic, held):
    """Against the best of the grid (8 of 12), not against weight 1 (6); the base must suffer at weight 1."""
    found = {BASE: 0, FULL: 6, "merge, weight 0.8": 8, SHARED: 3, PAPER: gate, f"mole, {WAYS[2]}": 10}
    journal = made_up(tmp_path / "world" / "mole.jsonl", {**found, f"mole, {WAYS[1]}": gate}, generic)
    holds, why = verdict(journal)
    assert holds is held
    assert f"the paper's gate against the best Merge {(gate - 8) / 12:+.2f}" in why
    assert f"the prompt's other elements {(generic[1] - generic[0]) / 5:+.2f}" in why
    assert "weight 1/k against weight 1 -0.25" in why
    assert "the strongest LoRA's share 0.50 (paper: row sums to 1), 0.50 (no balance)" in why
    assert EXPERIMENT.figure(journal).height > 300
    assert EXPERIMENT.where(Journal(tmp_path / "text" / "report.jsonl")).lines == journal.lines
    assert [one.name for one in page.measured(Journal(tmp_path / "text" / "report.jsonl"))] == ["mole"]


def test_without_every_comparison_nothing_holds(tmp_path):
    journal = made_up(tmp_path / "world" / "mole.jsonl", {FULL: 6, SHARED: 3, PAPER: 9})
    assert verdict(journal)[0] is False


@pytest.mark.long
def test_a_small_run_fills_every_cell_and_goes_on(tmp_path):
    from multilora.lab.reproduce import mole
    from multilora.lab.reproduce.bench import SMOKE, Bench

    bench = Bench(None, None, Journal(tmp_path / "text" / "report.jsonl"), tmp_path / "work", SMOKE)
    mole.measure(bench)
    journal = EXPERIMENT.where(bench.journal)
    lines = dict(journal.lines)
    assert {len(e["set"]) for e in journal.of("picture")} == {2, 3}
    assert {PAPER, BASE, SHARED, FULL} < {e["cell"] for e in journal.of("picture")}
    assert verdict(journal)[1].count("against") == 5
    mole.measure(bench)
    assert EXPERIMENT.where(bench.journal).lines == lines
