"""Feature caches beside masks, compiled models and the guider: each as without the cache's or the other's company."""

import pytest
import torch

from multilora.pipelines.composing import composing, member
from multilora.pipelines.guider import MultiLoraGuider
from tests import handloop, modular, scene, tiny
from tests.cache_copies import (
    ALWAYS,
    METHODS,
    STEPS,
    Ensemble,
    composed,
    counted,
    draw,
    first_block,
    flux,
    middle,
    pair,
    taylor,
)

__all__ = ["flux"]  # a fixture


class Region(Ensemble):
    """In the transformer's place: inside the mask the second row's prediction, outside of it the first one's."""

    def __call__(self, **kwargs):
        mask = torch.zeros(4, 4, dtype=torch.bool)
        mask[:1, 2:] = True
        outputs = []
        for row in self._plan(self._step):
            model = self._copy(row, False)
            with model.cache_context("only"):
                outputs.append(model(**kwargs)[0])
        return (torch.where(mask.reshape(1, 16, 1), outputs[1], outputs[0]),)


@pytest.mark.parametrize("config", [first_block, taylor])
def test_a_mask_s_passes_keep_stores_of_their_own(flux, config):
    """A LoRA in a region is one pass more; each pass decides by what it stored itself."""
    pipe, loras = flux
    mask = torch.zeros(32, 32)
    mask[:8, 16:] = 1.0
    members = [member(pipe, loras[0], weight=0.8, mask=mask), member(pipe, loras[1], weight=0.6)]

    def masked():
        with composing(pipe, members, "merge", passes_per_call=1):
            return draw(pipe)

    plain = masked()
    region = Region(pipe, loras, lambda step: [(0.0, 0.6), (0.8, 0.6)], config(pipe))
    model, pipe.transformer = pipe.transformer, region
    reference = draw(pipe)
    pipe.transformer = model
    model.enable_cache(config(pipe))
    with counted(middle(pipe)) as seen:
        found = masked()
    assert handloop.relative(found, reference) < 1e-9
    assert handloop.relative(plain, reference) > 1e-4
    assert len(seen) == len(region.calls) < 2 * 2 * STEPS
    if config is taylor:  # decided by counting: rows in one batch decide alike
        with composing(pipe, members, "merge"):
            assert handloop.relative(draw(pipe), reference) < 1e-9


@pytest.mark.long
@pytest.mark.parametrize("config", [first_block, taylor])
@pytest.mark.parametrize("how", ["wrapper", "in place", "blocks"])
def test_a_compiled_model_with_a_cache(flux, how, config):
    """The picture of the same model with the same cache that is not compiled."""
    pipe, loras = flux
    plain = composed(pipe, loras, "composite", 1)
    pipe.transformer.enable_cache(config(pipe))
    wanted = composed(pipe, loras, "composite", 1)
    assert handloop.relative(plain, wanted) > 1e-4
    torch._dynamo.reset()
    try:
        if how == "wrapper":
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        elif how == "in place":
            pipe.transformer.compile(backend="eager")
        else:
            pipe.transformer.compile_repeated_blocks(backend="eager")
        assert handloop.relative(composed(pipe, loras, "composite", 1), wanted) < 1e-9
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
def test_a_guider_with_a_cache(method):
    """As the hook with the same cache, which skips as many calls; nothing is stored after the picture."""
    standard = modular.standard("qwen")
    loras = pair(standard)
    pipe = modular.modular(standard, "qwen")
    guider = MultiLoraGuider(loras, method, METHODS[method][0], weights=[0.8, 0.6], guidance=pipe.guider.new())
    with modular.guided(pipe, guider):
        plain = modular.draw(pipe, steps=STEPS)
        pipe.transformer.enable_cache(ALWAYS)
        with counted(middle(pipe)) as seen:
            ours = modular.draw(pipe, steps=STEPS)
    with composing(pipe, loras, method, weights=[0.8, 0.6], **METHODS[method][0]), counted(middle(pipe)) as others:
        hook = modular.draw(pipe, steps=STEPS)
    assert torch.equal(ours, hook)
    assert scene.apart(plain, ours) > 0.01
    assert len(seen) == len(others) == (6 if method == "switch" else 2)  # prompt and negative prompt
    assert not any(hook_states(pipe.transformer))


def hook_states(model):
    """The stores of diffusers' caches in a model."""
    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            manager = getattr(hook, "state_manager", None)
            yield dict(manager._state_cache) if manager is not None else {}


def test_a_guider_refuses_what_the_hook_refuses():
    pipe = modular.modular(modular.standard("qwen"), "qwen")
    loras = [tiny.lora_for(pipe, seed=1, modules=["to_q"])]
    from diffusers.hooks import TextKVCacheConfig

    pipe.transformer.enable_cache(TextKVCacheConfig())
    guider = MultiLoraGuider(loras, "merge", guidance=pipe.guider.new())
    with modular.guided(pipe, guider), pytest.raises(ValueError, match="TextKVCache cannot run under composition"):
        modular.draw(pipe, steps=2)
