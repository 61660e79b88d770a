"""A route that several layers share while a language model decodes: beside the weights, or merged into them.

    bank.gate = TokenRoute(router, weights)      # one per run of the model, as any multilora.routing.Asked
    model(ids)

Many tokens (a prompt), and all that wants gradients, run as under any gate. One token per sample runs un-merged: the
head computes the rows once, as a tensor on the device, and every other layer reads them; no number goes to the host,
and the shapes are those of any other token. Linears that read one input share their first matmul.

In a bank whose form is "rebuilt" or "bank", one token alone is merged into the weights as soon as the head has its
route, every weight anew from its pristine copy, so that nothing drifts: what the LoRA-Switch paper does (its updates
are added to and subtracted from the weights; arXiv 2405.17741, section 3.3). A batch of tokens cannot be merged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multilora.kernels import choice
from multilora.kernels import routed as kernels
from multilora.routing import Asked, numbers
from multilora.side import Branch, Stack


class TokenRoute(Asked):
    """See multilora.routing.Asked. Shares per token, or [k] where no head has answered yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows: dict[str, Tensor] = {}  # group -> shares times weights
        self._read: dict[Any, Any] = {}  # what follows from a row: scales per rank, picked LoRAs

    def add(self, hook: Any, x: Tensor, y: Tensor) -> Tensor:
        branch, bank = hook.branch, hook.bank
        path, group = branch.site.path, self.router.group(branch.site.path)
        head = path == self.router.head(group)
        if head:
            if isinstance(bank._in_weights, Merge):  # of another token
                bank._in_weights.undo()
            self._read.clear()
        if head or group not in self._rows:
            self._rows[group] = self.row(branch, x, y)
        elif hook.weight is not None and hook.weight.now is not None:
            return y
        row = self._rows[group]
        if row.ndim == 3 and x.ndim == 2 and row.shape[0] * row.shape[1] == x.shape[0]:
            row = row.flatten(0, 1)
        if not _decodes(branch, x, y, row):
            return branch.tensor(x, y, row)
        if head and bank.form != "side" and row.shape[:-1].numel() == 1 and self._shared(bank):
            _merge_of(bank, path).put(row.reshape(-1))
        return self._beside(branch, x, y, row, group)

    def _shared(self, bank: Any) -> bool:
        """Whether one route is that of every layer."""
        return len({self.router.group(path) for path in bank.paths}) == 1

    def _beside(self, branch: Branch, x: Tensor, y: Tensor, row: Tensor, group: str) -> Tensor:
        stacked = branch.stacked(branch.where(x, y))
        if stacked.down is None:
            return y
        if choice.asked() == "triton":
            return self._by_index(branch, stacked, x, y, row)
        if x.device.type == "cpu" and row.shape[:-1].numel() == 1:
            return self._picked(branch, stacked, x, y, row, group)
        ranks, factors = branch.site.ranks, branch.site.factors

        def all_of(down: Tensor, members: int) -> list[Tensor]:
            key = (group, ranks, factors, x.dtype, members)
            scale = self._kept(key, lambda: _per_rank(row, ranks, factors, x.dtype).repeat(1, members))
            return [kernels.shrunk(x, down.T) * scale]

        h = self._narrow(branch, stacked, x, y, group, None, all_of)[0]
        return branch.add(h, y, kernels.add_expanded, stacked.up)

    def _picked(self, branch: Branch, stacked: Stack, x: Tensor, y: Tensor, row: Tensor, group: str) -> Tensor:
        """One token on the CPU: the picked LoRAs alone, read where they lie. Its numbers are in the host's memory."""
        ranks, factors = branch.site.ranks, branch.site.factors

        def read() -> list[tuple[int, int, float]]:
            found = []
            for i, value in enumerate(row.flatten().tolist()):
                if value and ranks[i]:
                    found.append((sum(ranks[:i]), ranks[i], value * factors[i]))
            return found

        picks = self._kept((group, ranks, factors), read)

        def each(down: Tensor, members: int) -> list[Tensor]:
            return [kernels.shrunk(x, down.narrow(0, members * start, members * rank).T) for start, rank, _ in picks]

        narrow = self._narrow(branch, stacked, x, y, group, ranks, each)
        for (start, rank, value), h in zip(picks, narrow, strict=True):
            y = branch.add(h, y, kernels.add_expanded, stacked.up.narrow(0, start, rank), value)
        return y

    def _narrow(
        self, branch: Branch, stacked: Stack, x: Tensor, y: Tensor, group: str, ranks: tuple[int, ...] | None,
        make: Callable[[Tensor, int], list[Tensor]],
    ) -> list[Tensor]:  # fmt: skip
        """make(down, members), for siblings of one route once: their own slices of what it gives for all of them."""
        family, n, branches = branch.siblings or (None, 0, ())
        if family is None or {self.router.group(site.path) for site in family.sites} != {group}:
            return make(stacked.down, 1)
        m, where, row = len(branches), branch.where(x, y), self._rows[group]
        kept = family.once(n, row, x, lambda: make(_wide([b().stacked(where) for b in branches], ranks), m))
        if kept is None:
            return make(stacked.down, 1)
        return [h.narrow(-1, n * (h.shape[-1] // m), h.shape[-1] // m) for h in kept]

    def _by_index(self, branch: Branch, stacked: Stack, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        down, up = _experts(branch, stacked)
        if any(f != 1.0 for f in branch.site.factors):
            row = row * numbers(branch.site.factors, row.dtype, row.device)
        weight, index = row.topk(min(getattr(self.router, "top_k", row.shape[-1]), row.shape[-1]), -1)
        return kernels.add_by_index_(y.clone(memory_format=torch.contiguous_format), x, down, up, index, weight)

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._read:
            self._read[key] = make()
        return self._read[key]


def _decodes(branch: Branch, x: Tensor, y: Tensor, row: Tensor) -> bool:
    """Whether a layer's part is that of one token per sample, of low-rank updates alone, and wants no gradient."""
    site = branch.site
    tracked = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or row.requires_grad)
    if tracked or branch.trained or site.kind != "linear" or row.ndim < 2 or row.shape[:-1] != x.shape[:-1]:
        return False
    if x.ndim == 3 and x.shape[1] > 1:
        return False
    return all(part is None or (part.rank is not None and part.bias is None) for part in site.parts)


def _per_rank(row: Tensor, ranks: tuple[int, ...], factors: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """[tokens, R] the rows' entries, one per stacked rank."""
    row = row.reshape(-1, row.shape[-1]).to(dtype)
    if any(f != 1.0 for f in factors):
        row = row * numbers(factors, dtype, row.device)
    return row.index_select(-1, kernels.columns(ranks, row.device))


# What is made of stacked factors, as long as these are kept.
_WIDE: weakref.WeakKeyDictionary[Stack, dict[bool, Tensor]] = weakref.WeakKeyDictionary()
_EXPERTS: weakref.WeakKeyDictionary[Stack, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
_MERGES: weakref.WeakKeyDictionary[Any, Merge] = weakref.WeakKeyDictionary()


def _wide(stacks: list[Stack], ranks: tuple[int, ...] | None) -> Tensor:
    """[members * R, in] siblings' down factors, member after member, or with `ranks` LoRA after LoRA."""
    made = _WIDE.setdefault(stacks[0], {})
    if (ranks is None) not in made:
        with torch.inference_mode(False), torch.no_grad():
            downs = [s.down for s in stacks]
            if ranks is not None:
                downs = [part for each in zip(*(d.split(ranks) for d in downs), strict=True) for part in each]
            made[ranks is None] = torch.cat(downs)
    return made[ranks is None]


def _experts(branch: Branch, stacked: Stack) -> tuple[Tensor, Tensor]:
    """down [k, r, in] and up [k, out, r] of a site, filled up with zeros to its largest rank r."""
    if stacked not in _EXPERTS:
        ranks = branch.site.ranks
        with torch.inference_mode(False), torch.no_grad():
            made = [t.new_zeros(len(ranks), max(ranks), t.shape[1]) for t in (stacked.down, stacked.up)]
            for new, old in zip(made, (stacked.down, stacked.up), strict=True):
                for i, part in enumerate(old.split(ranks)):
                    new[i, : len(part)] = part
        _EXPERTS[stacked] = made[0], made[1].mT
    return _EXPERTS[stacked]


class Merge:
    """The merged weights of one token in a bank: all its plain linears but the head, which ran before the route."""

    def __init__(self, bank: Any, head: str) -> None:
        self._bank, self.head = weakref.ref(bank), head
        self.weights, self.outs, self.bases, self.downs, self.ups = [], [], [], [], []
        with torch.inference_mode(False), torch.no_grad():
            for site, weight in bank._weights.items():
                low = all(part is None or (part.rank is not None and part.bias is None) for part in site.parts)
                if site.kind != "linear" or site.path == head or not low:
                    continue
                base = weight.base[0]
                stacked = bank._branches[site].stacked((base.device, torch.promote_types(base.dtype, torch.float32)))
                self.weights.append(weight)
                self.outs.append(torch.empty_like(base, memory_format=torch.contiguous_format))
                self.bases.append(base)
                self.downs.append(stacked.down)
                self.ups.append(stacked.up.T)

    def put(self, row: Tensor) -> None:
        """The weights of a row [k], from the pristine ones, in place of these."""
        bank, scales = self._bank(), {}
        with torch.inference_mode(False), torch.no_grad():
            row = row.clone()
            for weight in self.weights:
                key = (weight.site.ranks, weight.site.factors)
                if key not in scales:
                    scales[key] = _per_rank(row, *key, row.dtype).reshape(-1)
            found = [scales[w.site.ranks, w.site.factors] for w in self.weights]
            kernels.rebuild_(self.outs, self.bases, self.downs, self.ups, found)
            bank._in_weights = self
            for weight, out in zip(self.weights, self.outs, strict=True):
                weight.put((out, None))

    def undo(self) -> None:
        bank = self._bank()
        bank._restore()
        bank._in_weights = None


def _merge_of(bank: Any, head: str) -> Merge:
    """A bank's Merge, made once for a head."""
    if bank not in _MERGES or _MERGES[bank].head != head:
        _MERGES[bank] = Merge(bank, head)
    return _MERGES[bank]
