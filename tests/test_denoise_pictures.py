"""Pictures that end before their first call of the denoiser, and batches that the model itself cuts in parts."""

import threading

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline

from multilora.pipelines.composing import composing, member
from multilora.pipelines.denoise import Cancelled
from tests import families, scene, tiny

ENDS = ("error", "cancel")


@pytest.mark.parametrize(
    ("family", "end"),
    [
        pytest.param(f, e, marks=[] if f in ("sd15", "flux") else [pytest.mark.long])
        for f in families.PIPES
        for e in ENDS
        if (f, e) != ("zimage", "error")  # its pipeline takes any number of generators
    ],
)
def test_a_picture_that_ended_early_leaves_no_prompt_behind(family, end):
    """After encode_prompt, before the denoiser: by wrong generators, or by a cancel. The next prompt is another."""
    pipe, loras, stop = families.pipe(family), families.loras(family), threading.Event()
    guided = family in ("flux", "qwen")  # with two encodings a picture

    def draw(prompt, **changes):
        fixed = {**families.ALWAYS[family], **(families.GUIDED if guided else families.PLAIN)[family]}
        fixed |= {"generator": torch.Generator().manual_seed(5), "num_inference_steps": 2, "output_type": "latent"}
        negative = {"negative_prompt": "blur"} if guided else {}
        return pipe(prompt, **{**fixed, **negative, **changes}).images

    with composing(pipe, list(loras), "composite", weights=families.WEIGHTS):
        expected, other = draw("a fox"), draw("two robes, much ink")
    assert scene.apart(expected, other) > 0.02
    with composing(pipe, list(loras), "composite", weights=families.WEIGHTS, cancel=stop):
        if end == "cancel":
            stop.set()
        wrong = {"generator": [torch.Generator()] * 2} if end == "error" else {}
        with pytest.raises(ValueError if end == "error" else Cancelled, match=r"generators|cancelled"):
            draw("two robes, much ink", **wrong)
        stop.clear()
        assert torch.equal(draw("a fox"), expected)
    assert "check_inputs" not in vars(pipe)
    assert "encode_prompt" not in vars(pipe)


# -- perturbed-attention guidance: processors that cut the batch in two or three ------------------------------------


def perturbed(guidance):
    own = families.pipe("sd15")
    pipe = StableDiffusionPAGPipeline(**own.components, requires_safety_checker=False, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)

    def draw(**changes):
        fixed = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": guidance, "pag_scale": 3.0}
        return pipe(
            "a fox", negative_prompt="blur", generator=torch.Generator().manual_seed(5), **{**fixed, **changes}
        ).images

    # On the perturbed attention itself too: its layers see fewer samples than the call has.
    loras = [tiny.lora_for(own, rank=3, seed=i, strength=2.0, modules=["to_k", "to_v"]) for i in range(2)]
    return pipe, draw, loras


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_passes_are_not_batched_where_processors_cut_the_batch(guidance):
    """Against diffusers alone: one merged step of each LoRA, averaged by Composite."""
    pipe, draw, loras = perturbed(guidance)
    with scene.listening(pipe.unet) as runs, composing(pipe, loras, "composite") as conductor:
        found = draw(num_inference_steps=1)
    assert [len(run["sample"]) for run in runs] == [2 if guidance == 1.0 else 3] * 2
    assert conductor.passes == [2]
    alone = []
    for lora in loras:
        with composing(pipe, [lora], "merge"):
            alone.append(draw(num_inference_steps=1))
    # One step of a scheduler is linear in the prediction, and both guidances are.
    assert scene.apart(found, (alone[0] + alone[1]) / 2) < 1e-5
    assert scene.apart(alone[0], alone[1]) > 5e-3  # of a picture that is nearly all noise after one step


def test_the_perturbed_half_is_not_taken_for_the_negative_one():
    pipe, draw, loras = perturbed(1.0)
    members = [member(pipe, loras[0], positive_only=True)]
    with (
        composing(pipe, members),
        pytest.raises(ValueError, match=r"positive_only of LoRA .* 2 samples for 1 pictures"),
    ):
        draw()
    texted = list(families.loras("sd15"))
    with composing(pipe, texted, "merge"), pytest.warns(UserWarning, match=r"2 samples for 1 pictures.*as 'all'"):
        found = draw()
    with composing(pipe, texted, "merge", text_encoder="all"):
        assert torch.equal(draw(), found)
