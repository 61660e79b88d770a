"""Gates: a small network gives the row while the model runs. Here: how an adapted layer asks it.

    asked = Asked(router, weights)      # one per run of the model; as a pass's row: Pass(asked)
    bank.gate = asked
    model(x)
    asked.shares                        # {group: [k], [B, k] or [B, T, k]} what the router has answered

A router says which modules share an answer, and answers once per group and run of the model. The answer is computed at
the group's head, a module that the router names; modules of the group that run before it, or without it, get an answer
that knows less. Every layer's row is the answer times the users' weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """An adapted layer that asks: its site, input x [B, ..] and output y [B, ..] so far, the run's time and LoRAs.

    branch  multilora.side.Branch: `site` has path, kind and the LoRAs' parts, `deltas(x, y)` what each would add
    time    timestep of the run, a number or [B]; None where there is none
    live    [k] False for a LoRA that is masked out: its share is 0 and the others' sum to 1
    head    whether this is the head of its group
    """

    branch: Any
    x: Tensor
    y: Tensor
    time: float | Tensor | None
    live: tuple[bool, ...]
    head: bool


class Router(Protocol):
    """What gives rows. `group` names the modules that share an answer, `head` the one where it is computed."""

    def group(self, path: str) -> str: ...

    def head(self, group: str) -> str | None:
        """Path of the group's head; None: the group's first module to run, in every run."""
        ...

    def shares(self, layer: Layer) -> Tensor:
        """[k], [B, k] or [B, T, k] shares of the LoRAs, in the set's order."""
        ...


class Asked:
    """A router during one run of the model: its answers by group, and the rows that follow from them.

    weights  [k] the users' weights, which multiply the router's shares; None for ones
    time     timestep of the run, a number or a tensor [B]
    live     [k] False masks a LoRA out: its share becomes 0, the others' sum to 1
    total    what the shares are multiplied by, beside the weights
    shares   group -> the router's answer, filled as the model runs

    Two of one router, weights and mask are equal: what is cached under one goes with the other.
    """

    def __init__(
        self,
        router: Router,
        weights: Sequence[float] | None = None,
        time: float | Tensor | None = None,
        live: Sequence[bool] | None = None,
        total: float = 1.0,
    ) -> None:
        self.router, self.time, self.total = router, time, total
        self.weights = None if weights is None else tuple(float(w) for w in weights)
        self.live = None if live is None else tuple(bool(v) for v in live)
        if self.live is not None and not any(self.live):
            raise ValueError("a gate with every LoRA masked out: leave one in, or run the model without LoRAs")
        self.shares: dict[str, Tensor] = {}
        self._by_sample: tuple[tuple[float, ...], ...] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Asked) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.router, self.weights, self.live, self.total

    def reach(self, weights: Sequence[float]) -> tuple[float, ...]:
        """[k] the weights, these where it has none of its own; 0 for LoRAs that are masked out."""
        own = tuple(weights) if self.weights is None else self.weights
        return tuple(w if live else 0.0 for w, live in zip(own, self.live or (True,) * len(own), strict=True))

    def at(self, weights: Sequence[float]) -> Asked:
        """The same router at other weights, itself where they are its own."""
        if self.weights is not None and tuple(weights) == self.reach(weights):
            return self
        return type(self)(self.router, weights, self.time, self.live, self.total)

    def by_sample(self, weights: Sequence[Sequence[float]]) -> None:
        """Weights [B][k] that differ between the samples, in place of its own."""
        self._by_sample = tuple(tuple(map(float, row)) for row in weights)

    def __call__(self, path: str, x: Tensor) -> Tensor:
        raise TypeError("an Asked is read by adapted layers with their LoRAs' parts (row), not by path and input")

    def add(self, hook: Any, x: Tensor, y: Tensor) -> Tensor:
        """y plus the LoRAs' part in one adapted layer; its hook has bank and branch."""
        return hook.branch.tensor(x, y, self.row(hook.branch, x, y))

    def row(self, branch: Any, x: Tensor, y: Tensor) -> Tensor:
        """The row of one adapted layer: [k], [B, k] or [B, T, k], whatever fits its input x."""
        path = branch.site.path
        group = self.router.group(path)
        head = self.router.head(group)
        if group not in self.shares or path == head:
            live = self.live or (True,) * len(branch.site.parts)
            asks = Layer(branch, x, y, self.time, live, head is None or path == head)
            self.shares[group] = self.router.shares(asks)
        share = self.shares[group] if self.total == 1.0 else self.shares[group] * self.total
        if self._by_sample is not None:
            rows = torch.tensor(self._by_sample, dtype=share.dtype, device=share.device)
            return share * (rows[:, None] if share.ndim == 3 else rows)
        if share.ndim == 3 and x.ndim == 2 and share.shape[0] * share.shape[1] == x.shape[0]:
            share = share.flatten(0, 1)  # a layer that sees all tokens of all samples in one dimension
        if self.weights is None or all(w == 1.0 for w in self.weights):
            return share
        return share * numbers(self.weights, share.dtype, share.device)


@functools.lru_cache(256)
def numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor, made once: a copy to the device in every step would keep it out of a CUDA graph."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def normalised(logits: Tensor, live: Sequence[bool]) -> Tensor:
    """softmax over the last dimension with masked-out entries at minus infinity: they get 0, the others sum to 1."""
    if all(live):
        return logits.softmax(-1)
    out = numbers(tuple(not v for v in live), torch.bool, logits.device)
    return logits.masked_fill(out, -math.inf).softmax(-1)


def top(shares: Tensor, count: int) -> Tensor:
    """The `count` largest shares of each token, divided by their own sum (not by that of other tokens), the rest 0."""
    if count >= shares.shape[-1]:
        return shares
    kept = shares.topk(count, -1).indices
    only = torch.zeros_like(shares).scatter(-1, kept, shares.gather(-1, kept))
    return only / only.sum(-1, keepdim=True)


class Uniform:
    """The router that knows nothing: every LoRA that is not masked out gets the same share. All of them are equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Uniform)

    def __hash__(self) -> int:
        return hash(Uniform)

    def group(self, path: str) -> str:
        return ""

    def head(self, group: str) -> None:
        return None

    def asked(
        self,
        weights: Sequence[float] | None = None,
        time: float | Tensor | None = None,
        live: Sequence[bool] | None = None,
    ) -> Asked:
        """The router for one run of the model, as the gates have it."""
        return Asked(self, weights, time, live)

    def shares(self, layer: Layer) -> Tensor:
        live = torch.tensor(layer.live, dtype=torch.promote_types(layer.y.dtype, torch.float32), device=layer.y.device)
        return live / live.sum()


def mean_shares(shares: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """[groups, k] mean answer of each group over its samples and tokens.

    mask  [B, T] 0 for padding, which is left out of answers per token of that shape
    """
    found = []
    for share in shares.values():
        rows = share.reshape(-1, share.shape[-1])
        if mask is not None and share.shape[:-1] == mask.shape:
            rows = rows[mask.reshape(-1).bool()]
        found.append(rows.mean(0))
    return torch.stack(found)


def balance_loss(shares: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """-log prod_i q_i with q_i the share of LoRA i, averaged over all groups (arXiv 2404.13628, section 3.2).

    shares  group -> [k], [B, k] or [B, T, k]; mask as of mean_shares
    returns []; at least k log k, which uniform means reach

    The paper averages over its gated blocks; here also over samples and tokens.
    """
    q = mean_shares(shares, mask).mean(0)
    return -q.clamp_min(torch.finfo(q.dtype).tiny).log().sum()
