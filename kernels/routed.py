"""The adapted layer, fast: the one public face of the kernels.

`routed*` compute what several LoRAs add to a layer, for any row (one for all, per sample, per token), and are
differentiable in every argument. `add_folded*` add it to the layer's output with the row already folded into the
factors: two matmuls and nothing else, which is what repeated calls with one row use. Every other module calls these
functions; which code runs them is decided here. `reference.py` holds the definition.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora.kernels import reference

IMPLEMENTATIONS = ("torch", "reference")


@functools.cache
def _columns(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """[R] the LoRA that each of the stacked ranks belongs to."""
    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(device)


def _check(name: str, x: Tensor, down: Tensor, up: Tensor, row: Tensor, ranks: Sequence[int], lead: int) -> None:
    total = sum(ranks)
    if down.shape[0] != total or up.ndim != 2 or up.shape[1] != total:
        raise ValueError(
            f"{name}: ranks {tuple(ranks)} sum to {total}; wanted down [{total}, ...] and up [out, {total}], got "
            f"down {list(down.shape)} and up {list(up.shape)}"
        )
    if row.ndim < 1 or row.shape[-1] != len(ranks):
        raise ValueError(f"{name}: wanted a row of {len(ranks)} entries (one per LoRA), got shape {list(row.shape)}")
    if row.ndim - 1 > lead or row.shape[:-1] != x.shape[: row.ndim - 1]:
        raise ValueError(
            f"{name}: row {list(row.shape)} does not fit x {list(x.shape)}; wanted [k], [B, k] or [B, T, k] with B, T "
            f"the first dimensions of x"
        )


def _scale(row: Tensor, ranks: Sequence[int], x: Tensor, dtype: torch.dtype) -> Tensor:
    """row [.., k] as [.., R] in x's leading dimensions, with ones where x has more of them than row."""
    row = row.to(x.device, dtype)
    if len(ranks) > 1 or ranks[0] != 1:
        row = row.index_select(-1, _columns(tuple(ranks), row.device))
    return row


def _pick(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r}: wanted one of {', '.join(IMPLEMENTATIONS)}")
    return implementation


def routed(
    x: Tensor, down: Tensor, up: Tensor, row: Tensor, ranks: Sequence[int], *, implementation: str = "torch"
) -> Tensor:
    """What k LoRAs add to a linear layer.

    Semantics: ((x @ down.T) * row.repeat_interleave(ranks, -1)) @ up.T

    x       [..., in]   float
    down    [R, in]     dtype of x; the LoRAs' down factors stacked, R = sum(ranks)
    up      [out, R]    dtype of x; their up factors side by side, the scale alpha / r already inside
    row     [k], [B, k] or [B, T, k]; B, T are the first dimensions of x. Factor of each LoRA
    ranks   k ranks, each >= 0
    returns [..., out]

    Raises ValueError when shapes disagree.
    """
    _check("routed", x, down, up, row, ranks, x.ndim - 1)
    if _pick(implementation) == "reference":
        return reference.routed(x, down, up, row, ranks)
    scale = _scale(row, ranks, x, x.dtype)
    if scale.ndim > 1:
        scale = scale.reshape(*scale.shape[:-1], *[1] * (x.ndim - scale.ndim), scale.shape[-1])
    return F.linear(F.linear(x, down) * scale, up)


def routed_conv(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    row: Tensor,
    ranks: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] | str = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *,
    implementation: str = "torch",
) -> Tensor:
    """What k LoRAs add to a convolution in one, two or three dimensions.

    Semantics: conv(x, einsum("or,r...->o...", up * row.repeat_interleave(ranks), down), stride, padding, ...)

    x       [B, in, *size]             float
    down    [R, in / groups, *kernel]  dtype of x; R = sum(ranks)
    up      [out, R]                   dtype of x
    row     [k] or [B, k]
    ranks   k ranks, each >= 0
    stride, padding, dilation, groups  those of the base layer
    returns [B, out, *size after the convolution]

    Raises ValueError when shapes disagree.
    """
    _check("routed_conv", x, down, up, row, ranks, 1)
    if _pick(implementation) == "reference":
        return reference.routed_conv(x, down, up, row, ranks, stride, padding, dilation, groups)
    scale = _scale(row, ranks, x, x.dtype)
    ones = [1] * (x.ndim - 2)
    if groups > 1:  # every group needs its own intermediate: [B, groups * R, *size]
        down = down.repeat(groups, *[1] * (down.ndim - 1))
        scale = scale.repeat(*[1] * (scale.ndim - 1), groups)
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    h = conv(x, down, None, stride, padding, dilation, groups) * scale.reshape(*scale.shape, *ones)
    return conv(h, up.reshape(*up.shape, *ones), None, 1, 0, 1, groups)


