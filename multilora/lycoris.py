"""LyCORIS' products as exact updates: LoHa, LoKr and LoCon with a Tucker core.

All three are products of small factors, so all three have an exact low-rank form: the element-wise product of two
low-rank matrices has the row-wise Khatri-Rao products of their factors as factors (rank r1 r2), a Kronecker product
those of its halves' factors (rank r1 r2). An update is kept so where that is smaller than the dense matrix, and as
Dense otherwise; nothing is truncated. The scale is left to the caller.

Layouts and the rule alpha / rank are those of the package lycoris-lora (https://arxiv.org/abs/2309.14859) and of PEFT.
A convolution's flat factors do not tell its kernel: their update is [out, in * kernel] until a base gives it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from multilora.lora import Dense, LowRank

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOHA_CORES = ("hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def _wide(tensor: Tensor) -> Tensor:
    """In the precision products are formed in; the result is rounded once, to float32 (float64 stays)."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _stored(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _matrix(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim < 2 or min(tensor.shape) < 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, wanted a matrix")
    return _wide(tensor)


def core(mid: Tensor, inner: Tensor) -> Tensor:
    """The Tucker core [r, n, *kernel] times the input's factor [n, in]: a convolution's down [r, in, *kernel]."""
    if mid.ndim < 3 or min(mid.shape) < 1 or mid.shape[1] != inner.shape[0]:
        got = f"core {list(mid.shape)} and factor {list(inner.shape)}"
        raise ValueError(f"{got}: wanted [rank, n, *kernel] and [n, in]")
    return torch.einsum("mn...,nj->mj...", _wide(mid), _wide(inner))


def tucker(down: Tensor, mid: Tensor) -> Tensor:
    """`lora_down` [n, in, 1, 1] through `lora_mid` [r, n, *kernel] as one down [r, in, *kernel], float32 at least."""
    if down.ndim < 2 or down[0, 0].numel() != 1:
        raise ValueError(f"beside a lora_mid, down {list(down.shape)} must have a 1 x 1 kernel")
    return core(mid, down.flatten(1)).to(_stored(down, mid))


def small_or_dense(down: Tensor, up: Tensor, dtype: torch.dtype) -> LowRank | Dense:
    """up [out, r] @ down [r, in, *kernel] as LowRank where that has fewer numbers than the matrix, else Dense."""
    kind = "linear" if down.ndim == 2 else "conv"
    if down.numel() + up.numel() < up.shape[0] * down[0].numel():
        return LowRank(down.to(dtype), up.to(dtype), None, kind)
    return Dense((up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:]).to(dtype), None, kind)


def loha(got: Mapping[str, Tensor]) -> tuple[LowRank | Dense, int]:
    """(update at scale 1, rank that alpha is divided by) of (w1_a @ w1_b) * (w2_a @ w2_b).

    hada_w1_a, hada_w2_a  [out, r]; beside Tucker cores [r, out]
    hada_w1_b, hada_w2_b  [r, in] or [r, in * kernel]; beside Tucker cores [r, in]
    hada_t1, hada_t2      [r, r, *kernel], both or none

    Raises ValueError naming the tensor that is missing or does not fit.
    """
    cores = [name for name in LOHA_CORES if name in got]
    missing = [n for n in (*LOHA, *(LOHA_CORES if cores else ())) if n not in got]
    if missing:
        raise ValueError(f"an incomplete LoHa, {', '.join(missing)} missing")
    ups, downs = [], []
    for side in "12":
        up, down = (_matrix(f"hada_w{side}_{x}", got[f"hada_w{side}_{x}"]) for x in "ab")
        if cores:
            up, down = up.T, core(got[f"hada_t{side}"], down)
        if up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise ValueError(f"ranks differ: hada_w{side}_a {list(up.shape)} and hada_w{side}_b {list(down.shape)}")
        ups.append(up)
        downs.append(down)
    if ups[0].shape[0] != ups[1].shape[0] or downs[0].shape[1:] != downs[1].shape[1:]:
        got_shapes = " and ".join(f"{list(u.shape)} x {list(d.shape)}" for u, d in zip(ups, downs, strict=True))
        raise ValueError(f"the two halves of a LoHa have different shapes: {got_shapes}")
    dtype = _stored(*(got[n] for n in LOHA))
    rank = downs[0].shape[0]
    pairs = rank * downs[1].shape[0]
    rows, wide = ups[0].shape[0], downs[0][0].numel()
    if pairs * (rows + wide) >= rows * wide:  # as small_or_dense, without the long factors
        product = (ups[0] @ downs[0].flatten(1)) * (ups[1] @ downs[1].flatten(1))
        kind = "linear" if downs[0].ndim == 2 else "conv"
        return Dense(product.reshape(rows, *downs[0].shape[1:]).to(dtype), None, kind), rank
    up = (ups[0][:, :, None] * ups[1][:, None, :]).flatten(1)
    down = (downs[0][:, None] * downs[1][None, :]).flatten(0, 1)
    return small_or_dense(down, up, dtype), rank


