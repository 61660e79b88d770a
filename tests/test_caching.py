"""diffusers' feature caches under composition: whose store a call meets, and when it is dropped."""

import contextlib
import threading

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)

from multilora.pipelines import caching
from multilora.pipelines.composing import composing
from multilora.pipelines.denoise import Cancelled
from tests import handloop, tiny, tiny_more
from tests.cache_copies import (
    ALWAYS,
    METHODS,
    STEPS,
    Ensemble,
    broadcast,
    composed,
    counted,
    draw,
    faster,
    first_block,
    flux,
    mag,
    middle,
    pair,
    taylor,
)

__all__ = ["flux"]  # a fixture


# -- threshold 0 is no cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes_per_call", [None, 1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [tiny.flux, tiny_more.qwen_pipe])
def test_first_block_cache_at_threshold_0_is_no_cache(family, method, passes_per_call):
    pipe = family()
    loras = pair(pipe)
    base = draw(pipe, num_inference_steps=3)
    plain = composed(pipe, loras, method, passes_per_call, num_inference_steps=3)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(composed(pipe, loras, method, passes_per_call, num_inference_steps=3), plain)
    assert handloop.relative(base, plain) > 0.02


# -- a row's store is its own ---------------------------------------------------------------------------------------


def shared(monkeypatch):
    """The trap: all rows in the pipeline's own contexts."""
    monkeypatch.setattr(caching.Caches, "running", lambda self, runs: contextlib.nullcontext())


@pytest.mark.parametrize("planted", [False, True])
def test_first_step_of_composite_meets_no_store(flux, monkeypatch, planted):
    """Whatever the threshold: at step 0 no row has anything to reuse. With one shared context the second row does."""
    pipe, loras = flux
    plain = composed(pipe, loras, "composite", 1, num_inference_steps=1)
    pipe.transformer.enable_cache(ALWAYS)
    if planted:
        shared(monkeypatch)
    cached = composed(pipe, loras, "composite", 1, num_inference_steps=1)
    assert (handloop.relative(cached, plain) > 0.01) if planted else torch.equal(cached, plain)


@pytest.mark.parametrize("planted", [False, True])
def test_switch_never_reuses_the_other_lora(flux, monkeypatch, planted):
    """Two LoRAs in turn, a step each: a store is never one step old, so the picture is that without a cache."""
    pipe, loras = flux
    with composing(pipe, loras, "switch", every=1):
        plain = draw(pipe)
    pipe.transformer.enable_cache(ALWAYS)
    if planted:
        shared(monkeypatch)
    with composing(pipe, loras, "switch", every=1):
        cached = draw(pipe)
    assert (handloop.relative(cached, plain) > 0.01) if planted else torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("method", "every", "passes_per_call", "calls"),
    [
        ("merge", None, None, 1),
        ("composite", None, None, 1),  # one batch, one decision
        ("composite", None, 1, 2),  # each row for itself
        ("switch", 6, None, 1),
        ("switch", 2, None, 3),  # a a b b a a: at every change, also when a comes back
        ("switch", 1, None, 6),
    ],
)
def test_skipped_blocks_are_counted(flux, method, every, passes_per_call, calls):
    pipe, loras = flux
    pipe.transformer.enable_cache(ALWAYS)
    options = {"every": every} if every else {}
    with (
        counted(middle(pipe)) as seen,
        composing(pipe, loras[:1] if every == 6 else loras, method, passes_per_call=passes_per_call, **options),
    ):
        draw(pipe, negative_prompt=None)
        assert len(seen) == calls
        draw(pipe, negative_prompt=None)  # a new picture starts empty
        assert len(seen) == 2 * calls
        draw(pipe)  # positive and negative prompt: two contexts
        assert len(seen) == 4 * calls