def routed_embedding(
    ids: Tensor, down: Tensor, up: Tensor, row: Tensor, ranks: Sequence[int], *, implementation: str = "torch"
) -> Tensor:
    """What k LoRAs add to an embedding.

    Semantics: (down.T[ids] * row.repeat_interleave(ranks, -1)) @ up.T

    ids     [...]      integer
    down    [R, num]   float; R = sum(ranks)
    up      [dim, R]   dtype of down
    row     [k], [B, k] or [B, T, k]; B, T are the first dimensions of ids
    ranks   k ranks, each >= 0
    returns [..., dim]

    Raises ValueError when shapes disagree.
    """
    _check("routed_embedding", ids, down, up, row, ranks, ids.ndim)
    if _pick(implementation) == "reference":
        return reference.routed_embedding(ids, down, up, row, ranks)
    scale = _scale(row, ranks, ids, down.dtype)
    if scale.ndim > 1:
        scale = scale.reshape(*scale.shape[:-1], *[1] * (ids.ndim + 1 - scale.ndim), scale.shape[-1])
    return F.linear(F.embedding(ids, down.T) * scale, up)


def add_folded(y: Tensor, x: Tensor, down: Tensor, up: Tensor, alpha: float = 1.0, *, inplace: bool = False) -> Tensor:
    """A linear layer's output plus its LoRAs', the row folded into `up` and `alpha`.

    Semantics: y + alpha * (x.view(g, -1, in) @ down) @ up, with one segment of samples per g

    y       [..., out]   the layer's output, dtype of x
    x       [..., in]    the layer's input
    down    [in, R], or [g, in, R] when segments read different factors
    up      [R, out], or [g, R, out]; g divides x's first dimension into equal runs of samples
    inplace write into y (when it is contiguous) instead of a new tensor
    returns [..., out]

    Two matmuls, no other kernel.
    """
    inplace = inplace and y.is_contiguous()
    if up.ndim == 2:
        h = x.reshape(-1, x.shape[-1]) @ down
        flat = y.reshape(-1, y.shape[-1])
        total = flat.addmm_(h, up, alpha=alpha) if inplace else torch.addmm(flat, h, up, alpha=alpha)
        return y if inplace else total.view(y.shape)
    g = up.shape[0]
    if down.ndim == 2:
        h = (x.reshape(-1, x.shape[-1]) @ down).view(g, -1, down.shape[-1])
    else:
        h = torch.bmm(x.reshape(g, -1, x.shape[-1]), down)
    flat = y.reshape(g, -1, y.shape[-1])
    total = flat.baddbmm_(h, up, alpha=alpha) if inplace else torch.baddbmm(flat, h, up, alpha=alpha)
    return y if inplace else total.view(y.shape)


def add_folded_conv(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: float,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    *,
    inplace: bool = False,
) -> Tensor:
    """A convolution's output plus its LoRAs', one row for all samples folded into `up` and `alpha`.

    Semantics: y + alpha * conv(x, einsum("or,r...->o...", up, down), stride, padding, dilation, groups)

    y       [B, out, *size]            x [B, in, *size]
    down    [groups * R, in / groups, *kernel]   each group its copy
    up      [out, R, 1, ...]           one 1 per spatial dimension
    """
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    delta = conv(conv(x, down, None, stride, padding, dilation, groups), up, None, 1, 0, 1, groups)
    return y.add_(delta, alpha=alpha) if inplace else torch.add(y, delta, alpha=alpha)
