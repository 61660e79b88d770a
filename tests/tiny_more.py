"""More small real models with seeded random weights: transformers of Qwen-Image and Z-Image, and language models."""

from __future__ import annotations

import functools

from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, T5Config, T5EncoderModel

from tests.tiny import seeded


@functools.cache
def qwenimage() -> QwenImageTransformer2DModel:
    """Two blocks of width 16 with two heads, text of width 12."""
    model = QwenImageTransformer2DModel(
        patch_size=1, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return seeded(model, 3)


@functools.cache
def zimage() -> ZImageTransformer2DModel:
    """Two layers of width 16 with two heads, one refiner of each kind, captions of width 12."""
    model = ZImageTransformer2DModel(
        dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, in_channels=4, cap_feat_dim=12,
        axes_dims=[2, 2, 4], axes_lens=[16, 16, 16],
    )  # fmt: skip
    return seeded(model, 3)


_LANGUAGE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@functools.cache
def llama() -> LlamaForCausalLM:
    """Two layers of width 16, keys and values of width 8."""
    return seeded(LlamaForCausalLM(LlamaConfig(**_LANGUAGE)), 3)


@functools.cache
def qwen2() -> Qwen2ForCausalLM:
    return seeded(Qwen2ForCausalLM(Qwen2Config(**_LANGUAGE)), 3)


@functools.cache
def t5() -> T5EncoderModel:
    return seeded(T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)), 3)
