"""Records of scores and what they need; presence by recognisers and by reference pictures; DINO similarity."""

import importlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from multilora.lab.score import record
from multilora.lab.score.embed import Embedder
from multilora.lab.score.likeness import Likeness, Presence, load_eyes, read_references
from multilora.lab.score.presence import load_recogniser
from multilora.lab.score.presence import presence as presence_by_head
from multilora.lab.score.record import Score, ScoreFailed, Scorer, mean, measure, ready, resolve, scores
from multilora.lab.world.render import render
from multilora.lab.world.scene import sample_scene
from multilora.method import UnknownName, options_of

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def flat(colour, shade=0):
    return Image.new("RGB", (20, 14), tuple(max(0, c - shade) for c in COLOURS[colour]))


class Mean(Embedder):
    """A picture's mean colour, for references whose nearness can be worked out on paper."""

    library, name = "numpy", "mean colour"
    model = torch.nn.Linear(1, 1)
    preprocessing = "none"

    def _pictures(self, images):
        return torch.stack([torch.from_numpy(np.asarray(i, dtype=np.float32).mean((0, 1))) for i in images])


# -- records ---------------------------------------------------------------------------------------------------------


def test_the_folder_is_the_list_and_every_record_says_what_it_needs():
    found = scores()
    assert set(found) >= {"clip_text", "clip_image", "presence", "dino", "judge"}
    for name, one in found.items():
        assert one.name == name
        assert one.title
        assert one.unit
        assert one.higher is True
        assert one.needs
        assert set(one.needs) <= set(record.NEEDS)
        assert all(option.help for option in one.options), name
        assert one.fn.__doc__
    assert found["judge"].needs == ("prompt", "references")
    assert found["presence"].needs == ("element",)


