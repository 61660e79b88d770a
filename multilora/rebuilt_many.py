"""The rebuilt form of many adapted modules at once: one launch of kernels.rebuild_ instead of several for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from multilora.kernels import choice
from multilora.kernels import routed as kernels
from multilora.rebuilt import WIDE, Merged, Weight
from multilora.sites import Site


class Many:
    """Those of a bank's weights that are plain sums: linear layers, every part low-rank and without a bias.

    weights, outs   in the same order; `build` writes the merged weights of a row into `outs`
    """

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.weights, self.outs, self.bases, self.downs, self.ups = [], [], [], [], []
        with torch.inference_mode(False), torch.no_grad():
            for weight in weights:
                site, base = weight.site, weight.base[0]
                low = all(part is None or (part.rank is not None and part.bias is None) for part in site.parts)
                # One device: one launch. Those on another are left to be rebuilt one by one.
                if site.kind != "linear" or not low or (self.bases and base.device != self.bases[0].device):
                    continue
                wide = base.dtype if base.dtype in WIDE else torch.float32
                stacked = weight.branch.stacked((base.device, wide))
                self.weights.append(weight)
                self.outs.append(torch.empty_like(base, memory_format=torch.contiguous_format))
                self.bases.append(base)
                self.downs.append(stacked.down)
                self.ups.append(stacked.up.T)
        self.merged: dict[Site, Merged] = {
            weight.site: (out, None) for weight, out in zip(self.weights, self.outs, strict=True)
        }
        self._runs: dict[tuple, tuple[Callable[[Tensor], None], Tensor, Tensor | None]] = {}
        self._alone: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor, float]]] = {}

    def build(self, row: Tensor, live: range | None = None) -> None:
        """The weights of a row [k], from the pristine ones. live: LoRAs beyond which nothing is read."""
        if not self.weights:
            return
        live = range(len(self.weights[0].site.ranks)) if live is None else live
        which = live, choice.chosen(None, "rebuild_", self.bases[0])
        with torch.inference_mode(False), torch.no_grad():
            if which not in self._runs:
                self._runs[which] = self._run(live)
            run, pick, factors = self._runs[which]
            scale = row.to(pick.device).index_select(0, pick)
            run(scale if factors is None else scale * factors)

    def add_alone(self, value: float, index: int) -> None:
        """`build` for a row of one LoRA, its views made once; for weights that are as wide as their sums."""
        with torch.inference_mode(False), torch.no_grad():
            if index not in self._alone:
                self._alone[index] = []
                for weight, out, base, down, up in zip(
                    self.weights, self.outs, self.bases, self.downs, self.ups, strict=True
                ):
                    ranks = weight.site.ranks
                    span = sum(ranks[:index]), ranks[index]
                    factor = weight.site.factors[index] if span[1] else 0.0
                    self._alone[index].append((out, base, up.narrow(1, *span), down.narrow(0, *span), factor))
            for out, base, up, down, factor in self._alone[index]:
                if factor:
                    torch.addmm(base, up, down, alpha=value * factor, out=out)
                else:
                    out.copy_(base)

    def _run(self, live: range) -> tuple[Callable[[Tensor], None], Tensor, Tensor | None]:
        """What rebuilds; and for every stacked rank of all layers its LoRA, and its factor where not all are 1."""
        downs, ups, pick, factors = [], [], [], []
        for weight, down, up in zip(self.weights, self.downs, self.ups, strict=True):
            ranks = weight.site.ranks
            first, count = sum(ranks[: live.start]), sum(ranks[live.start : live.stop])
            downs.append(down.narrow(0, first, count))
            ups.append(up.narrow(1, first, count))
            pick += [i for i in live for _ in range(ranks[i])]
            factors += [weight.site.factors[i] for i in live for _ in range(ranks[i])]
        run, device = kernels.rebuilder(self.outs, self.bases, downs, ups), self.bases[0].device
        scaled = torch.tensor(factors, device=device, dtype=torch.float64) if any(f != 1.0 for f in factors) else None
        return run, torch.tensor(pick, device=device, dtype=torch.long), scaled


def rebuilt_at_once(bank: Any, row: tuple[float, ...]) -> Collection[Site]:
    """The sites whose weights of a row were merged together, into the bank's scratch memory: by one launch of Triton,
    or by one operation each where one LoRA alone has a weight (Switch). Other rows gain nothing from it."""
    live = [i for i, value in enumerate(row) if value]
    bases = [weight.base[0] for weight in bank._weights.values()]
    launched = all(choice.chosen(None, "rebuild_", base) == "triton" for base in bases)
    if not launched and (len(live) > 1 or any(base.dtype not in WIDE for base in bases)):
        return ()
    if bank._many is None:
        bank._many = Many(bank._weights.values())
        bank._scratch.update(bank._many.merged)
    many = bank._many
    if launched:
        many.build(torch.tensor(row, dtype=torch.float64, device=bases[0].device), range(live[0], live[-1] + 1))
    else:
        many.add_alone(row[live[0]], live[0])
    return many.merged
