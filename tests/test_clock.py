"""The step clock, in real pipelines, against lists written by hand.

Five steps from noise; image-to-image at strength 0.6 executes the last three of five. A number is the step of a call.
"""

import copy
import inspect

import diffusers
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionImg2ImgPipeline
from PIL import Image

from multilora.pipelines.clock import step_clock
from tests import tiny

# scheduler: (calls of five steps, calls at strength 0.6), each call as its step.
BY_HAND = {
    "DDIMScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    "DDPMScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    "LMSDiscreteScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    "EulerDiscreteScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    "EulerAncestralDiscreteScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    "DPMSolverMultistepScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    "DPMSolverSinglestepScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    "UniPCMultistepScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    "DEISMultistepScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    "LCMScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    # Two calls for each interval, one for the last, which ends at sigma 0.
    "HeunDiscreteScheduler": ([0, 0, 1, 1, 2, 2, 3, 3, 4], [0, 0, 1, 1, 2]),
    "KDPM2DiscreteScheduler": ([0, 0, 1, 1, 2, 2, 3, 3, 4], [0, 0, 1, 1, 2]),
    # t0 t1 t1 t2 t3 t4: the second call goes back to the start of the first interval.
    "PNDMScheduler": ([0, 0, 1, 2, 3, 4], [0, 0, 1, 2]),
    "FlowMatchEulerDiscreteScheduler": ([0, 1, 2, 3, 4], [0, 1, 2]),
    "FlowMatchHeunDiscreteScheduler": ([0, 0, 1, 1, 2, 2, 3, 3, 4], [0, 0, 1, 1, 2]),
}
GRAY = Image.new("RGB", (32, 32), (90, 140, 60))


@pytest.fixture(scope="module")
def pipes():
    """The four pipelines, by (flow matching?, image-to-image?); tests change only their schedulers."""
    sd, sd3 = tiny.sd15(), tiny.sd3()
    made = {
        (False, False): sd,
        (False, True): StableDiffusionImg2ImgPipeline.from_pipe(sd),
        (True, False): sd3,
        (True, True): StableDiffusion3Img2ImgPipeline.from_pipe(sd3),
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def use(pipe, name, **config):
    if name == "PNDMScheduler":
        config = {"skip_prk_steps": True, **config}  # as in Stable Diffusion's own configuration
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **config)
    return pipe


