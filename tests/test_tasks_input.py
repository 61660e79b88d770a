"""The pictures that a picture is made from: how they are read, and what is refused, by name, before anything runs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from multilora.pipelines.image import Composer
from multilora.pipelines.load import load_controlnet
from multilora.pipelines.pictures import read_picture
from multilora.recipe import Recipe, save_png
from tests import scene, tiny, tiny_more, tiny_tasks
from tests.tiny_tasks import array, mask, picture

QUICK = {"num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def world():
    pipe = tiny.sd15()
    composer = Composer(pipe, controlnet=tiny_tasks.controlnet("sd15", pipe))
    composer.add(scene.loras(pipe, 1)[0])
    return composer, scene.Witness(pipe)


# -- reading --------------------------------------------------------------------------------------------------------


def test_a_picture_is_the_same_from_a_path_an_object_and_an_array(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    found = [
        read_picture("image", given)
        for given in (
            tmp_path / "a.png", str(tmp_path / "a.bmp"), image, np.asarray(image), np.asarray(image) / 255.0,
            torch.tensor(np.asarray(image)), np.dstack([np.asarray(image), np.full((32, 32), 255, np.uint8)]),
        )
    ]  # fmt: skip
    assert len({p.sha256 for p in found}) == 1
    assert [p.reference for p in found] == [str(tmp_path / "a.png"), str(tmp_path / "a.bmp"), *[""] * 5]
    assert read_picture("image", picture(1)).sha256 != found[0].sha256
    assert read_picture("image", np.asarray(image).reshape(16, 64, 3)).sha256 != found[0].sha256


def test_transparency_is_over_white_and_a_photo_stands_upright(tmp_path):
    clear = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    assert set(read_picture("image", clear).image.getdata()) == {(255, 255, 255)}
    assert set(read_picture("mask_image", Image.new("LA", (4, 2), (255, 0))).image.getdata()) == {255}
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture(0, 8, 4).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture("image", tmp_path / "turned.jpg").image.size == (4, 8)


# -- what is refused ------------------------------------------------------------------------------------------------

IMAGE, MASK = {"image": picture()}, {"image": picture(), "mask_image": mask()}
BAD = {
    "no file": ({"image": "none.png"}, ["image:", "none.png", "cannot read"]),
    "no picture": ({"image": __file__}, ["image:", "test_tasks_input.py", "cannot read"]),
    "a number": ({"image": 3}, ["image=int", "path", "PIL"]),
    "a list": ({"image": [picture()]}, ["image=list", "path", "PIL"]),
    "shape": ({"image": np.zeros((3, 32, 32), np.uint8)}, ["image: array of shape [3, 32, 32]", "[height, width, 3]"]),
    "beyond 1": ({"image": np.full((8, 8), 2.0)}, ["image: floats from 2 to 2", "0..1"]),
    "nan": ({"image": np.full((8, 8), np.nan)}, ["image: floats from nan"]),
    "beyond 255": ({"image": np.full((8, 8), 256)}, ["image: values from 256"]),
    "size": ({"image": picture(0, 33, 32)}, ["width=33 (of image; width= and height= resize it)", "multiple of 4"]),
    "mask alone": ({"mask_image": mask()}, ["mask_image without image"]),
    "mask of another size": ({**IMAGE, "mask_image": mask(16, 32)}, ["mask_image is 16 x 32", "image is 32 x 32"]),
    "a black mask": ({**IMAGE, "mask_image": Image.new("L", (32, 32), 100)}, ["mask_image", "no white part"]),
    "control of another size": (
        {**IMAGE, "control_image": picture(0, 64, 32)},
        ["control_image is 64 x 32", "image is 32 x 32", "width= and height="],
    ),
    "strength 0": ({**IMAGE, "strength": 0}, ["strength=0.0", "above 0 and at most 1"]),
    "strength 1.5": ({**IMAGE, "strength": 1.5}, ["strength=1.5", "at most 1"]),
    "strength a word": ({**IMAGE, "strength": "much"}, ["strength='much'", "at most 1"]),
    "no step": ({**IMAGE, "strength": 0.4}, ["strength=0.4 of num_inference_steps=2", "no step", "at least 0.5"]),
    "strength without a picture": ({"strength": 0.5}, ["strength", "merge"]),
    "control scale without": (
        {"controlnet_conditioning_scale": 0.5},
        ["controlnet_conditioning_scale=0.5", "control_image="],
    ),
    "control scale nan": (
        {"control_image": picture(), "controlnet_conditioning_scale": float("nan")},
        ["controlnet_conditioning_scale=nan", "finite"],
    ),
    "true guidance": ({"true_cfg_scale": 2.0}, ["true_cfg_scale=2", "StableDiffusionPipeline does not take it"]),
    "option": ({"pipeline_options": {"clip_skp": 1}}, ["pipeline option", "'clip_skp'", "clip_skip"]),
    "option of ours": ({"pipeline_options": {"generator": 1}}, ["pipeline option 'generator'", "Composer"]),
    "a tensor": (
        {"pipeline_options": {"prompt_embeds": torch.zeros(1)}},
        ["pipeline option prompt_embeds is a Tensor", "composing(pipe, ...)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_refused(world, case):
    composer, witness = world
    given, words = BAD[case]
    with scene.listening(composer.denoiser) as runs, pytest.raises(ValueError) as caught:
        composer("a fox", **{**QUICK, **given})
    assert not runs
    for word in words:
        assert word in str(caught.value), str(caught.value)
    witness.check(False)


def test_tasks_that_a_family_lacks_are_named():
    composer = Composer(tiny_more.z_pipe())
    with pytest.raises(ValueError) as caught:
        composer("a fox", image=picture(), control_image=picture(), width=32, height=32)
    assert "family z-image has no task 'ControlNet image-to-image'" in str(caught.value)
    assert "ControlNet, ControlNet inpainting, image-to-image, inpainting, text-to-image" in str(caught.value)
    with pytest.raises(ValueError, match=r"task 'ControlNet' needs a ControlNet: Composer\(controlnet=FOLDER\)"):
        composer("a fox", control_image=picture())


def test_a_controlnet_of_another_model_is_refused(tmp_path):
    sd15, sdxl, flux = tiny.sd15(), tiny.sdxl(), tiny.flux()
    with pytest.raises(ValueError, match="cross_attention_dim is 64, this pipeline's is 32"):
        Composer(sd15, controlnet=tiny_tasks.controlnet("sdxl", sdxl))
    with pytest.raises(ValueError, match=r"controlnet is a ControlNetModel.*wants a FluxControlNetModel"):
        Composer(flux, controlnet=tiny_tasks.controlnet("sd15", sd15))
    with pytest.raises(ValueError, match=r"controlnet .*none.* no config.json"):
        Composer(sd15, controlnet=tmp_path / "none")
    sd15.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="names 'UNet2DConditionModel', which is no ControlNet"):
        Composer(sd15, controlnet=tmp_path / "unet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    with pytest.raises(ValueError, match="could not be loaded"):
        load_controlnet(tmp_path / "empty")


# -- sizes and recipes ----------------------------------------------------------------------------------------------


def test_sizes(world):
    composer, _ = world
    out = composer("a fox", image=picture(0, 48, 24), strength=0.5, **QUICK)
    assert (out.images[0].size, out.recipe.width, out.recipe.height) == ((48, 24), 48, 24)
    out = composer("a fox", image=picture(0, 100, 50), mask_image=mask(100, 50), width=48, height=24, **QUICK)
    assert out.images[0].size == (48, 24)
    out = composer("a fox", control_image=picture(0, 40, 24), **QUICK)
    assert out.images[0].size == (40, 24)


def test_a_method_s_own_strength_is_still_its_own(world):
    composer, _ = world
    weak = composer("a fox", method="sum_of_differences", strength=0.25, **QUICK)
    assert (weak.recipe.options["strength"], weak.recipe.strength) == (0.25, None)
    both = composer(
        "a fox", method="sum_of_differences", options={"strength": 0.25}, strength=0.5, image=picture(), **QUICK
    )
    assert (both.recipe.options["strength"], both.recipe.strength) == (0.25, 0.5)


def test_a_controlnet_acts_by_its_scale(world):
    composer, _ = world
    asked = {**QUICK, "guidance_scale": 3.0}
    plain = array(composer("a fox", **asked).images[0])
    made = [array(composer("a fox", control_image=picture(s), **asked).images[0]) for s in (5, 6)]
    assert np.abs(made[0] - plain).max() > 5.0
    assert np.abs(made[0] - made[1]).max() > 1.0
    off = composer("a fox", control_image=picture(5), controlnet_conditioning_scale=0.0, **asked)
    assert np.abs(array(off.images[0]) - plain).max() <= 1.0
    assert off.recipe.controlnet == "ControlNetModel"


def test_a_png_with_pictures_and_a_controlnet_is_made_again(world, tmp_path):
    composer, _ = world
    composer.controlnet.save_pretrained(tmp_path / "net")
    fresh = Composer(composer.pipe, controlnet=str(tmp_path / "net"))
    picture().save(tmp_path / "a.png")
    picture(5).save(tmp_path / "c.png")
    out = fresh(
        "a fox",
        image=str(tmp_path / "a.png"),
        control_image=tmp_path / "c.png",
        strength=0.6,
        scheduler="EulerDiscreteScheduler",
        controlnet_conditioning_scale=0.7,
        pipeline_options={"control_guidance_end": 0.9, "guess_mode": False},
        **QUICK,
    )
    recipe = Recipe.from_png(save_png(out.images[0], tmp_path / "out.png", out.recipe))
    assert recipe == out.recipe
    assert recipe.controlnet == str(tmp_path / "net")
    assert recipe.task == "ControlNet image-to-image"
    made = Composer(tiny.sd15(), controlnet=str(tmp_path / "net")).compose(recipe)
    assert np.array_equal(array(made.images[0]), array(out.images[0]))
    assert made.recipe == recipe
    with pytest.raises(ValueError, match=r"ControlNet .*net.*holds none"):
        Composer(tiny.sd15()).compose(recipe)
    picture(1).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"image .*a.png' is not the picture of the recipe: sha256"):
        fresh.compose(recipe)
    moved = fresh.compose(recipe, pictures={"image": picture()})
    assert np.array_equal(array(moved.images[0]), array(out.images[0]))
    with pytest.raises(ValueError, match="mask_image: the recipe has no such picture; it has image, control_image"):
        fresh.compose(recipe, pictures={"mask_image": mask()})
    (tmp_path / "c.png").unlink()
    with pytest.raises(ValueError, match=r"control_image: cannot read"):
        fresh.compose(recipe, pictures={"image": picture()})
    inside = out.recipe.model_copy(update={"pictures": [out.recipe.pictures[0].model_copy(update={"reference": ""})]})
    with pytest.raises(ValueError, match="image of the recipe was in memory only; give it again"):
        fresh.compose(inside)
