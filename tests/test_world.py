"""The embedded world: drawer, captions, labels, the linear encoder, and the shipped base model."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from multilora.lab.world.caption import caption
from multilora.lab.world.designs import CATEGORIES, DESIGNS
from multilora.lab.world.render import looks, render
from multilora.lab.world.scene import CLASSES, COLOURED, labels, sample_scene

BASE = Path(__file__).resolve().parents[1] / "assets" / "base"


@pytest.mark.parametrize("seed", [0, 7, 123456])
def test_a_seed_decides_every_byte(seed):
    scene = sample_scene(seed)
    assert scene == sample_scene(seed)
    assert render(scene).tobytes() == render(sample_scene(seed)).tobytes()
    assert render(scene).tobytes() != render(sample_scene(seed + 1)).tobytes()
    assert caption(scene, 3) == caption(sample_scene(seed), 3)


def test_pictures_have_the_asked_size():
    assert render(sample_scene(1)).size == (128, 128)
    assert render(sample_scene(1), size=64).size == (64, 64)


def test_labels_say_what_the_scene_is():
    for seed in range(300):
        scene = sample_scene(seed)
        found = labels(scene)
        for category in CATEGORIES:
            assert found[category] == getattr(scene, category)
            assert found[category] in CLASSES[category]
            assert found[f"{category}_design"] is None
        for category in COLOURED:
            expected = None if scene.style == "print" else getattr(scene, f"{category}_colour")
            assert found[f"{category}_colour"] == expected
        assert (scene.garment == "none") == (scene.garment_colour is None)
        assert scene.garment_colour != scene.character_colour


def test_captions_name_what_is_there():
    for seed in range(300):
        scene = sample_scene(seed)
        for variant in range(3):
            text = caption(scene, variant)
            words = text.replace(",", " ").replace("bunny", "rabbit").split()
            assert scene.character in words
            for category in ("garment", "object"):
                if getattr(scene, category) != "none":
                    assert getattr(scene, category) in words
                absent = set(CLASSES[category]) - {getattr(scene, category), "none"}
                assert not absent & set(words), text
            if scene.style != "print":
                for category in COLOURED:
                    assert getattr(scene, f"{category}_colour") in (*words, None)
    assert len({caption(sample_scene(5), i) for i in range(12)}) > 4


@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_is_fixed_named_and_unlike_the_base(name):
    design = DESIGNS[name]
    scene = sample_scene(11, designs={design.category: name})
    assert getattr(scene, design.category) == design.kind
    assert labels(scene)[f"{design.category}_design"] == name
    assert design.trigger in caption(scene)
    assert design.trigger == f"{name} {design.kind}"
    assert looks(scene)[design.category] == design.look
    # the base's sampler never draws it
    for seed in range(200):
        fixed = {design.category: design.kind}
        assert looks(sample_scene(seed, **fixed))[design.category] != design.look
    calm = {"garment": "none", "object": "none", "background": "plain", "style": "flat"}
    calm.pop(design.category, None)
    drawn = np.asarray(render(sample_scene(11, designs={design.category: name}, seed=11, **calm)), np.int64)
    for colour in ("red", "green", "white"):
        generic = sample_scene(
            11,
            seed=11,
            **{design.category: design.kind, f"{design.category}_colour": colour, **calm}
            if design.category in COLOURED
            else {design.category: design.kind, **calm},
        )
        moved = np.abs(drawn - np.asarray(render(generic), np.int64)).max(-1) > 40
        assert moved.sum() > 120


def test_designs_cover_every_category_and_hold_out_a_third():
    for category in CATEGORIES:
        splits = [d.split for d in DESIGNS.values() if d.category == category]
        assert splits.count("train") >= 3
        assert splits.count("test") >= 1
    share = sum(d.split == "test" for d in DESIGNS.values()) / len(DESIGNS)
    assert 0.25 <= share <= 0.4


def test_an_unknown_design_is_refused():
    with pytest.raises(ValueError, match="no garment design is named 'zib'"):
        sample_scene(0, designs={"garment": "zib"})


def test_a_design_changes_nothing_else():
    plain = sample_scene(21, garment="robe", seed=9)
    dressed = sample_scene(21, designs={"garment": "merlo"}, seed=9)
    before, after = looks(plain), looks(dressed)
    for category in ("background", "style"):
        assert before[category] == after[category]


def test_the_encoder_is_the_projection():
    from multilora.lab.world import autoencoder
    from multilora.lab.world.settings import SMOKE

    pictures = autoencoder.pictures_of(range(40, 52))
    pca = autoencoder.fit_pca(pictures, SMOKE.latent_channels, SMOKE.latent_rms)
    model = autoencoder.build(SMOKE)
    autoencoder.write_encoder(model, pca)
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(pictures).float() / 255 * 2 - 1).latents.numpy()
    # independently: cut patches by hand, singular vectors of the centred patches
    scaled = pictures.astype(np.float64) / 255
    patches = np.stack(
        [
            scaled[n, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].ravel()
            for n in range(12)
            for y in range(16)
            for x in range(16)
        ]
    )
    centred = patches - patches.mean(0)
    _, values, rows = np.linalg.svd(centred, full_matrices=False)
    deviation = values[:16] / np.sqrt(len(patches) - 1)
    expected = centred @ rows[:16].T / np.sqrt(deviation) * (SMOKE.latent_rms / np.sqrt(deviation.mean()))
    expected = expected.reshape(12, 16, 16, 16).transpose(0, 3, 1, 2)
    signs = np.sign((expected * latents).sum((0, 2, 3)))[None, :, None, None]
    assert np.abs(latents - expected * signs).max() < 1e-3
    assert abs(np.sqrt((latents**2).mean()) - SMOKE.latent_rms) < 0.02


def test_every_caption_word_is_one_token(tmp_path):
    from multilora.lab.world.settings import SMOKE
    from multilora.lab.world.text import _merges, _words, encode_texts, write_tokenizer

    tokenizer = write_tokenizer(tmp_path, SMOKE)
    words = _words(SMOKE)
    assert _merges(words) == _merges(words[::-1]), "token numbers must not depend on an order"
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    for design in DESIGNS.values():
        assert len(tokenizer(design.trigger).input_ids) == 4
    assert len(tokenizer("xylophone").input_ids) > 3
    rng = random.Random(0)
    texts = [caption(sample_scene(rng)) for _ in range(50)]
    rows = encode_texts(tokenizer, texts, SMOKE.tokens)
    assert rows.shape == (50, SMOKE.tokens)
    assert (
        tokenizer.decode(rows[0], skip_special_tokens=True).replace(" ", "").startswith(texts[0][:3].replace(" ", ""))
    )
    assert (rows[:, -1] == tokenizer.eos_token_id).all()


def test_the_shipped_base_loads_plainly():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (128, 128)
    size = sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file())
    assert size <= 18 * 2**20
