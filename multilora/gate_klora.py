"""The router of K-LoRA: in every layer and step the one LoRA that has the largest entries there (arXiv 2502.18461).

    S_i = sum of the K largest |entries| of up_i down_i        K = product of the LoRAs' ranks in that layer
    score_i = S_i / gamma_i,  of the style LoRA S * (alpha p + beta)        p in [0, 1]: how far the run is

gamma_i is the mean over layers of the L1 norm of LoRA i to that of the style LoRA, so that a LoRA trained at a larger
scale does not win everywhere. The paper has one content and one style LoRA; with more contents each has its own gamma,
and the largest score wins. What wins depends on layer and step alone: the sums are made once and kept.

The published code counts the steps by a global counter of layer calls, modulo 28000, and sorts at every call; here p
is step / (steps - 1), which is right for every number of steps and layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multilora.lora import Lora
from multilora.parts import Dense, LowRank
from multilora.routing import Layer, numbers


class Sums:
    """S and gamma of a set of LoRAs, made when a layer first asks; one serves all steps of a picture.

    style  number of the style LoRA in the set
    """

    def __init__(self, loras: Sequence[Lora], style: int) -> None:
        self.loras, self.style = list(loras), style
        self.known: dict[int, tuple[float | None, ...]] = {}
        self._sites: list[object] = []  # keeps alive the sites whose ids are keys
        self._gamma: tuple[float, ...] | None = None

    @property
    def gamma(self) -> tuple[float, ...]:
        """[k] mean of L1_i / L1_style over the layers that LoRA i shares with the style LoRA; 1 without any."""
        if self._gamma is None:
            style = {key: size for key, part in self.loras[self.style].items() if (size := _absolute(part))}
            found = []
            for lora in self.loras:
                ratios = [_absolute(lora[key]) / size for key, size in style.items() if key in lora]
                mean = sum(ratios) / len(ratios) if ratios else 0.0
                found.append(mean or 1.0)
            self._gamma = tuple(found)
        return self._gamma

    def of(self, site: object) -> tuple[float | None, ...]:
        """[k] S_i / gamma_i in one layer, None where a LoRA has no part."""
        if id(site) not in self.known:
            self._sites.append(site)
            with torch.no_grad():
                count = 1
                for part in site.parts:
                    count *= (getattr(part, "rank", None) or 1) if part is not None else 1
                self.known[id(site)] = tuple(
                    None if part is None else largest(part, count) / g
                    for part, g in zip(site.parts, self.gamma, strict=True)
                )
        return self.known[id(site)]


class KLoraRouter:
    """A multilora.routing.Router that gives each layer to one LoRA. Two of the same LoRAs, style and factor are equal.

    factor  of the style LoRA's score: alpha p + beta
    """

    def __init__(self, sums: Sums, factor: float) -> None:
        self.sums, self.factor = sums, factor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KLoraRouter) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return *map(id, self.sums.loras), self.sums.style, self.factor

    def group(self, path: str) -> str:
        return path

    def head(self, group: str) -> None:
        return None

    def shares(self, layer: Layer) -> Tensor:
        scores = self.sums.of(layer.branch.site)
        live = [i for i, s in enumerate(scores) if s is not None and layer.live[i]]
        best = max(live, key=lambda i: scores[i] * (self.factor if i == self.sums.style else 1.0), default=0)
        row = tuple(float(i == best) for i in range(len(scores)))
        return numbers(row, torch.promote_types(layer.y.dtype, torch.float32), layer.y.device)


def largest(part: LowRank | Dense, count: int) -> float:
    """The sum of the `count` largest magnitudes of an update, a vector's and a bias's included where it is one."""
    delta = part.delta(torch.float32) if part.shape is not None else part.bias
    if delta is None:
        return 0.0
    values = delta.abs().flatten()
    return float(values.topk(min(count, values.numel())).values.double().sum())


def _absolute(part: LowRank | Dense) -> float:
    delta = part.delta(torch.float32) if part.shape is not None else part.bias
    return 0.0 if delta is None else float(delta.abs().sum(dtype=torch.float64))