# -- against copies of the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["switch", "composite"])
@pytest.mark.parametrize("config", [first_block, taylor, broadcast, faster, mag])
def test_equals_copies_of_the_model(flux, config, method):
    pipe, loras = flux
    plain = composed(pipe, loras, method, 1)
    ensemble = Ensemble(pipe, loras, METHODS[method][1], config(pipe))
    model, pipe.transformer = pipe.transformer, ensemble
    reference = draw(pipe)
    pipe.transformer = model
    model.enable_cache(config(pipe))
    with counted(middle(pipe)) as seen:
        found = composed(pipe, loras, method, 1)
    assert handloop.relative(found, reference) < 1e-9
    assert handloop.relative(plain, reference) > 1e-4
    full = 2 * sum(len(METHODS[method][1](step)) for step in range(STEPS))
    assert len(seen) == len(ensemble.calls)
    assert 0 < len(seen) < full
    if config is not first_block:  # decided by counting, not by the numbers: rows in one batch decide alike
        assert handloop.relative(composed(pipe, loras, method), reference) < 1e-9


# -- steps of the picture, not of the store -------------------------------------------------------------------------


def calls_of_switch(pipe, loras, config) -> int:
    """Full calls in six steps of a a a b b b."""
    pipe.transformer.enable_cache(config)
    with counted(middle(pipe)) as seen, composing(pipe, loras, "switch", every=3):
        draw(pipe, negative_prompt=None)
    return len(seen)


def test_a_late_row_reads_the_ratios_of_its_own_steps(flux):
    """MagCache never skips in the first half here: a computes 3 times, b, which begins at half time, once."""
    config = MagCacheConfig(
        threshold=1.0, max_skip_steps=5, retention_ratio=0.5, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    )
    assert calls_of_switch(*flux, config) == 3 + 1


def test_the_end_of_caching_is_a_step_of_the_picture(flux):
    """TaylorSeer computes a at 0 and 2, b at 3, and from step 4 on always."""
    config = TaylorSeerCacheConfig(cache_interval=5, disable_cache_before_step=1, disable_cache_after_step=4)
    assert calls_of_switch(*flux, config) == 2 + 1 + 2


def test_stores_never_outnumber_the_rows_of_two_steps(flux):
    pipe, loras = flux
    pipe.transformer.enable_cache(ALWAYS)
    most = []
    more = [tiny.lora_for(pipe, seed=i, name=f"m{i}") for i in range(3, 8)]
    with composing(pipe, [*loras, *more], "switch", every=1) as conductor:
        manager = conductor.caches._managers[0][1]

        def look(pipe, step, t, tensors):
            most.append(len(manager._state_cache))
            return tensors

        draw(pipe, num_inference_steps=14, callback_on_step_end=look)
    assert most == [2, *[4] * 13]  # a positive and a negative call each
    assert not manager._state_cache


# -- before and after -----------------------------------------------------------------------------------------------


def test_a_plain_picture_is_as_before_also_after_a_cancelled_one(flux):
    pipe, loras = flux
    pipe.transformer.enable_cache(broadcast(pipe))
    kept = [hook.state for _, _, hook in caching.stateful_hooks(pipe.transformer)]
    plain = draw(pipe, negative_prompt=None)
    with composing(pipe, loras, "composite"):
        first = draw(pipe, negative_prompt=None)
        draw(pipe, seed=9, negative_prompt=None)
        assert torch.equal(draw(pipe, negative_prompt=None), first)
    assert handloop.relative(first, plain) > 0.02
    stop = threading.Event()

    def at_two(pipe, step, t, tensors):
        if step == 1:
            stop.set()
        return tensors

    with pytest.raises(Cancelled), composing(pipe, loras, "composite", cancel=stop):
        draw(pipe, negative_prompt=None, callback_on_step_end=at_two)
    assert torch.equal(draw(pipe, negative_prompt=None), plain)
    assert [hook.state for _, _, hook in caching.stateful_hooks(pipe.transformer)] == kept


def test_a_cache_that_comes_and_goes_between_pictures(flux):
    pipe, loras = flux
    plain = composed(pipe, loras, "composite")
    with composing(pipe, loras, "composite", weights=[0.8, 0.6]):
        assert torch.equal(draw(pipe), plain)
        pipe.transformer.enable_cache(ALWAYS)
        assert handloop.relative(draw(pipe), plain) > 0.01
        pipe.transformer.disable_cache()
        assert torch.equal(draw(pipe), plain)


def taylor_by_hand(model, pattern):
    config = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, cache_identifiers=[pattern])
    apply_taylorseer_cache(model, config)


def mag_by_hand(model, pattern):
    config = MagCacheConfig(
        threshold=9.0, max_skip_steps=2, retention_ratio=0.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    )
    apply_mag_cache(model, config)


