"""The MoLE experiment: it learns from other prompts than it is measured on; its tables say what the journal holds."""

import pytest
import torch

from multilora.lab.reproduce.mole import GATES, MOST, gate_scene, main, shares_of, tables
from multilora.lab.world.caption import caption
from multilora.lab.world.report import Journal, composed_scene, sets
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
    assert len(GATES) == 4
