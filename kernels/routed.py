"""The adapted layer, fast: the one public face of the kernels.

`routed*` compute what several LoRAs add to a layer: for any row (one for all, per sample, per token), for equal runs
of samples with factors of their own, or for experts picked by index. They are differentiable in every float argument.
`add_*` add the same to a layer's output, in place where said and then without gradients. Every other module calls
these functions; `implementation` picks the code that runs, None as the process asks (see choice). `reference.py` holds
the definitions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora.kernels import plain, reference
from multilora.kernels.checks import check_index, check_layers, check_row, check_segments
from multilora.kernels.choice import IMPLEMENTATIONS, chosen

__all__ = [
    "IMPLEMENTATIONS", "add_by_index_", "add_expanded", "add_folded", "add_folded_conv", "columns", "rebuild_",
    "rebuilder", "routed", "routed_by_index", "routed_conv", "routed_embedding", "routed_picked", "routed_segments",
    "shrunk",
]  # fmt: skip


@functools.cache
def columns(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """[R] the LoRA that each of the stacked ranks belongs to."""
    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(device)


def _scale(row: Tensor, ranks: Sequence[int], x: Tensor, dtype: torch.dtype) -> Tensor:
    """row [.., k] as [.., R] in x's leading dimensions, with ones where x has more of them than row."""
    row = row.to(x.device, dtype)
    if len(ranks) > 1 or ranks[0] != 1:
        row = row.index_select(-1, columns(tuple(ranks), row.device))
    return row


