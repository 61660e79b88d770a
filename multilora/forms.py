"""What one adapted module does: its stacked factors, its side branch for a row, its merged weight for a row."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multilora.kernels import routed as kernels
from multilora.sites import Site

Where = tuple[torch.device, torch.dtype]


@dataclass(eq=False)
class Row:
    """A row that stays for a while, as numbers: [1][k] for all samples, or [B][k].

    plans  what each site does for this row, made when first asked for
    """

    rows: tuple[tuple[float, ...], ...]
    per_sample: bool
    plans: dict[tuple[Site, Where], Any] = field(default_factory=dict)

    @property
    def zero(self) -> bool:
        return not any(v for row in self.rows for v in row)


@dataclass(eq=False)
class Stack:
    """A site's factors in one dtype on one device.

    down    [R, in, *kernel]   rows of all LoRAs, R = sum(ranks)
    up      [R, out]           transposed, so that a row's part is contiguous
    bias    [k] tensors [out] or None
    dense   [k] tensors of the weight's shape or None
    """

    down: Tensor | None
    up: Tensor | None
    bias: list[Tensor | None]
    dense: list[Tensor | None]
    starts: list[int]


def stack(site: Site, where: Where) -> Stack:
    """The stacked factors of a site; differentiable in them when they require grad."""
    device, dtype = where
    low = [p for p in site.parts if getattr(p, "rank", None)]
    downs = [p.down.to(device, dtype) for p in low]
    if site.kind != "embedding":
        kernel = _kernel(site)
        downs = [d.reshape(*d.shape[:2], *kernel) if d.ndim - 2 != len(kernel) else d for d in downs]
    down = torch.cat(downs) if low else None
    up = torch.cat([p.up.to(device, dtype).T for p in low]).contiguous() if low else None
    dense, bias = [], []
    for part in site.parts:
        delta = part.delta() if part is not None and part.rank is None else None
        if delta is not None and site.kind != "embedding":
            delta = delta.reshape(*delta.shape[:2], *_kernel(site))
        dense.append(None if delta is None else delta.to(device, dtype))
        own = None if part is None else part.bias
        bias.append(None if own is None else own.to(device, dtype))
    starts = [sum(site.ranks[:i]) for i in range(len(site.ranks))]
    return Stack(down, up, bias, dense, starts)


def _kernel(site: Site) -> tuple[int, ...]:
    return tuple(site.module.kernel_size) if site.kind == "conv" else ()


class Branch:
    """The side branch of a site: `branch(x, y, row)` is the module's output y with the LoRAs added."""

    def __init__(self, site: Site):
        self.site = site
        self.stacks: OrderedDict[Where, Stack] = OrderedDict()
        tensors = [t for p in site.parts if p is not None for t in (getattr(p, "down", None), getattr(p, "up", None))]
        self.trained = any(t is not None and t.requires_grad for t in tensors)
        # The output of these is always a new tensor, so it may be written into; a foreign module may keep its own.
        self.fresh = type(site.module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def stacked(self, where: Where) -> Stack:
        if self.trained:
            return stack(self.site, where)
        if where not in self.stacks:
            with torch.inference_mode(False), torch.no_grad():
                self.stacks[where] = stack(self.site, where)
            while len(self.stacks) > 2:
                self.stacks.popitem(last=False)
        self.stacks.move_to_end(where)
        return self.stacks[where]

    def __call__(self, x: Tensor, y: Tensor, row: Row) -> Tensor:
        """y + the LoRAs' part under a row of numbers."""
        if self.trained:
            rows = torch.tensor(row.rows if row.per_sample else row.rows[0], dtype=y.dtype, device=y.device)
            return self.gated(x, y, rows)
        where = (y.device, y.dtype if self.site.kind == "embedding" else x.dtype)
        key = (self.site, where)
        if key not in row.plans:
            with torch.inference_mode(False), torch.no_grad():
                row.plans[key] = self._plan(row, where)
        plan = row.plans[key]
        if plan is None:
            return y
        if row.per_sample and x.shape[0] != len(row.rows):
            raise ValueError(
                f"{self.site.path}: the row has {len(row.rows)} samples, the layer's input {list(x.shape)} has "
                f"{x.shape[0]}; give one row per sample of the call"
            )
        return plan(self, x, y)

    def gated(self, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        """y + the LoRAs' part under a row tensor [k], [B, k] or [B, T, k]; differentiable in it."""
        site = self.site
        where = (y.device, y.dtype if site.kind == "embedding" else x.dtype)
        s = self.stacked(where)
        if any(f != 1.0 for f in site.factors):
            row = row * torch.tensor(site.factors, dtype=row.dtype, device=row.device)
        if row.shape[-1] != len(site.parts) or row.ndim > 3 or (row.ndim > 1 and row.shape[:-1] != x.shape[: row.ndim - 1]):
            raise ValueError(
                f"{site.path}: row of shape {list(row.shape)} for {len(site.parts)} LoRAs and an input of "
                f"{list(x.shape)}; wanted [k], [B, k] or [B, T, k]"
            )
        if s.down is not None:
            up = s.up.T
            if site.kind == "linear":
                delta = kernels.routed(x, s.down, up, row, site.ranks)
            elif site.kind == "embedding":
                delta = kernels.routed_embedding(x, s.down, up, row, site.ranks)
            else:
                x_, geometry = self._geometry(x)
                delta = kernels.routed_conv(x_, s.down, up, row, site.ranks, *geometry)
            y = y + delta.to(y.dtype)
        for i, (dense, bias) in enumerate(zip(s.dense, s.bias, strict=True)):
            weight = _lead(row[..., i].to(y.device, y.dtype), y, 1 if site.kind == "conv" else -1)
            if dense is not None:
                y = y + weight * self._dense(x, dense).to(y.dtype)
            if bias is not None:
                y = y + weight * self._channels(bias, y)
        return y

    def _geometry(self, x: Tensor) -> tuple[Tensor, tuple]:
        m = self.site.module
        if getattr(m, "padding_mode", "zeros") != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
            return x, (m.stride, tuple(0 for _ in m.kernel_size), m.dilation, m.groups)
        return x, (m.stride, m.padding, m.dilation, getattr(m, "groups", 1))

    def _dense(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.site.kind == "linear":
            return F.linear(x, weight)
        if self.site.kind == "embedding":
            return F.embedding(x, weight)
        x, geometry = self._geometry(x)
        return (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3](x, weight, None, *geometry)

    def _channels(self, bias: Tensor, y: Tensor) -> Tensor:
        return bias.view(-1, *[1] * (y.ndim - 2)) if self.site.kind == "conv" else bias

    # -- a row folded into the factors ---------------------------------------------------------------------------

    def _plan(self, row: Row, where: Where) -> Any:
        site = self.site
        rows = [[v * f if p is not None else 0.0 for v, f, p in zip(r, site.factors, site.parts, strict=True)]
                for r in row.rows]  # fmt: skip
        if not any(v for r in rows for v in r):
            return None
        s = self.stacked(where)
        steps: list[Any] = []
        if any(v and site.ranks[i] for r in rows for i, v in enumerate(r)):
            if site.kind == "linear":
                steps.append(_folded_linear(site, s, rows))
            elif site.kind == "conv" and not row.per_sample:
                steps.append(_folded_conv(site, s, rows[0]))
            else:
                steps.append(_unfolded(site, s, rows if row.per_sample else rows[0], where))
        for i in range(len(site.parts)):
            column = [r[i] for r in rows]
            if any(column) and (s.dense[i] is not None or s.bias[i] is not None):
                weight = torch.tensor(column if row.per_sample else column[0], dtype=where[1], device=where[0])
                steps.append(_extra(s.dense[i], s.bias[i], weight, site.kind))
        if len(steps) == 1:
            return steps[0]

        def several(branch: Branch, x: Tensor, y: Tensor) -> Tensor:
            for step in steps:
                y = step(branch, x, y)
            return y

        return several


def _lead(weight: Tensor, y: Tensor, channel: int) -> Tensor:
    """A weight over y's leading dimensions, broadcast over the rest."""
    return weight.reshape(*weight.shape, *[1] * (y.ndim - weight.ndim)) if weight.ndim else weight


def _pick(s: Stack, site: Site, live: Sequence[int]) -> tuple[Tensor, Tensor]:
    """down [Rs, ...] and up [Rs, out] of some LoRAs; views where they lie side by side."""
    first, last = live[0], live[-1]
    end = s.starts[last] + site.ranks[last]
    if all(site.ranks[i] == 0 or i in live for i in range(first, last + 1)):
        return s.down[s.starts[first] : end], s.up[s.starts[first] : end]
    spans = [slice(s.starts[i], s.starts[i] + site.ranks[i]) for i in live]
    return torch.cat([s.down[a] for a in spans]), torch.cat([s.up[a] for a in spans])


def _fold(up: Tensor, weights: Sequence[float], ranks: Sequence[int]) -> tuple[Tensor, float]:
    """up [Rs, out] with the row inside, or untouched with a factor when all weights are one number."""
    if all(w == weights[0] for w in weights):
        return up, weights[0]
    scale = [w for w, r in zip(weights, ranks, strict=True) for _ in range(r)]
    return up * torch.tensor(scale, dtype=up.dtype, device=up.device)[:, None], 1.0


def segments(rows: Sequence[Sequence[float]]) -> int:
    """How many equal runs of samples with one row each the batch falls into."""
    size, run = 0, 1
    for a, b in zip(rows, [*rows[1:], None], strict=True):
        if a == b:
            run += 1
        else:
            size, run = math.gcd(size, run), 1
    return len(rows) // size


def _folded_linear(site: Site, s: Stack, rows: Sequence[Sequence[float]]) -> Any:
    g = segments(rows)
    picked = [rows[i * len(rows) // g] for i in range(g)]
    live = [[i for i, v in enumerate(r) if v and site.ranks[i]] for r in picked]
    union = sorted({i for each in live for i in each})
    if g == 1:
        down, up = _pick(s, site, union)
        up, alpha = _fold(up, [picked[0][i] for i in union], [site.ranks[i] for i in union])
        down = down.T
    else:
        width = max(sum(site.ranks[i] for i in each) for each in live)
        values = {v for r, each in zip(picked, live, strict=True) for v in (r[i] for i in each)}
        alpha = values.pop() if len(values) == 1 else 1.0
        shared = width == sum(site.ranks[i] for i in union)
        if not shared and alpha != 1.0 and False:
            pass
        down, up = _segment_factors(site, s, picked, live, union, width, shared, alpha)
    def run(branch: Branch, x: Tensor, y: Tensor) -> Tensor:
        return _add(branch, x, y, down, up, alpha)

    return run


def _segment_factors(
    site: Site, s: Stack, picked: Any, live: Any, union: list[int], width: int, shared: bool, alpha: float
) -> tuple[Tensor, Tensor]:
    """down [in, R] (shared) or [g, in, width] and up [g, R or width, out], row folded in, zeros where ranks differ."""
    whole, whole_up = _pick(s, site, union)
    g = len(picked)
    in_order = [each[0] if len(each) == 1 else -1 for each in live] == union
    if in_order and all(site.ranks[i] == width for i in union):  # one LoRA per segment, in order: views
        down = whole.view(g, width, -1).transpose(1, 2)
        up = whole_up.view(g, width, -1)
        if alpha == 1.0:
            scale = torch.tensor([r[each[0]] for r, each in zip(picked, live, strict=True)])
            if any(float(v) != 1.0 for v in scale):
                up = up * scale.to(up)[:, None, None]
        return down, up
    down = whole.T if shared else whole.new_zeros(g, width, whole.shape[1])
    up = whole_up.new_zeros(g, width, whole_up.shape[1])
    for j, (r, each) in enumerate(zip(picked, live, strict=True)):
        at = 0
        for i in union if shared else each:
            span = slice(s.starts[i], s.starts[i] + site.ranks[i])
            to = slice(at, at + site.ranks[i])
            if i in each:
                up[j, to] = s.up[span] * (r[i] / alpha)
            if not shared:
                down[j, to] = s.down[span]
            at = to.stop
    return (down if shared else down.transpose(1, 2)), up


def _add(branch: Branch, x: Tensor, y: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    if x.dtype == y.dtype and not torch.is_autocast_enabled(x.device.type):
        inplace = branch.fresh and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        return kernels.add_folded(y, x, down, up, alpha, inplace=inplace)
    delta = kernels.add_folded(y.new_zeros(y.shape, dtype=x.dtype), x, down, up, alpha)
    return y + delta.to(y.dtype)


def _folded_conv(site: Site, s: Stack, row: Sequence[float]) -> Any:
    live = [i for i, v in enumerate(row) if v and site.ranks[i]]
    down, up = _pick(s, site, live)
    up, alpha = _fold(up, [row[i] for i in live], [site.ranks[i] for i in live])
    groups = getattr(site.module, "groups", 1)
    up = up.T.reshape(up.shape[1], up.shape[0], *[1] * (down.ndim - 2)).contiguous()
    down = down.repeat(groups, *[1] * (down.ndim - 1)) if groups > 1 else down

    def run(branch: Branch, x: Tensor, y: Tensor) -> Tensor:
        x, geometry = branch._geometry(x)
        if x.dtype == y.dtype and not torch.is_autocast_enabled(x.device.type):
            inplace = branch.fresh and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
            return kernels.add_folded_conv(y, x, down, up, alpha, *geometry, inplace=inplace)
        delta = kernels.add_folded_conv(torch.zeros_like(y, dtype=x.dtype), x, down, up, alpha, *geometry)
        return y + delta.to(y.dtype)

    return run


def _unfolded(site: Site, s: Stack, row: Any, where: Where) -> Any:
    """Convolutions under a row per sample, and embeddings: the general kernel."""
    row = torch.tensor(row, dtype=where[1], device=where[0])
    up = s.up.T

    def run(branch: Branch, x: Tensor, y: Tensor) -> Tensor:
        if site.kind == "embedding":
            return y + kernels.routed_embedding(x, s.down, up, row, site.ranks).to(y.dtype)
        x, geometry = branch._geometry(x)
        return y + kernels.routed_conv(x, s.down, up, row, site.ranks, *geometry).to(y.dtype)

    return run


def _extra(dense: Tensor | None, bias: Tensor | None, weight: Tensor, kind: str) -> Any:
    """A dense delta and a bias, times their row entry."""

    def run(branch: Branch, x: Tensor, y: Tensor) -> Tensor:
        scale = _lead(weight, y, 0).to(y.dtype)
        if dense is not None:
            y = y + scale * branch._dense(x, dense).to(y.dtype)
        if bias is not None:
            y = y + scale * branch._channels(bias, y).to(y.dtype)
        return y

    return run


# -- merged weights ------------------------------------------------------------------------------------------------


def mergeable(site: Site) -> bool:
    """Whether the module's weight may be exchanged for a merged one: plain, floating, its own, on a real device."""
    module, weight = site.module, site.module._parameters.get("weight")
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return (
        isinstance(module, plain)
        and isinstance(weight, Tensor)
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
        and weight.device.type != "meta"
        and weight.layout is torch.strided
        and (module._parameters.get("bias") is not None or all(p is None or p.bias is None for p in site.parts))
    )


def merged_into(site: Site, s: Stack, row: Sequence[float], base: Tensor, out: Tensor) -> None:
    """Write W0 + sum_i row_i * delta_i to `out`, summed in float32 or wider and rounded once.

    s     factors in the dtype of the sum
    row   [k] before per-block factors
    base  pristine weight; out has its shape and dtype
    """
    row = [v * f for v, f in zip(row, site.factors, strict=True)]
    live = [i for i, v in enumerate(row) if v and site.ranks[i]]
    dtype = s.down.dtype if s.down is not None else next(d for d in s.dense if d is not None).dtype
    total = base if base.dtype == dtype else base.to(dtype)
    flat = total.reshape(total.shape[0], -1)
    target = out.view(flat.shape) if out.dtype == dtype and out.is_contiguous() else torch.empty_like(flat)
    if live:
        down, up = _pick(s, site, live)
        up, alpha = _fold(up, [row[i] for i in live], [site.ranks[i] for i in live])
        left, right = (down.T, up) if site.kind == "embedding" else (up.T, down.reshape(down.shape[0], -1))
        torch.addmm(flat, left, right, alpha=alpha, out=target)
    else:
        target.copy_(flat)
    for v, dense in zip(row, s.dense, strict=True):
        if v and dense is not None:
            target.add_(dense.reshape(target.shape), alpha=v)
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
