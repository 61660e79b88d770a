"""The guider on small modular pipelines of SDXL and Qwen-Image: against dense weights, the hook, inner guidance."""

import warnings

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, HeunDiscreteScheduler, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from PIL import Image

from multilora.pipelines.composing import composing, member
from multilora.pipelines.guider import MultiLoraGuider
from multilora.strength import TooStrong
from tests import dense, modular, scene, tiny
from tests.guided_pipes import FAMILIES, pipes, quiet
from tests.modular import draw, guided

__all__ = ["pipes", "quiet"]  # fixtures

METHODS = {"merge": {}, "switch": {"every": 1}, "composite": {}}
WEIGHTS = [1.0, 0.7]


# -- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_dense_weights(pipes, family, method):
    """Two pictures per prompt; the reference's means go through the pipeline's own guidance."""
    _, pipe, loras = pipes(family, torch.float64)

    def call(p):
        return draw(p, steps=2, num_images_per_prompt=2)

    wanted = dense.reference(pipe, loras, WEIGHTS, method, call)
    guider = MultiLoraGuider(loras, method, METHODS[method], weights=WEIGHTS, guidance=pipe.guider.new())
    base = call(pipe)
    with guided(pipe, guider):
        ours = call(pipe)
    assert ours.shape[0] == 2
    assert scene.apart(ours, wanted) < 1e-6
    assert scene.apart(wanted, base) > 0.03
    assert guider.passes == [2 if method == "composite" else 1] * 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_hook(pipes, family, method):
    """On the same modular pipeline bit for bit, on the standard pipeline within 1e-5."""
    standard, pipe, loras = pipes(family)
    guider = MultiLoraGuider(loras, method, METHODS[method], weights=WEIGHTS, guidance=pipe.guider.new())
    with guided(pipe, guider):
        ours = draw(pipe)
    with composing(pipe, loras, method, weights=WEIGHTS, **METHODS[method]):
        hook = draw(pipe)
    with composing(standard, loras, method, weights=WEIGHTS, **METHODS[method]):
        other = modular.draw_standard(standard, family)
    assert torch.equal(ours, hook)
    assert scene.apart(ours, other) < 1e-5
    assert scene.apart(draw(pipe), ours) > 0.03


GUIDANCE = {
    "rescaled": lambda: ClassifierFreeGuidance(guidance_scale=6.0, guidance_rescale=0.7),
    "projected": lambda: AdaptiveProjectedGuidance(
        guidance_scale=6.0, eta=0.2, adaptive_projected_guidance_rescale=3.0, adaptive_projected_guidance_momentum=-0.5
    ),
}


@pytest.mark.parametrize("kind", GUIDANCE)
def test_inner_guidance_acts_on_the_means(pipes, kind):
    """Guidance that is not linear sees the average of the raw predictions, as with the reference in the loop."""
    _, pipe, loras = pipes("sdxl", torch.float64)
    inner = GUIDANCE[kind]
    with guided(pipe, inner()):
        wanted = dense.reference(pipe, loras, WEIGHTS, "composite", lambda p: draw(p, steps=2))
    with guided(pipe, MultiLoraGuider(loras, "composite", weights=WEIGHTS, guidance=inner())):
        ours = draw(pipe, steps=2)
    with guided(pipe, MultiLoraGuider(loras, "composite", weights=WEIGHTS, guidance={"guidance_scale": 6.0})):
        linear = draw(pipe, steps=2)
    assert scene.apart(ours, wanted) < 1e-6
    assert scene.apart(linear, wanted) > 0.02


def test_a_guidance_of_three_conditions(pipes):
    """Skip-layer guidance puts its own hooks on the denoiser for the third; they are off again afterwards."""
    _, pipe, loras = pipes("sdxl")

    def inner():
        return SkipLayerGuidance(
            guidance_scale=4.0,
            skip_layer_config=LayerSkipConfig([0], fqn="mid_block.attentions.0.transformer_blocks"),
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        )

    before = scene.digest(pipe), scene.traces(pipe)
    guider = MultiLoraGuider(loras, "composite", weights=WEIGHTS, guidance=inner())
    with guided(pipe, guider):
        ours = draw(pipe, steps=2)
    assert guider.passes == [2] * 5  # diffusers skips layers after the first step only
    with guided(pipe, inner()):
        base = draw(pipe, steps=2)
        with composing(pipe, loras, "composite", weights=WEIGHTS):
            hook = draw(pipe, steps=2)
    assert torch.equal(ours, hook)
    assert scene.apart(ours, base) > 0.02
    assert (scene.digest(pipe), unhooked(scene.traces(pipe))) == (before[0], unhooked(before[1]))


