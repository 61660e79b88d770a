"""A route that several layers share while a language model decodes: beside the weights, or merged into them.

    bank.gate = TokenRoute(router, weights)      # one per run of the model, as any multilora.routing.Asked
    model(ids)

Many tokens (a prompt), and all that wants gradients, run as under any gate. One token per sample runs un-merged: the
head computes the rows once, as a tensor on the device, and every other layer reads them; no number goes to the host,
and the shapes are those of any other token. Linears that read one input share their first matmul.

On the CPU, where the numbers of a lone token's route can be read at no cost, only the picked LoRAs are read. In a bank
whose form is "side" plain linears take what these add as their bias, which needs neither a hook nor an addition.

In a bank whose form is "rebuilt" or "bank", one token alone is merged into the weights as soon as the head has its
route, every weight anew from its pristine copy, so that nothing drifts: what the LoRA-Switch paper does (its updates
are added to and subtracted from the weights; arXiv 2405.17741, section 3.3). A batch of tokens cannot be merged.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multilora.kernels import choice
from multilora.kernels import routed as kernels
from multilora.rebuilt_many import Many
from multilora.routing import Asked, numbers
from multilora.side import Branch, Stack


class TokenRoute(Asked):
    """See multilora.routing.Asked. Its router has top_k, and `ready`: WeakKeyDictionary of what is made for layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answers: dict[str, _Answer] = {}

    def inside(self, hook: Any, module: nn.Module) -> _Inside | None:
        """What stands in for the forward of a layer while a bank's gate is of this class; None: a hook behind it."""
        own = module.__dict__
        plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter and "forward" not in own
        alone = hook.weight is None and not hook.bank.eager.compiled and not module._forward_hooks
        return _Inside(hook, module) if plain and alone else None

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


