"""The table of the nine systems, and its two experiments that the text page had not: LoRA, and composition."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from multilora.lab.journal import Journal
from multilora.lab.machine import processor
from multilora.lab.reproduce import composition, lora, page
from multilora.lab.reproduce.bench import Bench, Size
from multilora.lab.reproduce.systems import REASONS, SYSTEMS, html_page, rows, summary
from multilora.lab.world.report import METHODS


def picture_journal(path, shares):
    """A journal of made-up pictures: {method: {k: elements found of each 10}}, in 6 batches of 10 elements."""
    journal = Journal(path)
    for name, by_k in shares.items():
        for k, found in by_k.items():
            for i in range(6):
                key = f"composition/{name}/set{i}/0+4"
                journal.add(
                    f"{key}/{k}", cell=name, k=k, set=[], found=found + i % 2, asked=10, complete=0, pictures=2
                )
    return journal


def test_all_nine_systems_have_a_row_and_every_experiment_a_system():
    assert len(SYSTEMS) == 9
    named = [name for system in SYSTEMS for name in system.experiments]
    assert sorted(named) == sorted(page.NAMES)
    assert all(system.experiments for system in SYSTEMS)
    assert REASONS.keys() <= set(named)


def test_what_is_not_measured_is_said(tmp_path):
    journal = Journal(tmp_path / "text" / "report.jsonl")
    found = rows([], journal)
    assert len(found) >= 9
    assert all(row[4].startswith("not measured to its end") for row in found)


def test_composition_follows_the_numbers(tmp_path):
    for gain, held in ((1, True), (-2, False)):
        shares = {cell.name: {2: 5, 5: 4} for cell in METHODS}
        for name in composition.AGAINST:
            shares[name] = {2: 5, 5: 4 + gain}
        journal = picture_journal(tmp_path / str(gain) / "world" / "report.jsonl", shares)
        assert composition.gains(journal, "switch", 5) == pytest.approx([gain / 10] * 6)
        holds, why = composition.verdict(journal)
        assert holds is held
        assert f"k = 5 {gain / 10:+.2f}" in why
        assert "| switch |" in composition.tables(journal)
        assert composition.figure(journal).height > 300
        text = Journal(tmp_path / str(gain) / "text" / "report.jsonl")
        assert composition.where(text).lines == journal.lines
        (one,) = page.measured(text)
        said = summary([one], text, page.times(text))
        assert ("| holds |" if held else "| does not hold here: Switch and Composite leave each LoRA 1/k") in said
        assert "not measured to its end: `multilora reproduce lora`" in said


def test_a_gain_that_does_not_grow_does_not_hold(tmp_path):
    shares = {cell.name: {2: 3, 5: 3} for cell in METHODS}
    shares |= {name: {2: 7, 5: 6} for name in composition.AGAINST}
    assert not composition.verdict(picture_journal(tmp_path / "w.jsonl", shares))[0]


def lora_journal(path, right, merged=100):
    journal = Journal(path)
    for seed in range(4):
        share = {"base": [1, 10], "LoRA": [right, 10], "full fine-tuning": [8, 10]}
        journal.add(f"lora/task/{seed}", right=share, trainable=[50, 1000])
    operations = {"base": 100, "merged": merged, "beside": 140, "base again": 100}
    journal.add("lora/cost", operations=operations, ratios=dict.fromkeys(operations, 1.0))
    return journal


def test_lora_follows_the_numbers(tmp_path):
    for right, merged, held in ((8, 100, True), (9, 100, True), (6, 100, False), (8, 101, False)):
        journal = lora_journal(tmp_path / f"{right}-{merged}.jsonl", right, merged)
        holds, why = lora.verdict(journal)
        assert holds is held
        assert "5.0% of the" in why
        assert f"{merged} operations merged" in why
        assert "140" in lora.tables(journal)


def test_the_page_as_html_escapes_and_needs_nothing_beside_it(tmp_path):
    journal = lora_journal(tmp_path / "text" / "report.jsonl", 8)
    page.write(journal, tmp_path)
    said = (tmp_path / "reproduction.html").read_text()
    assert said == html_page(page.measured(journal), journal, page.times(journal), tmp_path)
    assert said.count("data:image/png;base64,") == 1
    assert "http" not in said.replace("https://arxiv.org", "")
    assert '<td><span class="yes">holds</span></td>' in said
    assert '<span class="">not measured to its end</span>: <code>multilora reproduce addition</code>' in said
    assert "`" not in re.sub(r'src="[^"]*"', "", said)
    assert f"<td>{processor()}, " in said


def test_a_merged_lora_runs_the_operations_of_the_base(tmp_path):
    bench = Bench.embedded(
        tmp_path / "text" / "report.jsonl", tmp_path / "work", Size(asked=3, seeds=1, training=0.02)
    )
    counts = lora._cost(bench)["operations"]
    assert counts["merged"] == counts["base"] == counts["base again"]
    assert counts["beside"] > counts["base"] * 1.2


def test_what_was_stopped_midway_does_not_keep_the_page_from_being_written(tmp_path):
    """Of every experiment the first line alone, beside one that is whole."""
    stored = Path(__file__).parents[1] / "docs"
    text = lora_journal(tmp_path / "text" / "report.jsonl", 8)
    for name, parts in page.NAMES.items():
        one = page.experiment(name)
        kept = one.where(Journal(stored / "text" / "report.jsonl"))
        own = one.where(text)
        if name != "lora":
            first = kept.of(parts[0])[0]
            own.add(first["key"], **{key: value for key, value in first.items() if key not in ("key", "ran")})
    text = Journal(text.path)
    said = page.write(text, tmp_path).read_text()
    assert "lora" in [one.name for one in page.measured(text)]
    assert "not measured to its end: `multilora reproduce negation`" in said
    assert "| holds |" in said


def test_one_command_from_nothing_has_a_row_of_its_own(tmp_path):
    journal = lora_journal(tmp_path / "text" / "report.jsonl", 8)
    before = page.times(journal)
    told = {"jobs": 2, "lines": 5, "wall": 3330.0}
    journal.add(f"{page.COMMAND}/a", experiments=["lora"], before=0, **told)
    journal.add(f"{page.COMMAND}/b", experiments=list(page.NAMES), before=3, **told)
    assert page.times(journal) == before
    journal.add(f"{page.COMMAND}/c", experiments=list(page.NAMES), before=0, **told)
    *same, last = page.times(journal)
    assert same == before
    assert last[0] == "`multilora reproduce` from nothing to its end, 2 processes"
    assert last[3:] == ("55.5", "", "5")
    with pytest.raises(ValueError, match="jobs: wanted 1 or more, got 0"):
        page.reproduce(["lora"], tmp_path, jobs=0)
