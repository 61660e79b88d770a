"""What scripts write into the documentation is current; the examples run."""

import csv
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from docs import make_api, make_figures, make_pages
from examples import composlora, custom_method
from multilora.cli import main
from multilora.method import KINDS, methods
from multilora.plan import Moment

ROOT = Path(__file__).parents[1]


def test_the_api_page_is_current():
    assert make_api.PAGE.read_text() == make_api.page(), "run: python docs/make_api.py"


def test_the_api_page_has_every_method_and_no_object_without_words():
    text = make_api.PAGE.read_text()
    for kind in KINDS:
        for name in methods(kind):
            assert f"### {kind} {name}\n" in text
    assert "```text\nNone\n```" not in text
    assert not re.search(r" at 0x[0-9a-f]{6}", text)


@pytest.mark.parametrize("path", make_pages.pages(), ids=lambda p: p.stem)
def test_tables_and_verdicts_are_those_of_the_stored_results(path):
    assert path.read_text() == make_pages.made(path), "run: python docs/make_pages.py"


def test_the_leaderboard_says_what_an_evaluations_tables_say(tmp_path, monkeypatch):
    """On tables of known numbers: order by elements seen, the numbers of each cell in their places."""
    rows = []
    for m, name in enumerate(("weak", "strong")):
        for k in make_pages.KS:
            for measure, value in (("presence", 0.1 * k + 0.3 * m), ("complete", 0.01 * k), ("clip", 50 + k)):
                rows.append({"measure": measure, "method": name, "k": k, "value": value, "low": value - 0.05,
                             "high": value + 0.05, "pictures": 7})  # fmt: skip
            rows.append(
                {"measure": "presence", "method": name, "k": "", "value": 9, "low": 9, "high": 9, "pictures": 9}
            )
    (tmp_path / "tables").mkdir()
    for file in ("cells.csv", "costs.csv"):
        with open(tmp_path / "tables" / file, "w", newline="") as out:
            table = csv.DictWriter(out, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    (tmp_path / "evaluation.json").write_text(
        '{"steps": 17, "guidance": 2.5, "methods": {"a": {"weight": 0.75}, "b": {"weight": "1/k"}}}'
    )
    monkeypatch.setattr(make_pages, "KEPT", tmp_path / "kept")
    make_pages.keep(tmp_path)
    lines = make_pages.leaderboard().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| strong", "| weak"]
    assert lines[-1].startswith("17 steps, guidance 2.5, every LoRA at weight 0.75 or 1/k, ")
    assert "| weak | 0.20 (0.15 to 0.25), 0.02, n 7 | 0.30 (0.25 to 0.35), 0.03, n 7 |" in lines[3]
    with pytest.raises(ValueError, match=r"no tables/cells\.csv"):
        make_pages.keep(tmp_path / "kept")


def test_the_table_of_weights_for_pictures_is_that_of_its_journal(capsys):
    from benchmarks import weigh_pictures

    weigh_pictures.table(weigh_pictures.Journal(make_pages.ROOT / "docs" / "world" / "weigh_pictures.jsonl"))
    assert capsys.readouterr().out == (make_pages.ROOT / "benchmarks" / "weigh_pictures.md").read_text()


@pytest.mark.parametrize("name", ["lora", "composition", "guided_merge"])
def test_figures_are_those_of_the_stored_results(name):
    with Image.open(make_figures.IDEAS / f"{name}.png") as kept:
        assert kept.convert("RGB").tobytes() == getattr(make_figures, name)().convert("RGB").tobytes()


@pytest.mark.parametrize("name", ["loramoe", "lora_switch"])
def test_diagrams_are_current(name):
    assert (make_figures.IDEAS / f"{name}.svg").read_text() == getattr(make_figures, name)()


# -- examples --------------------------------------------------------------------------------------------------------


def test_the_published_testbed_would_be_drawn(tmp_path, capsys):
    """As far as it goes without the checkpoints: the plan of the evaluation over the published listing's form."""
    from multilora.lab.evaluate.settings import TESTBED

    with pytest.raises(FileNotFoundError, match=r"anime_lora_info\.json: not there; what to download"):
        composlora.words(tmp_path, "anime", [])
    listing = {
        c: [{"id": f"{c}_{i}", "name": c, "trigger": [f"{c} {i}"]} for i in range(n)] for c, n in TESTBED.items()
    }
    (tmp_path / "anime_lora_info.json").write_text(json.dumps(listing))
    (tmp_path / "anime").mkdir()
    for members in listing.values():
        for one in members:
            (tmp_path / "anime" / f"{one['id']}.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as exit_:
        main(composlora.words(tmp_path, "anime", ["--count", "3", "--dry-run"]))
    said = capsys.readouterr()
    assert not exit_.value.code, said.err
    assert f"{4 * 4 * 3} pictures: 4 methods, k = 2-5, 3 each, 200 steps" in said.err


@pytest.mark.long
def test_the_published_testbed_is_drawn_on_a_small_pipeline_of_its_class(tmp_path, capsys, monkeypatch):
    """The reality half from the hub ids to the report; a small pipeline of random weights stands in their place."""
    import diffusers

    import multilora as ml
    from tests import tiny

    pipe, asked = tiny.sd15(), []
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "from_pretrained", classmethod(lambda cls, name: asked.append(name) or pipe.vae)
    )
    monkeypatch.setattr(
        diffusers.StableDiffusionPipeline, "from_pretrained",
        classmethod(lambda cls, name, vae, safety_checker: asked.append(name) or pipe),
    )  # fmt: skip
    (tmp_path / "reality").mkdir()
    listing = {c: [{"id": f"{c}_1", "name": c, "trigger": [f"a {c}"]}] for c in ("character", "style")}
    (tmp_path / "reality_lora_info.json").write_text(json.dumps(listing))
    for seed, category in enumerate(listing):
        lora = tiny.lora_for(pipe, seed=seed, name=category, text_encoder=True)
        ml.save(lora, tmp_path / "reality" / f"{category}_1.safetensors")
    composlora.prepare(tmp_path)
    assert asked == [composlora.DECODER, composlora.REALITY]
    composlora.prepare(tmp_path)
    assert len(asked) == 2  # it is there
    monkeypatch.undo()
    more = ["--k", "2", "--count", "1", "--steps", "2", "--size", "64x64", "--methods", "none,merge,composite"]
    with pytest.raises(SystemExit) as exit_:
        main(composlora.words(tmp_path, "reality", more))
    said = capsys.readouterr()
    assert not exit_.value.code, said.err
    assert len(list((tmp_path / "evaluation_reality" / "pictures").glob("*.png"))) == 3
    assert (tmp_path / "evaluation_reality" / "report.html").is_file()


def test_fade_starts_with_the_first_lora_ends_with_the_last_and_never_leaves_a_gap():
    plan = custom_method.FADE(overlap=0.5)(["a", "b", "c"])
    rows = [plan(Moment(step, 60, 0.0, None, (1.0, 1.0, 1.0)))[0].row for step in range(60)]
    assert rows[0] == [1.0, 0.0, 0.0]
    assert rows[-1] == [0.0, 0.0, 1.0]
    assert rows[29][1] == 1.0
    assert all(abs(sum(row) - 1) < 0.05 for row in rows)
    jumps = [max(abs(x - y) for x, y in zip(a, b, strict=True)) for a, b in itertools.pairwise(rows)]
    assert max(jumps) < 0.15


@pytest.mark.long
def test_the_custom_method_draws(tmp_path):
    sheet = custom_method.draw(steps=3)
    assert sheet.width > 3 * 100


@pytest.mark.long
def test_the_notebooks_cells_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    book = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    names = {"__name__": "notebook"}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]).replace("STEPS = 25", "STEPS = 3"), "tour.ipynb", "exec"), names)
    assert set(names["pictures"]) == {"merge", "switch", "composite"}
    assert "merge {" in capsys.readouterr().out
    assert "docs" in sys.modules