def test_a_file_that_is_dropped_in_registers_its_scores(tmp_path, monkeypatch):
    import multilora.lab.score as package

    (tmp_path / "brightness.py").write_text(
        "from multilora.lab.score.record import score\n"
        "class Grey:\n"
        "    model = 'mean of Pillow L'\n"
        "    def __init__(self, scale): self.scale = scale\n"
        "    def numbers(self, images, texts, references):\n"
        "        assert texts == [] and references == []\n"
        "        return [self.scale * i.convert('L').getpixel((0, 0)) for i in images]\n"
        "@score(title='Brightness', needs=(), unit='0 to 255')\n"
        "def brightness(*, scale: float = 1.0):\n"
        "    return Grey(scale)\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        scorer = resolve("brightness", scale=0.5)
        assert scorer([Image.new("L", (2, 2), v) for v in (10, 200)]) == [5.0, 100.0]
        assert resolve(scorer, scale=2)([Image.new("L", (2, 2), 7)]) == [14.0]
        assert scorer.model == "mean of Pillow L"
        (tmp_path / "again.py").write_text((tmp_path / "brightness.py").read_text())
        importlib.invalidate_caches()
        with pytest.raises(ValueError, match="two scores are named brightness"):
            scores()
    finally:
        for name in ("brightness", "again"):
            sys.modules.pop(f"multilora.lab.score.{name}", None)
            vars(package).pop(name, None)


def made(run, needs=("prompt", "references"), name="made"):
    class Made:
        model = "hand made"

        def numbers(self, images, texts, references):
            return run(images, texts, references)

    return Scorer(Score(name, "Made", needs, "1", True, "", options_of(Made), Made))


def test_what_is_given_once_is_given_to_all():
    seen = []
    scorer = made(lambda *given: seen.append(given) or [1.0] * len(given[0]))
    images = [flat("red", i) for i in range(3)]
    scorer(images, "a fox", references=[images[0]])
    scorer(images, ["a", "b", "c"], references=[images[0], images[1:], (images[2],)])
    scorer(images, "a fox", references=images[1])
    assert seen[0][1:] == (["a fox"] * 3, [(images[0],)] * 3)
    assert seen[1][1:] == (["a", "b", "c"], [(images[0],), tuple(images[1:]), (images[2],)])
    assert seen[2][2] == [(images[1],)] * 3
    assert scorer([], [], references=[]) == []


@pytest.mark.parametrize(
    ("texts", "references", "message"),
    [
        (None, ["i"], "needs prompts"),
        ("a", None, "needs reference pictures"),
        (["a"], ["i"], "2 pictures but 1 prompts"),
        ("a", ["i", "i", "i"], "2 pictures but 3 references"),
        ("a", ["i", []], "picture 1 has an empty set"),
        (["a", 7], ["i"], "as text, got 7"),
    ],
)
def test_what_is_missing_or_too_many_is_said(texts, references, message):
    image = flat("red")
    given = None if references is None else [image if r == "i" else r for r in references]
    with pytest.raises(ValueError, match=message):
        made(lambda *_: [0, 0])([image, image], texts, given)


def test_a_score_that_loses_a_number_is_found_out():
    with pytest.raises(ValueError, match="made gave 1 numbers for 2 pictures"):
        made(lambda *_: [0.0], needs=())([flat("red")] * 2)


def test_names_and_options_are_checked():
    with pytest.raises(UnknownName, match=r"score 'clip_txt'.*Nearest: clip_text"):
        resolve("clip_txt")
    with pytest.raises(UnknownName, match="option of score clip_text 'modell'"):
        resolve("clip_text", modell="x")
    with pytest.raises(ValueError, match="torchmetrics"):
        resolve("clip_text", convention="percent")
    with pytest.raises(UnknownName, match="need of score f 'promt'"):

        @record.score(title="x", needs=("promt",), unit="1")
        def f():
            """Never called."""


def test_one_failing_score_costs_no_other():
    def fails(*_):
        raise ScoreFailed("the server is gone")

    images = [flat("red"), flat("blue")]
    good, bad = made(lambda i, *_: [2.0] * len(i), ("prompt",), "good"), made(fails, ("prompt",), "bad")
    found = measure([bad, good], images, prompts="x")
    assert (found.values, found.failed) == ({"good": [2.0, 2.0]}, {"bad": "the server is gone"})
    with pytest.raises(ValueError, match="two scores are named good"):
        measure([good, good], images, prompts="x")
    assert set(measure({"one": good, "two": good}, images, prompts="x").values) == {"one", "two"}
    assert ready([good, bad]) == ([good, bad], {})


def test_mean_leaves_out_what_has_no_answer():
    assert mean([1.0, math.nan, 0.0]) == 0.5
    assert math.isnan(mean([math.nan]))
    assert math.isnan(mean([]))


# -- presence --------------------------------------------------------------------------------------------------------


def test_presence_is_the_recognisers_own_answer_and_looks_once():
    images = [render(sample_scene(i)) for i in range(6)]
    elements = ["cat", "zib alien", "garment: robe", "object: none", "style: pixel", "gamo"]
    heads = [("character", "cat"), ("character", "zib"), ("garment", "robe"), ("object", "none"), ("style", "pixel"),
             ("style", "gamo")]  # fmt: skip
    eyes = load_recogniser("b")
    want = eyes.probabilities(images)
    scorer = resolve("presence")
    for odds in (False, True):
        got = resolve(scorer, odds=odds)(images, elements)
        for i, (head, label) in enumerate(heads):
            row = want[head][i]
            index = eyes.heads[head].index(label)
            assert got[i] == pytest.approx(float(row[index]) if odds else float(row.argmax() == index), abs=1e-5)
    source = scorer.source
    assert isinstance(source, Presence)
    for text in elements:
        assert scorer(images, text) == [float(v) for v in _by_head(images, eyes, *eyes_of(eyes, text))]
    assert source._seen.computed == 6
    assert "recogniser b (128 x 128 px, RGB)" in scorer.model


def eyes_of(eyes, text):
    head, index = eyes.find(text)
    return head, eyes.heads[head][index]


def _by_head(images, eyes, head, label):
    return presence_by_head(images, {head: label}, eyes)[head]


def test_elements_that_mean_several_or_nothing_are_refused():
    scorer = resolve("presence")
    with pytest.raises(ValueError, match=r"'red': say which, 'character_colour: red' or 'garment_colour: red'"):
        scorer([flat("red")], "red")
    with pytest.raises(UnknownName, match="Nearest: robot"):
        scorer([flat("red")], "robott")
    with pytest.raises(UnknownName, match="garment for recogniser b"):
        scorer([flat("red")], "garment: cat")


def test_likeness_is_the_nearest_reference_set():
    known = {c: [flat(c, 0), flat(c, 20)] for c in COLOURS}
    eyes = Likeness({"colour": known}, Mean())
    assert eyes.accuracy() == {"colour": (6, 6)}
    # One label of two colours: the mean over its references counts, not the nearest of them.
    known["blue"].append(flat("red"))
    eyes = Likeness({"colour": known}, Mean())
    images = [flat("green", 9), flat("blue", 11), flat("red", 3)]
    assert [labels["colour"] for labels in eyes.labels(images)] == ["green", "blue", "red"]
    got = eyes.probabilities(images)["colour"]
    vectors = {c: [np.asarray(i, dtype=np.float64)[0, 0] for i in known[c]] for c in COLOURS}
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    for image, row in zip(images, got, strict=True):
        seen = unit(np.asarray(image, dtype=np.float64)[0, 0])
        cosines = [np.mean([seen @ unit(v) for v in vectors[c]]) for c in COLOURS]
        want = np.exp(100 * np.array(cosines))
        assert row.tolist() == pytest.approx((want / want.sum()).tolist(), rel=1e-3, abs=1e-6)
    misfiled = Likeness(
        {"colour": {"red": [flat("red"), flat("blue"), flat("red", 9)], "blue": [flat("blue", 9)]}}, Mean()
    )
    assert misfiled.accuracy() == {"colour": (2, 3)}  # the blue one among the reds; blue has no second


def test_references_come_from_folders(tmp_path):
    for i, (category, label, scene) in enumerate(
        (c, label, sample_scene(40 + i, **{c: label}, style="flat"))
        for c, labels in (("character", ("cat", "robot", "bear")), ("background", ("snow", "city")))
        for label in labels
        for i in range(5)
    ):
        path = tmp_path / category / label / f"{i}.{('png', 'webp')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(scene).save(path)
    (tmp_path / "character" / "cat" / "notes.txt").write_text("not a picture")
    assert {c: {k: len(v) for k, v in labels.items()} for c, labels in read_references(tmp_path).items()} == {
        "background": {"city": 5, "snow": 5}, "character": {"bear": 5, "cat": 5, "robot": 5},
    }  # fmt: skip
    scorer = resolve("presence", eyes=str(tmp_path), embedder="embedded")
    held = [sample_scene(900 + i, background=("snow", "city")[i % 2], style="flat") for i in range(16)]
    images = [render(scene) for scene in held]
    assert mean(scorer(images, [scene.background for scene in held])) >= 0.85
    assert mean(scorer(images, ["city" if scene.background == "snow" else "snow" for scene in held])) <= 0.15
    right, asked = load_eyes(str(tmp_path)).accuracy()["background"]
    assert (right, asked) >= (8, 10)
    assert "references" in scorer.model
    assert "clip-anytorch embedded" in scorer.model


def test_references_that_cannot_serve_are_named(tmp_path):
    with pytest.raises(ValueError, match="wanted pictures as CATEGORY/LABEL/PICTURE"):
        read_references(tmp_path)
    with pytest.raises(ValueError, match=r"character has 1 labels.*'none'"):
        Likeness({"character": {"fox": [flat("red")]}}, Mean())
    with pytest.raises(ValueError, match="character/fox holds no pictures"):
        Likeness({"character": {"fox": [], "cat": [flat("red")]}}, Mean())
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(ValueError, match=r"reference picture: cannot read .*torn\.png"):
        read_references(tmp_path)


# -- DINO ------------------------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 35, "patch_size": 7}


def dino(folder, kind):
    """A DINO of random weights in its folder, and the model and processor that transformers loads from there."""
    import transformers as t

    config = {
        "dinov2": lambda: t.Dinov2Config(**SHAPE, mlp_ratio=2),
        "dinov3_vit": lambda: t.DINOv3ViTConfig(**SHAPE, intermediate_size=48, num_register_tokens=2),
        "dinov3_convnext": lambda: t.DINOv3ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1]),
        "vit": lambda: t.ViTConfig(**SHAPE, intermediate_size=48),
    }[kind]()
    torch.manual_seed(3)
    model = t.AutoModel.from_config(config).eval()
    if kind == "vit":
        model = t.ViTModel(config, add_pooling_layer=False).eval()  # as the first DINO's files are
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    processor = t.BitImageProcessor(
        size={"shortest_edge": 35}, crop_size={"height": 35, "width": 35}, image_mean=[0.5] * 3, image_std=[0.3] * 3
    )
    processor.save_pretrained(folder)
    return model, t.AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit", "dinov3_convnext", "vit"])
