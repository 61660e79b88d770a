"""The guider over several pictures: one call of the method each; after errors and cancels the model is as it was."""

import threading
from dataclasses import replace

import pytest
import torch
from diffusers import ClassifierFreeGuidance

from multilora.pipelines.composing import composing
from multilora.pipelines.denoise import Cancelled
from multilora.pipelines.guider import MultiLoraGuider
from multilora.pipelines.lanes import lane
from tests import modular, scene, tiny
from tests.guided_pipes import pipes, quiet
from tests.modular import draw, guided

__all__ = ["pipes", "quiet"]  # fixtures


def test_the_method_is_called_once_per_picture(pipes):
    """Three pictures in a row, each as alone; the plan is asked at each call and told the steps."""
    _, pipe, loras = pipes("sdxl")
    guider = MultiLoraGuider(loras, "switch", {"every": 1}, guidance=pipe.guider.new())
    plans, moments = [], []
    bound = guider.bound

    def counting(loras, **options):
        plans.append(len(loras))
        plan = bound.record.fn(loras, **options)
        return lambda moment: (moments.append((moment.step, moment.steps)), plan(moment))[1]

    guider.bound = replace(bound, record=replace(bound.record, fn=counting))
    with guided(pipe, guider):
        pictures = [draw(pipe), draw(pipe, seed=1), draw(pipe)]
    assert plans == [2, 2, 2]
    assert moments == [(s, 3) for _ in range(3) for s in (0, 0, 1, 1, 2, 2)]
    assert torch.equal(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], pictures[1])
    with guided(pipe, guider.new()):
        assert torch.equal(draw(pipe), pictures[0])


class Trap(RuntimeError):
    pass


def break_at(module, name, n, error):
    """Make the n-th call of a method raise; gives what undoes it."""
    original, count = getattr(module, name), [0]

    def broken(*args, **kwargs):
        count[0] += 1
        if count[0] == n:
            raise error
        return original(*args, **kwargs)

    module.__dict__[name] = broken
    return lambda: module.__dict__.pop(name)


@pytest.mark.parametrize(
    ("where", "error", "form"),
    [
        ("denoiser", Trap, "rebuilt"),
        ("denoiser", KeyboardInterrupt, "side"),
        ("scheduler", KeyboardInterrupt, "rebuilt"),
        ("scheduler", Trap, "bank"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(pipes, where, error, form):
    """Inside a run, and outside of them, where a guider is told nothing; then others may use the model at once."""
    _, pipe, loras = pipes("sdxl")
    before = scene.digest(pipe), scene.traces(pipe)
    target = pipe.unet.mid_block.resnets[0] if where == "denoiser" else pipe.scheduler
    undo = break_at(target, "forward" if where == "denoiser" else "step", 3 if where == "denoiser" else 2, error("x"))
    guider = MultiLoraGuider(loras, "composite", form=form, passes_per_call=1)
    pipe.update_components(guider=guider)
    try:
        with pytest.raises(error):
            draw(pipe, steps=2)
    finally:
        undo()
    assert not hasattr(type(pipe.unet), "__multilora_of__")
    assert scene.digest(pipe) == before[0]
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=modular.SCALE))
    assert scene.traces(pipe) == before[1]
    with composing(pipe, loras):
        draw(pipe, steps=1)
    with guided(pipe, guider):
        again = draw(pipe, steps=1)
    with guided(pipe, guider.new()):
        assert torch.equal(draw(pipe, steps=1), again)


def test_cancelled(pipes):
    _, pipe, loras = pipes("sdxl")
    before = scene.digest(pipe)
    guider = MultiLoraGuider(loras, "composite")
    guider.cancel = threading.Event()
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:
            guider.cancel.set()

    handle = pipe.unet.register_forward_hook(stop)
    try:
        with guided(pipe, guider), pytest.raises(Cancelled):
            draw(pipe)
    finally:
        handle.remove()
    assert len(calls) == 3
    assert scene.digest(pipe) == before


def test_an_error_between_prepare_and_call(pipes):
    """A ControlNet runs there. When the step's batches are gone, so is the interception, and the lane is free."""
    _, pipe, loras = pipes("sdxl")
    guider = MultiLoraGuider(loras)
    embeds = torch.zeros(1, 4)

    def step():
        guider.set_state(0, 2, torch.tensor(999.0))
        batches = guider.prepare_inputs({"prompt_embeds": (embeds, embeds)})
        guider.prepare_models(pipe.unet)
        assert hasattr(type(pipe.unet), "__multilora_of__")
        assert len(batches) == 2
        raise Trap

    with pytest.raises(Trap):
        try:
            step()
        except Trap as error:
            raise Trap from error.with_traceback(None)
    assert not hasattr(type(pipe.unet), "__multilora_of__")
    free = []

    def other():
        free.append(lane(pipe.unet).acquire(timeout=5))
        lane(pipe.unet).release()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert free == [True]


def test_a_denoiser_that_is_not_called_and_a_second_one(pipes):
    """Neither is composed silently."""
    _, pipe, loras = pipes("sdxl")
    guider = MultiLoraGuider(loras)
    embeds = torch.zeros(1, 4)

    def prepare():
        guider.set_state(0, 2, torch.tensor(999.0))
        batches = guider.prepare_inputs({"prompt_embeds": (embeds, embeds)})
        guider.prepare_models(pipe.unet)
        return batches

    batches = prepare()
    with pytest.raises(RuntimeError, match="UNet2DConditionModel was prepared and never called"):
        guider.cleanup_models(pipe.unet)
    batches = prepare()
    with pytest.raises(RuntimeError, match="two denoisers in one picture"):
        guider.prepare_models(tiny.sdxl().unet)
    assert len(batches) == 2
    assert not hasattr(type(pipe.unet), "__multilora_of__")


def test_without_weights_nothing_is_touched(pipes):
    _, pipe, loras = pipes("sdxl")
    for none in ([], [{"lora": loras[0], "weight": 0}]):
        with guided(pipe, MultiLoraGuider(none, guidance=pipe.guider.new())):
            ours = draw(pipe)
        assert torch.equal(ours, draw(pipe))
