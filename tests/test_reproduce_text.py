"""Experiments on the embedded text model: the bench against plain code, the compositions by hand, the stored page."""

import json
import random
import statistics

import pytest
import torch

from multilora.cli import main
from multilora.lab.journal import Journal
from multilora.lab.reproduce import addition, analogy, few_shot, fisher_text, lorahub_text, negation, page
from multilora.lab.reproduce.bench import CHECKED, DRAWN, SMOKE, Bench, Size, Target, mean_interval, shown
from multilora.lab.reproduce.systems import summary
from multilora.lab.result_chart import Point, draw_lines, draw_points
from multilora.lab.train.fisher import estimate
from multilora.lab.world.language import examples, split_of
from multilora.lab.world.language_train import exam
from multilora.method import UnknownName
from tests.test_packaging import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    work = tmp_path_factory.mktemp("bench")
    return Bench.embedded(work / "report.jsonl", work / "work", Size(asked=11, seeds=1), echo=lambda line: None)


# -- the bench -----------------------------------------------------------------------------------------------------


def test_questions_are_the_exams_under_any_loras(bench):
    """Counts as language_train.exam has them; two LoRAs at weights are one merged LoRA; weight 0 is the base."""
    for loras, row in (((), None), (("reverse",), [1.0]), (("reverse", "sort"), [0.9, 0.8])):
        held = [bench.lora(name) for name in loras]
        with bench.weighed(held, row):
            wanted = exam(bench.model, bench.tokenizer, ("reverse", "first"), 11)
        for skill, counts in wanted.items():
            assert bench.right(Target(skill), held, row) == [counts["right"], counts["asked"]]
    with bench.weighed([bench.lora("reverse")], [1.0]):
        polite = exam(bench.model, bench.tokenizer, ("reverse",), 11, register="polite")["reverse"]
    assert bench.right(Target("reverse", "polite"), [bench.lora("reverse")]) == [polite["exact"], polite["asked"]]
    assert bench.right(Target("reverse"), [bench.lora("reverse")])[0] >= 10
    assert bench.right(Target("reverse"), [bench.lora("reverse")], [0.0])[0] <= 4


def test_what_methods_see_is_never_asked():
    for target in (*few_shot.TARGETS, *lorahub_text.TARGETS):
        seen = target.draw(100, 3) + target.draw(30, 0, CHECKED)
        assert all(split_of(e.prompt) == "train" for e in seen)
        asked = {e.prompt for e in target.held_out(100)}
        assert asked.isdisjoint(e.prompt for e in seen)
        assert all(e.register == target.register for e in seen)
    assert DRAWN != CHECKED
    halves = {n: addition._of_length(n, "train", 1, 20) for n in addition.LENGTHS}
    assert {len(e.prompt.split()[1]) for e in halves[3]} == {3}
    pools = {*few_shot.POOL, *lorahub_text.POOL}
    tasks = {t.skill for t in (*few_shot.TARGETS, *lorahub_text.TARGETS) if t.register == "plain"}
    assert pools.isdisjoint(tasks)
    assert "reverse_polite" not in pools


def test_the_loss_of_contents_counts_contents_only(bench):
    """Against transformers' loss of each example alone: the prompt, the tail and the end do not count."""
    wanted = examples("add", 4, split="held_out") + examples("last", 3, split="held_out")
    total = counted = 0.0
    for one in wanted:
        start, end = (bench.tokenizer(t)["input_ids"] for t in (one.prompt, f" {one.content}"))
        ids = torch.tensor([[*start, *end]])
        labels = ids.clone()
        labels[0, : len(start)] = -100
        with torch.no_grad():
            total += bench.model(input_ids=ids, labels=labels).loss.item() * len(end)
        counted += len(end)
    assert bench.content_loss(wanted) == pytest.approx(total / counted, rel=1e-4)


def test_other_weights_are_held_for_a_block(bench):
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    name = "model.layers.1.mlp.up_proj.weight"
    other = {name: torch.zeros_like(before[name])}
    with pytest.raises(KeyError), bench.holding(other):
        assert not bench.model.state_dict()[name].any()
        raise KeyError
    assert all(torch.equal(v, before[k]) for k, v in bench.model.state_dict().items())


