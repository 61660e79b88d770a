"""DoRA (https://arxiv.org/abs/2402.09353) as the update it makes at weight 1: m * (W + D) / norm(W + D) - W.

The norm is over the whole input of each output channel, or over the outputs of each input channel; the file's tensor
says which. Both need the base's own weight, so the result is a Dense update of that one base. Other weights of the
LoRA scale this update linearly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from multilora.bases import Base
from multilora.lora import Dense, LowRank
from multilora.rebuilt import pristine
from multilora.sites import quantised

# lycoris-lora adds it to the norm, PEFT adds none.
_EPSILON = {"dora_scale": torch.finfo(torch.float32).eps, "magnitude": 0.0}


def base_weight(base: Base | None, targets: Sequence[str]) -> Tensor:
    """The live base's weight, [out, in, ...] in float64 on the CPU; rows of several layers one after the other.

    Raises ValueError where there is no live base or its weight is no plain tensor of the layer's shape.
    """
    rows = []
    for target in targets:
        layer = base.modules.get(target) if base else None
        layer = getattr(layer, "base_layer", layer)
        if layer is None:
            given = "no base given" if base is None else "no such layer" if base.modules else "a folder's headers"
            raise ValueError(
                f"this is DoRA, whose update depends on the base's own weight of {target}, got {given}: "
                "load it with base= a pipeline or module in memory"
            )
        rows.append(_plain(layer, target, base.shapes[target]))
    return torch.cat(rows)


def _plain(layer: nn.Module, target: str, shape: tuple[int, ...]) -> Tensor:
    if kind := quantised(layer):
        raise ValueError(f"this is DoRA, whose update depends on the base's weight; {target} is a quantised {kind}")
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        weight = pristine(weight)  # another thread may be drawing with merged ones
    if isinstance(weight, Tensor) and type(layer).__name__ == "Conv1D":
        weight = weight.T
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point() or weight.shape != shape:
        what = f"a {type(layer).__name__} without a plain floating weight {list(shape)}"
        raise ValueError(f"this is DoRA, and the base's {target} is {what} (quantised, or not in memory)")
    return weight.to("cpu", torch.float64)


def materialised(part: LowRank | Dense, magnitude: Tensor, weight: Tensor, *, spelling: str) -> Dense:
    """The Dense update of a DoRA layer at weight 1, in float32 at least.

    part       D, scale folded in
    magnitude  m: [out], [out, 1, ...] or [1, out, 1, ...] of PEFT ("magnitude"), of lycoris-lora ("dora_scale") [out,
               1, ...] for a norm over each output's input and [1, in, 1, ...] for one over each input's outputs
    weight     W of the base

    Raises ValueError when the shapes do not fit each other.
    """
    if part.kind == "embedding":
        raise ValueError("DoRA of an embedding is not read")
    if part.shape is None or part.shape != tuple(weight.shape):
        got = "none" if part.shape is None else list(part.shape)
        raise ValueError(f"expected a weight update of shape {list(weight.shape)}, found {got}")
    new = weight + part.delta(torch.float64)
    out, wide, flat = weight.shape[0], weight.shape[1], [1] * (weight.ndim - 2)
    by_out = spelling == "magnitude" or (magnitude.ndim > 0 and magnitude.shape[0] == out)
    by_in = spelling == "dora_scale" and magnitude.ndim == weight.ndim and tuple(magnitude.shape) == (1, wide, *flat)
    if by_out and magnitude.numel() == out and magnitude.ndim <= weight.ndim:
        shape, dims = (out, 1, *flat), tuple(range(1, weight.ndim))
    elif by_in:
        shape, dims = (1, wide, *flat), (0, *range(2, weight.ndim))
    else:
        raise ValueError(
            f"its DoRA magnitude has shape {list(magnitude.shape)}, wanted {out} values, one per output"
            + (f", or [1, {wide}], one per input" if spelling == "dora_scale" else "")
        )
    norm = torch.linalg.vector_norm(new, dim=dims, keepdim=True) + _EPSILON[spelling]
    if not bool((norm > 0).all()):
        raise ValueError("this is DoRA, and a row of base and update together is zero: its direction is not defined")
    update = magnitude.to(torch.float64).reshape(shape) / norm * new - weight
    return Dense(update.to(torch.promote_types(part.dtype, torch.float32)), part.bias, part.kind)
