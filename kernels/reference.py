"""The adapted layer by its definition: one LoRA after another. Slow and clear; the oracle of `routed`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_lora(down: Tensor, up: Tensor, row: Tensor, ranks: Sequence[int]):
    start = 0
    for i, rank in enumerate(ranks):
        if rank:
            yield down[start : start + rank], up[:, start : start + rank], row[..., i]
        start += rank


def _over(weight: Tensor, y: Tensor, channel: int) -> Tensor:
    """[], [B] or [B, T] against y, whose channels lie at dimension `channel`."""
    lead = weight.ndim
    trailing = y.ndim - lead if channel != 1 else y.ndim - 1
    return weight.reshape(*weight.shape, *[1] * trailing) if lead else weight


def routed(x: Tensor, down: Tensor, up: Tensor, row: Tensor, ranks: Sequence[int]) -> Tensor:
    """sum_i row[..., i] * (x @ down_i.T) @ up_i.T; arguments as `multilora.kernels.routed.routed`."""
    y = x.new_zeros(*x.shape[:-1], up.shape[0])
    for down_i, up_i, weight in _per_lora(down, up, row, ranks):
        y = y + _over(weight.to(x.dtype), y, -1) * ((x @ down_i.T) @ up_i.T)
    return y


def routed_conv(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    row: Tensor,
    ranks: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """sum_i row[..., i] * conv(x, (up_i @ down_i) as the base layer's weight); arguments as `routed_conv` there."""
    conv = (F.conv1d, F.conv2d, F.conv3d)[down.ndim - 3]
    y: Tensor | None = None
    for down_i, up_i, weight in _per_lora(down, up, row, ranks):
        delta = torch.einsum("or,r...->o...", up_i, down_i)
        one = conv(x, delta, None, stride, padding, dilation, groups)
        one = _over(weight.to(x.dtype), one, 1) * one
        y = one if y is None else y + one
    if y is None:
        raise ValueError("routed_conv: every rank is 0, nothing to compute")
    return y


def routed_embedding(ids: Tensor, down: Tensor, up: Tensor, row: Tensor, ranks: Sequence[int]) -> Tensor:
    """sum_i row[..., i] * (up_i @ down_i).T[ids]; arguments as `routed_embedding` there."""
    y = up.new_zeros(*ids.shape, up.shape[0])
    for down_i, up_i, weight in _per_lora(down, up, row, ranks):
        y = y + _over(weight.to(up.dtype), y, -1) * (up_i @ down_i).T[ids]
    return y


def routed_segments(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """x[s] @ (up[s] @ down[s]).T for each segment s; arguments as `routed_segments` there."""
    runs = x.chunk(down.shape[0])
    return torch.cat([run @ (up_i @ down_i).T for run, down_i, up_i in zip(runs, down, up, strict=True)])


def routed_by_index(x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """sum_j weight[.., j] * (up @ down)[index[.., j]] @ x, index -1 adding nothing; arguments as there."""
    delta, weight = up @ down, weight.to(x.dtype) * (index >= 0)
    return torch.einsum("...j,...joi,...i->...o", weight, delta[index.clamp(min=0)], x)


def rebuild(base: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """base + (up * scale) @ down, summed in float64; one weight of `rebuild_` there."""
    delta = (up.double() * scale.double()) @ down.flatten(1).double()
    return (base.double() + delta.view(base.shape)).to(base.dtype)