def test_answers_leave_the_random_numbers(bench):
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    drawn = [bench.ask(examples("add", 9, split="held_out", register="rude"), sample=s) for s in (0, 1, 0)]
    assert torch.equal(torch.rand(3), first)
    assert drawn[0] == drawn[2]


def test_intervals_of_means():
    """A bootstrap of 200 normal numbers is the textbook interval, mean ± 1.96 s / sqrt(n), within a tenth of it."""
    rng = random.Random(3)
    values = [rng.gauss(2.0, 3.0) for _ in range(200)]
    half = 1.96 * statistics.stdev(values) / 200**0.5
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(statistics.fmean(values))
    assert mean - low == pytest.approx(half, rel=0.15)
    assert high - mean == pytest.approx(half, rel=0.15)
    assert mean_interval([0.5] * 4) == (0.5, 0.5, 0.5)
    assert shown([0.0, 1.0]) == "0.50 (0.00 to 1.00), n 2"
    with pytest.raises(ValueError, match="measured nothing"):
        mean_interval([])


# -- compositions --------------------------------------------------------------------------------------------------


def test_the_analogy_of_factors_is_the_published_one(bench):
    """A = λ A1 + (1 - λ)(A2 + A3), B = λ B1 + (1 - λ)(B2 - B3) with 1 the labelled source, 2 target, 3 source."""
    made = analogy.composed(bench, ("sort", "reverse"), "factor", 0.7)[0]
    one, two, three = (bench.lora(n) for n in ("sort_polite", "reverse", "sort"))
    assert len(made) == len(one) > 20
    for key, part in made.items():
        a = 0.7 * one[key].down.double() + 0.3 * (two[key].down.double() + three[key].down.double())
        b = 0.7 * one[key].up.double() + 0.3 * (two[key].up.double() - three[key].up.double())
        torch.testing.assert_close(part.delta().double(), b @ a, rtol=1e-4, atol=1e-5)
    whole = analogy.composed(bench, ("sort", "reverse"), "delta", 0.5)[0]
    for key, part in whole.items():
        by_hand = 0.5 * (one[key].delta() - three[key].delta() + two[key].delta())
        torch.testing.assert_close(part.delta(), by_hand, rtol=1e-4, atol=1e-5)
        assert by_hand.norm() > 0


def test_negation_subtracts_and_its_control_has_the_same_norm(bench):
    rude = bench.lora("rude")
    subtracted = negation._lora(bench, "library's LoRA", 0.5)
    control = negation._lora(bench, "random LoRA of its norm", 0.5)
    for key, part in rude.items():
        torch.testing.assert_close(subtracted[key].delta(), -0.5 * part.delta())
        assert control[key].norm() == pytest.approx(0.5 * part.norm(), rel=1e-4)
        cosine = (control[key].delta() * subtracted[key].delta()).sum() / control[key].norm() / subtracted[key].norm()
        assert abs(cosine) < 0.5


def test_a_mask_of_answers_hides_nothing_from_the_model(bench):
    ids = torch.tensor([bench.tokenizer("reverse abc = cba")["input_ids"]])
    mask = torch.zeros_like(ids)
    mask[0, -1] = 1
    with torch.no_grad():
        ours, theirs = fisher_text.Answers(bench.model)(ids, mask), bench.model(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs)


