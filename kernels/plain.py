"""The operations that take more than two lines of PyTorch; `routed` calls them. No host sync but where said."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def shares(index: Tensor, weight: Tensor, experts: int) -> Tensor:
    """[.., j] indices and weights as [.., experts] factors: repeated indices add up, -1 adds nothing."""
    kept = torch.where(index >= 0, weight, 0)
    return kept.new_zeros(*index.shape[:-1], experts).scatter_add(-1, index.clamp(min=0).long(), kept)


def by_index(x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """`routed_by_index` through all experts at once: fixed shapes, three matmul-like kernels, differentiable.

    Costs E / j times the arithmetic of the routed experts, which for thin factors is little beside the base layer.
    """
    experts, rank = down.shape[:2]
    each = shares(index, weight.to(x.dtype), experts)
    h = F.linear(x, down.reshape(experts * rank, -1)).unflatten(-1, (experts, rank)) * each[..., None]
    return h.flatten(-2) @ up.mT.reshape(experts * rank, -1)


def add_by_index_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """y += routed_by_index(...). On the CPU one route for all tokens reads only its experts, through views."""
    one = index.ndim == 1 or index.shape[:-1].numel() == 1
    if not one or index.device.type != "cpu":
        return y.add_(by_index(x, down, up, index, weight).to(y.dtype))
    flat, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    # Reading the route here costs nothing: the numbers are in the host's memory.
    for expert, w in zip(index.flatten().tolist(), weight.flatten().tolist(), strict=True):
        if expert >= 0 and w:
            flat.addmm_(x @ down[expert].T, up[expert].T, alpha=w)
    return y


def rebuild_(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> None:
    for out, base, down, up, scale in zip(outs, bases, downs, ups, scales, strict=True):
        wide = torch.promote_types(base.dtype, torch.float32)
        left, right = up.to(wide) * scale.to(base.device, wide), down.to(wide).flatten(1)
        flat = base.to(wide).reshape(base.shape[0], -1)
        if out.dtype == wide:
            torch.addmm(flat, left, right, out=out.view(flat.shape))
        else:
            out.copy_(torch.addmm(flat, left, right).view(out.shape))
