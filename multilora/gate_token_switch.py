"""The router of LoRA-Switch for language models: a token picks its LoRAs once, for all layers (arXiv 2405.17741).

    p = softmax(W x1 + b)                x1 = the input of the first adapted linear, [B, T, in]
    G = the top_k largest of p, divided by their own sum, the others 0
    y_l = f_l(x_l) + sum_i G_i E_l,i(x_l)               in every adapted layer l, LoRA i being E_l,i there

The softmax is over all LoRAs, before the choice; dividing by the sum of the chosen makes it the softmax over these
alone. `per` other than "network" gives every group of layers a router of its own, which is what the paper compares
with. How a route is used while decoding, un-merged or by the paper's merge per token, is multilora.token_route's.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora.gate_mole import PER, group_of
from multilora.gates import Gate, heads_in, setting, tensor
from multilora.lora import Lora
from multilora.routing import Layer, Uniform, normalised, top
from multilora.token_route import TokenRoute


class TokenSwitchGate:
    """The routers' tensors and their answers; a multilora.routing.Router.

    heads    group -> (path of the linear whose input its router reads, that input's width)
    tensors  weight.<group> [k, width], bias.<group> [k]
    top_k    LoRAs that share a token at most
    per      what shares a route: "network" (the paper's), "block", "layer" or "linear"
    order    [loras] which of the gate's k LoRAs the set has; None for all. The others are absent: no share

    A linear that runs before its head gives every LoRA the same share.
    """

    def __init__(
        self,
        heads: Mapping[str, tuple[str, int]],
        tensors: Mapping[str, Tensor],
        k: int,
        *,
        top_k: int = 2,
        per: str = "network",
        order: Sequence[int] | None = None,
    ) -> None:
        self.heads, self.tensors, self.k, self.top_k, self.per = dict(heads), dict(tensors), k, top_k, per
        self.order = tuple(range(k)) if order is None else tuple(order)
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self.ready: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    @classmethod
    def fresh(
        cls,
        heads: Mapping[str, tuple[str, int]],
        k: int,
        *,
        top_k: int = 2,
        per: str = "network",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TokenSwitchGate:
        """An untrained gate, nearly equal shares: all equal ones would pick the same LoRAs for every token."""
        made = cls(heads, {}, k, top_k=top_k, per=per)
        generator = torch.Generator().manual_seed(seed)
        for name, shape in made.shapes().items():
            drawn = 0.1 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            made.tensors[name] = (torch.zeros(shape) if len(shape) == 1 else drawn).to(device, dtype)
        return made

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        found: dict[str, tuple[int, ...]] = {}
        for group, (_, width) in self.heads.items():
            found[f"weight.{group}"] = (self.k, width)
            found[f"bias.{group}"] = (self.k,)
        return found

    @classmethod
    def of(cls, gate: Gate, loras: Sequence[Lora] | None = None) -> TokenSwitchGate:
        """From a gate file, for a set of its LoRAs (None: all). Raises ValueError naming file and field."""
        gate.need("token_switch")
        order = None if loras is None else gate.order(loras)
        top_k, per = setting(gate, "top_k", int), setting(gate, "per", str, PER)
        if top_k < 1:
            raise ValueError(f"gate {gate.source}: setting top_k is {top_k}, wanted at least 1")
        made = cls(heads_in(gate), {}, len(gate.loras), top_k=top_k, per=per, order=order)
        for name, shape in made.shapes().items():
            made.tensors[name] = tensor(gate, name, *shape)
        return made

    def settings(self) -> dict[str, object]:
        """What its file's card keeps beside the tensors."""
        heads = {group: list(head) for group, head in self.heads.items()}
        return {"per": self.per, "top_k": self.top_k, "heads": heads}

    def asked(
        self,
        weights: Sequence[float] | None = None,
        time: float | Tensor | None = None,
        live: Sequence[bool] | None = None,
    ) -> TokenRoute:
        """The gate for one run of the model, as a bank's gate or a pass's row."""
        return TokenRoute(self, weights, time, live)

    # -- as a Router ------------------------------------------------------------------------------------------------

    def group(self, path: str) -> str:
        return group_of(path, self.per)

    def head(self, group: str) -> str | None:
        known = self.heads.get(group)
        return None if known is None else known[0]

    def shares(self, layer: Layer) -> Tensor:
        """[B, T, k] (x [B, in]: [B, k]), at most top_k of them above 0; [k] before the head has run."""
        group = self.group(layer.branch.site.path)
        if group not in self.heads or not layer.head:
            return Uniform().shares(layer)
        x, wide = layer.x, torch.promote_types(layer.y.dtype, torch.float32)
        weight, bias = (self._tensor(f"{name}.{group}", x.device, wide) for name in ("weight", "bias"))
        if x.shape[-1] != weight.shape[1]:
            path, width = self.heads[group]
            raise ValueError(f"{path}: an input of width {x.shape[-1]}, this gate was made for {width}")
        logits = F.linear(x.to(wide), weight, bias)
        return top(normalised(logits, layer.live), min(self.top_k, sum(layer.live)))

    def _tensor(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor where it is wanted, rows in the set's order; kept, so that a token copies nothing to the device."""
        own, key = self.tensors[name], (name, device, dtype)
        if own.requires_grad:
            return own[list(self.order)].to(device, dtype)
        if key not in self._placed:
            with torch.inference_mode(False):
                self._placed[key] = own[list(self.order)].to(device, dtype)
        return self._placed[key]