def test_the_fisher_looks_at_answers_only(bench, monkeypatch):
    """The counted places are those that predict an answer's tokens and the end; a sampled Fisher of one place is the
    squared gradient of one word's log-probability there, by hand."""
    seen = []
    monkeypatch.setattr(fisher_text, "estimate", lambda model, lora, inputs, **settings: seen.append(inputs))
    found = examples("reverse", 3, 4)
    weights = dict(bench.model.named_parameters())
    fisher_text._fisher(bench, weights, found, 0)
    for one, given in zip(found, seen[0], strict=True):
        start, end = (bench.tokenizer(t)["input_ids"] for t in (one.prompt, one.answer))
        assert given["input_ids"][0].tolist() == start + end
        assert given["attention_mask"][0].tolist() == [0] * (len(start) - 1) + [1] * (len(end) + 1)
    mask = torch.zeros_like(seen[0][0]["input_ids"])
    mask[0, -1] = 1
    fisher = estimate(fisher_text.Answers(bench.model), None, [{**seen[0][0], "attention_mask": mask}], examples=1)
    assert {f"model.{name}" for name in weights} == set(fisher)
    norm = bench.model.model.norm.weight
    log = bench.model(input_ids=seen[0][0]["input_ids"]).logits[0, -1].log_softmax(-1)
    gaps = []
    for said in log:
        (slope,) = torch.autograd.grad(said, norm, retain_graph=True)
        gaps.append(float((slope.square() - fisher["model.model.norm.weight"]).norm() / slope.square().norm()))
    assert min(gaps) < 1e-3
    assert sorted(gaps)[1] > 0.01


# -- the commands and the page -------------------------------------------------------------------------------------


