"""Blind review of an evaluation: which pictures are shown, what is sealed, and the agreement by hand."""

import json
from pathlib import Path

import pytest
from PIL import Image

from multilora.lab.evaluate import blind
from multilora.lab.world.render import render
from multilora.lab.world.report import composed_scene
from multilora.lab.world.scene import sample_scene
from multilora.recipe import LoraUse, Recipe, png_bytes

SETS = [("pandu", "heto"), ("gorm", "vesto"), ("pandu", "raio", "vesto")]


def drawn(folder, method, names, index, image):
    loras = [LoraUse(name=name, reference=name) for name in names]
    recipe = Recipe(prompt=f"scene {index}", base="embedded", method=method, seed=index, steps=1, guidance_scale=3.0,
                    width=128, height=128, loras=loras)  # fmt: skip
    (folder / "pictures" / f"{method}-{'-'.join(names)}-{index}.png").write_bytes(png_bytes(image, recipe))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Merge shows what was asked for, Switch another scene without designs; the last scenes are Merge's alone."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "pictures").mkdir()
    for names in SETS:
        for i in range(4):
            drawn(folder, "merge", names, i, render(composed_scene(names, i)))
            if i < 3:
                drawn(folder, "switch", names, i, render(sample_scene(100 + i, character="cat", background="beach")))
    return folder


def test_all_methods_are_shown_on_the_same_scenes(evaluation):
    found = blind.chosen(evaluation, 8)
    places = {(tuple(u.name for u in r.loras), r.seed) for _, r in found}
    assert len(found) == 8
    assert len(places) == 4
    assert {seed for _, seed in places} <= {0, 1, 2}
    assert sorted(len(names) for names, _ in places) == [2, 2, 3, 3]
    assert [r.method for _, r in found] != sorted(r.method for _, r in found), "the order tells the method"
    assert found == blind.chosen(evaluation, 8)


def test_pages_have_numbers_and_the_seal_has_what_b_sees(evaluation, tmp_path):
    assert blind.pages(evaluation, tmp_path, 100) == 18
    sealed = json.loads((tmp_path / "sealed.json").read_text())
    assert list(sealed) == [str(i) for i in range(1, 19)]
    seen = {method: [v for e in sealed.values() if e["method"] == method for v in e["b"].values()]
            for method in ("merge", "switch")}  # fmt: skip
    assert sum(seen["merge"]) >= 0.9 * len(seen["merge"])
    assert sum(seen["switch"]) <= 0.1 * len(seen["switch"])
    assert {p.name for p in tmp_path.glob("*.png")} == {"page01.png", "legend.png"}
    with Image.open(tmp_path / "page01.png") as page:
        assert page.width > 5 * 256


def test_agreement_is_counted_by_hand(tmp_path):
    both = {"character": "pandu", "object": "heto"}
    sealed = {
        "1": {"method": "merge", "asked": both, "b": {"character": True, "object": True}},
        "2": {"method": "switch", "asked": both, "b": {"character": True, "object": False}},
        "3": {"method": "switch", "asked": {"character": "gorm"}, "b": {"character": False}},
    }
    answers = {"1": {"character": "pandu", "object": "none"}, "2": {"character": "pandu", "object": "none"},
               "3": {"character": "gorm", "object": "heto"}}  # fmt: skip
    (tmp_path / "sealed.json").write_text(json.dumps(sealed))
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    found = blind.count(tmp_path / "sealed.json", tmp_path / "answers.json")
    assert found["categories"] == {"character": [2, 1, 0, 0], "object": [0, 0, 1, 1]}
    assert found["methods"] == {"merge": [2, 1, 2], "switch": [3, 2, 1]}
    assert found["agreement"][0] == pytest.approx(3 / 5)
    assert found["tau"] == -1.0, "the reviewer prefers Switch, B Merge"


@pytest.mark.parametrize(
    ("answers", "words"),
    [({"7": {"object": "none"}}, "picture 7 is on no page"), ({"1": {"object": "ball"}}, "object is 'ball'.*heto")],
)
def test_answers_that_fit_nothing_are_refused(tmp_path, answers, words):
    sealed = {"1": {"method": "merge", "asked": {"object": "heto"}, "b": {"object": True}}}
    (tmp_path / "sealed.json").write_text(json.dumps(sealed))
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    with pytest.raises(ValueError, match=words):
        blind.count(tmp_path / "sealed.json", tmp_path / "answers.json")


def test_a_folder_without_a_whole_scene_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no scene is drawn by all"):
        blind.chosen(tmp_path, 10)


def test_the_committed_figures_are_those_of_the_committed_labels(tmp_path):
    kept = Path(__file__).parents[1] / "docs" / "world" / "evaluation"
    labels = json.loads((kept / "blind_labels.json").read_text())
    (tmp_path / "sealed.json").write_text(json.dumps(labels))
    (tmp_path / "answers.json").write_text(json.dumps({n: each["reviewer"] for n, each in labels.items()}))
    found = blind.count(tmp_path / "sealed.json", tmp_path / "answers.json")
    stored = json.loads((kept / "blind.json").read_text())
    assert found["pictures"] == stored["pictures"] >= 200
    assert found["agreement"] == pytest.approx(stored["agreement"])
    assert (found["categories"], found["methods"]) == (stored["categories"], stored["methods"])
    assert found["tau"] == pytest.approx(stored["tau"])
