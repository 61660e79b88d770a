"""Intervals against scipy and the literature; tables against counts by hand; a page that needs no other file."""

import csv
import html.parser
import json
import math

import numpy as np
import pytest
import scipy.stats

from multilora.cli import main
from multilora.cli.eval import read_arms, read_ks
from multilora.lab.evaluate import evaluation, report, statistics
from multilora.lab.evaluate.combinations import read_library
from multilora.lab.evaluate.evaluation import Plan, arm, evaluate
from multilora.lab.evaluate.readings import Readers
from tests.eval_standin import StandIn

# -- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 101])
def test_the_bootstraps_interval_is_scipys(n):
    rng = np.random.default_rng(n)
    values = rng.gamma(2.0, 3.0, n)
    found = statistics.mean(values, resamples=40_000)
    wanted = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = wanted.high - wanted.low
    assert found.value == pytest.approx(values.mean())
    assert abs(found.low - wanted.low) < 0.03 * width  # two bootstraps of 40,000 differ by about 1%
    assert abs(found.high - wanted.high) < 0.03 * width
    assert found.n == n


def test_the_paired_interval_is_scipys_and_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(5)
    shared = rng.normal(0, 5, 60)
    a, b = shared + rng.normal(1.0, 0.5, 60), shared + rng.normal(0, 0.5, 60)
    found = statistics.difference(a, b, resamples=40_000)

    def apart(x, y, axis):
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    paired, free = (
        scipy.stats.bootstrap(
            (a, b), apart, n_resamples=20_000, method="percentile", paired=p, rng=np.random.default_rng(2)
        ).confidence_interval
        for p in (True, False)
    )
    width = paired.high - paired.low
    assert found.value == pytest.approx((a - b).mean())
    assert abs(found.low - paired.low) < 0.05 * width
    assert abs(found.high - paired.high) < 0.05 * width
    assert width < 0.4 * (free.high - free.low)
    assert found.apart
    assert not statistics.difference(b, b).apart


def test_wilsons_interval():
    low, high = statistics.wilson(81, 263)  # Newcombe 1998, table I
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    wanted = scipy.stats.binomtest(3, 17).proportion_ci(method="wilson")
    assert statistics.wilson(3, 17) == pytest.approx((wanted.low, wanted.high), abs=1e-6)
    assert statistics.wilson(0, 0) == (0.0, 1.0)


def test_where_all_pictures_agree_the_interval_is_not_a_point():
    assert statistics.mean([1.0] * 20) == statistics.share(20, 20)
    assert statistics.mean([0.0] * 20).high > 0.1
    half = statistics.mean([0.5] * 2)
    assert (half.value, half.n) == (0.5, 2)
    assert half.low < 0.2
    assert half.high > 0.8
    assert statistics.mean([7.5] * 20).low == 7.5
    assert math.isnan(statistics.mean([]).value)
    assert statistics.mean([]).n == 0


def test_a_handful_of_pictures_proves_nothing():
    assert not statistics.difference([1.0] * 5, [0.0] * 5).apart
    assert statistics.difference([1.0] * 6, [0.0] * 6).apart


def test_wins_and_lengths():
    assert statistics.wins([1, 2, 3, 3], [0, 2, 4, 1]) == (2, 1, 1)
    for of in (statistics.wins, statistics.difference):
        with pytest.raises(ValueError, match="2 and 1 values"):
            of([1, 2], [1])


# -- tables ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    plan = Plan(read_library("embedded").of("test"), [arm(n) for n in ("none", "merge", "switch")], ks=(2, 3), count=6)
    return evaluate(plan, tmp_path_factory.mktemp("evaluation"), make=StandIn)


