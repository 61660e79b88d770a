"""Whether the arguments of an operation fit together; ValueError says what was wanted and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_row(name: str, x: Tensor, down: Tensor, up: Tensor, row: Tensor, ranks: Sequence[int], lead: int) -> None:
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


def check_index(name: str, x: Tensor, down: Tensor, up: Tensor, index: Tensor, weight: Tensor) -> None:
    if down.ndim != 3 or up.ndim != 3 or up.shape[0] != down.shape[0] or up.shape[2] != down.shape[1]:
        raise ValueError(
            f"{name}: wanted down [E, r, in] and up [E, out, r], got {list(down.shape)}, {list(up.shape)}"
        )
    if x.shape[-1] != down.shape[2]:
        raise ValueError(f"{name}: x {list(x.shape)} has another width than down {list(down.shape)}")
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"{name}: index is {index.dtype}, wanted whole numbers, -1 for none")
    if weight.shape != index.shape or index.shape[:-1] not in (x.shape[:-1], torch.Size([])):
        raise ValueError(
            f"{name}: index {list(index.shape)} and weight {list(weight.shape)} for x {list(x.shape)}; wanted both "
            f"[j], one route for all, or {list(x.shape[:-1])} + [j]"
        )


def check_segments(x: Tensor, down: Tensor, up: Tensor) -> int:
    g = down.shape[0]
    if down.ndim != 3 or up.ndim != 3 or up.shape[0] != g or up.shape[2] != down.shape[1]:
        raise ValueError(
            f"routed_segments: wanted down [g, r, in] and up [g, out, r], got {list(down.shape)} and {list(up.shape)}"
        )
    if x.ndim < 2 or x.shape[-1] != down.shape[2] or x.shape[0] % g:
        raise ValueError(
            f"routed_segments: x {list(x.shape)} does not fall into {g} equal segments of width {down.shape[2]}"
        )
    return g


def check_layers(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> None:
    if not len(outs) == len(bases) == len(downs) == len(ups) == len(scales):
        raise ValueError(f"rebuild_: {len(outs)} outs for {len(bases)} bases, {len(downs)} downs, {len(ups)} ups and "
                         f"{len(scales)} scales; wanted one of each per layer")  # fmt: skip
    for i, (out, base, down, up, scale) in enumerate(zip(outs, bases, downs, ups, scales, strict=True)):
        rank = down.shape[0]
        if out.shape != base.shape or out.dtype != base.dtype or not out.is_contiguous():
            raise ValueError(
                f"rebuild_: out {i} is {out.dtype} {list(out.shape)}, wanted {base.dtype} {list(base.shape)} without "
                f"gaps"
            )
        if down.shape[1:] != base.shape[1:] or up.shape != (base.shape[0], rank) or scale.shape != (rank,):
            raise ValueError(
                f"rebuild_: layer {i} of shape {list(base.shape)} got down {list(down.shape)}, up {list(up.shape)} "
                f"and scale {list(scale.shape)}; wanted [R, in, *kernel], [out, R] and [R]"
            )