def watched(pipe, clock, seen=None):
    """Every call of the denoiser tells the clock; `seen` collects what the clock says then."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer

    def hook(module, args, kwargs):
        clock.call(args[1] if len(args) > 1 else kwargs["timestep"])
        if seen is not None:
            seen.append((clock.step, clock.steps, clock.t, clock.sigma))

    return denoiser.register_forward_pre_hook(hook, with_kwargs=True)


def draw(pipe, clock, seen=None, **kwargs):
    if "strength" in kwargs:
        kwargs["image"] = GRAY
    kwargs = {"num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "latent", **kwargs}
    if hasattr(pipe, "transformer"):
        kwargs["max_sequence_length"] = 16
    handle = watched(pipe, clock, seen)
    try:
        return pipe("a fox", generator=torch.Generator().manual_seed(0), **kwargs).images
    finally:
        handle.remove()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("from_image", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_calls_and_steps_are_those_written_by_hand(pipes, name, from_image, guidance):
    expected = BY_HAND[name][from_image]
    pipe = use(pipes["FlowMatch" in name, from_image], name)
    with step_clock(pipe.scheduler) as clock:
        draw(pipe, clock, seen := [], guidance_scale=guidance, **({"strength": 0.6} if from_image else {}))
    assert clock.calls == list(enumerate(expected))
    assert [s for s, *_ in seen] == expected
    assert {steps for _, steps, *_ in seen} == {expected[-1] + 1}
    assert clock.advances == len(expected)


def test_runge_kutta_warm_up_is_four_calls_to_a_step(pipes):
    pipe = use(pipes[False, False], "PNDMScheduler", skip_prk_steps=False)
    with step_clock(pipe.scheduler) as clock:
        draw(pipe, clock)
    assert clock.calls == list(enumerate([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4]))
    assert clock.steps == 5
    pipe = use(pipes[False, True], "PNDMScheduler", skip_prk_steps=False)
    with step_clock(pipe.scheduler) as clock:
        draw(pipe, clock, strength=0.6)
    assert clock.calls == list(enumerate([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]))


@pytest.mark.parametrize(
    ("strength", "expected"), [(1.0, [0, 0, 1, 2, 3, 4]), (0.8, [0, 0, 1, 2, 3]), (0.4, [0, 0, 1]), (0.2, [0, 0])]
)
def test_pndm_from_an_image_at_every_strength(pipes, strength, expected):
    """t0 t1 t1 t2 t3 t4 sliced at 0 to 4: the repeated timestep may be first, second or gone; the counter is not."""
    pipe = use(pipes[False, True], "PNDMScheduler")
    with step_clock(pipe.scheduler) as clock:
        draw(pipe, clock, strength=strength)
    assert [s for _, s in clock.calls] == expected
    assert clock.steps == expected[-1] + 1


def test_start_is_found_by_value_when_the_timestep_is_no_view(pipes):
    """t0 t1 t1 t2 t3 t4 from its first or its second t1, told by copies: the second call settles which."""
    scheduler = use(pipes[False, False], "PNDMScheduler").scheduler
    for first, expected, steps in ((1, [0, 0, 1, 2, 3], 4), (2, [0, 0, 1, 2], 3), (4, [0, 0], 1)):
        with step_clock(scheduler) as clock:
            scheduler.set_timesteps(5)
            for t in scheduler.timesteps[first:].tolist():
                clock.call(t)
                scheduler.step(torch.zeros(1), t, torch.zeros(1))
        assert [s for _, s in clock.calls] == expected
        assert clock.steps == steps


def test_guidance_in_turn_is_one_step():
    pipe = tiny.flux()
    arguments = {"max_sequence_length": 16, "num_inference_steps": 3, "output_type": "latent"}
    with step_clock(pipe.scheduler) as clock:
        handle = watched(pipe, clock, seen := [])
        pipe("a fox", negative_prompt="a wolf", true_cfg_scale=3.0, **arguments)
        handle.remove()
    assert clock.calls == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    # FLUX hands t / 1000 to its transformer; the clock keeps the scheduler's units.
    assert [t for *_, t, _ in seen] == [t for t in pipe.scheduler.timesteps.tolist() for _ in "ab"]
    assert [sigma for *_, sigma in seen] == [s for s in pipe.scheduler.sigmas.tolist()[:-1] for _ in "ab"]


def test_timesteps_and_sigmas(pipes):
    """DDIM of five steps on 1000: 801, 601, ... and sigma from its alphas; Heun's half calls share a step's sigma."""
    pipe = use(pipes[False, False], "DDIMScheduler")
    with step_clock(pipe.scheduler) as clock:
        draw(pipe, clock, seen := [])
    assert [t for *_, t, _ in seen] == [801, 601, 401, 201, 1]
    alphas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)
    expected = [((1 - alphas[t]) / alphas[t]).sqrt().item() for t in (801, 601, 401, 201, 1)]
    assert [sigma for *_, sigma in seen] == pytest.approx(expected, rel=1e-4)

    for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler"):
        pipe = use(pipes[False, True], name)
        with step_clock(pipe.scheduler) as clock:
            draw(pipe, clock, seen := [], strength=0.6)
        euler = use(pipes[False, False], "EulerDiscreteScheduler").scheduler
        euler.set_timesteps(5)
        a, b, c = euler.sigmas[2:5].tolist()
        assert [sigma for *_, sigma in seen] == pytest.approx([a, a, b, b, c], rel=1e-5), name


def test_every_picture_begins_at_step_0(pipes):
    pipe = use(pipes[False, True], "HeunDiscreteScheduler")
    with step_clock(pipe.scheduler) as clock:
        for strength, expected in ((0.6, [0, 0, 1, 1, 2]), (1.0, [0, 0, 1, 1, 2, 2, 3, 3, 4]), (0.4, [0, 0, 1])):
            draw(pipe, clock, strength=strength)
            assert [s for _, s in clock.calls] == expected


def test_own_timesteps_and_sigmas(pipes):
    pipe = use(pipes[False, False], "DDPMScheduler")
    with step_clock(pipe.scheduler) as clock:
        draw(pipe, clock, seen := [], timesteps=[900, 500, 20])
    assert [(s, n, t) for s, n, t, _ in seen] == [(0, 3, 900), (1, 3, 500), (2, 3, 20)]
    pipe = use(pipes[True, False], "FlowMatchEulerDiscreteScheduler")
    with step_clock(pipe.scheduler) as clock:
        draw(pipe, clock, seen := [], sigmas=[1.0, 0.4])
    assert [(s, n) for s, n, *_ in seen] == [(0, 2), (1, 2)]


def test_a_picture_that_stops_early_counts_what_the_pipeline_says():
    pipe = tiny.sdxl()
    with step_clock(pipe.scheduler, length=lambda: getattr(pipe, "_num_timesteps", None)) as clock:
        draw(pipe, clock, seen := [], denoising_end=0.6)
    assert [(s, n) for s, n, *_ in seen] == [(0, 3), (1, 3), (2, 3)]


class _Deaf:
    def call(self, t):
        return 0


def test_the_clock_changes_no_picture_and_leaves_nothing(pipes):
    for name in ("DDIMScheduler", "HeunDiscreteScheduler"):
        pipe = use(pipes[False, False], name)
        without = draw(pipe, _Deaf())
        with step_clock(pipe.scheduler) as clock:
            assert {"step", "set_timesteps"} <= set(vars(pipe.scheduler))
            assert "eta" in inspect.signature(pipe.scheduler.step).parameters or name != "DDIMScheduler"
            assert torch.equal(draw(pipe, clock), without)
        assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


class _Stop(BaseException):
    pass


def test_everything_is_given_back_after_an_error(pipes):
    pipe = use(pipes[False, False], "DDIMScheduler")
    scheduler = pipe.scheduler

    def stop(*_):
        raise _Stop

    handle = pipe.unet.register_forward_hook(stop)
    with pytest.raises(_Stop), step_clock(scheduler) as clock:
        draw(pipe, clock)
    handle.remove()
    assert "step" not in vars(scheduler)
    assert "set_timesteps" not in vars(scheduler)
    with pytest.raises(ValueError, match="no set_timesteps"):
        step_clock(object()).__enter__()


def test_two_clocks_and_a_copy(pipes):
    """An inner clock ends without disturbing the outer one; a copy of the scheduler runs free of both."""
    scheduler = use(pipes[False, False], "DDIMScheduler").scheduler
    with step_clock(scheduler) as outer:
        with step_clock(scheduler) as inner:
            other = copy.deepcopy(scheduler)
            scheduler.set_timesteps(4)
            other.set_timesteps(7)
            scheduler.step(torch.zeros(1), int(scheduler.timesteps[0]), torch.zeros(1))
            other.step(torch.zeros(1), int(other.timesteps[0]), torch.zeros(1))
            assert (inner.advances, outer.advances) == (1, 1)
            assert (len(scheduler.timesteps), len(other.timesteps)) == (4, 7)
        scheduler.step(torch.zeros(1), int(scheduler.timesteps[1]), torch.zeros(1))
        assert (inner.advances, outer.advances) == (1, 2)
    assert "step" not in vars(scheduler)


def test_a_pipeline_that_steps_a_copy_is_followed_by_its_timesteps(pipes):
    scheduler = use(pipes[False, False], "DDIMScheduler").scheduler
    with step_clock(scheduler) as clock:
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            clock.call(t)
            clock.call(t)
    assert [s for _, s in clock.calls] == [0, 0, 1, 1, 2, 2, 3, 3]
