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
    places = {(tuple(u.name for u in r.loras), r.seed) for _, r, _ in found}
    assert len(found) == 8
    assert len(places) == 4
    assert {seed for _, seed in places} <= {0, 1, 2}
    assert sorted(len(names) for names, _ in places) == [2, 2, 3, 3]
    assert [arm for *_, arm in found] != sorted(arm for *_, arm in found), "the order tells the method"
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


def test_two_arms_of_one_method_are_kept_apart(tmp_path):
    (tmp_path / "pictures").mkdir()
    for weight in (0.5, 1.0):
        loras = [LoraUse(name=name, reference=name, weight=weight) for name in SETS[0]]
        recipe = Recipe(prompt="a scene", base="embedded", method="merge", seed=1, steps=1, guidance_scale=3.0,
                        width=128, height=128, loras=loras)  # fmt: skip
        image = render(composed_scene(SETS[0], 0))
        (tmp_path / "pictures" / f"{weight}.png").write_bytes(png_bytes(image, recipe))
    assert sorted(arm for *_, arm in blind.chosen(tmp_path, 2)) == ["merge {} 0.5", "merge {} 1.0"]


BOTH = {"character": "pandu", "object": "heto"}
SEALED = {
    "1": {"method": "merge", "prompt": "a", "asked": BOTH, "b": {"character": True, "object": True}},
    "2": {"method": "switch", "prompt": "a", "asked": BOTH, "b": {"character": True, "object": False}},
    "3": {"method": "merge", "prompt": "b", "asked": {"character": "gorm"}, "b": {"character": True}},
    "4": {"method": "switch", "prompt": "b", "asked": {"character": "gorm"}, "b": {"character": False}},
}
ANSWERS = {
    "1": {"character": "pandu", "object": "none"}, "2": {"character": "pandu", "object": "none"},
    "3": {"character": "pandu", "object": "heto"}, "4": {"character": "gorm", "object": "heto"},
}  # fmt: skip


def counted(folder, sealed, answers):
    (folder / "sealed.json").write_text(json.dumps(sealed))
    (folder / "answers.json").write_text(json.dumps(answers))
    return blind.count(folder / "sealed.json", folder / "answers.json")


def test_agreement_is_counted_by_hand(tmp_path):
    found = counted(tmp_path, SEALED, ANSWERS)
    assert found["categories"] == {"character": [2, 1, 1, 0], "object": [0, 0, 1, 1]}
    assert found["methods"] == {"merge": [3, 1, 3], "switch": [3, 2, 1]}
    assert found["agreement"][0] == pytest.approx(3 / 6)
    chance = (3 * 4 + 3 * 2) / 36  # the reviewer says there of 3 of 6, B of 4
    assert found["kappa"] == pytest.approx((0.5 - chance) / (1 - chance))
    assert found["tau"][0] == -1.0, "the reviewer prefers Switch, B Merge"
    assert -1.0 <= found["tau"][1] <= found["tau"][2] <= 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"7": ANSWERS["1"]}, "pictures: unknown 7"),
        ({"2": None}, "pictures: missing 2"),
        ({"1": {"character": "pandu", "object": "ball"}}, "picture 1, object is 'ball', wanted one of heto, none"),
        ({"1": {"character": "heto", "object": "none"}}, "picture 1, character is 'heto', wanted one of gorm"),
        ({"1": {"character": "pandu", "Object": "heto"}}, "picture 1, categories: unknown Object; missing object"),
        ({"1": {}}, "picture 1, categories: missing character, object"),
        ({"1": ["pandu"]}, r"picture 1 is \['pandu'\], wanted {category: name}"),
        ({"1": {"character": ["pandu"], "object": "none"}}, r"picture 1, character is \['pandu'\], wanted one"),
    ],
)
def test_answers_that_do_not_fit_the_pages_are_refused(tmp_path, change, words):
    answers = {n: labels for n, labels in {**ANSWERS, **change}.items() if labels is not None}
    with pytest.raises(ValueError, match=words):
        counted(tmp_path, SEALED, answers)


def test_a_lora_from_elsewhere_is_refused(tmp_path):
    (tmp_path / "pictures").mkdir()
    drawn(tmp_path, "merge", ("pandu", "fox"), 0, render(composed_scene(SETS[0], 0)))
    with pytest.raises(ValueError, match="fox: no LoRAs of the embedded world"):
        blind.pages(tmp_path, tmp_path / "out")


def test_the_command_counts_and_says_plainly_what_is_wrong(tmp_path, capsys):
    counted(tmp_path, SEALED, ANSWERS)
    words = ["count", str(tmp_path), str(tmp_path / "answers.json")]
    assert blind.main(words) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 4
    for content, said in (("[]", "a list, wanted {number: {category: name}}"), ("{", "no JSON"), ("{}", "missing 1")):
        (tmp_path / "answers.json").write_text(content)
        assert blind.main(words) == 2
        assert said in capsys.readouterr().err
    assert blind.main(["count", str(tmp_path / "nowhere"), str(tmp_path / "answers.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert blind.main(["pages", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "no scene is drawn by all methods" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "code"), [([], 2), (["pages"], 2), (["count", "a"], 2), (["--help"], 0)])
def test_arguments_of_the_command_are_explained(words, code, capsys):
    with pytest.raises(SystemExit) as exit_:
        blind.main(words)
    said = capsys.readouterr()
    assert exit_.value.code == code
    assert "usage: python -m multilora.lab.evaluate.blind" in said.out + said.err


def test_a_folder_without_a_whole_scene_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no scene is drawn by all methods"):
        blind.chosen(tmp_path, 10)


def test_the_committed_figures_are_those_of_the_committed_labels(tmp_path):
    kept = Path(__file__).parents[1] / "docs" / "world" / "evaluation"
    labels = json.loads((kept / "blind_labels.json").read_text())
    found = counted(tmp_path, labels, {number: each["reviewer"] for number, each in labels.items()})
    assert found["pictures"] >= 200
    assert json.loads(json.dumps(found)) == json.loads((kept / "blind.json").read_text())