def _reproduce(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main(["reproduce", *map(str, words)])
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def measured(path):
    """Lines without when and in what time, and without those on whole commands."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{n: fact for n, fact in one.items() if n != "ran"} for one in found if page.COMMAND not in one["key"]]


def test_quick_runs_write_a_page_and_go_on(capsys, tmp_path, monkeypatch):
    code, out, err = _reproduce(capsys, "analogy", "--quick", "--jobs", 1, "--out", tmp_path / "r")
    assert (code, out.strip()) == (0, str(tmp_path / "r" / "reproduction.md"))
    assert "here.**" in err
    journal = tmp_path / "r" / "text" / "report.jsonl"
    before = measured(journal)
    *lines, last = map(json.loads, journal.read_text().splitlines())
    assert (last["experiments"], last["jobs"], last["before"], last["lines"]) == (["analogy"], 1, 0, len(lines))
    assert 0 < sum(one["ran"]["seconds"][0] for one in lines) <= last["wall"] + 0.1
    said = (tmp_path / "r" / "text.md").read_text()
    assert "## Analogy" in said
    assert "## Addition" not in said
    assert (tmp_path / "r" / "text" / "analogy.png").stat().st_size > 1000
    journal.write_text(json.dumps(lines[0]) + "\n")  # stopped after the first entry
    _reproduce(capsys, "analogy", "--quick", "--jobs", 2, "--out", tmp_path / "r")
    assert measured(journal) == before
    monkeypatch.setattr(Bench, "ask", lambda *a, **k: pytest.fail("measured again"))
    _reproduce(capsys, "analogy", "--quick", "--jobs", 1, "--out", tmp_path / "r")
    assert (tmp_path / "r" / "text.md").read_text() == said


def test_names_of_experiments(capsys, tmp_path):
    code, out, _ = _reproduce(capsys, "--list")
    assert code == 0
    assert all(name in out for name in page.NAMES)
    code, _, err = _reproduce(capsys, "adition", "--out", tmp_path / "r")
    assert code == 2
    assert "addition" in err
    assert not (tmp_path / "r").exists()
    with pytest.raises(UnknownName):
        page.experiment("negatoin")
    with pytest.raises(ValueError, match="nothing was measured"):
        page.text(Journal(tmp_path / "none.jsonl"))


@pytest.mark.long
@pytest.mark.parametrize("name", page.NAMES)
def test_every_experiment_runs_small(name, tmp_path):
    page.reproduce([name], tmp_path, size=SMOKE, echo=lambda line: None)
    assert page.experiment(name).title in (tmp_path / "reproduction.md").read_text()


def test_the_stored_page_is_that_of_the_stored_journal():
    journal = Journal(DOCS / "text" / "report.jsonl")
    measured = {one.name for one in page.measured(journal)}
    assert set(page.NAMES) - measured <= {"mole"}, "its pictures take hours and are not drawn yet"
    assert (DOCS / "text.md").read_text() == page.text(journal)
    assert (DOCS / "reproduction.md").read_text() == summary(page.measured(journal), journal, page.times(journal))
    for name in measured:
        assert (DOCS / "text" / f"{name}.png").is_file()


def test_the_stored_journal_is_reproduced_where_it_is_cheap(bench):
    """Counts of two stored cells, measured again with the machine at hand; greedy answers may differ in a tie."""
    journal = Journal(DOCS / "text" / "report.jsonl")
    stored = journal.lines["addition/alone/reverse"]["right"]
    full = Bench(bench.model, bench.tokenizer, journal, bench.work)
    for skill in ("reverse", "sort_digits"):
        again = full.right(Target(skill), [full.lora("reverse")])
        assert again[1] == stored[skill][1]
        assert abs(again[0] - stored[skill][0]) <= 1
    pair = journal.lines["addition/pair/reverse+count"]["ways"]["sum of updates"]["right"]
    again = full.right(Target("count"), [full.lora("reverse"), full.lora("count")], [1.0, 1.0])
    assert abs(again[0] - pair["count"][0]) <= 1


def _journal(tmp_path, entries):
    journal = Journal(tmp_path / "made.jsonl")
    for key, facts in entries.items():
        journal.add(key, **facts)
    return journal


def test_verdicts_follow_the_numbers(tmp_path):
    """The same rule on made-up journals, one where the claim holds and one where it does not."""
    names = [f"{a}-{b}" for a, b in analogy.pairs()[:6]]
    for gain, held in ((30, True), (-3, False)):
        named = ("source's polite LoRA", "analogy of updates", "analogy of updates, scale chosen", "trained for it")
        ways = {w: {"asked": 100, "right": 60, "polite": 60, "exact": 10} for w in named}
        ways[analogy.PAPER] = {"asked": 100, "right": 60, "polite": 60, "exact": 10 + gain}
        found = _journal(tmp_path / str(gain), {f"analogy/pair/{name}": {"right": ways} for name in names})
        holds, why = analogy.verdict(found)
        assert holds is held
        assert f"{gain / 100:+.2f}" in why
    for rude, right, held in ((40, 99, True), (60, 99, False), (40, 90, False)):
        entries = {}
        for strength, numbers in ((0.0, (100, 99)), (1.0, (rude, right))):
            entries[f"negation/library's LoRA/{strength}"] = {
                "strength": strength, "loss": 0.1, "rude": [numbers[0], 300], "polite": [0, 300],
                "right": [numbers[1], 100], "checked": [numbers[0], 95 - strength, 100],
            }  # fmt: skip
        assert negation.verdict(_journal(tmp_path / f"{rude} {right}", entries))[0] is held


# -- figures -------------------------------------------------------------------------------------------------------


def test_points_and_lines_stand_where_their_numbers_are():
    picture = draw_points(
        [Point("a", 0.25, 0.2, 0.3), Point("b", 0.75, 0.7, 0.8), Point("c", 1.0, 1.0, 1.0)], title="t"
    )
    colour = (0, 114, 178)
    found = {}
    for y in range(picture.height):
        row = [x for x in range(picture.width) if picture.getpixel((x, y)) == colour]
        if row:
            found.setdefault(y // 34, []).append((min(row), max(row)))
    middles = [statistics.fmean(a + b for a, b in spans) / 2 for spans in found.values()]
    dots = sorted({round(m) for m in middles})
    assert len(dots) >= 3
    assert (dots[-1] - dots[0]) > 100
    lines = {"up": [Point("", y, y, y, x=x) for x, y in ((1, 0.0), (5, 0.5), (100, 1.0))]}
    for even in (True, False):
        chart = draw_lines(lines, title="t", axis="examples", even=even)
        marks = [
            (x, y) for x in range(chart.width) for y in range(150, chart.height) if chart.getpixel((x, y)) == colour
        ]
        left = min(marks)
        right = max(marks)
        assert right[0] - left[0] > 400
        assert left[1] - right[1] > 200, "the picture's top is the larger number"
    with pytest.raises(ValueError, match="at least one"):
        draw_points([], title="t")
    with pytest.raises(ValueError, match="at least one"):
        draw_lines({"a": []}, title="t", axis="x")
