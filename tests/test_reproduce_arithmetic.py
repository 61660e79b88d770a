"""Arithmetic on pictures: what is asked for, how strengths are chosen, and that the verdict follows the numbers."""

import random

import pytest

from multilora.lab.journal import Journal
from multilora.lab.reproduce import arithmetic_pictures as arithmetic
from multilora.lab.reproduce import page
from multilora.lab.reproduce.arithmetic_pictures import ALONE, ANALOGY, BOTH, EXPERIMENT, SOURCE, UNLEARNED
from multilora.lab.reproduce.bench import SMOKE, Bench
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.report import requested


def test_prompts_ask_for_the_class_and_name_no_design():
    assert len(UNLEARNED) >= 5
    for name in UNLEARNED:
        for index in range(6):
            scene, text = arithmetic.plain_scene(name, "negation", index)
            assert not scene.designs
            assert requested(scene, text)[DESIGNS[name].category] == DESIGNS[name].kind
            assert not any(design in text.split() for design in DESIGNS)
    assert arithmetic.plain_scene("pandu", "negation", 0) != arithmetic.plain_scene("pandu", "choose", 0)


def made_up(folder, *, own=4, rest=38, likened=9, alone=2):
    """At strength 1 the class is there `own` of 10 times (9 before) and the rest `rest` of 40 (39); at 2 the rest is
    gone. An analogy shows both in `likened` of 10, the target's LoRA in `alone`."""
    world = Journal(folder / "world" / "report.jsonl")
    if not world.lines:
        world.add("composition/merge, weight 1/set/0+4", cell="merge, weight 1", k=2, set=[], found=19, asked=20)
    journal = Journal(folder / "world" / "arithmetic.jsonl")
    for name in ("pandu", "gorm"):
        for strength, seen, other in ((0.0, 9, 39), (1.0, own, rest), (2.0, 0, 2)):
            counts = {"class": [seen, 10], "rest": [other, 40]}
            counts |= {"class, chosen by": [seen, 10], "rest, chosen by": [38 if strength < 2 else 2, 40]}
            journal.add(f"negation/{name}/{strength:g}", name=name, strength=strength, **counts)
    for i in range(6):
        way = {ALONE: alone, SOURCE: 1, ANALOGY: likened + i % 2, BOTH: 9}
        counts = {w: {"target": 9, "thing": 9, "both": n, "asked": 10} for w, n in way.items()}
        journal.add(f"analogy/korv+inka/{i}", pair=["korv", "inka"], target=f"t{i}", ways=counts)
    return journal


@pytest.mark.parametrize(
    ("numbers", "held"),
    [({}, True), ({"own": 5}, False), ({"rest": 30}, False), ({"likened": 1, "alone": 2}, False)],
)
def test_the_verdict_follows_the_numbers(tmp_path, numbers, held):
    journal = made_up(tmp_path, **numbers)
    holds, why = EXPERIMENT.verdict(journal)
    assert holds is held
    assert "two LoRAs added: 0.95" in why
    assert f"the class 0.90 to {numbers.get('own', 4) / 10:.2f}" in why
    assert "korv+inka - korv + t0" in EXPERIMENT.tables(journal)
    assert EXPERIMENT.figure(journal).height > 200
    text = Journal(tmp_path / "text" / "report.jsonl")
    assert EXPERIMENT.where(text).lines == journal.lines
    assert [one.name for one in page.measured(text)] == ["arithmetic_pictures"]  # of composition, one method is there


def test_a_strength_that_takes_the_rest_away_is_not_chosen(tmp_path):
    """2 has the class down to nothing."""
    for line in arithmetic.negated(made_up(tmp_path)).values():
        assert [e["strength"] for e in line] == [0.0, 1.0, 2.0]
        assert arithmetic.chosen(line)["strength"] == 1.0


def test_without_addition_nothing_holds(tmp_path):
    whole = made_up(tmp_path)
    (tmp_path / "world" / "report.jsonl").unlink()
    assert EXPERIMENT.verdict(whole) == (False, EXPERIMENT.verdict(whole)[1])
    assert "addition not measured" in EXPERIMENT.verdict(whole)[1]


def test_without_analogies_nothing_holds(tmp_path):
    whole, part = made_up(tmp_path), Journal(tmp_path / "part.jsonl")
    for entry in whole.of("negation"):
        part.add(entry["key"], **{k: v for k, v in entry.items() if k != "key"})
    assert EXPERIMENT.verdict(part)[0] is False


@pytest.mark.long
def test_a_small_run_draws_trains_and_goes_on(tmp_path):
    bench = Bench(None, None, Journal(tmp_path / "text" / "report.jsonl"), tmp_path / "work", SMOKE)
    state = random.getstate()
    arithmetic.measure(bench)
    assert random.getstate() == state
    journal = EXPERIMENT.where(bench.journal)
    assert [e["strength"] for e in journal.of("negation")] == [0.0, 0.5]
    (likened,) = journal.of("analogy")
    assert set(likened["ways"]) == {ALONE, SOURCE, ANALOGY, BOTH}
    assert (tmp_path / "work" / "arithmetic" / "korv_inka.safetensors").is_file()
    lines = dict(journal.lines)
    arithmetic.measure(bench)
    assert EXPERIMENT.where(bench.journal).lines == lines