def test_dino_similarity_is_the_cosine_of_the_models_own_vectors(tmp_path, kind):
    model, processor = dino(tmp_path, kind)
    noise = [Image.fromarray(np.random.randint(0, 256, (35, 44, 3), dtype=np.uint8)) for _ in range(2)]
    images = [*noise, flat("red"), flat("blue"), render(sample_scene(1))]

    def vector(image):
        with torch.no_grad():
            out = model(**processor(image, return_tensors="pt"))
        row = out.pooler_output[0] if kind == "dinov3_convnext" else out.last_hidden_state[0, 0]
        return (row.double() / row.double().norm()).numpy()

    vectors = [vector(image) for image in images]
    scorer = resolve("dino", model=str(tmp_path))
    want = [100 * float(v @ vectors[4]) for v in vectors]
    assert scorer(images, references=[images[4]]) == pytest.approx(want, abs=1e-3)
    assert max(want) - min(want) > 1
    several = 100 * float(np.mean([vectors[0] @ v for v in vectors[2:]]))
    assert scorer(images[:1], references=[images[2:]]) == pytest.approx([several], abs=1e-3)
    assert all(part in scorer.model for part in (kind, "float32", "BitImageProcessor"))
    with pytest.raises(ValueError, match="reads no texts"):
        scorer.source.embedder.inner.texts(["a"])
    eyes = Likeness({"x": {"a": images[:1], "b": images[2:3]}}, scorer.source.embedder)
    assert [one["x"] for one in eyes.labels([images[0], images[2]])] == ["a", "b"]


def test_folders_without_a_whole_dino_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a model"):
        resolve("dino").load()
    with pytest.raises(ValueError, match=r"wanted a folder whose config\.json says one of dinov2"):
        resolve("dino", model=str(tmp_path / "none")).load()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="got bert"):
        resolve("dino", model=str(tmp_path)).load()
    from safetensors.torch import load_file, save_file

    dino(tmp_path, "dinov2")
    state = load_file(tmp_path / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors, such as layernorm\.weight"):
        resolve("dino", model=str(tmp_path)).load()
