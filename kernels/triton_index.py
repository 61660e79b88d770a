"""Experts by index in two Triton kernels that read the bank where it lies.

The shrink splits the input's width over programs, so that one token fills a GPU; the parts are added up in order by
the expand, not by atomics, so that equal inputs give equal bits. An index of -1 reads nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora.kernels import plain
from multilora.kernels.triton_shared import accumulator, block, on

PART = 256  # width of the input that one program of the shrink takes, where few tokens must fill the GPU
FILLED = 256  # programs: two on each multiprocessor of a large GPU, nearly


# Not specialised: what changes with the batch and no vector load depends on.
@triton.jit(do_not_specialize=["picks", "n_t", "n_j"])
def _shrink(
    h, x, down, index, wide, rank, picks, x_t, x_i, d_e, d_r, d_i, n_t, n_j,
    PART: tl.constexpr, WIDE: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    pick, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, j = pick // picks, pick % picks
    expert = tl.load(index + t * n_t + j * n_j).to(tl.int64)
    r = tl.arange(0, BR)
    ranks = r < tl.where(expert >= 0, rank, 0)
    total = tl.zeros((BR,), dtype=WIDE)
    for first in range(0, PART, BI):
        i = part * PART + first + tl.arange(0, BI)
        xs = tl.load(x + t * x_t + i * x_i, mask=i < wide, other=0.0).to(WIDE)
        ds = tl.load(
            down + expert * d_e + r[:, None] * d_r + i[None, :] * d_i, mask=ranks[:, None] & (i < wide)[None, :],
            other=0.0,
        )  # fmt: skip
        total += tl.sum(ds.to(WIDE) * xs[None, :], axis=1)
    tl.store(h + (part * tl.num_programs(0) + pick) * rank + r, total, mask=r < rank)


@triton.jit(do_not_specialize=["tokens", "picks", "parts", "n_t", "n_j", "w_t", "w_j"])
def _expand(
    y, h, up, index, weight, tokens, out, rank, picks, parts, y_t, y_o, u_e, u_o, u_r, n_t, n_j, w_t, w_j,
    ADD: tl.constexpr, WIDE: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    r, p = tl.arange(0, BR), tl.arange(0, BP)
    total = tl.zeros((BO,), dtype=WIDE)
    for j in range(picks):
        expert = tl.load(index + t * n_t + j * n_j).to(tl.int64)
        ranks = r < tl.where(expert >= 0, rank, 0)
        inner = tl.zeros((BR,), dtype=WIDE)
        for part in range(0, parts, BP):
            each = tl.load(
                h + (((part + p)[:, None] * tokens + t) * picks + j) * rank + r[None, :],
                mask=(part + p < parts)[:, None] & ranks[None, :], other=0.0,
            )  # fmt: skip
            inner += tl.sum(each, axis=0)
        inner *= tl.load(weight + t * w_t + j * w_j).to(WIDE)
        us = tl.load(
            up + expert * u_e + o[:, None] * u_o + r[None, :] * u_r, mask=(o < out)[:, None] & ranks[None, :],
            other=0.0,
        )  # fmt: skip
        total += tl.sum(us.to(WIDE) * inner[None, :], axis=1)
    where = y + t * y_t + o * y_o
    if ADD:
        total += tl.load(where, mask=o < out, other=0.0).to(WIDE)
    tl.store(where, total.to(y.dtype.element_ty), mask=o < out)


def _run(y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor, add: bool) -> None:
    """y [T, out] (+)= the picked experts on x [T, in]; index and weight [T, j], one row for all by stride 0."""
    (tokens, wide), rank, out, picks = x.shape, down.shape[1], up.shape[1], index.shape[-1]
    if not rank or not picks or not y.numel():
        if not add:
            y.zero_()
        return
    index, weight = (t.expand(tokens, picks) for t in (index, weight))
    kind, br = accumulator(x.dtype), triton.next_power_of_2(rank)
    part, bo = sizes(tokens, picks, wide, out, br)
    parts = triton.cdiv(wide, part)
    h = torch.empty(
        parts, tokens, picks, rank, device=x.device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    )
    with on(x.device):
        _shrink[(tokens * picks, parts)](
            h, x, down, index, wide, rank, picks, *x.stride(), *down.stride(), *index.stride(),
            PART=part, WIDE=kind, BI=min(part, max(4096 // br, 16)), BR=br,
        )  # fmt: skip
        _expand[(tokens, triton.cdiv(out, bo))](
            y, h, up, index, weight, tokens, out, rank, picks, parts, *y.stride(), *up.stride(), *index.stride(),
            *weight.stride(), ADD=add, WIDE=kind, BO=bo, BR=br, BP=min(triton.next_power_of_2(parts), 16),
        )  # fmt: skip


def sizes(tokens: int, picks: int, wide: int, out: int, br: int) -> tuple[int, int]:
    """Width of the shrink's parts and outputs of the expand's programs: as large as still fills a GPU."""
    part = block(wide, most=1024)
    while part > PART and tokens * picks * triton.cdiv(wide, part) < FILLED:
        part //= 2
    bo = block(out, most=max(16, min(128, 4096 // br)))
    while bo > 32 and tokens * triton.cdiv(out, bo) < FILLED:
        bo //= 2
    return part, bo


@torch.library.custom_op("multilora::by_index", mutates_args=())
def by_index(x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """`routed_by_index` for x [T, in], index and weight [T, j] or [j]."""
    y = x.new_empty(x.shape[0], up.shape[1])
    _run(y, x, down, up, index, weight, add=False)
    return y


@by_index.register_fake
def _(x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], up.shape[1])


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up, index, weight = ctx.saved_tensors
    each = plain.shares(index, weight.to(x.dtype), down.shape[0]).expand(x.shape[0], -1)[..., None]
    h = torch.einsum("ti,eri->ter", x, down)
    inner = torch.einsum("to,eor->ter", gradient, up)
    by_x = torch.einsum("ter,eri->ti", inner * each, down)
    by_down = torch.einsum("ter,ti->eri", inner * each, x)
    by_up = torch.einsum("to,ter->eor", gradient, h * each)
    by_expert = (inner * h).sum(-1)
    picked = by_expert.gather(1, index.clamp(min=0).long().expand(x.shape[0], -1))
    by_weight = torch.where(index >= 0, picked, 0)
    if index.ndim == 1:
        by_weight = by_weight.sum(0)
    return by_x, by_down, by_up, None, by_weight.to(weight.dtype)


by_index.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("multilora::add_by_index_", mutates_args=("y",))
def add_by_index_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> None:
    """y [T, out] += by_index(...); without gradients."""
    _run(y, x, down, up, index, weight, add=True)


@add_by_index_.register_fake
def _(y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> None:
    return None
