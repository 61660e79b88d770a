"""The Composer: what it holds, what it answers, what it tells while it draws."""

import threading

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from multilora import files
from multilora.method import UnknownName
from multilora.pipelines import inputs
from multilora.pipelines.composing import composing, denoiser_of, member
from multilora.pipelines.image import Cancelled, Composer
from multilora.pipelines.preview import preview
from tests import scene, tiny


@pytest.fixture(scope="module")
def composer():
    pipe = tiny.sd15()
    made = Composer(pipe)
    for lora in scene.loras(pipe):
        made.add(lora)
    return made


def array(image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(float)


# -- the set --------------------------------------------------------------------------------------------------------


def test_add_and_remove():
    pipe = tiny.sd15()
    fox, robe = scene.loras(pipe)
    composer = Composer(pipe)
    assert composer.loras == {}
    first = composer.add(fox, weight="0@0,1@0.5")
    composer.add(robe, name="coat", weight=0.5, text_encoder_weight=0.2, blocks={"up_blocks.*": 0.0})
    assert list(composer.loras) == ["fox", "coat"]
    assert composer.loras["fox"] is first
    assert str(first.weight) == "0@0,1@0.5"
    with pytest.raises(ValueError, match="'fox'"):
        composer.add(robe, name="fox")
    with pytest.raises(UnknownName, match=r"fxo.*fox"):
        composer.remove("fxo")
    composer.remove("fox")
    assert list(composer.loras) == ["coat"]
    composer.add(fox)
    assert list(composer.loras) == ["coat", "fox"]


def test_defaults_and_size(composer):
    assert composer.defaults == {"num_inference_steps": 50, "guidance_scale": 7.5}
    assert composer.size == (32, 32)
    assert Composer(tiny.sd3()).size == (32, 32)
    assert Composer(tiny.flux()).size == (32, 32)
    out = composer("a fox", seed=1, num_inference_steps=1)
    assert out.images[0].size == (32, 32)
    assert (out.recipe.width, out.recipe.height, out.recipe.guidance_scale) == (32, 32, 7.5)


def test_other_sizes(composer):
    out = composer("a fox", seed=1, num_inference_steps=1, width=48, height=24)
    assert out.images[0].size == (48, 24)
    assert (out.recipe.width, out.recipe.height) == (48, 24)


def test_a_seed_is_drawn_and_recorded(composer):
    first = composer("a fox", num_inference_steps=2)
    second = composer("a fox", num_inference_steps=2)
    assert first.recipe.seed != second.recipe.seed
    assert np.array_equal(
        array(composer("a fox", num_inference_steps=2, seed=first.recipe.seed).images[0]), array(first.images[0])
    )


def test_pictures_of_a_composer_are_those_of_composing(composer):
    sets = [m.lora for m in composer.loras.values()]
    with composing(composer.pipe, sets, "composite"):
        wanted = scene.draw(composer.pipe, seed=9, output_type="np")[0]
    out = composer(scene.PROMPT, scene.NEGATIVE, "composite", seed=9, num_inference_steps=3, guidance_scale=4.0)
    assert np.abs(array(out.images[0]) / 255 - wanted).max() < 1 / 254
    assert out.passes == [2, 2, 2]


def test_recipe_names_what_ran(composer):
    out = composer(
        "a fox", "blur", "switch", {"every": 1}, seed=3, num_inference_steps=2, guidance_scale=2.0, scale=0.5
    )
    recipe = out.recipe
    assert (recipe.prompt, recipe.negative_prompt, recipe.method) == ("a fox", "blur", "switch")
    assert recipe.options == {"every": 1, "schedule": "paper", "compensate": 0.0}
    assert (recipe.seed, recipe.steps, recipe.guidance_scale, recipe.scale) == (3, 2, 2.0, 0.5)
    assert [(u.name, u.weight) for u in recipe.loras] == [("fox", 1.0), ("robe", 1.0)]
    assert (recipe.scheduler, recipe.base_family) == ("DDIMScheduler", "sd15")
    assert (recipe.resolved.device, recipe.resolved.dtype, recipe.resolved.form) == ("cpu", "float32", "rebuilt")
    assert out.passes == [1, 1]


def test_prompt_tags_add_loras_for_one_picture(composer):
    plain = composer("a fox", seed=1, num_inference_steps=2)
    composer_of_one = Composer(composer.pipe)
    composer_of_one.add(composer.loras["fox"].lora)
    tagged = composer("a fox <lora:robe:0>", seed=1, num_inference_steps=2)
    assert tagged.recipe.prompt == "a fox"
    wanted = composer_of_one("a fox", seed=1, num_inference_steps=2)
    assert np.array_equal(array(tagged.images[0]), array(wanted.images[0]))
    assert not np.array_equal(array(tagged.images[0]), array(plain.images[0]))
    assert composer.loras["robe"].weight.constant == 1.0


def test_without_loras_the_pipeline_draws_untouched():
    pipe = tiny.sd15()
    composer = Composer(pipe)
    wanted = scene.draw(pipe, seed=4, output_type="np")[0]
    out = composer(scene.PROMPT, scene.NEGATIVE, seed=4, num_inference_steps=3, guidance_scale=4.0)
    assert np.abs(array(out.images[0]) / 255 - wanted).max() < 1 / 254
    assert out.recipe.loras == []
    composer.add(scene.loras(pipe, 1)[0], weight=0.0)
    zero = composer(scene.PROMPT, scene.NEGATIVE, seed=4, num_inference_steps=3, guidance_scale=4.0)
    assert np.array_equal(array(zero.images[0]), array(out.images[0]))


# -- schedulers -----------------------------------------------------------------------------------------------------


def test_another_scheduler_for_one_picture(composer):
    own = composer.pipe.scheduler
    out = composer("a fox", seed=1, num_inference_steps=4, scheduler="EulerDiscreteScheduler")
    assert composer.pipe.scheduler is own
    assert out.recipe.scheduler == "EulerDiscreteScheduler"
    other = composer("a fox", seed=1, num_inference_steps=4)
    assert other.recipe.scheduler == "DDIMScheduler"
    assert not np.array_equal(array(out.images[0]), array(other.images[0]))
    karras = composer(
        "a fox", seed=1, num_inference_steps=4, scheduler="EulerDiscreteScheduler",
        scheduler_config={"use_karras_sigmas": True},
    )  # fmt: skip
    assert karras.recipe.scheduler_config == {"use_karras_sigmas": True}
    assert not np.array_equal(array(karras.images[0]), array(out.images[0]))


def test_a_lora_that_is_kept_is_compared_with_the_base_once(monkeypatch):
    pipe, other, flux = tiny.sd15(), tiny.sd15(), tiny.flux()
    fox, robe = scene.loras(pipe)
    looked = []
    fits = files.fits
    monkeypatch.setattr(files, "fits", lambda lora, base: (looked.append((lora, base)), fits(lora, base)))
    for _ in range(3):
        Composer(pipe).add(fox)
    assert [(a is fox, b is pipe) for a, b in looked] == [(True, True)]
    Composer(pipe).add(robe)
    Composer(other).add(fox)
    other.text_encoder = tiny.sd15().text_encoder
    Composer(other).add(fox)
    assert len(looked) == 4
    for _ in range(2):
        with pytest.raises(ValueError, match=r"does not fit|made for"):
            Composer(flux).add(fox)
    assert len(looked) == 6


# -- progress and preview -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [(None, 4), ("EulerDiscreteScheduler", 4), ("HeunDiscreteScheduler", 4), ("PNDMScheduler", 4)],
)
@pytest.mark.parametrize("loras", [True, False])
def test_progress_counts_steps_to_the_end(composer, scheduler, steps, loras):
    """Never backwards, never above the number of steps, at the end complete: second order and no LoRA too."""
    if not loras:
        composer = Composer(composer.pipe)
    seen, shown = [], []
    composer(
        "a fox", seed=1, num_inference_steps=steps, scheduler=scheduler, method="composite",
        progress=lambda step, of, info: seen.append((step, of, info)),
        preview=lambda step, of, image: shown.append((step, of)),
    )  # fmt: skip
    assert shown == [(step, of) for step, of, _ in seen]
    done = [s for s, _, _ in seen]
    assert done == sorted(done)
    assert sorted(set(done)) == list(range(1, steps + 1))
    assert {of for _, of, _ in seen} == {steps}
    assert {info["method"] for *_, info in seen} == {"composite"}
    assert {info["passes"] for *_, info in seen} == {2 if loras else 1}