def unhooked(traces):
    """Without the attribute that diffusers' own hooks leave on modules that ever had one."""
    return {
        k: tuple(tuple(n for n in part if n not in ("_diffusers_hook", "forward")) if i == 2 else part
                 for i, part in enumerate(v)) if k != "pipe" and k != "scheduler" else None
        for k, v in traces.items()
    }  # fmt: skip


def test_options_of_a_lora(pipes, tmp_path):
    """Schedule, positive branch only, blocks and a mask, against the hook with the same options."""
    _, pipe, loras = pipes("sdxl")
    left = str(tmp_path / "left.png")
    Image.linear_gradient("L").rotate(90).resize((8, 8)).save(left)
    first = {"positive_only": True, "weight": "0.2@0,1@1"}
    second = {"blocks": {"*attn2*": 0.5}, "weight": 0.9, "mask": left}
    guider = MultiLoraGuider([{"lora": loras[0], **first}, {"lora": loras[1], **second}], guidance=pipe.guider.new())
    with guided(pipe, guider):
        ours = draw(pipe)
    members = [member(pipe, loras[0], **first), member(pipe, loras[1], **second)]
    with composing(pipe, members):
        assert torch.equal(draw(pipe), ours)
    for lora, options in ((0, first), (1, second)):
        for left_out in set(options) - {"weight"}:
            fewer = {k: v for k, v in options.items() if k != left_out}
            changed = [member(pipe, loras[0], **first), member(pipe, loras[1], **second)]
            changed[lora] = member(pipe, loras[lora], **fewer)
            with composing(pipe, changed):
                assert scene.apart(draw(pipe), ours) > 0.01, left_out
    Image.new("L", (8, 8), 255).save(left)
    with pytest.raises(ValueError, match=r"mask of LoRA 'robe': .*left\.png is not the picture of the config"):
        guider.new(loras=[guider.config.loras[1] | {"lora": loras[1]}])


def test_positive_only_leaves_the_negative_prediction(pipes):
    """In a call per condition the negative one is the base model's, bit for bit."""
    _, pipe, loras = pipes("sdxl")
    plain, ours, hook = [], [], []

    def seen(into):
        return pipe.unet.register_forward_hook(lambda m, a, out: into.append(out[0].clone()))

    for into, context in (
        (plain, guided(pipe, pipe.guider)),
        (ours, guided(pipe, MultiLoraGuider([{"lora": loras[0], "positive_only": True}]))),
        (hook, composing(pipe, [member(pipe, loras[0], positive_only=True)])),
    ):
        handle = seen(into)
        try:
            with context:
                draw(pipe, steps=1)
        finally:
            handle.remove()
    for found in (ours, hook):
        assert torch.equal(found[1], plain[1])
        assert scene.apart(found[0], plain[0]) > 0.02


def test_a_stack_that_is_too_strong_is_told(pipes):
    """As under the hook: by the plan's rows, so not for the same LoRAs one at a time."""
    _, pipe, loras = pipes("sdxl")
    for method, expected in (("merge", 1), ("composite", 0)):
        with (
            guided(pipe, MultiLoraGuider(loras, method, weights=[2.4, 2.4])),
            warnings.catch_warnings(record=True) as w,
        ):
            warnings.simplefilter("always")
            draw(pipe, steps=1)
        told = [str(x.message) for x in w if x.category is TooStrong]
        assert len(told) == expected
        assert all("fox at 2.4, robe at 2.4: together 3.4 times" in text for text in told), told


# -- on a pipeline: scheduler and text encoders ---------------------------------------------------------------------