def test_cells_are_the_counts_by_hand(results):
    rows = {(r["measure"], r["method"], r["k"]): r for r in report.cells(results)}
    assert len(rows) == 3 * 3 * 3
    for a in ("none", "merge", "switch"):
        for k in (2, 3, None):
            shown = [s for s in results.shown if s.arm == a and k in (None, s.k)]
            seen = [list(s.reading.seen.values()) for s in shown]
            assert rows["presence", a, k]["value"] == pytest.approx(np.mean([np.mean(one) for one in seen]))
            assert rows["complete", a, k]["value"] == pytest.approx(np.mean([all(one) for one in seen]))
            assert rows["clip", a, k]["value"] == pytest.approx(np.mean([s.reading.clip for s in shown]))
            assert rows["presence", a, k]["pictures"] == len(shown) == (6 if k else 12)
    assert rows["presence", "merge", None]["value"] > rows["presence", "switch", None]["value"] + 0.1
    assert rows["presence", "none", None]["value"] < 0.1


def test_categories_wins_and_differences_are_counts_by_hand(results):
    for r in report.categories(results):
        asked = [s.reading.seen[r["category"]] for s in results.of(r["method"]) if r["category"] in s.reading.seen]
        assert (r["pictures"], r["value"]) == (len(asked), pytest.approx(sum(asked) / len(asked)))
    found = {(r["method"], r["other"]): r for r in report.wins(results)}
    by_place = {s.wanted.place: s.reading.presence for s in results.of("switch")}
    apart = [s.reading.presence - by_place[s.wanted.place] for s in results.of("merge")]
    r = found["merge", "switch"]
    assert (r["won"], r["lost"]) == (sum(d > 0 for d in apart), sum(d < 0 for d in apart))
    assert (r["won"], r["tied"]) == (found["switch", "merge"]["lost"], found["switch", "merge"]["tied"])
    r = next(
        r for r in report.differences(results) if (r["measure"], r["method"], r["k"]) == ("presence", "switch", None)
    )
    assert r["against"] == "merge"
    assert r["value"] == pytest.approx(-np.mean(apart))