@pytest.mark.parametrize("family", scene.FAMILIES)
def test_preview_shows_the_latents(family):
    pipe = getattr(tiny, family)()
    composer = Composer(pipe)
    composer.add(scene.loras(pipe, 1)[0])
    shown = []
    composer(
        "a fox", seed=1, num_inference_steps=3, width=64, height=32,
        preview=lambda step, steps, image: shown.append((step, steps, image)),
    )  # fmt: skip
    assert [(s, n) for s, n, _ in shown] == [(1, 3), (2, 3), (3, 3)]
    assert {image.size for *_, image in shown} == {(16, 8)}
    assert not np.array_equal(array(shown[0][2]), array(shown[2][2]))
    scale = {} if family == "flux" else {"guidance_scale": composer.defaults["guidance_scale"]}
    with composing(pipe, [m.lora for m in composer.loras.values()]):
        options = {"prompt": "a fox", "width": 64, "height": 32, "num_inference_steps": 3, "output_type": "latent"}
        latents = pipe(generator=torch.Generator().manual_seed(1), **scale, **options).images
    assert np.array_equal(array(preview(pipe, latents, 32, 64)), array(shown[-1][2]))


def test_preview_keeps_a_flat_picture_flat_and_its_colour():
    """On an autoencoder that is a linear map per position the preview is the decoded picture."""
    pipe = tiny.sd15()
    slopes = torch.tensor([[0.2, 0.0, 0.1], [0.0, 0.3, 0.0], [-0.1, 0.0, 0.2], [0.05, 0.05, 0.0]])

    class Linear(torch.nn.Module):
        config = pipe.vae.config

        def __init__(self):
            super().__init__()
            self.slopes = torch.nn.Parameter(slopes)

        def decode(self, z, return_dict=True):
            return (torch.einsum("bchw,cr->brhw", z, self.slopes).repeat_interleave(4, 2).repeat_interleave(4, 3),)

    pipe.vae = Linear()
    latents = torch.randn(2, 4, 8, 6) * 0.18
    image = preview(pipe, latents, 32, 24)
    assert image.size == (6, 8)
    rgb = torch.einsum("chw,cr->hwr", latents[0] / pipe.vae.config.scaling_factor, slopes).clamp(-1, 1)
    assert np.abs(array(image) - ((rgb + 1) * 127.5).numpy()).max() <= 1


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, [1, 2, 3]), (3600.0, [1])])
def test_previews_come_no_faster_than_asked_for(composer, seconds, steps, monkeypatch):
    shown, drawn = [], []
    monkeypatch.setattr("multilora.pipelines.image.latent_preview", lambda *given: drawn.append(given))
    composer("a fox", seed=1, num_inference_steps=3, preview=lambda s, n, i: shown.append(s), preview_seconds=seconds)
    assert shown == steps
    assert len(drawn) == len(steps), "those that nobody sees are not made"