def test_text_encoder_parts(pipes):
    """Alone the guider cannot reach them and says so once; on the pipeline they act as "all", as under the hook."""
    standard, pipe, _ = pipes("sdxl")
    loras = [tiny.lora_for(standard, seed=i, text_encoder=True, name=n) for i, n in enumerate(("fox", "robe"))]
    guider = MultiLoraGuider(loras, "composite", guidance=pipe.guider.new())
    before = scene.digest(pipe), scene.traces(pipe)
    with guided(pipe, guider), pytest.warns(UserWarning, match="text encoders") as warned:
        without = draw(pipe)
    with guided(pipe, guider), warnings.catch_warnings():
        warnings.filterwarnings("error", "LoRA 'fox' has a part")
        assert torch.equal(draw(pipe), without)
    said = [str(w.message) for w in warned if "text encoders" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("LoRA 'fox' has a part for the text encoders")
    assert "guider.on(pipe)" in said[0]
    with warnings.catch_warnings(record=True) as warned, guider.on(pipe) as same:
        warnings.simplefilter("always")
        assert same is guider
        assert pipe.guider is guider
        ours = [draw(pipe), draw(pipe)]
    assert sum("Running as 'all'" in str(w.message) for w in warned) == 1
    assert torch.equal(*ours)
    with composing(pipe, loras, "composite", text_encoder="all"):
        hook = draw(pipe)
    with composing(standard, loras, "composite", text_encoder="all"):
        other = modular.draw_standard(standard, "sdxl")
    assert torch.equal(ours[0], hook)
    assert scene.apart(ours[0], other) < 1e-5
    assert scene.apart(without, hook) > 0.01
    with guided(pipe, guider.new(text_encoder="none")):
        assert torch.equal(draw(pipe), without)
    assert (scene.digest(pipe), scene.traces(pipe)) == before


def test_second_order_and_sigma(pipes):
    """What only the scheduler knows: the intervals of Heun's half steps, and sigma; on the pipeline as the hook."""
    standard, _, loras = pipes("sdxl")
    pipe = modular.modular(standard, "sdxl")
    weights = ["1@14.6sigma,0.2@0sigma", 0.8]
    guider = MultiLoraGuider(loras, "switch", {"every": 1}, weights=weights, guidance=pipe.guider.new())
    with guided(pipe, guider), pytest.raises(ValueError, match=r"goes by sigma"):
        draw(pipe)
    pipe.update_components(scheduler=HeunDiscreteScheduler.from_config(standard.scheduler.config))
    with composing(pipe, loras, "switch", weights=weights, every=1) as conductor:
        hook = draw(pipe)
        steps = [step for _, step in conductor.clock.calls]
    assert len(set(steps)) == 3
    with guider.on(pipe):
        assert torch.equal(draw(pipe), hook)
    plain = guider.new(weights=[1, 1])
    with guided(pipe, plain), pytest.raises(ValueError, match=r"more than once per step.*guider\.on"):
        draw(pipe)


def test_image_to_image(pipes):
    """The first executed step is step 0."""
    _, pipe, loras = pipes("sdxl")
    image = Image.linear_gradient("L").convert("RGB").resize((32, 32))
    options = {"image": image, "strength": 0.5}
    guider = MultiLoraGuider(loras, "switch", {"every": 1}, guidance=pipe.guider.new())
    with guided(pipe, guider):
        ours = draw(pipe, steps=4, **options)
    assert len(guider.passes) == 4  # two steps, two conditions
    with composing(pipe, loras, "switch", every=1):
        hook = draw(pipe, steps=4, **options)
    assert torch.equal(ours, hook)
    assert scene.apart(draw(pipe, steps=4, **options), ours) > 0.01


def test_on_refuses(pipes):
    standard, pipe, loras = pipes("sdxl")
    guider = MultiLoraGuider(loras)
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline has no guider.*composing"), guider.on(standard):
        raise AssertionError("entered")
    before = pipe.guider
    with guider.on(pipe), pytest.raises(RuntimeError, match="in use"), guider.on(pipe):
        raise AssertionError("entered")
    assert pipe.guider is before
    with composing(pipe, loras), guided(pipe, MultiLoraGuider(loras)), pytest.raises(RuntimeError, match="already"):
        draw(pipe, steps=1)
    assert torch.equal(draw(pipe, steps=1), draw(pipe, steps=1))
