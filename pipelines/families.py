"""The table of denoiser arguments, one row per family, and what each family's `encode_prompt` returns.

A row says which arguments are one entry per sample, shared, or hold the prompt, and where the negative half lies.

A denoiser class or an argument that is not here runs in turn on copied inputs: dimension 0 is never guessed to be the
batch. Adding a family is adding a row; `multilora.pipelines.inputs` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Inputs:
    """How one denoiser class takes its arguments. An entry of a dict argument is named "arg.key".

    sample        the argument with the latents: a tensor with the batch B in dimension 0, or a list of B tensors
    per_sample    arguments with one entry per sample in dimension 0: tensors, or dicts, lists, tuples of them; a
                  tensor without dimensions, or with 1 there, goes for all samples
    shared        arguments that are the same for every sample
    lists         arguments that are a list with one entry per sample
    text          argument -> name of the prompt encoding that it holds
    time          the argument with the timestep
    negative      where guided calls carry the negative prompt: "first" or "last" half of one batch, or "second": in a
                  call of its own, after the positive one
    layout        of predictions: "spatial" [B, C, h, w]; "packed" [B, h * w, C]; "list" of B tensors [C, frames, h, w]
    joined        modules (globs) whose input is the tokens of all samples joined in dimension 0: no row per sample
    in_turn       names in the model's config that, when set, double the batch inside it or the like: passes in turn
    """

    sample: str
    per_sample: frozenset[str]
    shared: frozenset[str]
    lists: frozenset[str] = frozenset()
    text: Mapping[str, str] = field(default_factory=dict)
    time: str = "timestep"
    negative: str = "first"
    layout: str = "spatial"
    joined: tuple[str, ...] = ()
    in_turn: tuple[str, ...] = ()


_UNET = Inputs(
    sample="sample",
    per_sample=frozenset(
        {
            "sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask",
            "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids", "added_cond_kwargs.image_embeds",
            "added_cond_kwargs.hint", "down_block_additional_residuals", "mid_block_additional_residual",
            "down_intrablock_additional_residuals", "encoder_attention_mask",
        }
    ),
    shared=frozenset({"return_dict", "cross_attention_kwargs.scale", "cross_attention_kwargs.ip_adapter_masks"}),
    text={"encoder_hidden_states": "prompt_embeds", "added_cond_kwargs.text_embeds": "pooled_prompt_embeds"},
)  # fmt: skip
_SD3 = Inputs(
    sample="hidden_states",
    per_sample=frozenset(
        {
            "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep",
            "block_controlnet_hidden_states", "joint_attention_kwargs.ip_adapter_image_embeds",
        }
    ),
    shared=frozenset({"return_dict", "joint_attention_kwargs.scale", "skip_layers"}),
    text={"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"},
)  # fmt: skip
_FLUX = Inputs(
    sample="hidden_states",
    per_sample=frozenset(
        {
            "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance",
            "controlnet_block_samples", "controlnet_single_block_samples",
            "joint_attention_kwargs.ip_adapter_image_embeds",
        }
    ),
    shared=frozenset(
        {
            "return_dict", "joint_attention_kwargs.scale", "joint_attention_kwargs.ip_adapter_masks", "img_ids",
            "txt_ids", "controlnet_blocks_repeat",
        }
    ),
    text={"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"},
    negative="second",
    layout="packed",
)  # fmt: skip
_QWEN = Inputs(
    sample="hidden_states",
    per_sample=frozenset(
        {
            "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "guidance",
            "controlnet_block_samples", "additional_t_cond",
        }
    ),
    # Of img_shapes the model reads the first entry only; the pipeline hands over one per prompt, not per sample.
    shared=frozenset({"return_dict", "attention_kwargs.scale", "img_shapes"}),
    lists=frozenset({"txt_seq_lens"}),
    text={"encoder_hidden_states": "prompt_embeds", "encoder_hidden_states_mask": "prompt_embeds_mask"},
    negative="second",
    layout="packed",
    in_turn=("zero_cond_t",),
)  # fmt: skip
_ZIMAGE = Inputs(
    sample="x",
    per_sample=frozenset({"t", "controlnet_block_samples"}),
    shared=frozenset({"return_dict", "joint_attention_kwargs.scale", "patch_size", "f_patch_size"}),
    lists=frozenset({"x", "cap_feats"}),
    text={"cap_feats": "prompt_embeds"},
    time="t",
    negative="last",
    layout="list",
    joined=("all_x_embedder.*", "cap_embedder.*"),
)
TABLE: dict[str, Inputs] = {
    "UNet2DConditionModel": _UNET,
    "SD3Transformer2DModel": _SD3,
    "FluxTransformer2DModel": _FLUX,
    "QwenImageTransformer2DModel": _QWEN,
    "ZImageTransformer2DModel": _ZIMAGE,
}

_POOLED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
# What `encode_prompt` returns, by the order of its return values.
ENCODINGS: dict[str, tuple[str, ...]] = {
    "UNet2DConditionModel": ("prompt_embeds", "negative_prompt_embeds"),
    "UNet2DConditionModel+pooled": _POOLED,
    "SD3Transformer2DModel": _POOLED,
    "FluxTransformer2DModel": ("prompt_embeds", "pooled_prompt_embeds", "text_ids"),
    "QwenImageTransformer2DModel": ("prompt_embeds", "prompt_embeds_mask"),
    "ZImageTransformer2DModel": ("prompt_embeds", "negative_prompt_embeds"),  # lists, one tensor [tokens, D] a prompt
}
