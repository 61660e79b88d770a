"""Small real diffusers pipelines with seeded random weights, and random LoRAs for them. Nothing is downloaded.

    sd15() sdxl() sd3() flux()     real pipelines of these families (pass max_sequence_length=16 to flux for speed)
    sd15_topology(width=0.1)       the true SD 1.5 U-Net (4 levels, 128 attention linears) at a tenth of its widths
    lora_for(pipe, ...)            a random LoRA whose effect on a prediction at weight 1 is 0.1 to 0.3 of its norm

All run on the CPU in float32, or in the `dtype` asked for; all four run in float64 throughout, except sinusoidal
embeddings of timesteps and positions, which diffusers computes in a fixed precision whatever the model's dtype is: the
same values for everyone, so comparisons at 1e-12 hold. Each call returns a new copy; changing it changes no other.
"""

from __future__ import annotations

import copy
import functools
import math

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from multilora.lora import Card, Lora, LowRank

LENGTH = 77
# Relative Frobenius norm of a random update that gives effects of about 0.2, measured; more blocks need less each.
UPDATE = {"unet": 0.07, "transformer": 0.18, "": 0.12}
ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "q_proj", "k_proj", "v_proj", "out_proj",
)  # fmt: skip
T5_ATTENTION = ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o")


# -- tokenizers and text encoders -----------------------------------------------------------------------------------


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer class with bytes as its whole vocabulary: any text works, one token per byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """T5's own tokenizer class (Unigram) with printable ASCII as its whole vocabulary."""
    words = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(33, 127))]
    extra = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    vocab = [(w, 0.0 if i < 3 else -2.0) for i, w in enumerate(words)] + [(w, 0.0) for w in extra]
    return T5Tokenizer(vocab=vocab, model_max_length=512)


def _clip(hidden: int, projected: bool = False) -> nn.Module:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=hidden,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(hidden: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=hidden, d_kv=hidden // 2, d_ff=2 * hidden, num_layers=2, num_heads=2
    )
    return T5EncoderModel(config)


def _vae(channels: int, flow: bool = False) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=not flow,
        use_post_quant_conv=not flow,
        scaling_factor=0.36 if flow else 0.18215,
        shift_factor=0.1 if flow else None,
        force_upcast=False,
    )


def seeded(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Random weights of order-1 effect in every layer: N(0, gain² / fan_in) weights, N(0, 0.1²) biases, norms at 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float) -> None:
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * std)

    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            normal(layer.weight, gain / math.sqrt(layer.weight[0].numel()))
            if layer.bias is not None:
                normal(layer.bias, 0.1)
        elif isinstance(layer, nn.Embedding):
            normal(layer.weight, 1.0)
    return module.eval().requires_grad_(False)


# -- pipelines ------------------------------------------------------------------------------------------------------

_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "transformer_layers_per_block": 1,
}


@functools.cache
def _sd15() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        **_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
    )
    return _sd(unet, _clip(32))


def _sd(unet: UNet2DConditionModel, text_encoder: nn.Module) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=seeded(_vae(4), 1),
        text_encoder=seeded(text_encoder, 2),
        tokenizer=clip_tokenizer(),
        unet=seeded(unet, 3, 1.4),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe)


@functools.cache
def _sd15_topology(width: float) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        sample_size=8,
        layers_per_block=2,
        block_out_channels=tuple(max(32, round(n * width / 32) * 32) for n in (320, 640, 1280, 1280)),
        attention_head_dim=8,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    return _sd(unet, _clip(64))


@functools.cache
def _sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        cross_attention_dim=64,
    )
    pipe = StableDiffusionXLPipeline(
        vae=seeded(_vae(4), 1),
        text_encoder=seeded(_clip(32), 2),
        text_encoder_2=seeded(_clip(32, projected=True), 4),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=seeded(unet, 3, 1.4),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )
    return _quiet(pipe)


