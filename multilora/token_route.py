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
from typing import Any

import torch
from torch import Tensor, nn

from multilora.kernels import choice
from multilora.kernels import routed as kernels
from multilora.routing import Asked, numbers
from multilora.side import Branch


class TokenRoute(Asked):
    """See multilora.routing.Asked. Its router has top_k, and `ready`: WeakKeyDictionary of what is made for layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answers: dict[str, _Answer] = {}

    def add(self, hook: Any, x: Tensor, y: Tensor) -> Tensor:
        branch = hook.branch
        layer = self.router.ready.get(branch)
        if layer is None or layer.device != y.device or layer.dtype != x.dtype:
            layer = self.router.ready[branch] = _Ready(branch, self.router, x, y)
        if layer.head:
            merged = hook.bank._in_weights
            if isinstance(merged, Merge):  # of another token
                merged.undo()
        elif hook.weight is not None and hook.weight.now is not None:
            return y
        answer = self._answers.get(layer.group)
        if layer.head or answer is None:
            answer = self._answers[layer.group] = _Answer(self.row(branch, x, y), self.router.top_k)
        tracked = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        if tracked or not (layer.low and answer.decodes) or x.shape[:-1] != answer.lead or y.dtype != x.dtype:
            return branch.tensor(x, y, answer.fitting(x))
        if layer.head and answer.single and hook.bank.form != "side" and self._shared(hook.bank):
            _merge_of(hook.bank, branch.site.path).put(answer.row.reshape(-1))
        return layer.add(branch.site.module, x, y, answer)

    def _shared(self, bank: Any) -> bool:
        """Whether one route is that of every layer."""
        return len({self.router.group(path) for path in bank.paths}) == 1


class _Answer:
    """A group's row: shares times weights, [B, k], [B, 1, k] of one token per sample, or anything else."""

    def __init__(self, row: Tensor, most: int) -> None:
        self.row, self.lead, self.most = row, row.shape[:-1], min(most, row.shape[-1])
        autocast = not row.is_meta and torch.is_autocast_enabled(row.device.type)
        tracked = torch.is_grad_enabled() and row.requires_grad
        one_each = row.ndim == 2 or (row.ndim == 3 and row.shape[1] == 1)
        self.decodes, self.single = one_each and not (tracked or autocast), self.lead.numel() == 1
        self.triton = choice.asked() == "triton"
        self.picks: list[tuple[int, float]] | None = None
        if self.decodes and self.single and row.device.type == "cpu" and not self.triton:
            # Reading the route here costs nothing: the numbers are in the host's memory.
            self.picks = [(i, value) for i, value in enumerate(row.flatten().tolist()) if value]
        self._scales: dict[Any, Tensor] = {}

    def fitting(self, x: Tensor) -> Tensor:
        """The row for a layer that may see all tokens of all samples in one dimension."""
        row = self.row
        flat = row.ndim == 3 and x.ndim == 2 and row.shape[0] * row.shape[1] == x.shape[0]
        return row.flatten(0, 1) if flat else row

    def scale(self, key: tuple[Any, ...], members: int) -> Tensor:
        """[tokens, members * R] the row's entries, one per stacked rank; key: ranks, factors and dtype."""
        at = (*key, members)
        if at not in self._scales:
            self._scales[at] = _per_rank(self.row, *key).repeat(1, members)
        return self._scales[at]