def broadcast_by_hand(model, pattern):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=(pattern,),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(model, config)


@pytest.mark.parametrize(
    ("family", "put", "pattern", "steps"),
    [
        (tiny_more.z_pipe, taylor_by_hand, r"layers\.\d+\.attention", (0, 2, 5)),
        (tiny_more.z_pipe, broadcast_by_hand, r"layers\.\d+\.attention", (0, 3)),
        (tiny.sd3, taylor_by_hand, r"transformer_blocks\.\d+\.attn", (0, 2, 5)),
        (tiny.sd3, broadcast_by_hand, r"transformer_blocks\.\d+\.attn", (0, 3)),
        (tiny.sd3, mag_by_hand, "", (0, 3)),
    ],
)
def test_put_on_by_hand(family, put, pattern, steps):
    """SD3 and Z-Image have no enable_cache. Both halves in one call, Z-Image with lists in and out."""
    pipe = family()
    loras = pair(pipe)
    one = composed(pipe, loras, "composite", 1, num_inference_steps=1)
    plain = composed(pipe, loras, "composite", 1)
    put(pipe.transformer, pattern)
    assert torch.equal(composed(pipe, loras, "composite", 1, num_inference_steps=1), one)
    for passes_per_call, rows in ((1, 2), (None, 1)):
        with counted(middle(pipe)) as seen:
            cached = composed(pipe, loras, "composite", passes_per_call)
        assert len(seen) == rows * len(steps)
        assert 1e-4 < handloop.relative(cached, plain) < 2


def test_a_unet_with_broadcast_attention():
    """U-Nets have no enable_cache; the hooks can be put on by hand. Two of three steps reuse what the first stored."""
    pipe = tiny.sd15()
    loras = pair(pipe)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("down_blocks.*attn1",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)
    layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    for passes, calls in ((None, 2), (1, 4)):
        with counted(layer) as seen, composing(pipe, loras, "composite", passes_per_call=passes):
            pipe("a fox", num_inference_steps=6, output_type="latent")
        assert len(seen) == calls


# -- what is refused ------------------------------------------------------------------------------------------------


class Own(ModelHook):
    _is_stateful = True

    def reset_state(self, module):
        return module


def on(model, config):
    model.enable_cache(config)


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (lambda m: on(m, SeaCacheConfig(raw_vision_callback=lambda *_: None)), r"SeaCache .*video"),
        (lambda m: on(m, TextKVCacheConfig()), r"TextKVCache .*place in memory"),
        (lambda m: on(m, FasterCacheConfig(tensor_format="BCHW")), r"FasterCache .*negative half.*is_guidance_dist"),
        (lambda m: on(m, MagCacheConfig(calibrate=True)), r"MagCache .*calibrate on the plain pipeline"),
        (lambda m: on(m, TaylorSeerCacheConfig(use_lite_mode=True)), r"TaylorSeer .*proj_out, a layer that a LoRA"),
        (lambda m: HookRegistry.check_if_exists_or_initialize(m).register_hook(Own(), "own"), r"Own .*unknown"),
    ],
)
def test_refused_by_name_with_the_reason(flux, put, said):
    pipe, _ = flux
    loras = [tiny.lora_for(pipe, seed=1, modules=lambda key: key.endswith(("to_q", "transformer.proj_out")))]
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    put(pipe.transformer)
    with pytest.raises(ValueError, match=said), composing(pipe, loras):
        raise AssertionError("entered")
    assert type(pipe.transformer).__name__ == "FluxTransformer2DModel"
    assert all(torch.equal(weights[name], value) for name, value in pipe.transformer.state_dict().items())
    assert not any(m._forward_hooks for m in pipe.transformer.modules())


def test_models_that_diffusers_own_cache_fails_on():
    """SD3's last block returns no text; Z-Image's blocks name their input otherwise."""
    config = FirstBlockCacheConfig(threshold=0.1)
    for pipe, said in (
        (tiny.sd3(), r"FirstBlockCache .*transformer_blocks\.1 returns no text"),
        (tiny_more.z_pipe(), r"FirstBlockCache .*blocks take no hidden_states"),
    ):
        apply_first_block_cache(pipe.transformer, config)
        with pytest.raises(ValueError, match=said), composing(pipe, pair(pipe)):
            raise AssertionError("entered")
