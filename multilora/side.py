"""The side form of one adapted module: its stacked factors, and the branch beside it that adds the LoRAs' part.

A row that stays is folded into the factors once, after which a linear layer costs two matmuls per call for all LoRAs
and samples; a row per token, a gate and anything that needs gradients go through the general kernel.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multilora.kernels import routed as kernels
from multilora.siblings import Siblings, siblings_of
from multilora.sites import Site, live_modules

Where = tuple[torch.device, torch.dtype]
Step = Callable[["Branch", Tensor, Tensor], Tensor]  # (branch, x, y) -> y with something added

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a row folds into stacked factors; the same for all sites with the same ranks and block factors.

    segments  equal runs of samples that share a row; 1 when all samples do
    pick      which of the stacked ranks take part: a slice or an index [R']
    shared    whether all segments read one down [R', in]; else R' = segments * width, a segment's ranks at a time
    scale     what the picked up is multiplied by: [R', 1], [segments, R', 1] when shared, or None
    alpha     one factor for all
    """

    segments: int
    pick: slice | Tensor
    shared: bool
    scale: Tensor | None
    alpha: float


@dataclass(eq=False)
class Row:
    """A row that stays for a while, as numbers: [1][k] for all samples, or [B][k].

    layouts, plans  what follows from it, made when first needed
    wide            the down factors of siblings side by side
    nbytes          size of the factors that the plans hold
    """

    rows: tuple[tuple[float, ...], ...]
    per_sample: bool
    layouts: dict[Any, Layout] = field(default_factory=dict)
    plans: dict[tuple[Site, Where], Step | None] = field(default_factory=dict)
    wide: dict[tuple[Siblings, Where], Tensor] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def zero(self) -> bool:
        return not any(v for row in self.rows for v in row)

    def layout(self, site: Site, where: Where) -> Layout:
        key = (site.ranks, site.factors, where)
        if key not in self.layouts:
            self.layouts[key] = _layout(site.ranks, [site.row(row) for row in self.rows], where)
        return self.layouts[key]


