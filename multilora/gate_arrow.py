"""The router of Arrow: each LoRA's share of a token by the one input direction that it acts on most (2405.11157).

    v_i = top right singular vector of up_i down_i;  share = softmax over the top-k LoRAs of |x . v_i| / temperature

Nothing is trained. The sign and the factorisation of a LoRA do not matter. A convolution's direction is one of its
patches; its share is per sample, the mean of |patch . v_i| over positions (and groups). A LoRA without a part in a
layer takes no share there; one that only changes a vector (norms, biases) has no direction and scores 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora.parts import Dense, LowRank
from multilora.routing import Layer, normalised, top


class ArrowRouter:
    """A multilora.routing.Router for LoRA sets that need no training.

    top_k        LoRAs that share a token at most
    temperature  of the softmax over their scores

    Directions are found when a layer first asks, and kept: one router serves one set of LoRAs. Two of one setting are
    equal.
    """

    def __init__(self, top_k: int = 3, temperature: float = 1.0) -> None:
        self.top_k, self.temperature = top_k, temperature
        self._directions: dict[int, list[Tensor | None]] = {}
        self._parts: list[object] = []  # keeps the parts alive whose ids are keys

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArrowRouter) and (self.top_k, self.temperature) == (other.top_k, other.temperature)

    def __hash__(self) -> int:
        return hash((self.top_k, self.temperature))

    def group(self, path: str) -> str:
        return path

    def head(self, group: str) -> None:
        return None

    def shares(self, layer: Layer) -> Tensor:
        scores = self.scores(layer)
        here = [live and part is not None for live, part in zip(layer.live, layer.branch.site.parts, strict=True)]
        if not any(here):  # only a masked-out LoRA has a part here: whatever the others' shares, they add nothing
            here = list(layer.live)
        return top(normalised(scores / self.temperature, here), min(self.top_k, sum(here)))

    def scores(self, layer: Layer) -> Tensor:
        """[.., k] |x . v_i| of every token, [B, k] of a convolution's samples; 0 where a LoRA has no direction."""
        wide = torch.promote_types(layer.y.dtype, torch.float32)
        x = layer.x if layer.branch.site.kind == "embedding" else layer.x.to(wide)
        found = [
            None if v is None else self._along(layer, x, v.to(x.device, wide)) for v in self.directions(layer.branch)
        ]
        if all(one is None for one in found):
            return torch.zeros(len(found), dtype=wide, device=layer.y.device)
        like = next(one for one in found if one is not None)
        return torch.stack([torch.zeros_like(like) if one is None else one for one in found], -1)

    def _along(self, layer: Layer, x: Tensor, v: Tensor) -> Tensor:
        kind = layer.branch.site.kind
        if kind == "embedding":
            return v[x].abs()
        if kind != "conv":
            return (x @ v).abs()
        x, (stride, padding, dilation, groups) = layer.branch.geometry(x)
        kernel = v[None].repeat(groups, *[1] * v.ndim)
        conv = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
        return conv(x, kernel, None, stride, padding, dilation, groups).abs().flatten(1).mean(1)

    def directions(self, branch: object) -> list[Tensor | None]:
        """[k] unit vectors in the layer's input [in, *kernel], an embedding's [num]; None where there is none."""
        site = branch.site
        if id(site) not in self._directions:
            self._parts.append(site)
            with torch.no_grad():
                self._directions[id(site)] = [direction(part) for part in site.parts]
        return self._directions[id(site)]


def direction(part: LowRank | Dense | None) -> Tensor | None:
    """The top right singular vector of a part's update, in float64 and the shape of one row of its weight.

    None without a part, for a vector's update and for zero.
    """
    if part is None or part.shape is None or len(part.shape) < 2:
        return None
    first = part.to(torch.float64).truncated(1)[0]
    down = first.down[0].detach()
    size = float(down.norm())
    return down / size if size > 0 and math.isfinite(size) else None
