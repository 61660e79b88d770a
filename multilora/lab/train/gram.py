"""Gram matrices of the inputs that a model's layers see, for merge/regmean.py.

    with grams(pipe, fox) as collected, composing(pipe, [fox]):  # the modules that `fox` adapts
        for prompt in prompts:                                   # in which `fox` does its own work
            pipe(prompt)
    collected.save("fox.grams.safetensors")
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multilora.lora import COMPONENTS
from multilora.sites import kind_of, live_modules, nearest
from multilora.stored import write_tensors

LARGEST = 5120  # inputs of a layer up to which its matrix is kept whole: 100 MB in float32


class Grams(Mapping):
    """{key: mean of x xᵀ over all input rows x [in] so far, float32}: [in, in], or its diagonal [in].

    The diagonal is kept of embeddings (how often each entry was looked up) and of layers with more inputs than
    `largest`. `rows` counts the input rows by key. A layer that did not run has no entry.
    """

    def __init__(self, modules: Mapping[str, nn.Module], largest: int = LARGEST) -> None:
        self.modules, self.largest = dict(modules), largest
        self.rows: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        return (self._sums[key] / self.rows[key]).to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    @torch.no_grad()
    def add(self, key: str, inputs: Tensor) -> None:
        """Count the inputs of one call of the module."""
        module = self.modules[key]
        if kind_of(module) == "embedding":
            counts = torch.bincount(inputs.flatten(), minlength=module.num_embeddings).double()
            self._gather(key, counts, inputs.numel())
            return
        x = _patches(module, inputs) if kind_of(module) == "conv" else inputs.flatten(0, -2)
        x = x.to(torch.promote_types(torch.float32, x.dtype))
        self._gather(key, x.T @ x if x.shape[1] <= self.largest else x.square().sum(0), len(x))

    def _gather(self, key: str, new: Tensor, rows: int) -> None:
        if key in self._sums:
            self._sums[key].add_(new)
        else:
            self._sums[key] = new
        self.rows[key] = self.rows.get(key, 0) + rows

    def save(self, path: str | Path, **about: Any) -> Path:
        """Write a .safetensors file, one matrix at a time, atomically; `about` is kept in its header as JSON."""
        if not self._sums:
            raise ValueError(f"{Path(path).name}: no layer has run yet, there are no Gram matrices to save")
        layout = {key: (torch.float32, tuple(total.shape)) for key, total in self._sums.items()}
        text = json.dumps({"version": 1, "rows": self.rows, **about})
        return write_tensors(path, layout, self.values(), {"format": "pt", "multilora_grams": text})


def _patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """[rows, in * kernel] what a two-dimensional convolution multiplies its flattened weight by."""
    mode = getattr(module, "padding_mode", "zeros")
    if inputs.ndim != 4 or module.groups != 1 or mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(f"Gram matrices are collected of plain two-dimensional convolutions, not of {module}")
    options = {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}
    return nn.functional.unfold(inputs, module.kernel_size, **options).transpose(1, 2).flatten(0, 1)


@contextmanager
def grams(model: Any, keys: Iterable[str], *, largest: int = LARGEST) -> Iterator[Grams]:
    """Collect while the block runs, by hooks; nothing stays on the model.

    model  a pipeline (keys begin with its component, as a Lora's do) or a bare module
    keys   module paths, for instance a Lora: its keys are the modules that it adapts. Norms are left out
    largest  see LARGEST

    Raises ValueError for a key that is no module of the model, and inside the block for a convolution that is grouped
    or padded otherwise than with zeros.
    """
    known: dict[str, dict[str, nn.Module]] = {}
    modules = {key: module for key in keys if kind_of(module := _module(model, key, known)) != "norm"}
    collected = Grams(modules, largest)
    handles = []
    try:
        for key, module in modules.items():

            def hook(module: nn.Module, args: tuple, kwargs: dict, key: str = key) -> None:
                collected.add(key, args[0] if args else next(iter(kwargs.values())))

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def _module(model: Any, key: str, known: dict[str, dict[str, nn.Module]]) -> nn.Module:
    """The module that a key names; `known` keeps the components' modules between calls."""
    component, _, path = key.partition(".")
    if isinstance(model, nn.Module):
        component, path, owner = "", key, model
    else:
        owner = getattr(model, component, None) if component in COMPONENTS else None
        if not isinstance(owner, nn.Module):
            raise ValueError(f"key {key!r}: {type(model).__name__} has no component {component!r}")
    if component not in known:
        known[component] = live_modules(owner)
    if path not in known[component]:
        raise ValueError(f"key {key!r}: no module of {type(owner).__name__}{nearest(path, list(known[component]))}")
    return known[component][path]