def test_files_hold_the_tables(results, tmp_path):
    import pyarrow.parquet

    paths = report.write(results, tmp_path)
    assert {p.name for p in paths} >= {"report.html", "summary.md", "pictures.csv", "pictures.parquet", "cells.csv"}
    rows = list(csv.DictReader((tmp_path / "tables" / "pictures.csv").open()))
    table = pyarrow.parquet.read_table(tmp_path / "tables" / "pictures.parquet").to_pylist()
    assert len(rows) == len(table) == len(results.shown)
    for row, same, s in zip(rows, table, results.shown, strict=True):
        assert (row["method"], int(row["k"]), int(row["seed"])) == (s.arm, s.k, s.wanted.item.recipe.seed)
        assert (same["seed"], same["prompt"]) == (s.wanted.item.recipe.seed, s.wanted.item.recipe.prompt)
        assert float(row["presence"]) == pytest.approx(same["presence"]) == pytest.approx(s.reading.presence)
        assert {c: row[f"seen_{c}"] for c in s.reading.seen} == {c: str(v) for c, v in s.reading.seen.items()}
    summary = (tmp_path / "summary.md").read_text()
    assert "| merge " in summary
    assert "k = 3" in summary
    widths = [{len(line) for line in block.splitlines()} for block in summary.split("\n\n") if block.startswith("| ")]
    assert all(len(w) == 1 for w in widths)


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.open, self.text, self.images = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        self.images += tag == "img"
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(results, tmp_path):
    page = _Page()
    report.write(results, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page.feed(text)
    assert page.open == []
    assert page.images == 3 * 12  # 12 places, 3 methods: best, worst and most apart
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert not [word for word in ("http://", "https://", "url(", "@import", "<script") if word in text]
    shown = " ".join(page.text)
    for words in ("recogniser b", "clip-anytorch embedded", "2 LoRAs: merge leads", "95%", "by Wilson"):
        assert words in shown, words
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_names_of_others_are_text_on_the_page(results, tmp_path):
    import dataclasses

    named = dataclasses.replace(results.plan.library, source="<script>alert(1)</script>")
    plan = dataclasses.replace(results.plan, library=named)
    report.write(dataclasses.replace(results, plan=plan), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_without_a_recogniser_the_clip_score_judges_and_without_both_nothing(results, tmp_path):
    import dataclasses

    blind = [dataclasses.replace(s, reading=dataclasses.replace(s.reading, seen={})) for s in results.shown]
    found = dataclasses.replace(results, shown=blind)
    assert report.measured(found) == ["clip"]
    assert "CLIP score" in report.findings(found)[0]
    assert report.wins(found)[0]["measure"] == "clip"
    report.write(found, tmp_path / "clip") if (tmp_path / "clip").mkdir() is None else None
    dark = [dataclasses.replace(s, reading=dataclasses.replace(s.reading, seen={}, clip=math.nan)) for s in blind]
    found = dataclasses.replace(results, shown=dark)
    assert report.measured(found) == []
    assert "Nothing was measured" in report.findings(found)[0]
    report.write(found, tmp_path)
    with pytest.raises(ValueError, match="no picture is done"):
        report.write(dataclasses.replace(results, shown=[]), tmp_path)


# -- the command -----------------------------------------------------------------------------------------------------


def call(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(w) for w in words])
    said = capsys.readouterr()
    return exit_.value.code or 0, said.out, said.err


def test_the_command_draws_reads_and_reports(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "CountingRenderer", StandIn)
    words = ("eval", "--methods", "none,merge@0.8,switch", "--option", "every=2", "--k", "2,4", "--count", 2,
             "--threads", 1, "--out", tmp_path / "out")  # fmt: skip
    status, out, err = call(capsys, *words)
    assert status == 0, err
    assert "| merge at 0.8" in out
    assert out.rstrip().endswith("report.html")
    assert "presence: recogniser b" in err
    assert "12 pictures: 3 methods" in err
    recipes = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(recipes) == 12
    status, out, err = call(capsys, *words, "--json")
    assert status == 0, err
    assert {r["method"] for r in json.loads(out)["cells"]} == {"none", "merge at 0.8", "switch, every 2"}
    status, out, err = call(capsys, *words[:-1], tmp_path / "out", "--steps", 7)
    assert status == 2
    assert "steps: 25 -> 7" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--methods", "merg"), "merg"),
        (("--k", "6"), "k = 6"),
        (("--k", "5-2"), "--k '5-2'"),
        (("--library", "nowhere"), "nowhere"),
        (("--split", "tset"), "tset"),
        (("--preset", "anime"), "--base"),
        (("--option", "evry=3"), "evry"),
        (("--clip", "ViT-Z"), "ViT-Z"),
        (("--workers", "0"), "--workers"),
    ],
)
def test_bad_words_are_refused_before_a_picture_is_drawn(capsys, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "CountingRenderer", lambda *_: pytest.fail("it draws"))
    status, out, err = call(capsys, "eval", "--count", "1", *words)
    assert status == 2
    assert told in err
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_how_much_it_is(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, "eval", "--methods", "all", "--dry-run", "--clip", "nobody/has-this")
    assert status == 0
    assert "CLIP score: nobody/has-this" in err, "named, and not loaded"
    assert f"{len(evaluation.training_free()) * 400} pictures" in err
    assert not list(tmp_path.iterdir())


def test_numbers_and_arms_of_the_command():
    assert read_ks("2-4") == (2, 3, 4)
    assert read_ks("3, 5") == (3, 5)
    found = read_arms("merge, switch,all,none", ["switch.every=3"])
    assert [a.name for a in found][:2] == ["merge", "switch, every 3"]
    assert {a.method.record.name for a in found} == {*evaluation.training_free()}
    assert found[1].method.options["every"] == 3


def test_who_reads_is_named():
    assert Readers().names == {"presence": "not measured", "CLIP score": "not measured"}
    assert "recogniser b" in Readers.load().names["presence"]