def routed(
    x: Tensor, down: Tensor, up: Tensor, row: Tensor, ranks: Sequence[int], *, implementation: str | None = None
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
    check_row("routed", x, down, up, row, ranks, x.ndim - 1)
    which = chosen(implementation, "routed", x)
    if which == "reference":
        return reference.routed(x, down, up, row, ranks)
    scale = _scale(row, ranks, x, x.dtype)
    if scale.ndim > 1:
        scale = scale.reshape(*scale.shape[:-1], *[1] * (x.ndim - scale.ndim), scale.shape[-1])
    if which == "triton":
        from multilora.kernels.triton_segments import segments

        lead = x.shape[:-1] if x.ndim == 3 else (1, x.shape[:-1].numel())
        scale = scale.expand(*x.shape[:-1], -1).reshape(*lead, -1)
        y = segments(x.reshape(*lead, -1), down.expand(lead[0], -1, -1), up.expand(lead[0], -1, -1), scale)
        return y.view(*x.shape[:-1], -1)
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
    implementation: str | None = None,
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
    check_row("routed_conv", x, down, up, row, ranks, 1)
    if chosen(implementation, "routed_conv", x, has_triton=False) == "reference":
        return reference.routed_conv(x, down, up, row, ranks, stride, padding, dilation, groups)
    scale = _scale(row, ranks, x, x.dtype)
    ones = [1] * (x.ndim - 2)
    if groups > 1:  # every group needs its own intermediate: [B, groups * R, *size]
        down = down.repeat(groups, *[1] * (down.ndim - 1))
        scale = scale.repeat(*[1] * (scale.ndim - 1), groups)
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    h = conv(x, down, None, stride, padding, dilation, groups) * scale.reshape(*scale.shape, *ones)
    return conv(h, up.reshape(*up.shape, *ones), None, 1, 0, 1, groups)


def routed_segments(x: Tensor, down: Tensor, up: Tensor, *, implementation: str | None = None) -> Tensor:
    """What LoRAs add to a linear layer where equal runs of samples have one each (a batched Composite).

    Semantics: ((x.view(g, -1, in) @ down.mT) @ up.mT).view(*x.shape[:-1], out)

    x       [g * n, ..., in]   float; segment s is samples s * n to (s + 1) * n
    down    [g, r, in]         dtype of x
    up      [g, out, r]        dtype of x, scale and weight already inside
    returns [g * n, ..., out]

    Raises ValueError when shapes disagree.
    """
    g = check_segments(x, down, up)
    which = chosen(implementation, "routed_segments", x)
    if which == "reference":
        return reference.routed_segments(x, down, up)
    runs = x.reshape(g, -1, x.shape[-1])
    if which == "triton":
        from multilora.kernels.triton_segments import segments

        return segments(runs, down, up, None).view(*x.shape[:-1], up.shape[1])
    return torch.bmm(torch.bmm(runs, down.mT), up.mT).view(*x.shape[:-1], up.shape[1])


def _tokens(x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The arguments with one leading dimension: x [T, in], index and weight [T, j] or [j]."""
    if index.ndim > 1:
        index, weight = index.reshape(-1, index.shape[-1]), weight.reshape(-1, index.shape[-1])
    return x.reshape(-1, x.shape[-1]), down, up, index, weight


def routed_by_index(
    x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor, *, implementation: str | None = None
) -> Tensor:
    """What the experts that each token picks add to a linear layer.

    Semantics: einsum("...j,...joi,...i->...o", weight * (index >= 0), (up @ down)[index.clamp(0)], x)

    x       [..., in]      float
    down    [E, r, in]     dtype of x; ranks filled up with zeros where they differ
    up      [E, out, r]    dtype of x, the scale inside; any strides. Contiguous as [E, r, out] (up.mT) reads best
    index   [..., j] or [j] for all tokens   whole numbers below E; -1 picks nothing; an expert may come twice
    weight  like index     float, factor of each pick
    returns [..., out]

    Gradients in x, down, up and weight. No host synchronisation; indices of E and more are not looked for.
    Raises ValueError when shapes disagree.
    """
    check_index("routed_by_index", x, down, up, index, weight)
    which = chosen(implementation, "routed_by_index", x)
    if which == "reference":
        return reference.routed_by_index(x, down, up, index, weight)
    if which == "triton":
        from multilora.kernels.triton_index import by_index

        return by_index(*_tokens(x, down, up, index, weight)).view(*x.shape[:-1], up.shape[1])
    return plain.by_index(x, down, up, index, weight)


def add_by_index_(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor, *, implementation: str | None = None
) -> Tensor:
    """y plus what the picked experts add, written into y; for inference, where no gradient is wanted.

    Semantics: y.add_(routed_by_index(x, down, up, index, weight))

    y       [..., out]  contiguous; the rest as `routed_by_index`
    returns y

    On the CPU one route for all tokens reads the picked experts alone, where they lie. Raises ValueError when shapes
    disagree.
    """
    check_index("add_by_index_", x, down, up, index, weight)
    if y.shape != (*x.shape[:-1], up.shape[1]) or not y.is_contiguous():
        raise ValueError(
            f"add_by_index_: y {list(y.shape)}, wanted contiguous {[*x.shape[:-1], up.shape[1]]} for x {list(x.shape)}"
        )
    which = chosen(implementation, "add_by_index_", x)
    if which == "reference":
        return y.add_(reference.routed_by_index(x, down, up, index, weight))
    if which == "triton":
        from multilora.kernels import triton_index

        triton_index.add_by_index_(y.view(-1, y.shape[-1]), *_tokens(x, down, up, index, weight))
        return y
    return plain.add_by_index_(y, x, down, up, index, weight)


def routed_embedding(
    ids: Tensor, down: Tensor, up: Tensor, row: Tensor, ranks: Sequence[int], *, implementation: str | None = None
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
    check_row("routed_embedding", ids, down, up, row, ranks, ids.ndim)
    if chosen(implementation, "routed_embedding", down, has_triton=False) == "reference":
        return reference.routed_embedding(ids, down, up, row, ranks)
    scale = _scale(row, ranks, ids, down.dtype)
    if scale.ndim > 1:
        scale = scale.reshape(*scale.shape[:-1], *[1] * (ids.ndim + 1 - scale.ndim), scale.shape[-1])
    return F.linear(F.embedding(ids, down.T) * scale, up)


def add_folded(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: float = 1.0,
    *,
    inplace: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """A linear layer's output plus its LoRAs', the row folded into `up` and `alpha`.

    Semantics: y + alpha * (x.view(g, -1, in) @ down) @ up, with one segment of samples per g

    y       [..., out]   the layer's output, dtype of x
    x       [..., in]    the layer's input
    down    [in, R], or [g, in, R] when segments read different factors
    up      [R, out], or [g, R, out]; g divides x's first dimension into equal runs of samples
    inplace write into y (when it is contiguous) instead of a new tensor
    returns [..., out]

    Two matmuls, no other kernel; in Triton, and in place without gradients, one.
    """
    inplace = inplace and y.is_contiguous()
    if chosen(implementation, "add_folded", x, has_triton=inplace) == "triton":
        from multilora.kernels.triton_segments import add_segments_

        g = up.shape[0] if up.ndim == 3 else 1
        add_segments_(
            y.view(g, -1, y.shape[-1]), x.reshape(g, -1, x.shape[-1]), down.expand(g, -1, -1).mT,
            up.expand(g, -1, -1).mT, None, float(alpha),
        )  # fmt: skip
        return y
    return add_expanded(y, shrunk(x, down, up.shape[0] if up.ndim == 3 else 1), up, alpha, inplace=inplace)


def shrunk(x: Tensor, down: Tensor, segments: int = 1) -> Tensor:
    """The first half of `add_folded`, for several layers at once where they read one input.

    Semantics: x.view(segments, -1, in) @ down

    x       [..., in]
    down    [in, R] or [segments, in, R]; R may be that of several layers side by side
    returns [tokens, R], or [segments, tokens / segments, R] where there are several
    """
    if down.ndim == 3:
        return torch.bmm(x.reshape(down.shape[0], -1, x.shape[-1]), down)
    h = x.reshape(-1, x.shape[-1]) @ down
    return h if segments == 1 else h.view(segments, -1, h.shape[-1])


def add_expanded(y: Tensor, h: Tensor, up: Tensor, alpha: float = 1.0, *, inplace: bool = False) -> Tensor:
    """The second half of `add_folded`.

    Semantics: y + alpha * (h @ up).view_as(y)

    y       [..., out]
    h       [tokens, R] or [segments, tokens / segments, R], from `shrunk`
    up      [R, out] or [segments, R, out]
    inplace write into y (when it is contiguous) instead of a new tensor
    returns [..., out]
    """
    inplace = inplace and y.is_contiguous()
    if up.ndim == 2:
        flat, h = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])
        total = flat.addmm_(h, up, alpha=alpha) if inplace else torch.addmm(flat, h, up, alpha=alpha)
    else:
        flat = y.reshape(up.shape[0], -1, y.shape[-1])
        total = flat.baddbmm_(h, up, alpha=alpha) if inplace else torch.baddbmm(flat, h, up, alpha=alpha)
    return y if inplace else total.view(y.shape)


def routed_picked(
    x: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, ...] | None:
    """What the LoRAs that the host has picked for one token add to m linear layers of one width that read it.

    Semantics: sum(w * (x @ down).view(m, 1, r) @ up for down, up, w in zip(downs, ups, weights)), by layer

    x       [..., in]    one token
    downs   [in, m * r]  one of each picked LoRA, the layers side by side
    ups     [m, r, out]  the scale inside; may be views into the bank
    returns m tensors [out], None where nothing was picked; without gradients

    Two operations a LoRA for all m layers (in half precision one more), none to add: it is a linear layer's bias.
    """
    flat, total = x.view(1, -1), None  # one token is a view however it lies
    early = x.dtype in (torch.float16, torch.bfloat16) or len(weights) == 1
    for i, (down, up, weight) in enumerate(zip(downs, ups, weights, strict=True)):
        h = torch.mm(flat, down).view(up.shape[0], 1, -1)
        if i == 0:  # bmm has no alpha: the operation after it weighs both products, where none can overflow before
            total = torch.bmm(h * weight if early else h, up)
        else:
            total.baddbmm_(h, up, beta=weights[0] if i == 1 and not early else 1, alpha=weight)
    return None if total is None else total.view(total.shape[0], -1).unbind()


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


def rebuild_(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    implementation: str | None = None,
) -> None:
    """Many layers' merged weights from their pristine ones, written into `outs`; no gradients.

    Semantics, for each layer: out.copy_(base + ((up * scale) @ down.flatten(1)).view_as(base))

    outs    [out, in, *kernel]  contiguous, dtype and shape of its base, memory of its own
    bases   [out, in, *kernel]  float
    downs   [R, in, *kernel]    float; all LoRAs' stacked
    ups     [out, R]            float
    scales  [R]                 the row, an entry per rank: row.repeat_interleave(ranks)

    Summed in float32, or float64 where the base is; rounded once. Raises ValueError when shapes disagree.
    """
    which = chosen(implementation, "rebuild_", bases[0]) if bases else "torch"
    if which != "triton":  # which checks what it has not seen: 560 layers' checks take longer than their weights
        check_layers(outs, bases, downs, ups, scales)
    if which == "reference":
        for out, *arguments in zip(outs, bases, downs, ups, scales, strict=True):
            out.copy_(reference.rebuild(*arguments))
    elif which == "triton":
        from multilora.kernels import triton_rebuild

        triton_rebuild.rebuild_(outs, bases, downs, ups, scales)
    else:
        plain.rebuild_(outs, bases, downs, ups, scales)


def rebuilder(
    outs: Sequence[Tensor], bases: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor],
    *, implementation: str | None = None,
) -> Callable[[Tensor], None]:  # fmt: skip
    """run(scale [sum of R], the layers' in turn): `rebuild_` of tensors that stay where they are; it holds them."""
    ranks = [len(down) for down in downs]
    check_layers(outs, bases, downs, ups, [base.new_empty(rank) for base, rank in zip(bases, ranks, strict=True)])
    if bases and chosen(implementation, "rebuild_", bases[0]) == "triton":
        from multilora.kernels import triton_rebuild

        return triton_rebuild.rebuilder(outs, bases, downs, ups)
    return lambda scale: rebuild_(outs, bases, downs, ups, scale.split(ranks), implementation=implementation)
