"""Many layers' merged weights from pristine ones in one launch per dtype; a table of pointers finds the layers.

A launch per layer (128 to 560 of them) would cost more than the memory traffic, which is reading W0 and writing W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora.kernels.triton_shared import TYPES, accumulator

TILE = 64
COLUMNS = 16  # numbers per layer in the table: 5 pointers, first tile, rows, columns, ranks, 7 strides


@triton.jit
def _rebuild(
    table, layer_of, KIND: tl.constexpr, FACTORS: tl.constexpr, SCALES: tl.constexpr, WIDE: tl.constexpr,
    COUNT: tl.constexpr, TILE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    at = table + tl.load(layer_of + tile).to(tl.int64) * COUNT
    out = tl.load(at).to(tl.pointer_type(KIND))
    base = tl.load(at + 1).to(tl.pointer_type(KIND))
    down = tl.load(at + 2).to(tl.pointer_type(FACTORS))
    up = tl.load(at + 3).to(tl.pointer_type(FACTORS))
    scale = tl.load(at + 4).to(tl.pointer_type(SCALES))
    first, rows, columns, rank = tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8)
    b_m, b_n, d_r, d_n = tl.load(at + 9), tl.load(at + 10), tl.load(at + 11), tl.load(at + 12)
    u_m, u_r, s_r = tl.load(at + 13), tl.load(at + 14), tl.load(at + 15)
    across = (columns + TILE - 1) // TILE
    m = (tile - first) // across * TILE + tl.arange(0, TILE)
    n = (tile - first) % across * TILE + tl.arange(0, TILE)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    total = tl.load(base + m[:, None] * b_m + n[None, :] * b_n, mask=inside, other=0.0).to(WIDE)
    for start in range(0, rank, BR):
        r = start + tl.arange(0, BR)
        us = tl.load(
            up + m[:, None] * u_m + r[None, :] * u_r, mask=(m < rows)[:, None] & (r < rank)[None, :], other=0.0
        )
        ds = tl.load(
            down + r[:, None] * d_r + n[None, :] * d_n, mask=(r < rank)[:, None] & (n < columns)[None, :], other=0.0
        )
        each = tl.load(scale + r * s_r, mask=r < rank, other=0.0).to(WIDE)
        total = tl.dot(us.to(WIDE) * each[None, :], ds.to(WIDE), total, input_precision="ieee")
    tl.store(out + m[:, None] * columns + n[None, :], total.to(KIND), mask=inside)


def rebuild_(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> None:
    """`rebuild_` of the face. One launch for each combination of dtypes."""
    groups: dict[tuple, list[tuple[Tensor, ...]]] = {}
    for out, base, down, up, scale in zip(outs, bases, downs, ups, scales, strict=True):
        layer = (out, base.reshape(base.shape[0], -1), down.flatten(1), up.to(down.dtype), scale.to(base.device))
        groups.setdefault((base.device, base.dtype, down.dtype, scale.dtype), []).append(layer)
    for (device, kind, factors, scaling), layers in groups.items():
        table, layer_of = _table(layers, device)
        wide = torch.promote_types(kind, torch.float32)
        _rebuild[(len(layer_of),)](
            table, layer_of, KIND=TYPES[kind], FACTORS=TYPES[factors], SCALES=TYPES[scaling], WIDE=accumulator(wide),
            COUNT=COLUMNS, TILE=TILE, BR=32,
        )  # fmt: skip


def _table(layers: Sequence[tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """[layers, COLUMNS] pointers and sizes, and [tiles] the layer of each tile."""
    rows, layer_of = [], []
    for number, (out, base, down, up, scale) in enumerate(layers):
        m, n = base.shape
        pointers = [t.data_ptr() for t in (out, base, down, up, scale)]
        strides = [*base.stride(), *down.stride(), *up.stride(), *scale.stride()]
        rows.append([*pointers, len(layer_of), m, n, down.shape[0], *strides])
        layer_of += [number] * (triton.cdiv(m, TILE) * triton.cdiv(n, TILE))
    return torch.tensor(rows, dtype=torch.int64, device=device), torch.tensor(layer_of, device=device)