@pytest.mark.parametrize("seconds", [-1, float("nan"), "0.2", None, True])
def test_bad_seconds_of_previews_are_refused_before_anything_runs(composer, seconds):
    steps = []
    with pytest.raises(ValueError, match=r"preview_seconds=.*at least 0"):
        composer("a fox", num_inference_steps=1, progress=lambda *step: steps.append(step), preview_seconds=seconds)
    assert steps == []


def test_cancel_from_the_preview(composer):
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        composer("a fox", num_inference_steps=5, preview=lambda s, n, i: cancel.set(), cancel=cancel)


# -- several pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_picture_i_of_several_has_seed_plus_i(family):
    pipe = getattr(tiny, family)()
    composer = Composer(pipe)
    for lora in scene.loras(pipe, text=True):
        composer.add(lora)
    out = composer("a fox", "blur", "composite", seed=7, num_inference_steps=2, num_images_per_prompt=3)
    assert len(out.images) == 3
    assert out.recipe.images == 3
    assert [out.recipe_of(i).index for i in range(3)] == [0, 1, 2]
    for i, image in enumerate(out.images):
        alone = composer("a fox", "blur", "composite", seed=7 + i, num_inference_steps=2)
        assert np.abs(array(alone.images[0]) - array(image)).max() <= 1
    with pytest.raises(ValueError, match="3"):
        out.recipe_of(3)


