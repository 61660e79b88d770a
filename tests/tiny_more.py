"""More small real models with seeded random weights: pipelines of Qwen-Image and Z-Image, and language models.

    qwen_pipe() z_pipe()    pipelines as those of tests/tiny.py: a new copy each call, `dtype`, lora_for works on them
    qwenimage() zimage()    bare transformers, even smaller

Nothing is downloaded.
"""

from __future__ import annotations

import functools

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.tiny import _copy, _quiet, _vae, seeded

# -- pipelines ------------------------------------------------------------------------------------------------------

_QWEN_WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's own tokenizer class with bytes as its whole vocabulary, and a chat template: one token per byte."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_QWEN_WORDS]
    tokenizer = Qwen2Tokenizer(
        vocab={w: i for i, w in enumerate(words)},
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(_QWEN_WORDS[1:]),
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


@functools.cache
def _qwen() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    words = len(qwen_tokenizer())
    text = Qwen2_5_VLConfig(
        text_config={
            **_QWEN_TEXT, "vocab_size": words, "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [1], "patch_size": 14, "window_size": 112,
        },
        vocab_size=words,
        bos_token_id=None,
        eos_token_id=None,
        image_token_id=words - 1,
        vision_start_token_id=words - 3,
        vision_end_token_id=words - 2,
    )  # fmt: skip
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=seeded(vae, 1),
        text_encoder=seeded(Qwen2_5_VLForConditionalGeneration(text), 2),
        tokenizer=qwen_tokenizer(),
        transformer=seeded(transformer, 3, 1.2),
    )
    pipe.default_sample_size = 8
    # One token per byte: the real template's system message would be most of the text.
    pipe.prompt_template_encode = "<|im_start|>user\n{}<|im_end|>\n"
    pipe.prompt_template_encode_start_idx = 6
    return _quiet(pipe)


@functools.cache
def _z() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[160, 32, 32],
    )
    text = Qwen3Model(Qwen3Config(vocab_size=len(qwen_tokenizer()), head_dim=16, **_QWEN_TEXT))
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=seeded(_vae(4, flow=True), 1),
        text_encoder=seeded(text, 2),
        tokenizer=qwen_tokenizer(),
        transformer=seeded(transformer, 3, 1.2),
    )
    return _quiet(pipe)


def qwen_pipe(dtype: torch.dtype | None = None) -> QwenImagePipeline:
    """32 x 32 pictures, packed latents [B, 16, 16] (4 x 4), a Qwen2.5-VL of 1 token per byte; flow matching."""
    return _copy(_qwen(), dtype)


def z_pipe(dtype: torch.dtype | None = None) -> ZImagePipeline:
    """32 x 32 pictures (give height and width), latents [B, 4, 8, 8] sent as a list, a Qwen3 of 1 token per byte.

    Pass max_sequence_length=96 for speed; texts beyond 127 tokens do not fit its positions. Its pipeline keeps latents
    in float32 whatever the model's dtype.
    """
    return _copy(_z(), dtype)


# -- bare models ----------------------------------------------------------------------------------------------------
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