class _Inside:
    """In the place of a plain linear layer's forward: the LoRAs that a lone token has picked are the layer's bias.

    All else runs as the layer itself with the bank's hook behind it.
    """

    def __init__(self, hook: Any, module: nn.Module) -> None:
        self.hook, self.bank, self.module, self.own = hook, hook.bank, module, module._parameters
        self.path, self.router = hook.path, hook.bank._gate.router
        self.layer = self._ready()
        module.__dict__["forward"] = self

    def _ready(self) -> _Ready | None:
        layer = self.router.ready.get(self.hook.branch)
        fast = layer is not None and layer.low and not layer.head and layer.device.type == "cpu"
        return layer if fast else None

    def remove(self) -> None:
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]

    def __call__(self, input: Tensor) -> Tensor:  # named as nn.Linear's
        route, layer, own = self.bank._gate, self.layer, self.own
        if layer is not None and type(route) is TokenRoute and route.router is self.router:
            answer = route._answers.get(layer.group)
            if (
                answer is not None
                and answer.picks is not None
                and input.numel() == layer.width
                and input.dtype is layer.dtype
                and input.is_cpu
                and not torch.is_grad_enabled()
            ):
                self.bank.calls[self.path] += 1
                delta, bias = layer.picked(input, answer), own["bias"]
                if delta is None or bias is None:
                    return F.linear(input, own["weight"], bias if delta is None else delta)
                return F.linear(input, own["weight"], bias).add_(delta)
        y = F.linear(input, own["weight"], own["bias"])
        total = self.hook(self.module, (input,), {}, y)
        if type(route) is TokenRoute:
            self.router = route.router
            self.layer = self._ready()
        return y if total is None else total


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
        self._present: dict[Any, tuple[list[int], list[float]]] = {}

    def fitting(self, x: Tensor) -> Tensor:
        """The row for a layer that may see all tokens of all samples in one dimension."""
        row = self.row
        flat = row.ndim == 3 and x.ndim == 2 and row.shape[0] * row.shape[1] == x.shape[0]
        return row.flatten(0, 1) if flat else row

    def present(self, ranks: tuple[int, ...], factors: tuple[float, ...]) -> tuple[list[int], list[float]]:
        """The picked LoRAs that have a part in a layer, and their weights there."""
        at = (ranks, factors)
        if at not in self._present:
            picks = [(i, value * factors[i]) for i, value in self.picks if ranks[i]]
            self._present[at] = [i for i, _ in picks], [value for _, value in picks]
        return self._present[at]

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
    outs    widths of the siblings' outputs, None where they are one
    """

    def __init__(self, branch: Branch, router: Any, x: Tensor, y: Tensor) -> None:
        site = branch.site
        self.device, self.dtype, self.group = y.device, x.dtype, router.group(site.path)
        self.head = site.path == router.head(self.group)
        plain = all(part is None or (part.rank is not None and part.bias is None) for part in site.parts)
        self.low = site.kind == "linear" and plain and not branch.trained
        if not self.low:
            return
        self.ranks, self.factors = site.ranks, site.factors
        self.width = x.shape[-1]
        self.key, where = (site.ranks, site.factors, x.dtype), branch.where(x, y)
        self.stacked, self.stacks, self.family, self.n = branch.stacked(where), [], None, 0
        if branch.siblings is not None:
            family, n, branches = branch.siblings
            if {router.group(each.path) for each in family.sites} == {self.group}:
                self.family, self.n, self.stacks = family, n, [b().stacked(where) for b in branches]
        outs = [s.up.shape[1] for s in self.stacks]
        self.outs = outs if len(set(outs)) > 1 else None
        self._wide: Tensor | None = None
        self._banks: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._experts: tuple[Tensor, Tensor] | None = None

    def add(self, module: nn.Module, x: Tensor, y: Tensor, answer: _Answer) -> Tensor:
        """y plus the LoRAs' part, in place where nobody else can have seen y."""
        if answer.triton:
            return self._by_index(x, y, answer)
        inplace = type(module) is nn.Linear and len(module._forward_hooks) < 2  # ours, or another behind _Inside
        if answer.picks is not None:
            delta = self.picked(x, answer)
            return y if delta is None else y.add_(delta) if inplace else y + delta
        narrow = None
        if self.family is not None:
            narrow = self.family.once(self.n, answer, x, lambda: self._of_siblings(x, answer))
        narrow = self._narrow(x, self.stacked.down.T, answer, 1) if narrow is None else narrow[self.n]
        return kernels.add_expanded(y, narrow, self.stacked.up, inplace=inplace)

    def _narrow(self, x: Tensor, down: Tensor, answer: _Answer, members: int) -> Tensor:
        """x by all LoRAs' factors at once, scaled by the rows."""
        return kernels.shrunk(x, down) * answer.scale(self.key, members)

    def _of_siblings(self, x: Tensor, answer: _Answer) -> tuple[Tensor, ...]:
        """[members] what each of the siblings takes of `_narrow`; they read one input."""
        m = len(self.stacks)
        if self._wide is None:
            with torch.inference_mode(False), torch.no_grad():
                self._wide = torch.cat([s.down for s in self.stacks]).T
        h = self._narrow(x, self._wide, answer, m)
        return h.split(h.shape[-1] // m, -1)

    def picked(self, x: Tensor, answer: _Answer) -> Tensor | None:
        """[out] what the picked LoRAs add for one token x; None where none of them has a part here."""
        if self.family is not None:
            found = self.family.once(self.n, answer, x, lambda: self._picked(x, answer, self.stacks))
            if found is not None:
                return found[self.n]
        return self._picked(x, answer, [self.stacked])[0]

    def _picked(self, x: Tensor, answer: _Answer, stacks: list[Stack]) -> Sequence[Tensor | None]:
        """[members] of `picked`, for layers with these factors."""
        m = len(stacks)
        if m not in self._banks:
            with torch.inference_mode(False), torch.no_grad():
                self._banks[m] = self._bank(stacks)
        downs, ups = self._banks[m]
        index, weights = answer.present(self.ranks, self.factors)
        found = kernels.routed_picked(x, [downs[i] for i in index], [ups[i] for i in index], weights)
        if found is None:
            return (None,) * m
        return found if self.outs is None or m == 1 else [d[:out] for d, out in zip(found, self.outs, strict=True)]

    def _bank(self, stacks: list[Stack]) -> tuple[list[Tensor], list[Tensor]]:
        """By LoRA: down [in, members * r] and up [members, r, widest out]; of one layer they are views."""
        if len(stacks) == 1:
            downs, ups = stacks[0].down.split(self.ranks), stacks[0].up.split(self.ranks)
            return [down.T for down in downs], [up[None] for up in ups]
        widest = max(s.up.shape[1] for s in stacks)
        downs = zip(*(s.down.split(self.ranks) for s in stacks), strict=True)
        ups = zip(*(F.pad(s.up, (0, widest - s.up.shape[1])).split(self.ranks) for s in stacks), strict=True)
        return [torch.cat(each).T for each in downs], [torch.stack(each) for each in ups]

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
        if any(f != 1.0 for f in self.factors):
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
        self.many = Many(weight for site, weight in bank._weights.items() if site.path != head)

    def put(self, row: Tensor) -> None:
        """The weights of a row [k], from the pristine ones, in place of these."""
        bank = self._bank()
        self.many.build(row)
        bank._in_weights = self
        for weight, out in zip(self.many.weights, self.many.outs, strict=True):
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
