"""Grids over fields of a recipe: what each cell's recipe has, what is drawn once, what stands under each picture."""

import json

import pytest
from PIL import Image

from multilora.cli import main
from multilora.lab.evaluate import grid as lab
from multilora.lab.evaluate import workers
from multilora.lab.evaluate.grid import axis, draw_grid, folder_of, rows_of
from multilora.lab.evaluate.readings import Readers, Reading, told
from multilora.method import UnknownName
from tests.eval_standin import StandIn

ROW = {"prompt": "a pandu bear in a raio scarf", "base": "embedded", "method": "merge", "options": {}, "steps": 3,
       "loras": [{"name": "pandu", "reference": "pandu", "weight": 1.0},
                 {"name": "raio", "reference": "raio", "weight": 0.5}]}  # fmt: skip


def test_axes_are_read():
    assert axis("weight=0.6, 1") == lab.Axis("weight", ("0.6", "1"))
    assert axis("guidance=3,5").field == "guidance_scale"
    assert axis("prompt=a fox, sitting|a cat").values == ("a fox, sitting", "a cat")
    for text in ("weight", "=1", "weight=", "weight=1,,2", "weight=1,1"):
        with pytest.raises(ValueError, match="axis"):
            axis(text)


@pytest.mark.parametrize(
    ("text", "of", "wanted"),
    [
        ("method=merge,switch", lambda r: r["method"], ["merge", "switch"]),
        ("weight=0.6,1", lambda r: [u["weight"] for u in r["loras"]], [[0.6, 0.6], [1, 1]]),
        ("raio.weight=0.6,0@0|1@0.5", lambda r: [u["weight"] for u in r["loras"]], [[1.0, "0.6,0@0"], [1.0, "1@0.5"]]),
        ("pandu.positive_only=true,false", lambda r: r["loras"][0]["positive_only"], [True, False]),
        ("steps=2,7", lambda r: r["steps"], [2, 7]),
        ("guidance=1.5,3", lambda r: r["guidance_scale"], [1.5, 3]),
        ("size=64x96,128x128", lambda r: (r["width"], r["height"]), [(64, 96), (128, 128)]),
        ("negative=blurry|12", lambda r: r["negative_prompt"], ["blurry", "12"]),
        ("seed=1,2", lambda r: r["seed"], [1, 2]),
    ],
)
def test_a_field_is_set_in_its_cells_alone(text, of, wanted):
    before = json.dumps(ROW)
    (line,) = rows_of({"seed": 0, **ROW}, axis(text))
    assert [of(r) for r in line] == wanted
    assert json.dumps(ROW) == before


