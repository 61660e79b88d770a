"""Few steps, previews, offloaded models, U-Nets on other latents, pipelines of any task given by the user.

Few-step models and image prompts against dense weights: tests/test_cells.py.
"""

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from multilora.pipelines.image import Composer
from tests import scene, tiny, tiny_tasks
from tests.tiny_tasks import array, inputs


def test_switch_wants_a_step_for_each_lora():
    composer = Composer(tiny.sd15())
    for lora in scene.loras(composer.pipe, 2):
        composer.add(lora)
    with pytest.raises(ValueError, match="composite"):
        composer("a fox", method="switch", num_inference_steps=1, seed=0)
    with pytest.raises(ValueError, match="composite"):  # 3 steps, of which image-to-image runs one
        composer("a fox", method="switch", num_inference_steps=3, seed=0, image=tiny_tasks.picture(), strength=0.4)
    out = composer("a fox", method="switch", num_inference_steps=3, seed=0, image=tiny_tasks.picture(), strength=0.7)
    assert out.passes == [1, 1]


def test_the_first_executed_step_is_step_0():
    """A LoRA whose weight falls from 1 to 0 acts from the first step of image-to-image on, as it does from noise."""
    composer = Composer(tiny.sd15())
    lora = scene.loras(composer.pipe, 1)[0]
    seen = []
    asked = {"num_inference_steps": 8, "seed": 0, "image": tiny_tasks.picture(), "strength": 0.5}

    def progress(step, steps, info):
        seen.append((step, steps))

    composer.add(lora, weight="1@0,1@0.2,0@0.2")
    out = composer("a fox", progress=progress, **asked)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    composer.loras.clear()
    base = composer("a fox", **asked)
    assert np.abs(array(out.images[0]) - array(base.images[0])).max() > 3.0


# -- pipelines of any task ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionControlNetPipeline"]
)
def test_a_composer_around_a_pipeline_of_any_task_makes_every_task(cls):
    """Pictures are those of the Composer around the text-to-image pipeline, and no weight is copied."""
    pipe = tiny.sd15()
    net = tiny_tasks.controlnet("sd15", pipe)
    components = {**pipe.components, **({"controlnet": net} if "ControlNet" in cls else {})}
    own = getattr(diffusers, cls)(**components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    ours, theirs = Composer(own, controlnet=net), Composer(pipe, controlnet=net)
    lora = scene.loras(pipe, 1)[0]
    ours.add(lora), theirs.add(lora)
    for task in ("text-to-image", "image-to-image", "inpainting", "ControlNet"):
        asked = {"num_inference_steps": 2, "seed": 1, **inputs(task)}
        one, two = ours("a fox", **asked), theirs("a fox", **asked)
        assert one.recipe.task == two.recipe.task == task
        assert np.array_equal(array(one.images[0]), array(two.images[0]))
    sibling = ours.pipeline_for("image", "mask_image")
    assert sibling.unet is pipe.unet
    assert sibling.vae is pipe.vae
    assert ours.tasks == theirs.tasks


@pytest.mark.parametrize("family", list(tiny_tasks.FAMILIES))
def test_previews_of_every_family(family):
    """As large as the latents, and other from step to step."""
    make, quick, _ = tiny_tasks.FAMILIES[family]
    composer = Composer(make())
    seen = []
    asked = {"num_inference_steps": 2, "seed": 1, "strength": 1.0, "pipeline_options": quick, **inputs("inpainting")}
    composer("a fox", preview=lambda step, steps, small: seen.append(small), **asked)
    assert [small.size for small in seen] == [(8, 8)] * 2
    assert array(seen[1]).std() > 1.0
    assert not np.array_equal(array(seen[0]), array(seen[1]))


def test_what_was_set_on_the_pipeline_holds_in_the_others():
    pipe = tiny.flux()
    pipe.default_sample_size = 12
    pipe.set_progress_bar_config(disable=True, desc="mine")
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.transformer.to(torch.bfloat16)
    other = Composer(pipe).pipeline_for("image")
    assert other.default_sample_size == 12
    assert other._progress_bar_config == pipe._progress_bar_config
    assert other._all_hooks is pipe._all_hooks
    assert {p.dtype for p in other.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in other.vae.parameters()} == {torch.float32}


def test_offloaded_models_make_the_same_picture():
    """Twice: diffusers takes off all hooks after a picture and puts them on again."""
    asked = {"num_inference_steps": 2, "seed": 1, "method": "composite", **inputs("inpainting")}
    pictures = []
    for offload in (False, True):
        composer = Composer(tiny.sd15())
        if offload:
            composer.pipe.enable_model_cpu_offload(device="cpu")
        for lora in scene.loras(composer.pipe, 2):
            composer.add(lora)
        pictures += [array(composer("a fox", **asked).images[0]) for _ in range(2)]
        assert hasattr(composer.denoiser, "_hf_hook") == offload
    assert all(np.array_equal(pictures[0], p) for p in pictures[1:])


def test_a_u_net_on_latents_of_another_width_inpaints():
    """As one of 4 channels does: outside the mask the latents of the last step are the picture's own."""
    pipe = tiny.sd15()
    config = {**pipe.unet.config, "in_channels": 6, "out_channels": 6}
    unet = tiny.seeded(UNet2DConditionModel.from_config(config), 3, 1.4)
    vae = tiny.seeded(tiny._vae(6), 1)
    pipe = StableDiffusionPipeline(**{**pipe.components, "unet": unet, "vae": vae}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    composer = Composer(pipe)
    composer.add(scene.loras(pipe, 1)[0])
    own = unet.config
    last = []
    asked = {"num_inference_steps": 3, "seed": 1, "strength": 0.7, **inputs("inpainting")}
    task = composer.pipeline_for("image", "mask_image")
    original = type(task.vae).decode

    def decode(self, latents, *args, **kwargs):
        last.append(latents)
        return original(self, latents, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoencoderKL, "decode", decode)
        composer("a fox", **asked)
        composer("a cat", **asked)
    assert unet.config is own
    white = torch.tensor(np.asarray(inputs("inpainting")["mask_image"]))[None, None] / 255.0
    kept = torch.nn.functional.interpolate(white, size=(8, 8))[0, 0] < 0.5
    one, two = (latents[0] for latents in last)
    assert torch.equal(one[:, kept], two[:, kept])
    assert scene.apart(one[:, ~kept], two[:, ~kept]) > 0.01


def test_a_u_net_made_for_inpainting_has_no_other_task():
    pipe = tiny.sd15()
    unet = tiny.seeded(UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9}), 3, 1.4)
    own = diffusers.StableDiffusionInpaintPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    composer = Composer(own)
    composer.add(scene.loras(own, 1)[0])
    before = copy.deepcopy(own.config)
    with pytest.raises(ValueError, match=r"9 input channels has no task 'text-to-image'.*tasks are inpainting"):
        composer("a fox")
    out = composer("a fox", num_inference_steps=2, seed=1, **inputs("inpainting"))
    assert out.recipe.task == "inpainting"
    assert composer.tasks == ["inpainting"]
    assert own.config == before
