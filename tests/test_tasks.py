"""Image-to-image, inpainting and ControlNet: the Composer's pictures are the reference's, of every family.

tests/dense.py is the reference: deep copies of the model with W + sum_i w_i up_i down_i, one after the other, in the
loop of the family's own pipeline. Single calls by every method: tests/test_cells.py.
"""

import numpy as np
import pytest

from tests import dense, scene, tiny_tasks
from tests.cells import CASES, STEPS, STRENGTH, WEIGHTS, call_of, composer_of
from tests.tiny_tasks import FAMILIES, array


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