def _half(got: Mapping[str, Tensor], side: str) -> tuple[Tensor, Tensor, int | None]:
    """(left [m, r], right [r, n, *kernel], the rank it was trained with or None) of w1 or w2, thin as can be."""
    name = f"lokr_w{side}"
    whole, pair = got.get(name), [got.get(f"{name}_{x}") for x in "ab"]
    mid = got.get("lokr_t2") if side == "2" else None
    if (whole is None) == (pair[0] is None or pair[1] is None) or (whole is not None and (mid is not None)):
        there = sorted(n for n in got if n.startswith(name) or n == "lokr_t2")
        raise ValueError(f"a LoKr wants {name}, or both {name}_a and {name}_b; got {', '.join(there) or 'none'}")
    if whole is not None:
        if any(p is not None for p in pair):
            raise ValueError(f"a LoKr with both {name} and its factors")
        full, rank = _matrix(name, whole), None
    else:
        left, right = _matrix(f"{name}_a", pair[0]), _matrix(f"{name}_b", pair[1])
        if mid is not None:
            left, right = left.T, core(mid, right)
        if left.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(f"ranks differ: {name}_a {list(left.shape)} and {name}_b {list(right.shape)}")
        rank = left.shape[1]
        if rank < min(left.shape[0], right[0].numel()):
            return left, right, rank
        full = (left @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:])
    rows, columns = full.shape[0], full[0].numel()
    if rows <= columns:
        return torch.eye(rows, dtype=full.dtype), full, rank
    return full.flatten(1), torch.eye(columns, dtype=full.dtype).reshape(columns, *full.shape[1:]), rank


def lokr(got: Mapping[str, Tensor]) -> tuple[LowRank | Dense, int | None]:
    """(update at scale 1, rank that alpha is divided by) of w1 kron w2; None where both halves are whole.

    w1  lokr_w1 [a, b], or lokr_w1_a [a, r] @ lokr_w1_b [r, b]
    w2  lokr_w2 [c, d, *kernel], or lokr_w2_a [c, r] @ lokr_w2_b [r, d] (or [r, d * kernel]), or with lokr_t2
        [r, r, *kernel]: lokr_w2_a [r, c] and lokr_w2_b [r, d]

    The update is [a c, b d, *kernel]. Raises ValueError naming the tensor that is missing or does not fit.
    """
    left1, right1, rank1 = _half(got, "1")
    left2, right2, rank2 = _half(got, "2")
    if right1.ndim != 2:
        raise ValueError(f"lokr_w1 has {right1.ndim} dimensions, wanted a matrix")
    dtype = _stored(*(t for n, t in got.items() if n in LOKR))
    kernel = right2.shape[2:]
    rank = rank1 if rank1 is not None else rank2
    up_rows, terms = left1.shape[0] * left2.shape[0], right1.shape[0] * right2.shape[0]
    wide = right1.shape[1] * right2.shape[1] * math.prod(kernel)
    spread = [1] * len(kernel)
    if terms * (up_rows + wide) >= up_rows * wide:
        one, two = left1 @ right1, (left2 @ right2.flatten(1)).reshape(left2.shape[0], *right2.shape[1:])
        kind = "conv" if kernel else "linear"
        return Dense(torch.kron(one.reshape(*one.shape, *spread), two).to(dtype), None, kind), rank
    up = torch.kron(left1.contiguous(), left2.contiguous())  # torch.kron refuses other strides
    down = torch.kron(right1.reshape(*right1.shape, *spread).contiguous(), right2.contiguous())
    return small_or_dense(down, up, dtype), rank


def unflattened(part: LowRank | Dense, shape: tuple[int, ...]) -> LowRank | Dense:
    """The update [out, in * kernel] of a convolution's flat factors as one of the convolution's own shape.

    An update that is no such matrix comes back as it is.
    """
    if part.kind != "linear" or part.shape is None or len(shape) < 3:
        return part
    if part.shape != (shape[0], math.prod(shape[1:])):
        return part
    if isinstance(part, Dense):
        return Dense(part.weight.reshape(shape), part.bias, "conv")
    return LowRank(part.down.reshape(part.rank, *shape[1:]), part.up, part.bias, "conv")
