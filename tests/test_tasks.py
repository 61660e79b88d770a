"""Image-to-image, inpainting and ControlNet: every family, every method, against dense weights in the pipeline's loop.

tests/dense.py is the reference: deep copies of the model with W + sum_i w_i up_i down_i, one after the other. The
pipelines are those that the Composer uses, of the family's own classes in diffusers. Two pictures per prompt.
"""

import numpy as np
import pytest
import torch

from multilora.pipelines.image import Composer
from tests import dense, scene, tiny_tasks
from tests.tiny_tasks import FAMILIES, array

METHODS = ("merge", "switch", "composite")
TASKS = ("image-to-image", "inpainting", "ControlNet")
# U-Nets run floor(3 * 0.7) = 2 of the 3 steps, transformers' pipelines all 3.
STEPS, STRENGTH, WEIGHTS = 3, 0.7, (1.3, 1.1)
SIZED_BY_IMAGE = ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline")


def composer_of(family, task, text=False):
    """A Composer around the family's text-to-image pipeline, with two LoRAs, and a ControlNet for its tasks."""
    pipe = FAMILIES[family][0]()
    net = tiny_tasks.controlnet(family, pipe) if "ControlNet" in task else None
    composer = Composer(pipe, controlnet=net)
    loras = scene.loras(pipe, 2, text=text, strength=1.8 if family == "sdxl" else 1.0)
    for lora, weight in zip(loras, WEIGHTS, strict=True):
        composer.add(lora, weight=weight)
    return composer, loras


def call_of(family, task, pipe, pictures=2, seed=7, **more):
    """A call of the pipeline itself, its arguments written out."""
    _, quick, guidance = FAMILIES[family]
    given = tiny_tasks.inputs(task)
    if (family, task) == ("z", "ControlNet inpainting"):
        given["mask_image"] = [given["mask_image"]] * pictures
    elif "image" in given:
        given |= {"image": [given["image"]] * pictures, "strength": STRENGTH}
    if family in ("sd15", "sdxl") and task == "ControlNet":
        given = {"image": given["control_image"]}
    if "ControlNet" in task:
        given["controlnet_conditioning_scale"] = 0.5
    if type(pipe).__name__ in tiny_tasks.UNGUIDED:
        guidance = {}
    elif guidance:
        guidance = {**guidance, "negative_prompt": scene.NEGATIVE}
    side = tiny_tasks.SIZE
    sides = {} if type(pipe).__name__ in SIZED_BY_IMAGE else {"width": side, "height": side}
    wanted = {"output_type": "latent", **given, **quick, **guidance, **sides, **more}

    def call(pipe):
        seeds = [torch.Generator().manual_seed(seed + i) for i in range(pictures)]
        torch.manual_seed(0)  # SD3's ControlNet encodes the control image with the global generator
        return pipe(
            prompt=scene.PROMPT, num_inference_steps=STEPS, num_images_per_prompt=pictures, generator=seeds, **wanted
        ).images

    return call


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_call_is_that_of_dense_weights(family, task):
    composer, loras = composer_of(family, task)
    pipe = composer.pipeline_for(*tiny_tasks.inputs(task))
    call = call_of(family, task, pipe)
    models = dense.Dense(pipe, loras, WEIGHTS, call)
    for method in METHODS:
        found = dense.compare(pipe, loras, WEIGHTS, method, call, models=models)
        found.check(1e-5)


# -- the Composer's pictures ----------------------------------------------------------------------------------------


def drawn(composer, family, task, **more):
    _, quick, guidance = FAMILIES[family]
    asked = {"num_inference_steps": STEPS, "seed": 7, "num_images_per_prompt": 2, "method": "composite", **guidance}
    given = tiny_tasks.inputs(task)
    if "image" in given and (family, task) != ("z", "ControlNet inpainting"):
        asked["strength"] = STRENGTH
    if "ControlNet" in task:
        asked["controlnet_conditioning_scale"] = 0.5
    negative = scene.NEGATIVE
    if type(composer.pipeline_for(*given)).__name__ in tiny_tasks.UNGUIDED:
        negative = None
        asked.pop("true_cfg_scale", None)
    side = {"width": tiny_tasks.SIZE, "height": tiny_tasks.SIZE} if not given else {}
    return composer(scene.PROMPT, negative, pipeline_options=quick, **given, **{**asked, **side, **more})


def far(a, b):
    return float(np.abs(array(a) - array(b)).max())


CASES = [
    (family, task)
    for family in FAMILIES
    for task in (*TASKS, "ControlNet image-to-image", "ControlNet inpainting")
    if family in ("sd15", "sdxl", "flux") or task in TASKS or (family, task) == ("z", "ControlNet inpainting")
]


# The others take longer than the default suite has.
QUICK = {("sd15", "inpainting"), ("sdxl", "ControlNet"), ("flux", "image-to-image"), ("sd3", "ControlNet"),
         ("qwen", "inpainting"), ("z", "ControlNet inpainting")}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "task"), [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.long]) for c in CASES]
)
def test_pictures_are_the_reference_s_and_the_recipe_makes_them_again(family, task):
    """Text-encoder parts act too. Picture 1 of two is the lone picture of its seed.

    SD3's ControlNet, whose pipeline encodes control images without the pictures' generators, only from the same call.
    """
    composer, loras = composer_of(family, task, text=True)
    out = drawn(composer, family, task)
    assert out.recipe.task == task
    again = composer.compose(out.recipe, pictures=tiny_tasks.inputs(task))
    assert [far(a, b) for a, b in zip(again.images, out.images, strict=True)] == [0.0, 0.0]
    assert again.recipe.model_dump(exclude={"pictures"}) == out.recipe.model_dump(exclude={"pictures"})
    pipe = composer.pipeline_for(*tiny_tasks.inputs(task))
    wanted = dense.reference(pipe, loras, WEIGHTS, "composite", call_of(family, task, pipe, output_type="pil"))
    assert max(far(a, b) for a, b in zip(wanted, out.images, strict=True)) <= 1.0
    alone = drawn(composer, family, task, num_images_per_prompt=1, seed=8)
    assert far(alone.images[0], out.images[1]) <= 1.0 or (family, task) == ("sd3", "ControlNet")
    assert far(out.images[0], out.images[1]) > 5.0
    composer.loras.clear()
    assert far(drawn(composer, family, task).images[0], out.images[0]) > 5.0