@dataclass(eq=False)
class Stack:
    """A site's factors in one dtype on one device.

    down    [R, in, *kernel]   of all LoRAs, R = sum(ranks); None when no LoRA is low-rank here
    up      [R, out]           transposed, so that each LoRA's part is contiguous
    bias    [k] tensors [out] or None
    dense   [k] tensors of the weight's shape or None
    """

    down: Tensor | None
    up: Tensor | None
    bias: list[Tensor | None]
    dense: list[Tensor | None]

    def folded(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """down [R', ...] and up [R', out] (with segments in front where each has its own), the row inside up."""
        up = self.up[layout.pick] if isinstance(layout.pick, slice) else self.up.index_select(0, layout.pick)
        if layout.scale is not None:
            up = up * layout.scale
        own = layout.segments > 1 and not layout.shared
        return self.picked(layout), up.view(layout.segments, -1, up.shape[-1]) if own else up

    def picked(self, layout: Layout) -> Tensor:
        """The down of `folded`."""
        down = self.down[layout.pick] if isinstance(layout.pick, slice) else self.down.index_select(0, layout.pick)
        own = layout.segments > 1 and not layout.shared
        return down.view(layout.segments, -1, *down.shape[1:]) if own else down


def stack(site: Site, where: Where) -> Stack:
    """The stacked factors of a site; differentiable in them."""
    device, dtype = where
    low = [p for p in site.parts if p is not None and p.rank]
    down = torch.cat([p.down.to(device, dtype) for p in low]) if low else None
    up = torch.cat([p.up.to(device, dtype).T for p in low]).contiguous() if low else None
    bias, dense = [], []
    for part in site.parts:
        delta = part.delta() if part is not None and part.rank is None else None
        dense.append(None if delta is None else delta.to(device, dtype))
        bias.append(None if part is None or part.bias is None else part.bias.to(device, dtype))
    return Stack(down, up, bias, dense)


class Branch:
    """What the LoRAs add to one module."""

    def __init__(self, site: Site):
        self.site = site
        self.siblings: tuple[Siblings, int, Sequence[weakref.ref[Branch]]] | None = None
        self.stacks: OrderedDict[Where, Stack] = OrderedDict()
        tensors = [t for p in site.parts if p is not None for t in (getattr(p, "down", None), getattr(p, "up", None))]
        self.trained = any(t is not None and t.requires_grad for t in tensors)

    def stacked(self, where: Where) -> Stack:
        """The site's factors in a dtype on a device; the two used last are kept."""
        if self.trained:
            return stack(self.site, where)
        if where not in self.stacks:
            with torch.inference_mode(False), torch.no_grad():
                self.stacks[where] = stack(self.site, where)
            while len(self.stacks) > 2:
                self.stacks.popitem(last=False)
        self.stacks.move_to_end(where)
        return self.stacks[where]

    def where(self, x: Tensor, y: Tensor) -> Where:
        return y.device, y.dtype if self.site.kind == "embedding" else x.dtype

    def numbers(self, x: Tensor, y: Tensor, row: Row) -> Tensor:
        """y plus the LoRAs' part under a row of numbers; y itself where the row is zero here."""
        if self.trained:
            return self.tensor(x, y, torch.tensor(row.rows if row.per_sample else row.rows[0], device=y.device))
        key = (self.site, self.where(x, y))
        if key not in row.plans:
            with torch.inference_mode(False), torch.no_grad():
                row.plans[key] = _plan(self, self.stacked(key[1]), row, key[1])
        step = row.plans[key]
        if step is None:
            return y
        if row.per_sample and x.shape[0] != len(row.rows):
            raise ValueError(
                f"{self.site.path}: the row has {len(row.rows)} samples, the layer's input {list(x.shape)} has "
                f"{x.shape[0]}; give one row per sample of the call"
            )
        return step(self, x, y)

    def tensor(self, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        """y plus the LoRAs' part under a row tensor [k], [B, k] or [B, T, k]; differentiable in it."""
        site = self.site
        lead = row.shape[:-1]
        deepest = 1 if site.kind == "conv" else 2
        if row.ndim < 1 or row.shape[-1] != len(site.parts) or len(lead) > deepest or lead != x.shape[: len(lead)]:
            raise ValueError(
                f"{site.path}: row of shape {list(row.shape)} for {len(site.parts)} LoRAs and an input of "
                f"{list(x.shape)}; wanted [k], [B, k]{' or [B, T, k]' if deepest == 2 else ''}"
            )
        stacked = self.stacked(self.where(x, y))
        if any(f != 1.0 for f in site.factors):
            row = row * torch.tensor(site.factors, dtype=row.dtype, device=row.device)
        if stacked.down is not None:
            y = y + self.low_rank(x, stacked.down, stacked.up, row, site.ranks).to(y.dtype)
        for i in range(len(site.parts)):
            if stacked.dense[i] is not None or stacked.bias[i] is not None:
                y = self.extra(x, y, stacked.dense[i], stacked.bias[i], row[..., i])
        return y

    def deltas(self, x: Tensor, y: Tensor) -> list[Tensor | None]:
        """[k] what each LoRA alone adds at weight 1 to the output y, in its shape; None where it has no part."""
        site, stacked, found, first = self.site, self.stacked(self.where(x, y)), [], 0
        for part, rank, factor, *rest in zip(
            site.parts, site.ranks, site.factors, stacked.dense, stacked.bias, strict=True
        ):
            own = torch.zeros_like(y) if part is not None else None
            if rank:
                mine = slice(first, first + rank)
                one = torch.ones(1, dtype=x.dtype if x.is_floating_point() else y.dtype, device=y.device)
                own = self.low_rank(x, stacked.down[mine], stacked.up[mine], one, (rank,)).to(y.dtype)
                first += rank
            if any(t is not None for t in rest):
                own = self.extra(x, own, *rest, torch.ones((), dtype=y.dtype, device=y.device))
            found.append(own if own is None or factor == 1.0 else own * factor)
        return found

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor, row: Tensor, ranks: Sequence[int]) -> Tensor:
        up = up.T
        if self.site.kind == "conv":
            x, geometry = self.geometry(x)
            return kernels.routed_conv(x, down, up, row, ranks, *geometry)
        if self.site.kind == "embedding":
            return kernels.routed_embedding(x, down, up, row, ranks) * self._embed_scale()
        return kernels.routed(x, down, up, row, ranks)

    def extra(self, x: Tensor, y: Tensor, dense: Tensor | None, bias: Tensor | None, weight: Tensor) -> Tensor:
        """y plus a dense delta and a bias, times weight [], [B] or [B, T]."""
        scale = weight.to(y.device, y.dtype)
        scale = scale.reshape(*scale.shape, *[1] * (y.ndim - scale.ndim)) if scale.ndim else scale
        if dense is not None:
            y = y + scale * self._dense(x, dense).to(y.dtype)
        if bias is not None:
            by_channel = bias.view(-1, *[1] * (y.ndim - 2)) if self.site.channels == 1 else bias
            y = y + scale * by_channel.to(y.dtype)
        return y

    def geometry(self, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """A convolution's input (padded where its padding is not zeros), stride, padding, dilation and groups."""
        m = self.site.module
        if getattr(m, "padding_mode", "zeros") == "zeros":
            return x, (m.stride, m.padding, m.dilation, getattr(m, "groups", 1))
        x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
        return x, (m.stride, tuple(0 for _ in m.kernel_size), m.dilation, m.groups)

    def _embed_scale(self) -> float | Tensor:
        # transformers' scaled word embeddings multiply what they look up.
        return getattr(self.site.module, "embed_scale", 1.0)

    def _dense(self, x: Tensor, weight: Tensor) -> Tensor:
        m = self.site.module
        match self.site.kind:
            case "linear":
                return F.linear(x, weight)
            case "embedding":
                return F.embedding(x, weight) * self._embed_scale()
            case "conv":
                x, geometry = self.geometry(x)
                return (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3](x, weight, None, *geometry)
        if isinstance(m, nn.LayerNorm):
            return F.layer_norm(x, m.normalized_shape, weight, None, m.eps)
        if isinstance(m, nn.GroupNorm):
            return F.group_norm(x, m.num_groups, weight, None, m.eps)
        if isinstance(m, nn.RMSNorm):
            return F.rms_norm(x, m.normalized_shape, weight, m.eps)
        raise ValueError(
            f"{self.site.path}: a weight difference of a {type(m).__name__} can be merged but not run beside it; use "
            f"form='rebuilt' and one row for all samples"
        )

    def add(self, x: Tensor, y: Tensor, kernel: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """kernel(y, x, *arguments), in place where nobody else can see y."""
        m = self.site.module
        # Autocast does not know the meta device.
        if x.dtype == y.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            # The output of these is a new tensor; a foreign module may keep its own, another hook may have kept it.
            fresh = type(m) in (nn.Linear, *_CONVS) and len(m._forward_hooks) == 1
            tracked = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
            return kernel(y, x, *arguments, inplace=fresh and not tracked)
        return y + kernel(torch.zeros_like(y, dtype=x.dtype), x, *arguments).to(y.dtype)


# -- a row folded into the factors ------------------------------------------------------------------------------


def branches_of(sites: Sequence[Site], model: nn.Module) -> dict[Site, Branch]:
    """A branch for each site; those that have siblings know them."""
    found = {site: Branch(site) for site in sites}
    for site, (group, n) in siblings_of(sites, live_modules(model)).items():
        if not any(found[each].trained for each in group.sites):
            # Weak: a cycle would keep LoRAs alive that nobody uses any more.
            found[site].siblings = (group, n, [weakref.ref(found[each]) for each in group.sites])
    return found


def _plan(branch: Branch, stacked: Stack, row: Row, where: Where) -> Step | None:
    """What a site does under a row: one step, several, or None when the row is zero here."""
    site, (device, dtype) = branch.site, where
    rows = [site.row(r) for r in row.rows]
    if not any(v for r in rows for v in r):
        return None
    steps: list[Step] = []
    if any(v and site.ranks[i] for r in rows for i, v in enumerate(r)):
        if site.kind == "linear" or (site.kind == "conv" and not row.per_sample):
            layout = row.layout(site, where)
            down, up = stacked.folded(layout)
            row.nbytes += _own(down, stacked.down) + _own(up, stacked.up)
            if site.kind == "conv":
                steps.append(_conv(site, down, up, layout.alpha))
            elif branch.siblings is None:
                steps.append(_linear(down, up, layout.alpha))
            else:
                steps.append(_sibling(branch, row, where, down, up, layout))
        else:
            weights = torch.tensor(rows if row.per_sample else rows[0], dtype=dtype, device=device)
            steps.append(lambda b, x, y: y + b.low_rank(x, stacked.down, stacked.up, weights, site.ranks).to(y.dtype))
    for i, (dense, bias) in enumerate(zip(stacked.dense, stacked.bias, strict=True)):
        column = [r[i] for r in rows]
        if any(column) and (dense is not None or bias is not None):
            weight = torch.tensor(column if row.per_sample else column[0], dtype=dtype, device=device)
            steps.append(lambda b, x, y, d=dense, c=bias, w=weight: b.extra(x, y, d, c, w))
    if len(steps) == 1:
        return steps[0]

    def several(branch: Branch, x: Tensor, y: Tensor) -> Tensor:
        for step in steps:
            y = step(branch, x, y)
        return y

    return several


def _own(tensor: Tensor, of: Tensor) -> int:
    """Bytes of a tensor unless it is a view of `of`."""
    same = tensor.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()
    return 0 if same else tensor.numel() * tensor.element_size()


def _linear(down: Tensor, up: Tensor, alpha: float) -> Step:
    down = down.mT
    return lambda branch, x, y: branch.add(x, y, kernels.add_folded, down, up, alpha)


def _sibling(branch: Branch, row: Row, where: Where, down: Tensor, up: Tensor, layout: Layout) -> Step:
    """As _linear, with the first matmul done for all siblings by the first of them."""
    group, n, branches = branch.siblings
    if n == 0:
        downs = [b().stacked(where).picked(layout) for b in branches]
        row.wide[group, where] = torch.cat(downs, dim=-2).mT
        row.nbytes += sum(d.numel() * d.element_size() for d in downs)
    # What the step needs of the row, and not the row, which holds the step.
    down, segments, alpha, wide = down.mT, layout.segments, layout.alpha, row.wide

    def step(branch: Branch, x: Tensor, y: Tensor) -> Tensor:
        h = group.shrunk(n, wide, x, down, wide.get((group, where)), segments)
        return branch.add(h, y, kernels.add_expanded, up, alpha)

    return step


def _conv(site: Site, down: Tensor, up: Tensor, alpha: float) -> Step:
    groups, ones = getattr(site.module, "groups", 1), [1] * (down.ndim - 2)
    down = down.repeat(groups, 1, *ones) if groups > 1 else down
    up = up.T.reshape(*up.T.shape, *ones)

    def step(branch: Branch, x: Tensor, y: Tensor) -> Tensor:
        x, geometry = branch.geometry(x)
        return branch.add(x, y, kernels.add_folded_conv, down, up, alpha, *geometry)

    return step


def segments(rows: Sequence[Sequence[float]]) -> int:
    """How many equal runs of samples with one row each the batch falls into."""
    size, run = 0, 1
    for a, b in zip(rows, [*rows[1:], None], strict=True):
        if a == b:
            run += 1
        else:
            size, run = math.gcd(size, run), 1
    return len(rows) // size


def _layout(ranks: Sequence[int], rows: Sequence[Sequence[float]], where: Where) -> Layout:
    g = segments(rows)
    rows = [rows[i * len(rows) // g] for i in range(g)]
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    live = [[i for i, v in enumerate(r) if v and ranks[i]] for r in rows]
    union = sorted({i for each in live for i in each})
    width = max(sum(ranks[i] for i in each) for each in live)
    # Where some segment reads all LoRAs, one down for all is as narrow as it gets.
    shared = g > 1 and width == sum(ranks[i] for i in union)
    chosen = [union] if g == 1 or shared else live
    index: list[int] = []
    scale: list[list[float]] = [[] for _ in rows] if shared else [[]]
    for j, each in enumerate(chosen):
        index += [starts[i] + n for i in each for n in range(ranks[i])]
        for target, row in zip(scale, rows if shared else [rows[j]], strict=True):
            target += [row[i] for i in each for _ in range(ranks[i])]
        if g > 1 and not shared:  # segments of fewer ranks are filled up with ranks times zero
            fill = (j + 1) * width - len(index)
            index += [0] * fill
            scale[0] += [0.0] * fill
    values = {v for target in scale for v in target}
    alpha = values.pop() if len(values) == 1 else 1.0
    device, dtype = where
    scales = None
    if values:
        scales = torch.tensor(scale if shared else scale[0], dtype=dtype, device=device)[..., None]
    first, last = index[0], index[-1] + 1
    side_by_side = index == list(range(first, last))
    return Layout(g, slice(first, last) if side_by_side else torch.tensor(index, device=device), shared, scales, alpha)
