"""Equal segments and gated concatenation in one Triton kernel: shrink, scale, expand, and add to the output.

A program takes a block of a segment's tokens through both matmuls, so x is read once, y read and written once, and
the intermediate never leaves the chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora.kernels.triton_shared import accumulator, block, on, upcast

RANKS = 128  # at once; more are taken in turn
PROGRAMS = 132  # that a large GPU runs at once, or more


@triton.jit(do_not_specialize=["tokens"])
def _segments(
    y, x, down, up, scale, tokens, wide, out, rank, alpha,
    y_s, y_t, y_o, x_s, x_t, x_i, d_s, d_r, d_i, u_s, u_o, u_r, f_s, f_t, f_r,
    SCALED: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BT: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    r = tl.arange(0, BR)
    live, ranks = t < tokens, r < rank
    h = tl.zeros((BT, BR), dtype=WIDE)
    for first in range(0, wide, BI):
        i = first + tl.arange(0, BI)
        xs = tl.load(
            x + segment * x_s + t[:, None] * x_t + i[None, :] * x_i,
            mask=live[:, None] & (i < wide)[None, :],
            other=0.0,
        )
        ds = tl.load(
            down + segment * d_s + i[:, None] * d_i + r[None, :] * d_r,
            mask=(i < wide)[:, None] & ranks[None, :], other=0.0,
        )  # fmt: skip
        if UPCAST:
            xs, ds = xs.to(WIDE), ds.to(WIDE)
        h = tl.dot(xs, ds, h, out_dtype=WIDE, input_precision="ieee")
    h *= alpha
    if SCALED:
        each = tl.load(
            scale + segment * f_s + t[:, None] * f_t + r[None, :] * f_r, mask=live[:, None] & ranks[None, :], other=0.0
        )
        h *= each.to(WIDE)
    for first in range(0, out, BO):
        o = first + tl.arange(0, BO)
        us = tl.load(
            up + segment * u_s + r[:, None] * u_r + o[None, :] * u_o, mask=ranks[:, None] & (o < out)[None, :],
            other=0.0,
        )  # fmt: skip
        if UPCAST:
            us = us.to(WIDE)
        total = tl.dot(h.to(us.dtype), us, out_dtype=WIDE, input_precision="ieee")
        where = y + segment * y_s + t[:, None] * y_t + o[None, :] * y_o
        mask = live[:, None] & (o < out)[None, :]
        if ADD:
            total += tl.load(where, mask=mask, other=0.0).to(WIDE)
        tl.store(where, total.to(y.dtype.element_ty), mask=mask)


def _run(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor | None, alpha: float, add: bool) -> None:
    """y [g, n, out] (+)= alpha * ((x [g, n, in] @ down [g, R, in].mT) * scale [g, n, R]) @ up [g, out, R].mT"""
    g, tokens, wide = x.shape
    out, rank = up.shape[1], down.shape[1]
    if not rank or not y.numel():
        if not add:
            y.zero_()
        return
    if x.dtype == torch.float64 and alpha != 1.0:  # Triton passes numbers as float32
        up, alpha = up * alpha, 1.0
    for first in range(0, rank, RANKS):
        ranks = slice(first, first + RANKS)
        d, u = down[:, ranks], up[:, :, ranks]
        f = u if scale is None else scale[:, :, ranks]
        bt, most = 64, 32 if x.dtype == torch.float64 else 64  # with more, shared memory overflows
        while bt > 16 and triton.cdiv(tokens, bt) * g < PROGRAMS:
            bt //= 2
        with on(x.device):
            _segments[(triton.cdiv(tokens, bt), g)](
                y, x, d, u, f, tokens, wide, out, d.shape[1], alpha,
                *y.stride(), *x.stride(), *d.stride(), *u.stride(), *f.stride(),
                SCALED=scale is not None, ADD=add or first > 0, WIDE=accumulator(x.dtype), UPCAST=upcast(),
                BT=bt, BI=block(wide, most=most), BR=block(d.shape[1]), BO=block(out, most=most),
            )  # fmt: skip


@torch.library.custom_op("multilora::segments", mutates_args=())
def segments(x: Tensor, down: Tensor, up: Tensor, scale: Tensor | None) -> Tensor:
    """((x @ down.mT) * scale) @ up.mT for x [g, n, in], down [g, R, in], up [g, out, R], scale [g, n, R] or None."""
    y = x.new_empty(*x.shape[:2], up.shape[1])
    _run(y, x, down, up, scale, 1.0, add=False)
    return y


@segments.register_fake
def _(x: Tensor, down: Tensor, up: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:2], up.shape[1])


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up, scale = ctx.saved_tensors
    h = x @ down.mT
    inner = gradient @ up
    by_scale = inner if scale is None else inner * scale
    by_up = gradient.mT @ (h if scale is None else h * scale)
    return by_scale @ down, by_scale.mT @ x, by_up, None if scale is None else inner * h


segments.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("multilora::add_segments_", mutates_args=("y",))
def add_segments_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor | None, alpha: float) -> None:
    """y [g, n, out] += alpha * segments(x, down, up, scale); without gradients."""
    _run(y, x, down, up, scale, alpha, add=True)


@add_segments_.register_fake
def _(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor | None, alpha: float) -> None:
    return None
