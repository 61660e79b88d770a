"""CLIP scores: clip-anytorch's and transformers' own numbers on one set of weights; torchmetrics; what is cached."""

import sqlite3
import threading

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.functional.multimodal import clip_score

from multilora.lab.score.cache import File, Vectors, picture_hash
from multilora.lab.score.clip import load_clip
from multilora.lab.score.embed import Cached
from multilora.lab.score.record import resolve
from tests import tiny_clip
from tests.tiny_clip import SIZE, pictures

TEXTS = [
    "a fox in a robe",
    "zib alien, forest",
    "Ünïcode — 3 dogs!",
    "a",
    "neon city at night",
    "two ink print",
    "b c",
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("clip"))


def anytorch_numbers(images, texts):
    """100 cos per pair by clip-anytorch alone: its class, its tokenizer, its transform, its forward."""
    import clip

    model = tiny_clip.openai()
    x = torch.stack([clip.clip._transform(SIZE)(image) for image in images])
    with torch.no_grad():
        logits, _ = model(x, clip.tokenize(texts))
    return (100 * logits.diagonal() / model.logit_scale.exp()).tolist()


def transformers_numbers(folder, images, texts):
    """100 cos per pair by transformers alone."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        out = model(**processor(text=texts, images=images, return_tensors="pt", padding=True))
    return (100 * out.logits_per_image.diagonal() / model.logit_scale.exp()).tolist()


@pytest.mark.parametrize("size", [(SIZE, SIZE), (53, 37)])
def test_each_library_gives_our_numbers_on_the_same_weights(both, size):
    file, folder = both
    images = pictures(len(TEXTS), size)
    want = anytorch_numbers(images, TEXTS), transformers_numbers(folder, images, TEXTS)
    got = [resolve("clip_text", model=str(m), convention="cosine")(images, TEXTS) for m in (file, folder)]
    assert got[0] == pytest.approx(want[0], abs=1e-4)
    assert got[1] == pytest.approx(want[1], abs=1e-4)
    assert max(want[0]) - min(want[0]) > 10  # numbers that differ, some below 0
    assert min(want[0]) < 0
    # Without resizing the two libraries agree; their bicubic resizes do not (Pillow's and torchvision's on bytes).
    assert got[0] == pytest.approx(got[1], abs=1e-4 if size == (SIZE, SIZE) else 0.01)


def test_default_convention_is_torchmetrics(both):
    from transformers import CLIPModel, CLIPProcessor

    class Tensors:
        """torchmetrics 1.9 takes features as tensors, transformers 5 returns them in an output object."""

        def __init__(self):
            self.model = CLIPModel.from_pretrained(both[1]).eval()
            self.config = self.model.config

        def to(self, device):
            return self

        def get_image_features(self, pixel_values):
            return self.model.get_image_features(pixel_values).pooler_output.detach()

        def get_text_features(self, ids, mask):
            return self.model.get_text_features(ids, mask).pooler_output.detach()

    images = pictures(len(TEXTS), (40, 48))
    asked = Tensors(), CLIPProcessor.from_pretrained(both[1])
    tensors = [
        torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(48, 40, 3).permute(2, 0, 1) for i in images
    ]
    want = [float(clip_score(x, text, lambda: asked)) for x, text in zip(tensors, TEXTS, strict=True)]
    got = resolve("clip_text", model=str(both[1]))(images, TEXTS)
    assert got == pytest.approx(want, abs=1e-4)
    assert 0.0 in got
    pairs = [float(clip_score(x, tensors[2], lambda: asked)) for x in tensors]
    assert resolve("clip_image", model=str(both[1]))(images, references=[images[2]]) == pytest.approx(pairs, abs=1e-4)
    # Of many pictures torchmetrics clamps the mean: the mean of "cosine", not of ours.
    raw = resolve("clip_text", model=str(both[1]), convention="cosine")(images, TEXTS)
    assert max(sum(raw) / len(raw), 0) == pytest.approx(float(clip_score(tensors, TEXTS, lambda: asked)), abs=1e-4)


def test_long_texts_are_cut_alike_and_said_to_be(both):
    long = " ".join(f"word{i} fox" for i in range(60))
    images = pictures(1)
    found = []
    for model in both:
        with pytest.warns(UserWarning, match="1 of 2 texts are longer than this CLIP's 77 tokens"):
            found.append(load_clip(str(model)).texts([long, "a fox"]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert (found[0][0] - found[0][1]).abs().max() > 0.01
    assert resolve("clip_text", model=str(both[0]))(images, "short")


def test_of_several_references_the_mean_cosine_counts(both):
    images = pictures(5)
    scorer = resolve("clip_image", model=str(both[0]), convention="cosine")
    each = [[scorer([a], references=[b])[0] for b in images[2:]] for a in images[:2]]
    got = scorer(images[:2], references=[images[2:], images[2:4]])
    assert got == pytest.approx([sum(each[0]) / 3, sum(each[1][:2]) / 2], abs=1e-4)


def test_a_name_says_library_precision_and_preprocessing(both):
    for model, library in zip(both, ("clip-anytorch", "transformers"), strict=True):
        told = resolve("clip_text", model=str(model)).model
        assert all(part in told for part in (library, str(model), "float32", "bicubic 32 px", "100 max(cos, 0)")), told


def test_incomplete_folders_are_refused(both, tmp_path):
    with pytest.raises(ValueError, match="wanted a folder with transformers' CLIPModel"):
        load_clip(str(tmp_path))
    short = tmp_path / "short"
    short.mkdir()
    for path in both[1].iterdir():
        if path.name != "model.safetensors":
            (short / path.name).write_bytes(path.read_bytes())
    state = load_file(both[1] / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, short / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 of CLIPModel's tensors, such as visual_projection\.weight"):
        load_clip(str(short))


# -- what is kept ----------------------------------------------------------------------------------------------------


def counting(rows):
    asked = []

    def compute(things):
        asked.append(list(things))
        return torch.stack([rows[thing] for thing in things])

    return asked, compute


def test_equal_pictures_share_a_hash_and_others_do_not(tmp_path):
    image = pictures(3)[2]
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    first, second = (Image.open(tmp_path / name) for name in ("a.png", "a.bmp"))
    assert picture_hash(first) == picture_hash(second) == picture_hash(image.convert("RGBA"))
    other = image.copy()
    other.putpixel((3, 4), (1, 2, 3))
    flat = Image.frombytes("RGB", (SIZE // 2, SIZE * 2), image.tobytes())
    assert len({picture_hash(image), picture_hash(other), picture_hash(flat)}) == 3


def test_rows_are_computed_once_in_memory_and_across_runs(tmp_path):
    rows = {name: torch.randn(5) for name in "abc"}
    path = str(tmp_path / "deep" / "scores.sqlite")
    asked, compute = counting(rows)
    first = Vectors(compute, str, lambda: {"weights": 1}, path)
    torch.testing.assert_close(first(["a", "b", "a"]), torch.stack([rows["a"], rows["b"], rows["a"]]), rtol=0, atol=0)
    first(["b", "c"])
    assert asked == [["a", "b"], ["c"]]
    again = Vectors(compute, str, lambda: {"weights": 1}, path)
    assert torch.equal(again(["c", "a"]), torch.stack([rows["c"], rows["a"]]))
    assert len(asked) == 2
    other = Vectors(compute, str, lambda: {"weights": 2}, path)
    other(["a"])
    assert asked[2:] == [["a"]]
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*), count(DISTINCT model) FROM rows").fetchone() == (4, 2)
        assert db.execute("SELECT facts FROM models ORDER BY facts").fetchall() == [
            ('{"weights": 1}',),
            ('{"weights": 2}',),
        ]


def test_a_scorer_embeds_a_picture_once_and_keeps_it_for_the_next_run(both, tmp_path):
    path, images = str(tmp_path / "c.sqlite"), pictures(3)
    plain = load_clip(str(both[1]))
    want = plain.score(images, TEXTS[:3])
    runs = [Cached(plain, path) for _ in range(2)]
    for scorer in runs:
        assert scorer.score(images, TEXTS[:3]) == pytest.approx(want, abs=1e-4)
        scorer.image_score(images, [images])
    assert [(s._images.computed, s._words.computed) for s in runs] == [(3, 3), (0, 0)]
    facts = plain.facts
    assert '"shortest_edge": 32' in facts["preprocessing"]
    assert "torchvision" in facts["preprocessing"]
    assert len(facts["weights"]) == 64
    assert load_clip(str(both[0])).facts["preprocessing"].startswith("clip._transform(32)")
    moved = tiny_clip.openai()
    with torch.no_grad():
        moved.visual.proj[0, 0] += 1
    from multilora.lab.score.clip import Clip

    changed = Clip(moved, load_clip(str(both[0])).preprocess, "changed")
    assert changed.facts["weights"] != load_clip(str(both[0])).facts["weights"]


def test_a_full_disk_costs_the_caching_and_nothing_else(tmp_path):
    file = File(tmp_path / "c.sqlite")
    (pages,) = file._db.execute("PRAGMA page_count").fetchone()
    file._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.warns(RuntimeWarning, match="cannot be written to: database or disk is full"):
        file.put("m", "{}", {str(i): bytes(1000) for i in range(50)})
    assert file.get("m", ["0", "49"]) == {}  # all or nothing
    file.put("m", "{}", {"x": b"1"})  # said once
    file.close()


def test_a_file_that_is_no_cache_is_refused_and_untouched(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes, no database " * 50)
    with pytest.raises(ValueError, match=r"notes\.txt: not a cache file"):
        File(path)
    assert path.read_text().startswith("my notes")


def test_two_connections_write_one_file(tmp_path):
    files = [File(tmp_path / "c.sqlite") for _ in range(2)]

    def fill(file, mark):
        for i in range(40):
            file.put("m", "{}", {f"{i}": b"same", f"{mark}{i}": mark.encode()})

    threads = [threading.Thread(target=fill, args=(f, m)) for f, m in zip(files, "xy", strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    found = files[0].get("m", [f"{m}{i}" for i in range(40) for m in ("", "x", "y")])
    assert len(found) == 120
    for file in files:
        file.close()