# -- passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "wanted"),
    [
        ("merge", {}, [1] * 4),
        ("switch", {"every": 1}, [1] * 4),
        ("composite", {}, [2] * 4),
        ("sum_of_differences", {}, [3] * 4),
    ],
)
def test_passes_are_counted(composer, method, options, wanted):
    with scene.listening(composer.denoiser) as runs:
        out = composer("a fox", method=method, seed=1, num_inference_steps=4, passes_per_call=1, **options)
    assert out.passes == wanted
    assert len(runs) == sum(wanted)
    assert out.recipe.resolved.passes_per_call == 1


class Unheard(UNet2DConditionModel):
    """A denoiser class that the table does not know."""


def unheard(pipe):
    pipe.unet.__class__ = Unheard
    return pipe


@pytest.mark.parametrize("method", ["merge", "composite", "sum_of_differences"])
def test_an_unknown_denoiser_runs_in_turn_with_the_same_result(method):
    known, other = tiny.sd15(), unheard(tiny.sd15())
    assert inputs.inputs_of(other.unet) is None
    sets = scene.loras(known)
    with composing(known, sets, method):
        wanted = scene.draw(known)
    with scene.listening(other.unet) as runs, composing(other, sets, method) as conductor:
        ours = scene.draw(other)
    assert scene.apart(ours, wanted) < 1e-5
    assert len(runs) == sum(conductor.passes)
    assert {r["sample"].shape[0] for r in runs} == {2}  # never a guessed batch
    assert type(other.unet) is Unheard


def test_an_unknown_denoiser_with_text_parts_says_what_it_does():
    other = unheard(tiny.sd15())
    sets = scene.loras(other, text=True)
    with pytest.warns(UserWarning, match="text_encoder"), composing(other, sets, "composite"):
        ours = scene.draw(other, steps=2)
    known = tiny.sd15()
    with composing(known, sets, "composite", text_encoder="all"):
        assert scene.apart(ours, scene.draw(known, steps=2)) < 1e-5


def test_an_unknown_denoiser_refuses_what_needs_its_halves():
    other = unheard(tiny.sd15())
    fox = scene.loras(other, 1)[0]
    positive, masked = member(other, fox, positive_only=True), member(other, fox, mask=torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"positive_only.*'fox'.*Unheard"), composing(other, [positive]):
        raise AssertionError("entered")
    with pytest.raises(ValueError, match=r"mask.*'fox'.*Unheard"), composing(other, [masked]):
        scene.draw(other)
    assert type(other.unet) is Unheard


@pytest.mark.parametrize("family", scene.FAMILIES)
@pytest.mark.parametrize("size", [1, 2])
def test_passes_per_call_changes_only_rounding(family, size):
    pipe = getattr(tiny, family)()
    sets = scene.loras(pipe, 3)
    with composing(pipe, sets, "composite"):
        wanted = scene.draw(pipe, steps=2)
    with scene.listening(scene.denoiser(pipe)) as runs, composing(pipe, sets, "composite", passes_per_call=size):
        ours = scene.draw(pipe, steps=2)
    assert scene.apart(ours, wanted) < 1e-5
    calls = 4 if family == "flux" else 2
    assert len(runs) == calls * (3 if size == 1 else 2)


def test_a_pipeline_without_denoiser_is_refused():
    with pytest.raises(ValueError, match="unet or transformer"):
        denoiser_of(object())