class _Ready:
    """What one layer needs while decoding, made once: views of its stacked factors, and those of its siblings.

    low     linear, and every LoRA's part is low-rank without a bias; others run as under any gate
    group, head   of the route
    """

    def __init__(self, branch: Branch, router: Any, x: Tensor, y: Tensor) -> None:
        site = branch.site
        self.device, self.dtype, self.group = y.device, x.dtype, router.group(site.path)
        self.head = site.path == router.head(self.group)
        plain = all(part is None or (part.rank is not None and part.bias is None) for part in site.parts)
        self.low = site.kind == "linear" and plain and not branch.trained
        if not self.low:
            return
        self.ranks, self.factors = site.ranks, None if all(f == 1.0 for f in site.factors) else site.factors
        self.key, where = (site.ranks, site.factors, x.dtype), branch.where(x, y)
        self.stacked, self.stacks, self.family, self.n = branch.stacked(where), [], None, 0
        with torch.inference_mode(False), torch.no_grad():
            self.downs = [down.T for down in self.stacked.down.split(self.ranks)]
            self.ups = self.stacked.up.split(self.ranks)
        if branch.siblings is not None:
            family, n, branches = branch.siblings
            if {router.group(each.path) for each in family.sites} == {self.group}:
                self.family, self.n, self.stacks = family, n, [b().stacked(where) for b in branches]
        self._wide: dict[bool, list[Tensor]] = {}
        self._experts: tuple[Tensor, Tensor] | None = None

    def add(self, module: nn.Module, x: Tensor, y: Tensor, answer: _Answer) -> Tensor:
        """y plus the LoRAs' part, in place where nobody else can have seen y."""
        if answer.triton:
            return self._by_index(x, y, answer)
        inplace = type(module) is nn.Linear and len(module._forward_hooks) == 1
        narrow = None
        if self.family is not None:
            narrow = self.family.once(self.n, answer, x, lambda: self._of_siblings(x, answer))
        narrow = self._narrow(x, answer, self.downs, 1) if narrow is None else narrow[self.n]
        if answer.picks is None:
            return kernels.add_expanded(y, narrow[0], self.stacked.up, inplace=inplace)
        picks = self._present(answer)
        weights = [value if self.factors is None else value * self.factors[i] for i, value in picks]
        return kernels.add_each(y, narrow, [self.ups[i] for i, _ in picks], weights, inplace=inplace)

    def _present(self, answer: _Answer) -> list[tuple[int, float]]:
        return answer.picks if all(self.ranks) else [pick for pick in answer.picks if self.ranks[pick[0]]]

    def _narrow(self, x: Tensor, answer: _Answer, downs: list[Tensor], members: int) -> list[Tensor]:
        """x by the picked factors [in, members * r] one by one, else by all of them at once and scaled."""
        if answer.picks is not None:
            return kernels.shrunk_each(x, [downs[i] for i, _ in self._present(answer)])
        down = self.stacked.down.T if members == 1 else self._wide_of(False)[0]
        return [kernels.shrunk(x, down) * answer.scale(self.key, members)]

    def _of_siblings(self, x: Tensor, answer: _Answer) -> list[tuple[Tensor, ...]]:
        """[members] what each of the siblings takes of `_narrow`; they read one input."""
        m, picked = len(self.stacks), answer.picks is not None
        found = self._narrow(x, answer, self._wide_of(True) if picked else [], m)
        return list(zip(*(h.split(h.shape[-1] // m, -1) for h in found), strict=True))

    def _wide_of(self, by_lora: bool) -> list[Tensor]:
        """Siblings' down factors side by side: [in, members * r] of each LoRA, or one [in, members * R] of all."""
        if by_lora not in self._wide:
            with torch.inference_mode(False), torch.no_grad():
                downs = [s.down for s in self.stacks]
                groups = zip(*(d.split(self.ranks) for d in downs), strict=True) if by_lora else [downs]
                self._wide[by_lora] = [torch.cat(list(group)).T for group in groups]
        return self._wide[by_lora]

    def _by_index(self, x: Tensor, y: Tensor, answer: _Answer) -> Tensor:
        """The Triton kernel reads the picked LoRAs from down [k, r, in] and up [k, out, r], r the largest rank."""
        if self._experts is None:
            with torch.inference_mode(False), torch.no_grad():
                made = []
                for old in (self.stacked.down, self.stacked.up):
                    new = old.new_zeros(len(self.ranks), max(self.ranks), old.shape[1])
                    for i, part in enumerate(old.split(self.ranks)):
                        new[i, : len(part)] = part
                    made.append(new)
            self._experts = made[0], made[1].mT
        index = answer.row.abs().topk(answer.most, -1).indices  # by size: a user's weight may be negative
        weight = answer.row.gather(-1, index)
        if self.factors is not None:
            weight = weight * numbers(self.factors, weight.dtype, x.device)[index]
        return kernels.add_by_index_(y.clone(memory_format=torch.contiguous_format), x, *self._experts, index, weight)


def _per_rank(row: Tensor, ranks: tuple[int, ...], factors: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """[tokens, R] the rows' entries, one per stacked rank."""
    row = row.reshape(-1, row.shape[-1]).to(dtype)
    if any(f != 1.0 for f in factors):
        row = row * numbers(factors, dtype, row.device)
    return row.index_select(-1, kernels.columns(ranks, row.device))


_MERGES: weakref.WeakKeyDictionary[Any, Merge] = weakref.WeakKeyDictionary()  # of banks


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
