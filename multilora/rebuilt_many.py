"""The rebuilt form of many adapted modules at once: one launch of kernels.rebuild_ instead of several for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from multilora.kernels import choice
from multilora.kernels import routed as kernels
from multilora.rebuilt import WIDE, Weight
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
                if site.kind != "linear" or not low:
                    continue
                wide = base.dtype if base.dtype in WIDE else torch.float32
                stacked = weight.branch.stacked((base.device, wide))
                self.weights.append(weight)
                self.outs.append(torch.empty_like(base, memory_format=torch.contiguous_format))
                self.bases.append(base)
                self.downs.append(stacked.down)
                self.ups.append(stacked.up.T)
        self._runs: dict[tuple, tuple[Callable[[Tensor], None], Tensor, Tensor | None]] = {}

    def build(self, row: Tensor, index: int | None = None) -> None:
        """The weights of a row [k], from the pristine ones.

        index: the one LoRA that has a weight; nothing of the others is read then
        """
        which = index, choice.chosen(None, "rebuild_", self.bases[0])
        with torch.inference_mode(False), torch.no_grad():
            if which not in self._runs:
                self._runs[which] = self._run(index)
            run, pick, factors = self._runs[which]
            scale = row.to(pick.device).index_select(0, pick)
            run(scale if factors is None else scale * factors)

    def _run(self, index: int | None) -> tuple[Callable[[Tensor], None], Tensor, Tensor | None]:
        """What rebuilds; and for every stacked rank of all layers its LoRA, and its factor where not all are 1."""
        downs, ups, pick, factors = [], [], [], []
        for weight, down, up in zip(self.weights, self.downs, self.ups, strict=True):
            site, k = weight.site, len(weight.site.ranks)
            live = range(k) if index is None else (index,)
            first, count = sum(site.ranks[: live[0]]), sum(site.ranks[i] for i in live)
            downs.append(down.narrow(0, first, count))
            ups.append(up.narrow(1, first, count))
            pick += [i for i in live for _ in range(site.ranks[i])]
            factors += [site.factors[i] for i in live for _ in range(site.ranks[i])]
        run = kernels.rebuilder(self.outs, self.bases, downs, ups)
        device, dtype = self.bases[0].device, torch.promote_types(self.bases[0].dtype, torch.float32)
        scaled = torch.tensor(factors, device=device, dtype=dtype) if any(f != 1.0 for f in factors) else None
        return run, torch.tensor(pick, device=device, dtype=torch.long), scaled


def rebuilt_at_once(bank: Any, row: tuple[float, ...]) -> Collection[Site]:
    """The sites whose weights of a row one launch has merged into the bank's scratch memory.

    None of them where plain PyTorch runs `rebuild_`: layer by layer, it gains nothing from having them together.
    """
    base = next(iter(bank._weights.values())).base[0]
    if choice.chosen(None, "rebuild_", base) != "triton":
        return ()
    if bank._many is None:
        bank._many = Many(bank._weights.values())
    many, live = bank._many, [i for i, value in enumerate(row) if value]
    numbers_of = torch.tensor(row, device=base.device)
    many.build(numbers_of, live[0] if len(live) == 1 else None)
    made = {weight.site: (out, None) for weight, out in zip(many.weights, many.outs, strict=True)}
    bank._scratch.update(made)
    return made
