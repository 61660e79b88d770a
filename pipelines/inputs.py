"""The table of denoiser arguments: which are one entry per sample, which are shared, which hold the prompt.

A denoiser class or an argument that is not in the table is run in turn on copied inputs: dimension 0 is never guessed
to be the batch. Adding a family is adding a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """How one denoiser class takes its arguments.

    sample        the argument with the latents; its dimension 0 is the batch B
    per_sample    arguments with one entry per sample in dimension 0 (tensors, or dicts, lists, tuples of them); a
                  tensor without dimensions counts as shared
    shared        arguments that are the same for every sample
    text          argument (dict entries as "arg.key") -> name of the prompt encoding that it holds
    negative      "first": guided calls carry the negative half first in one batch; "second": the negative prompt has
                  its own call, after the positive one
    layout        "spatial": predictions are [B, C, h, w]; "packed": [B, h * w, C] with positions in img_ids
    """

    sample: str
    per_sample: frozenset[str]
    shared: frozenset[str]
    text: Mapping[str, str] = field(default_factory=dict)
    negative: str = "first"
    layout: str = "spatial"


_UNET = Inputs(
    sample="sample",
    per_sample=frozenset(
        {
            "sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask",
            "added_cond_kwargs", "down_block_additional_residuals", "mid_block_additional_residual",
            "down_intrablock_additional_residuals", "encoder_attention_mask",
        }
    ),
    shared=frozenset({"return_dict", "cross_attention_kwargs"}),
    text={"encoder_hidden_states": "prompt_embeds", "added_cond_kwargs.text_embeds": "pooled_prompt_embeds"},
)
_SD3 = Inputs(
    sample="hidden_states",
    per_sample=frozenset(
        {
            "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep",
            "block_controlnet_hidden_states",
        }
    ),
    shared=frozenset({"return_dict", "joint_attention_kwargs", "skip_layers"}),
    text={"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"},
)
_FLUX = Inputs(
    sample="hidden_states",
    per_sample=frozenset(
        {
            "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance",
            "controlnet_block_samples", "controlnet_single_block_samples",
        }
    ),
    shared=frozenset({"return_dict", "joint_attention_kwargs", "img_ids", "txt_ids", "controlnet_blocks_repeat"}),
    text={"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"},
    negative="second",
    layout="packed",
)
TABLE: dict[str, Inputs] = {
    "UNet2DConditionModel": _UNET,
    "SD3Transformer2DModel": _SD3,
    "FluxTransformer2DModel": _FLUX,
}

# What `encode_prompt` returns, by the order of its return values.
ENCODINGS: dict[str, tuple[str, ...]] = {
    "UNet2DConditionModel": ("prompt_embeds", "negative_prompt_embeds"),
    "UNet2DConditionModel+pooled": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "SD3Transformer2DModel": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "FluxTransformer2DModel": ("prompt_embeds", "pooled_prompt_embeds", "text_ids"),
}


def class_name(denoiser: torch.nn.Module) -> str:
    """The model's own class name, under torch.compile's wrapper and under our own call interception."""
    inner = getattr(denoiser, "_orig_mod", denoiser)
    return getattr(type(inner), "__multilora_of__", type(inner)).__name__


def inputs_of(denoiser: torch.nn.Module) -> Inputs | None:
    """The table's row for this denoiser, or None for a class that is not in it."""
    return TABLE.get(class_name(denoiser))


def encodings_of(denoiser: torch.nn.Module, returned: Sequence[Any]) -> dict[str, Tensor] | None:
    """What `encode_prompt` returned, by name; None for a family that is not in the table. None values are left out."""
    name = class_name(denoiser)
    names = ENCODINGS.get(name + "+pooled" if name == "UNet2DConditionModel" and len(returned) == 4 else name)
    if names is None or len(names) != len(returned):
        return None
    return {n: v for n, v in zip(names, returned, strict=True) if isinstance(v, Tensor)}


def bound_arguments(forward: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by name (positional ones too), absent ones left out."""
    arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
    extra = {}
    for p in inspect.signature(forward).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            extra = arguments.pop(p.name, {})
    return {**arguments, **extra}


def batchable(table: Inputs | None, arguments: Mapping[str, Any]) -> bool:
    """Whether several passes of this call can run as one batch: the class and every used argument are in the table."""
    if table is None:
        return False
    known = table.per_sample | table.shared
    return all(value is None or name in known for name, value in arguments.items())


def repeat(value: Any, times: int) -> Any:
    """A per-sample argument for `times` passes: [B, ...] -> [times * B, ...], inside dicts, lists and tuples too."""
    if isinstance(value, Tensor):
        return value if value.ndim == 0 else value.repeat(times, *[1] * (value.ndim - 1))
    if isinstance(value, dict):
        return {k: repeat(v, times) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(repeat(v, times) for v in value)
    return value


def copied(value: Any) -> Any:
    """The same argument with its own tensors and containers: a pass that consumes or writes it leaves the original."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v) for v in value)
    return value


def put(arguments: dict[str, Any], path: str, value: Any) -> None:
    """Set `arguments["arg"]` or `arguments["arg"]["key"]` (path "arg.key") without touching the caller's dict."""
    name, _, key = path.partition(".")
    arguments[name] = {**arguments[name], key: value} if key else value


def get(arguments: Mapping[str, Any], path: str) -> Any:
    """The argument at "arg" or "arg.key", or None."""
    name, _, key = path.partition(".")
    value = arguments.get(name)
    return value.get(key) if key and isinstance(value, Mapping) else None if key else value


def grid(table: Inputs, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """(h, w) of the prediction in latent positions."""
    if table.layout == "spatial":
        return tuple(arguments[table.sample].shape[-2:])
    ids = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    return int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1


def spread(table: Inputs, mask: Tensor) -> Tensor:
    """A mask [h, w] in the layout of a prediction: [1, 1, h, w] or [1, h * w, 1]."""
    return mask[None, None] if table.layout == "spatial" else mask.reshape(1, -1, 1)
