"""The reference of feature caches under composition: copies of the model, each with a cache of its own.

It has none of our hooks: every LoRA has its own copy of the transformer with dense weights and diffusers' cache on it,
in the place of the pipeline's transformer, and the copies' predictions are averaged.
"""

import contextlib
import copy

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from multilora.pipelines import caching
from multilora.pipelines.composing import composing
from tests import handloop, tiny

STEPS = 6
METHODS = {
    "merge": ({}, lambda step: [(0.8, 0.6)]),
    "switch": ({"every": 2}, lambda step: [[(0.8, 0.0), (0.0, 0.6)][step // 2 % 2]]),
    "composite": ({}, lambda step: [(0.8, 0.0), (0.0, 0.6)]),
}
ALWAYS = FirstBlockCacheConfig(threshold=1e9)  # skips whenever something is stored


def arguments(pipe, steps: int = STEPS, guided: bool = True) -> dict:
    name = type(pipe).__name__
    own = {"max_sequence_length": 16} if "Flux" in name else {"max_sequence_length": 96}
    if name in ("ZImagePipeline", "StableDiffusion3Pipeline"):
        own.update(height=32, width=32)
        guidance = {"guidance_scale": 3.0} if guided else {"guidance_scale": 0.0}
    else:
        guidance = {"true_cfg_scale": 3.0} if guided else {}
    if guided:
        own["negative_prompt"] = "blurry"
    return {"prompt": "a fox", "num_inference_steps": steps, "output_type": "latent", **guidance, **own}


def draw(pipe, seed: int = 5, **changes) -> torch.Tensor:
    given = {**arguments(pipe), **changes}
    return pipe(**given, generator=torch.Generator().manual_seed(seed)).images


def composed(pipe, loras, method: str, passes_per_call: int | None = None, **changes) -> torch.Tensor:
    options = METHODS[method][0]
    with composing(pipe, loras, method, weights=[0.8, 0.6], passes_per_call=passes_per_call, **options):
        return draw(pipe, **changes)


def pair(pipe):
    return [tiny.lora_for(pipe, seed=1, name="fox"), tiny.lora_for(pipe, seed=2, name="robe", rank=3)]


@contextlib.contextmanager
def counted(module):
    """One entry for each call of a module in the block."""
    calls = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


@pytest.fixture
def flux():
    pipe = tiny.flux(torch.float64)
    return pipe, pair(pipe)


def middle(pipe):
    """A layer of the second block: called only when the blocks behind the first are."""
    model = pipe.transformer
    blocks = model.layers if hasattr(model, "layers") else model.transformer_blocks
    return next(m for path, m in blocks[1].named_modules() if path.endswith("to_q"))


class Ensemble:
    """In the pipeline's transformer's place: one dense copy with its own cache per row and branch, and their mean."""

    def __init__(self, pipe, loras, plan, config):
        self._model, self._plan, self._config = pipe.transformer, plan, config
        self._factors = [handloop.factors(lora) for lora in loras]
        self._dense, self._copies, self._step, self._before, self.calls = {}, {}, -1, [], []

    def __getattr__(self, name):
        return getattr(self._model, name)

    @contextlib.contextmanager
    def cache_context(self, name):
        if name == "cond":
            self._step += 1
        self._name = name
        yield

    def _copy(self, row, fresh):
        if row not in self._dense:
            self._dense[row] = handloop.dense(self._model, self._factors, row, "transformer")
        key = row, self._name
        if fresh or key not in self._copies:
            self._copies[key] = copy.deepcopy(self._dense[row])
            self._copies[key].enable_cache(self._config)
            if isinstance(self._config, FasterCacheConfig):
                # diffusers' own crashes when it begins within its range of timesteps: it skips, with nothing stored
                for _, _, hook in caching.stateful_hooks(self._copies[key]):
                    hook.state.iteration = self._config.spatial_attention_block_skip_range
            middle_of = self._copies[key].transformer_blocks[1].attn.to_q
            middle_of.register_forward_pre_hook(lambda *_: self.calls.append(self._step))
        return self._copies[key]

    def __call__(self, **kwargs):
        rows = self._plan(self._step)
        before = self._plan(self._step - 1) if self._step else []
        outputs = []
        for row in rows:
            model = self._copy(row, row not in before)
            with model.cache_context("only"):
                outputs.append(model(**kwargs)[0])
        return (sum(outputs) / len(outputs),)


def first_block(pipe):
    """A threshold between the changes that these rows meet (0.5 to 1.4): one row skips where another computes."""
    return FirstBlockCacheConfig(threshold=0.985)


def taylor(pipe):
    return TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, max_order=1, taylor_factors_dtype=torch.float64
    )


def broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(50, 990),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(50, 990),
        spatial_attention_block_identifiers=(r"transformer_blocks.*attn",),
        attention_weight_callback=lambda _: 0.4,
        tensor_format="BCHW",
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def mag(pipe):
    return MagCacheConfig(
        threshold=0.3, max_skip_steps=1, retention_ratio=0.0, num_inference_steps=STEPS, mag_ratios=[1.1] * STEPS
    )
