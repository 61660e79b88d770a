"""Many layers' merged weights from pristine ones in one launch per dtype; a table of pointers finds the layers.

A launch per layer (128 to 560 of them) would cost more than the memory traffic, which is reading W0 and writing W. The
table is kept between calls, for a new one costs more than that too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora.kernels.checks import check_layers
from multilora.kernels.triton_shared import TYPES, accumulator, on

# A tile's rows and columns, and how many ranks at a time; and those of 16-bit layers with even sizes.
TILE = {"ROWS": 64, "WIDTH": 64, "BR": 16}
HALF = {"ROWS": 64, "WIDTH": 64, "BR": 16, "num_warps": 4, "maxnreg": 128}
COLUMNS = 16  # numbers per layer in the table: 4 pointers, first scale, first tile, rows, columns, rank, 6 strides, 0
KEPT = 8  # tables


@triton.jit
def _rebuild(
    table, layer_of, scale, KIND: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    at = table + tl.load(layer_of + tile).to(tl.int64) * COUNT
    out = tl.load(at).to(tl.pointer_type(KIND))
    base = tl.load(at + 1).to(tl.pointer_type(KIND))
    down = tl.load(at + 2).to(tl.pointer_type(DOWN))
    up = tl.load(at + 3).to(tl.pointer_type(UP))
    scale += tl.load(at + 4)
    first, rows, columns, rank = tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8)
    b_m, b_n, d_r, d_n = tl.load(at + 9), tl.load(at + 10), tl.load(at + 11), tl.load(at + 12)
    u_m, u_r = tl.load(at + 13), tl.load(at + 14)
    if EVEN:  # what comes from a table the compiler cannot know; without this every load is of one number
        out, base, down = tl.multiple_of(out, 16), tl.multiple_of(base, 16), tl.multiple_of(down, 16)
        columns = tl.multiple_of(columns, 16)
        b_m, b_n, d_r, d_n = columns, 1, columns, 1
    across = (columns + WIDTH - 1) // WIDTH
    m = (tile - first) // across * ROWS + tl.arange(0, ROWS)
    n = (tile - first) % across * WIDTH + tl.arange(0, WIDTH)
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
        each = tl.load(scale + r, mask=r < rank, other=0.0)
        total = tl.dot(us.to(WIDE) * each[None, :], ds.to(WIDE), total, out_dtype=WIDE, input_precision=PRECISION)
    tl.store(out + m[:, None] * columns + n[None, :], total.to(KIND), mask=inside)


class _Group(NamedTuple):
    """Layers that one launch takes."""

    layers: list[int]
    table: Tensor
    layer_of: Tensor
    wide: torch.dtype
    constants: dict

    def run(self, scales: Sequence[Tensor]) -> None:
        found = [scales[i] for i in self.layers]
        if any(s.device != self.table.device for s in found):
            found = [s.to(self.table.device) for s in found]
        self.launch(torch.cat(found))

    def launch(self, scale: Tensor) -> None:
        """scale [R of all its layers]"""
        scale = scale.to(self.table.device, self.wide)
        with on(self.table.device):
            _rebuild[(len(self.layer_of),)](self.table, self.layer_of, scale, **self.constants)


_kept: list[tuple[tuple, list[_Group], list[torch.Size]]] = []  # the last used first; the scales' shapes
_captured: list[list[_Group]] = []  # a CUDA graph reads their memory as long as it lives


def rebuild_(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> None:
    """`rebuild_` of the face, checks included. One launch for each combination of dtypes."""
    key, shapes = _key(outs, bases, downs, ups), [scale.shape for scale in scales]
    found, copies = next((kept for kept in _kept if kept[0] == key and kept[2] == shapes), None), []
    if found is None:
        check_layers(outs, bases, downs, ups, scales)
        groups, copies = _groups(outs, bases, downs, ups)
        found = key, groups, shapes
    if not copies:
        _kept[:] = [found, *(kept for kept in _kept if kept is not found)][:KEPT]
    groups = found[1]
    if bases[0].is_cuda and torch.cuda.is_current_stream_capturing() and not any(groups is g for g in _captured):
        _captured.append(groups)
    for group in groups:
        group.run(scales)


def rebuilder(
    outs: Sequence[Tensor], bases: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor]
) -> Callable[[Tensor], None]:
    """`rebuilder` of the face."""
    groups, copies = _groups(outs, bases, downs, ups)
    parts = torch.arange(sum(len(down) for down in downs)).split([len(down) for down in downs])
    picks = [torch.cat([parts[i] for i in group.layers]).to(group.table.device) for group in groups]
    held = outs, bases, downs, ups, copies  # the table has their addresses

    def run(scale: Tensor, held=held) -> None:
        for group, pick in zip(groups, picks, strict=True):
            group.launch(scale if len(groups) == 1 else scale.to(pick.device).index_select(0, pick))

    return run


def _key(*lists: Sequence[Tensor]) -> tuple:
    """All that a table is made of. It holds no tensor: one freed and another at its address make another key, or the
    same table."""
    tensors = [tensor for each in lists for tensor in each]
    return (
        [len(each) for each in lists],
        list(map(Tensor.data_ptr, tensors)),
        [tensor.shape for tensor in tensors],
        list(map(Tensor.stride, tensors)),
        [tensor.dtype for tensor in tensors],
    )


def _groups(
    outs: Sequence[Tensor], bases: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor]
) -> tuple[list[_Group], list[Tensor]]:
    """The launches, and the copies made here that they read: then they are of this call alone."""
    split: dict[tuple, list[tuple[int, tuple[Tensor, ...]]]] = {}
    copies = []
    for i, (out, base, down, up) in enumerate(zip(outs, bases, downs, ups, strict=True)):
        where = {out.device, base.device, down.device, up.device}
        if len(where) > 1:
            raise ValueError(f"rebuild_: layer {i} lies on {', '.join(sorted(map(str, where)))}, wanted one device")
        flat = out, base.reshape(base.shape[0], -1), down.flatten(1), up
        copies += [new for new, old in ((flat[1], base), (flat[2], down)) if new.data_ptr() != old.data_ptr()]
        split.setdefault((base.device, base.dtype, down.dtype, up.dtype), []).append((i, flat))
    return [_group(key, layers) for key, layers in split.items()], copies


def _group(key: tuple, layers: list[tuple[int, tuple[Tensor, ...]]]) -> _Group:
    device, kind, downs, ups = key
    even = all(
        base.shape[1] % 16 == 0 and base.is_contiguous() and down.is_contiguous()
        and not any(t.data_ptr() % 16 for t in (out, base, down))
        for _, (out, base, down, _) in layers
    )  # fmt: skip
    tile = HALF if even and kind.itemsize == 2 else TILE
    rows, tiles, first, scale = [], [], 0, 0
    for _, (out, base, down, up) in layers:
        (m, n), rank = base.shape, down.shape[0]
        pointers = [t.data_ptr() for t in (out, base, down, up)]
        rows.append([*pointers, scale, first, m, n, rank, *base.stride(), *down.stride(), *up.stride(), 0])
        tiles.append(triton.cdiv(m, tile["ROWS"]) * triton.cdiv(n, tile["WIDTH"]))
        first, scale = first + tiles[-1], scale + rank
    wide = torch.promote_types(kind, torch.float32)
    constants = {
        "KIND": TYPES[kind], "DOWN": TYPES[downs], "UP": TYPES[ups], "WIDE": accumulator(wide),
        "PRECISION": precision(wide), "EVEN": even, "COUNT": COLUMNS, **tile,
    }  # fmt: skip
    layer_of = torch.repeat_interleave(torch.arange(len(layers), dtype=torch.int32), torch.tensor(tiles))
    return _Group([i for i, _ in layers], torch.tensor(rows, device=device), layer_of.to(device), wide, constants)


def precision(wide: torch.dtype) -> str:
    """Of a dot: three products of tf32 on tensor cores are off by a bit or two of float32, and far faster."""
    return "ieee" if wide == torch.float64 else "tf32x3"