@functools.cache
def _sd3(layers: int) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=seeded(transformer, 3, 1.2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=seeded(_vae(8, flow=True), 1),
        text_encoder=seeded(_clip(16, projected=True), 2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=seeded(_clip(16, projected=True), 4),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=seeded(_t5(32), 5),
        tokenizer_3=t5_tokenizer(),
    )
    return _quiet(pipe)


@functools.cache
def _flux(guidance_embeds: bool, layers: int, single_layers: int) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=seeded(_vae(4, flow=True), 1),
        text_encoder=seeded(_clip(32), 2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=seeded(_t5(32), 5),
        tokenizer_2=t5_tokenizer(),
        transformer=seeded(transformer, 3, 1.2),
    )
    pipe.default_sample_size = 8
    return _quiet(pipe)


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _copy(pipe, dtype: torch.dtype | None):
    new = copy.deepcopy(pipe)
    return new if dtype is None else new.to(dtype)


def sd15(dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """32 x 32 pictures, latents [B, 4, 8, 8], U-Net of two levels, one CLIP of 77 tokens; DDIM."""
    return _copy(_sd15(), dtype)


def sd15_topology(width: float = 0.1, dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """As sd15(), with the U-Net of Stable Diffusion 1.5 at `width` of its channels (in multiples of 32)."""
    return _copy(_sd15_topology(width), dtype)


def sdxl(dtype: torch.dtype | None = None) -> StableDiffusionXLPipeline:
    """32 x 32 pictures, latents [B, 4, 8, 8], two CLIPs, pooled text and size ids; Euler."""
    return _copy(_sdxl(), dtype)


def sd3(dtype: torch.dtype | None = None, layers: int = 2) -> StableDiffusion3Pipeline:
    """32 x 32 pictures, latents [B, 8, 8, 8], two CLIPs and a T5; flow matching. The last block is context-only."""
    return _copy(_sd3(layers), dtype)


def flux(
    dtype: torch.dtype | None = None, guidance_embeds: bool = False, layers: int = 2, single_layers: int = 2
) -> FluxPipeline:
    """32 x 32 pictures, packed latents [B, 16, 16], one CLIP and a T5; flow matching with dynamic shift."""
    return _copy(_flux(guidance_embeds, layers, single_layers), dtype)


# -- LoRAs ----------------------------------------------------------------------------------------------------------


def lora_for(
    pipe,
    rank: int = 4,
    seed: int = 0,
    strength: float = 1.0,
    text_encoder: bool = False,
    modules=None,
    conv: bool = False,
    name: str | None = None,
) -> Lora:
    """A random LoRA for a pipeline (component-prefixed keys) or a bare module (plain paths).

    strength      scales the update; 1 changes a prediction by 0.1 to 0.3 of its norm
    text_encoder  also the attention linears of every text encoder
    modules       None for the attention linears, else a predicate on the full key, or names that keys end with
    conv          also the convolutions of a U-Net
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    parts = {}
    for component, module in _components(pipe, text_encoder):
        for path, layer in module.named_modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                continue
            key = f"{component}.{path.removeprefix('text_model.')}" if component else path
            if _wanted(key, layer, modules, conv):
                parts[key] = _random_update(layer, rank, strength * UPDATE.get(component, UPDATE[""]), generator)
    if not parts:
        raise ValueError(f"no module of {type(pipe).__name__} matches modules={modules!r}")
    return Lora(parts, Card(name=name or f"tiny{seed}"))


def _components(pipe, text_encoder: bool):
    if isinstance(pipe, nn.Module):
        return [("", pipe)]
    names = ["unet", "transformer"] + (["text_encoder", "text_encoder_2", "text_encoder_3"] if text_encoder else [])
    return [(n, getattr(pipe, n)) for n in names if getattr(pipe, n, None) is not None]


def _wanted(key: str, layer: nn.Module, modules, conv: bool) -> bool:
    if isinstance(layer, nn.Conv2d) and not conv:
        return False
    if modules is None:
        return isinstance(layer, nn.Conv2d) or key.endswith((*ATTENTION, *T5_ATTENTION))
    return modules(key) if callable(modules) else key.endswith(tuple(modules))


def _random_update(layer: nn.Module, rank: int, relative: float, generator: torch.Generator) -> LowRank:
    weight = layer.weight
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], rank, generator=generator)
    size = (up @ down.flatten(1)).norm()
    kind = "conv" if isinstance(layer, nn.Conv2d) else "linear"
    return LowRank(down, up * (relative * float(weight.float().norm()) / float(size)), kind=kind)
