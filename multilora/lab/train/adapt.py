"""PEFT's LoRA layers on a pipeline's components: which modules, put in, read out as a Lora, taken off again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from multilora.method import unknown
from multilora.parts import LowRank

ADAPTER = "trained"  # not "train": torch would take it for the method
# group -> pattern of module paths inside a denoiser. "all" is their union.
GROUPS = {
    "attention": r"(^|\.)(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
    "feed_forward": r"(^|\.)(ff|ff_context)\.net\.(0\.proj|2)$|(^|\.)single_transformer_blocks\.\d+\.proj_(mlp|out)$",
    "convolution": r"(^|\.)(conv\d*|conv_shortcut)$",
    "projection": r"(^|\.)attentions\.\d+\.proj_(in|out)$|(^|\.)time_emb_proj$",
}
TEXT = r"(^|\.)([qkv]_proj|out_proj|fc[12])$"
# The same for language models, by the names of Llama, Qwen, GPT-2, OPT, BART and T5.
TEXT_GROUPS = {
    "attention": r"(^|\.)([qkvo]_proj|out_proj|qkv_proj|query_key_value|attn\.c_(attn|proj)|"
    r"(SelfAttention|EncDecAttention)\.[qkvo])$",
    "feed_forward": r"(^|\.)((gate|up|down|gate_up)_proj|fc[12]|mlp\.c_(fc|proj)|DenseReluDense\.w[io](_[01])?)$",
}
OUTSIDE = re.compile(r"^(conv_in|conv_out|time_embedding|add_embedding)\b")  # reached by "edges" only


def chosen(
    denoiser: nn.Module, modules: str | Sequence[str] = "all", groups_of: Mapping[str, str] = GROUPS
) -> list[str]:
    """The exact module paths to adapt: group names joined by "+" ("attention+feed_forward"), "all", or path endings.

    groups_of is GROUPS or TEXT_GROUPS.

    Raises ValueError (UnknownName) for an unknown group and when nothing matches.
    """
    kinds = (nn.Linear, nn.Conv2d)
    # transformers keeps GPT-2's linears in a class of its own
    linear = {p: m for p, m in denoiser.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"}
    if isinstance(modules, str):
        groups = list(groups_of) if modules == "all" else modules.split("+")
        for group in groups:
            if group not in groups_of:
                raise unknown("module group", group, [*groups_of, "all"])
        pattern = re.compile("|".join(groups_of[group] for group in groups))
        found = [path for path in linear if pattern.search(path) and not OUTSIDE.search(path)]
    else:
        found = [path for path in linear if any(path == end or path.endswith("." + end) for end in modules)]
    if not found:
        raise ValueError(f"modules={modules!r} match none of the {len(linear)} layers of a {type(denoiser).__name__}")
    return found


def inject(
    model: nn.Module, paths: Iterable[str], rank: int, alpha: float, dropout: float = 0.0
) -> list[nn.Parameter]:
    """Add trainable float32 LoRA layers at `paths`, freeze everything else; the new parameters, in a fixed order."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(paths))
    inject_adapter_in_model(config, model, ADAPTER)
    found = []
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name and "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            found.append(parameter)
    return found


def layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by module path."""
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def refuse_adapters(model: nn.Module) -> None:
    """Raise ValueError when somebody else's LoRA layers are on the model: training would take them off."""
    held = list(layers(model))
    if held:
        raise ValueError(
            f"{type(model).__name__} already carries a LoRA (at {held[0]}); unload it before training: "
            "pipe.unload_lora_weights()"
        )


def take_off(model: nn.Module) -> None:
    """Put the original layers, the same objects, back in place of PEFT's."""
    for path, layer in layers(model).items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    for leftover in ("peft_config",):
        if hasattr(model, leftover):
            delattr(model, leftover)


def read_out(components: Mapping[str, nn.Module], alpha: float) -> dict[str, Any]:
    """The trained factors as {"unet.<path>": LowRank}, alpha folded by LowRank.from_factors.

    The component "" is a bare model: plain paths.
    """
    parts = {}
    for component, model in components.items():
        for path, layer in layers(model).items():
            down = layer.lora_A[ADAPTER].weight.detach().float().cpu().clone()
            up = layer.lora_B[ADAPTER].weight.detach().float().cpu().clone()
            kind = "conv" if down.ndim > 2 else "linear"
            path = path.removeprefix("text_model.") if component.startswith("text_encoder") else path
            key = f"{component}.{path}" if component else path
            if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
                raise ValueError(f"training diverged: {key} holds values that are not finite; lower lr")
            parts[key] = LowRank.from_factors(
                down, up.reshape(up.shape[0], up.shape[1]), alpha=alpha, kind=kind
            )
    return parts
