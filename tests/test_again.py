"""The same recipe twice, and again from its PNG: bit-equal."""

import pytest
import torch

from multilora.pipelines.image import Composer
from multilora.recipe import Recipe, save_png
from tests import scene, tiny

STEPS = 3
pixels = scene.pixels


def composer_of(family, files_in=None):
    pipe = getattr(tiny, family)()
    composer = Composer(pipe)
    for lora in scene.loras(pipe, text=True):
        composer.add(lora, weight=0.8)
    return composer


@pytest.mark.parametrize(("family", "method"), [("sd15", "switch"), ("sd3", "composite")])
def test_the_same_recipe_twice_and_from_its_png_is_bit_equal(family, method, tmp_path):
    composer = composer_of(family)
    asked = {"method": method, "num_inference_steps": STEPS, "guidance_scale": 3.0, "seed": 5}
    first = composer("a fox", "blur", **asked)
    again = composer("a fox", "blur", **asked)
    assert torch.equal(pixels(first.images[0]), pixels(again.images[0]))
    path = save_png(first.images[0], tmp_path / "a.png", first.recipe)
    recipe = Recipe.from_png(path)
    assert recipe == first.recipe
    made = composer_of(family).compose(recipe)
    assert torch.equal(pixels(first.images[0]), pixels(made.images[0]))
    assert made.recipe == first.recipe
    other = composer("a fox", "blur", **{**asked, "seed": 6})
    assert not torch.equal(pixels(first.images[0]), pixels(other.images[0]))


def test_a_png_with_files_schedules_and_a_mask_is_made_again_by_a_fresh_composer(tmp_path):
    import PIL.Image

    import multilora as ml

    pipe = tiny.sd15()
    composer = Composer(pipe)
    mask = PIL.Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    for i, lora in enumerate(scene.loras(pipe, 2, text=True)):
        path = ml.save(lora, tmp_path / f"{lora.card.name}.safetensors")
        options = [
            {"mask": str(tmp_path / "mask.png"), "weight": "0@0,1@0.5", "text_encoder_weight": 0.4},
            {"positive_only": True, "blocks": {"up_blocks.*": 0.5}},
        ][i]
        composer.add(path, **options)
    out = composer("a fox", seed=2, num_inference_steps=STEPS, guidance_scale=2.0, scheduler="EulerDiscreteScheduler")
    path = save_png(out.images[0], tmp_path / "a.png", out.recipe)
    fresh = Composer(tiny.sd15())
    made = fresh.compose(Recipe.from_png(path))
    assert torch.equal(pixels(out.images[0]), pixels(made.images[0]))
    assert fresh.loras == {}
    ml.save(scene.loras(pipe, 2)[1], tmp_path / "fox.safetensors")
    with pytest.raises(ValueError, match="sha256"):
        fresh.compose(Recipe.from_png(path))


def test_one_picture_of_several_is_made_again(tmp_path):
    composer = composer_of("sd15")
    out = composer("a fox", seed=5, num_inference_steps=STEPS, num_images_per_prompt=3)
    assert len(out.images) == 3
    path = save_png(out.images[2], tmp_path / "c.png", out.recipe_of(2))
    recipe = Recipe.from_png(path)
    assert (recipe.images, recipe.index, recipe.seed) == (3, 2, 5)
    made = composer.compose(recipe)
    assert torch.equal(pixels(made.images[made.recipe.index if len(made.images) > 1 else 0]), pixels(out.images[2]))
    assert made.recipe.index == 2
