"""The token switch experiment: what routers learn from, and a verdict that follows from hand-made counts."""

import pytest

from multilora.lab.journal import Journal
from multilora.lab.reproduce import token_switch as ts
from multilora.lab.world.language import split_of
from multilora.lab.world.language_loras import PLANS


def _journal(path, shared, each):
    """Two seeds of one pool; [skills] counts right of 100 for the two ways that are compared."""
    journal, pool = Journal(path), "train split"
    skills = ts.POOLS[pool]
    right = {ts.SHARED: shared, ts.EACH: each, ts.SECOND: [90] * 4, ts.LORAMOE: [80] * 4}
    for way in ts.UNTRAINED:
        journal.add(f"token_switch/{pool}/{way}/-", right={s: [50, 100] for s in skills})
    for way, counts in right.items():
        for seed in (0, 1):
            found = {s: [n + seed, 100] for s, n in zip(skills, counts, strict=True)}
            journal.add(f"token_switch/{pool}/{way}/{seed}", right=found, parameters=516)
    return journal


@pytest.mark.parametrize(("shared", "holds"), [([70, 80, 90, 95], True), ([60, 80, 90, 93], False), ([95] * 4, True)])
def test_the_verdict_is_the_mean_difference_within_two_points(tmp_path, shared, holds):
    each = [70, 80, 90, 99]
    journal = _journal(tmp_path / "j.jsonl", shared, each)
    held, why = ts.verdict(journal)
    mean = sum(a - b for a, b in zip(shared, each, strict=True)) / 400
    assert held is holds is (mean >= -0.02)
    assert f"one route less a router in every layer: {mean:+.2f}" in why
    assert f"one route less LoRAMoE: {sum(shared) / 400 - 0.8:+.2f}" in why
    text = ts.tables(journal)
    for way in (*ts.UNTRAINED, *ts.ROUTERS, ts.LORAMOE):
        assert f"| {way} |" in text
    assert "| reverse (train split) | 0.50 |" in text
    assert "516" in text
    assert ts.figure(journal).width == 760


def test_routers_learn_from_training_prompts_of_all_skills_and_pools_keep_to_a_split():
    found = ts._examples("test split", 0)
    assert len(found) == 4 * ts.EXAMPLES
    assert {split_of(one["prompt"]) for one in found} == {"train"}
    assert found != ts._examples("test split", 1)
    assert all(PLANS[name].split == pool.split()[0] for pool, names in ts.POOLS.items() for name in names)