def test_an_option_goes_to_the_methods_that_have_it():
    found = rows_of(ROW, axis("every=1,2"), axis("method=merge,switch"))
    assert [[(r["method"], r["options"]) for r in line] for line in found] == [
        [("merge", {}), ("merge", {})],
        [("switch", {"every": "1"}), ("switch", {"every": "2"})],
    ]


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ("evry=1,2", None, "evry"),
        ("every=1,2", None, "every"),  # Merge has no such option
        ("method=merg,switch", None, "merg"),
        ("fox.weight=1,2", None, "fox.weight"),
        ("pandu.wieght=1,2", None, "wieght"),
        ("size=64,65", None, "size=64"),
        ("images=1,2", None, "images"),
        ("steps=1,2", "steps=3,4", "both axes are steps"),
        ("seed=" + ",".join(map(str, range(30))), "steps=" + ",".join(map(str, range(1, 30))), "at most 400"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(x, y, words):
    with pytest.raises(ValueError, match=words):
        rows_of(ROW, axis(x), axis(y) if y else None)


def test_weights_need_loras():
    with pytest.raises(ValueError, match="--lora"):
        rows_of({**ROW, "loras": []}, axis("weight=1,2"))
    with pytest.raises(UnknownName, match="field of LoRA pandu"):
        rows_of(ROW, axis("pandu.x=1,2"))


def test_a_grid_is_drawn_read_and_goes_on(tmp_path):
    readers, elements = Readers.load(), {"character": "pandu", "garment": "raio"}
    x, y = axis("every=1,2"), axis("method=merge,switch")
    drawn = []

    class Counting(StandIn):
        def __call__(self, recipe, cancel=None):
            drawn.append(recipe)
            return super().__call__(recipe, cancel)

    found = draw_grid(ROW, x, y, tmp_path, readers=readers, elements=elements, make=Counting)
    assert len(drawn) == 3  # Merge has no `every`: one picture in both its cells
    assert [[s.y for s in line] for line in found.squares] == [["merge"] * 2, ["switch"] * 2]
    assert found.squares[0][0].path == found.squares[0][1].path
    assert found.squares[1][0].path != found.squares[1][1].path
    assert {s.recipe.seed for line in found.squares for s in line} == {0}
    for line in found.squares:
        for s in line:
            (alone,) = readers.read([Image.open(s.path)], [ROW["prompt"]], [elements])
            assert s.reading.seen == alone.seen
            assert s.reading.clip == pytest.approx(alone.clip, abs=1e-3)
    sheet = Image.open(found.sheet)
    assert sheet.width > 2 * 256
    again = draw_grid(ROW, x, y, tmp_path, readers=readers, elements=elements, make=Counting)
    assert len(drawn) == 3
    assert [[s.reading for s in line] for line in again.squares] == [
        [s.reading for s in line] for line in found.squares
    ]
    assert folder_of(ROW, x, y) != folder_of(ROW, y, x)


def test_a_cell_that_fails_leaves_the_others(tmp_path):
    class Failing(StandIn):
        def __call__(self, recipe, cancel=None):
            if recipe.steps == 2:
                raise ArithmeticError("no")
            return super().__call__(recipe, cancel)

    found = draw_grid(ROW, axis("steps=2,3"), None, tmp_path, make=Failing)
    assert found.squares[0][0] is None
    assert found.squares[0][1].reading.seen == {}
    assert "ArithmeticError: no" in found.errors[0]
    assert found.sheet.is_file()


def test_readings_in_words():
    assert told(Reading(71.2, {"object": False, "style": True})) == "1 of 2 seen, no object; CLIP 71"
    assert told(Reading(seen={"style": True})) == "1 of 1 seen"
    assert told(Reading()) == ""


def call(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(w) for w in words])
    said = capsys.readouterr()
    return exit_.value.code or 0, said.out, said.err


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "ComposerRenderer", StandIn)
    status, out, err = call(capsys, "grid", "--y", "weight=0.6,1", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert len(found["cells"]) == 6
    assert {(c["x"], c["y"]) for c in found["cells"]} == {
        (m, w) for m in ("merge", "switch", "composite") for w in ("0.6", "1")
    }
    assert set(found["cells"][0]["seen"]) == {"character", "garment", "object", "background"}
    assert "recogniser b" in found["read_by"]["presence"]
    assert Image.open(found["sheet"]).width > 3 * 256
    status, out, err = call(
        capsys, "grid", "a pandu bear", "--lora", "pandu:0.7", "--x", "steps=2,3", "--method", "switch", "--option",
        "every=1", "--out", "here",
    )  # fmt: skip
    assert (status, out) == (0, "here/grid.png\n"), err


@pytest.mark.parametrize(
    ("words", "told_"),
    [
        (("--x", "evry=1,2"), "evry"),
        (("a fox", "--x", "weight=1,2"), "--lora"),
        (("--lora", "korv"), "PROMPT is missing"),
        (("a fox", "--lora", "nobody"), "nobody"),
        (("--x", "method=merge,switch", "--option", "strnegth=1"), "strnegth"),
    ],
)
def test_bad_words_are_refused_before_anything_is_drawn(capsys, tmp_path, monkeypatch, words, told_):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, "grid", *words)
    assert status == 2
    assert told_ in err
    assert out == ""
    assert not list(tmp_path.iterdir())
