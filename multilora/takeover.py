"""LoRAs that diffusers or PEFT put into a model: read as Lora, switched off for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from multilora.lora import Card, Lora, LowRank
from multilora.sites import canonical, kind_of


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Path and module of every PEFT layer; empty without importing peft when nothing can be one."""
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if not found:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in found if isinstance(module, BaseTunerLayer)]


def loaded(model: nn.Module, component: str | None = None) -> dict[str, tuple[Lora, float]]:
    """The LoRAs that PEFT layers hold: adapter name -> (Lora with `component.` before its paths, its weight now).

    The weight is what `set_adapters` gave on top of alpha / rank (the mean over layers when it differs); 1 for an
    adapter that is not active. Raises ValueError for a kind of PEFT layer that is not a plain LoRA.
    """
    parts: dict[str, dict[str, LowRank]] = {}
    weights: dict[str, list[float]] = {}
    for name, layer in _layers(model):
        path = canonical(name)
        path = f"{component}.{path}" if component else path
        for adapter in _adapters(layer):
            part, weight = _part(layer, adapter, path)
            parts.setdefault(adapter, {})[path] = part
            weights.setdefault(adapter, []).append(weight)
    return {
        adapter: (Lora(own, Card(name=adapter)), sum(weights[adapter]) / len(weights[adapter]))
        for adapter, own in parts.items()
    }


def _adapters(layer: Any) -> list[str]:
    names = (n for attribute in layer.adapter_layer_names for n in getattr(layer, attribute, {}))
    return list(dict.fromkeys(names))


def _part(layer: Any, adapter: str, path: str) -> tuple[LowRank, float]:
    embedding = adapter in getattr(layer, "lora_embedding_A", {})
    if not embedding and adapter not in getattr(layer, "lora_A", {}):
        raise ValueError(f"{path}: adapter {adapter!r} is a {type(layer).__name__}, only plain LoRA can be taken over")
    if getattr(layer, "use_dora", {}).get(adapter) or adapter in getattr(layer, "lora_variant", {}):
        raise ValueError(f"{path}: adapter {adapter!r} is a variant such as DoRA, only plain LoRA can be taken over")
    if embedding:
        down, up, bias = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], None
    else:
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        bias = layer.lora_B[adapter].bias
    rank, alpha, rslora = down.shape[0], layer.lora_alpha[adapter], bool(layer.use_rslora.get(adapter, False))
    scale = alpha / (rank**0.5 if rslora else rank)
    part = LowRank.from_factors(
        down.detach(),
        up.detach(),
        alpha=alpha,
        rslora=rslora,
        bias=None if bias is None else bias.detach() * scale,
        kind=kind_of(_inner(layer)),
    )
    return part, layer.scaling[adapter] / scale if scale else 1.0


def _inner(layer: Any) -> nn.Module:
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """PEFT layers without their adapters; fused ones count as part of the base. Flags are put back exactly."""
    saved = [(layer, layer._disable_adapters) for _, layer in _layers(model) if not layer.merged]
    try:
        for layer, _ in saved:
            layer._disable_adapters = True
        yield
    finally:
        for layer, flag in saved:
            layer._disable_adapters = flag
