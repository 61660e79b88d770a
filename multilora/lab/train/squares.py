"""Squares of per-example gradients, summed: what a diagonal Fisher is made of.

A square of a gradient summed over a batch is not a sum of squares: cross terms between examples would enter. So the
gradient of one example is made whole (over its tokens, places and repeated calls of the layer), then squared, then
added up. Layers are done one after the other as the backward pass reaches them, so that one layer's gradient is in
memory; the sums are on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multilora.sites import kind_of, shape_of


def tappable(module: nn.Module) -> bool:
    """Whether a layer's gradient follows from its input and its output's gradient: linears and 2d convolutions.

    Quantised linears and transformers' Conv1D count: their stored weight is never looked at.
    """
    if isinstance(module, nn.Conv2d):
        return True
    says = hasattr(module, "in_features") and hasattr(module, "out_features")
    return kind_of(module) == "linear" and (says or (hasattr(module, "nf") and hasattr(module, "nx")))


@dataclass(eq=False)
class Tap:
    """One layer and the names of its parameters whose squares are wanted.

    calls   of the running forward: (input, its version) each
    grads   of the running backward: call number -> gradient of the output
    """

    path: str
    module: nn.Module
    weight: str | None = None
    bias: str | None = None
    calls: list[tuple[Tensor, int]] = field(default_factory=list)
    grads: dict[int, Tensor] = field(default_factory=dict)
    called: bool = False


class Squares:
    """sums[name] = sum over examples of weight * gradient ** 2, in the parameters' shapes.

    taps   layers of which `tappable` is true. Dimension 0 of their input is the batch, or, where it is a multiple of
           the batch, falls into equal runs that belong to one example each
    loose  {name: parameter} for everything else: autograd's own gradient, for one example at a time
    dtype  of the sums, float32 or float64

    The parameters need not require gradients outside `watching()`.
    """

    def __init__(
        self, taps: list[Tap], loose: Mapping[str, nn.Parameter], dtype: torch.dtype = torch.float32
    ) -> None:
        self.taps, self.loose, self.dtype = taps, dict(loose), dtype
        self.sums: dict[str, Tensor] = {}
        for tap in taps:
            shape = shape_of(tap.module)
            if tap.weight is not None:
                self.sums[tap.weight] = torch.zeros(shape, dtype=dtype)
            if tap.bias is not None:
                self.sums[tap.bias] = torch.zeros(shape[0], dtype=dtype)
        for name, parameter in self.loose.items():
            self.sums[name] = torch.zeros(parameter.shape, dtype=dtype)
        self._weights = torch.ones(1)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the layers for the length of a block; forwards without gradients are not seen."""
        handles: list[Any] = []
        flags = {name: p.requires_grad for name, p in self.loose.items()}
        try:
            for tap in self.taps:
                hook = functools.partial(self._forward, tap)
                handles.append(tap.module.register_forward_hook(hook, with_kwargs=True))
            for name, parameter in self.loose.items():
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(functools.partial(self._loose, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in self.loose.items():
                parameter.requires_grad_(flags[name])
                parameter.grad = None
            for tap in self.taps:
                tap.calls, tap.grads = [], {}

    def add(self, objective: Tensor, weights: float | Tensor = 1.0, *, keep: bool = False) -> None:
        """Add weights[b] * (gradient of objective[b]) ** 2 for every example b of the forward that made `objective`.

        objective [B]; weights a number or [B]; keep: another objective of the same forward will follow. Raises
        ValueError when a layer had no call with gradients, its input was overwritten, or the examples of a batch
        cannot be told apart in it.
        """
        weights = torch.as_tensor(weights, dtype=torch.float64).expand(len(objective))
        self._weights = weights
        if len(objective) > 1 and self.loose:
            raise ValueError(f"{next(iter(self.loose))}: its squares are taken for one example at a time; use batch=1")
        missed = next((tap for tap in self.taps if not tap.calls), None)
        if missed is not None:
            raise ValueError(
                f"{missed.path}: the model's answer was computed without calling this layer with gradients, so it has "
                "no Fisher; leave it out (modules=)"
            )
        if not objective.requires_grad:
            raise ValueError("the model's answer does not depend on any of the chosen layers")
        objective.sum().backward(retain_graph=keep)
        for tap in self.taps:
            if tap.grads:  # some call of it did not reach the objective
                self._square(tap)
            if not keep:
                tap.calls = []

    def _forward(self, tap: Tap, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        number = len(tap.calls)
        tap.calls.append((x.detach(), x._version))
        tap.called = True
        if output.requires_grad:
            output.register_hook(functools.partial(self._backward, tap, number))
            return None
        # The first layer that is looked at: nothing before it has a gradient. A leaf, and a copy of it that the model
        # may write to.
        leaf = output.detach().requires_grad_()
        leaf.register_hook(functools.partial(self._backward, tap, number))
        return leaf.clone()

    def _backward(self, tap: Tap, number: int, grad: Tensor) -> None:
        tap.grads[number] = grad.detach()
        if len(tap.grads) == len(tap.calls):
            self._square(tap)

    def _square(self, tap: Tap) -> None:
        """Add the squares of one layer: per example the gradient of all its calls, squared, weighted."""
        grads, tap.grads = tap.grads, {}
        batch = len(self._weights)
        pairs = []
        for number, d in grads.items():
            x, version = tap.calls[number]
            if x._version != version:
                raise ValueError(f"{tap.path}: its input was overwritten in place before the backward pass")
            if batch > 1 and (len(x) % batch or len(d) % batch or x.ndim < 2):
                raise ValueError(
                    f"{tap.path}: its input {list(x.shape)} does not show the {batch} examples of the batch in "
                    "dimension 0; use batch=1"
                )
            work = torch.promote_types(torch.promote_types(x.dtype, d.dtype), torch.float32)
            x, d = x.to(work), d.to(work)
            if batch == 1:
                pairs.append((x[None], d[None]))
            else:
                pairs.append((x.reshape(batch, -1, *x.shape[1:]), d.reshape(batch, -1, *d.shape[1:])))
        totals: dict[str, Tensor] = {}
        for b, weight in enumerate(self._weights.tolist()):
            if not weight:
                continue
            for name, gradient in ((tap.weight, weight_gradient), (tap.bias, bias_gradient)):
                if name is not None:
                    g = sum(gradient(tap.module, x[b], d[b]) for x, d in pairs).square_().mul_(weight)
                    totals[name] = totals[name].add_(g) if name in totals else g
        for name, total in totals.items():
            self._add(name, total)

    def _loose(self, name: str, parameter: nn.Parameter) -> None:
        grad, parameter.grad = parameter.grad, None
        grad = grad.to_dense() if grad.is_sparse else grad
        work = torch.promote_types(grad.dtype, torch.float32)
        self._add(name, grad.to(work).square().mul_(float(self._weights[0])))

    def _add(self, name: str, total: Tensor) -> None:
        total = total.to("cpu", self.dtype)
        if not torch.isfinite(total).all():
            raise ValueError(
                f"{name}: the squared gradient has values that are not finite; load the model in float32 or bfloat16"
            )
        self.sums[name].add_(total)


def weight_gradient(module: nn.Module, x: Tensor, d: Tensor) -> Tensor:
    """Gradient of a layer's weight [out, in, *kernel] from its input and its output's gradient, over all of x.

    Linear: x [..., in], d [..., out]; convolution: x [n, in, h, w] or [in, h, w], d likewise.
    """
    if not isinstance(module, nn.Conv2d):
        return d.reshape(-1, d.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    x, d = x.reshape(-1, *x.shape[-3:]), d.reshape(-1, *d.shape[-3:])
    padding: Any = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), 0
    geometry = (module.stride, padding, module.dilation, module.groups)
    return torch.nn.grad.conv2d_weight(x, shape_of(module), d, *geometry)


def bias_gradient(module: nn.Module, x: Tensor, d: Tensor) -> Tensor:
    """Gradient of a layer's bias [out] from its output's gradient."""
    if isinstance(module, nn.Conv2d):
        return d.reshape(-1, *d.shape[-3:]).sum((0, 2, 3))
    return d.reshape(-1, d.shape[-1]).sum(0)
