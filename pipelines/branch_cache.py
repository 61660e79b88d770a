"""Branch cache of U-Nets: at most calls only the shallow branch runs, on what the deep part gave at an earlier call.

DeepCache (Ma et al. 2023, https://arxiv.org/abs/2312.00858, section 3.2) with the split at its shallowest: a cached
call runs the first convolution, the last layer of the last up block, which joins it over the longest skip connection,
and what follows. diffusers has no such cache for U-Nets. The model's own forward runs as it stands, and the modules
that are left out answer in their place: so time embeddings, ControlNet residuals and FreeU are the model's own.

What is kept is kept by row (pipelines.caching): a feature of one LoRA never serves another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LAST_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
_ABSENT = object()


@dataclass
class _Kept:
    """What the deep part gave: the feature that enters the last layer, and the outputs of the modules left out, as
    empty tensors on the meta device; age counts the calls since."""

    feature: Tensor
    outputs: dict[nn.Module, Any]
    age: int = 0


class BranchCache:
    """The branch cache of one U-Net.

    every  the whole model runs at every this many calls of a row; 1 is the model without a cache
    full, short  calls of either kind so far
    """

    def __init__(self, unet: nn.Module, every: int):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"branch cache: every={every!r}, wanted a whole number of at least 1")
        self.every, self.full, self.short = every, 0, 0
        self.unet = _checked(unet)
        self._kept: dict[str, _Kept] = {}

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Around one call of the U-Net for the row of this name: whole, or short where its feature is fresh enough."""
        if self.every == 1:
            self.full += 1
            yield
            return
        kept = self._kept.get(name)
        if kept is not None and kept.age + 1 < self.every:
            answers = {m: _filled(output, kept.feature) for m, output in kept.outputs.items()}
            # The model's own forward joins this one with the skip connection.
            source = _left_out(self.unet)[-1]
            answers[source] = _with(kept.outputs[source], kept.feature)
            with _answering(answers):
                yield
            kept.age += 1
            self.short += 1
            return
        self.drop(name)
        with _recording(_left_out(self.unet)) as record:
            yield
        self._kept[name] = _Kept(record.feature, record.outputs)
        self.full += 1

    def drop(self, name: str) -> None:
        self._kept.pop(name, None)

    def clear(self) -> None:
        self._kept.clear()


def _left_out(unet: nn.Module) -> list[nn.Module]:
    """The modules that a short call leaves out; the last of them gives what enters the last layer."""
    last = unet.up_blocks[-1]
    mid = [] if unet.mid_block is None else [unet.mid_block]
    layers = [*last.resnets[:-1], *getattr(last, "attentions", [])[:-1]]
    return [*unet.down_blocks, *mid, *unet.up_blocks[:-1], *layers]


def _checked(unet: nn.Module) -> nn.Module:
    """The U-Net. Raises ValueError saying why where it cannot be run by halves."""
    if hasattr(unet, "_orig_mod"):
        raise ValueError("branch cache: the U-Net is compiled as a whole, and a compiled graph runs whole; compile "
                         "its transformer blocks instead (compile_repeated_blocks)")  # fmt: skip
    last = (getattr(unet, "up_blocks", None) or [None])[-1]
    kind = type(last).__name__
    if not hasattr(unet, "down_blocks") or kind not in _LAST_BLOCKS or len(last.resnets) < 2:
        raise ValueError(
            f"branch cache: {type(unet).__name__} has {kind} as last up block; wanted a U-Net that ends in one of "
            f"{', '.join(_LAST_BLOCKS)} with two layers or more (Stable Diffusion 1, 2, XL)"
        )
    for path, module in unet.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None and module in (unet, last, *_left_out(unet)):
            raise ValueError(f"branch cache: {path or 'the U-Net'} is compiled, and a compiled graph runs whole")
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        hook = next((name for name in hooks if "offload" in name or hooks[name]._is_stateful), None)
        if hook:
            raise ValueError(
                f"branch cache: {path or 'the U-Net'} has diffusers' {hook}, which counts on all blocks to run; take "
                f"it off first"
            )
    return unet


@contextlib.contextmanager
def _answering(answers: Mapping[nn.Module, Callable[[], Any]]) -> Iterator[None]:
    """The modules' forward is the answer, for the length of the block."""
    own: dict[nn.Module, Any] = {}
    try:
        for module, answer in answers.items():
            own[module] = module.__dict__.get("forward", _ABSENT)
            module.__dict__["forward"] = lambda *args, _answer=answer, **kwargs: _answer()
        yield
    finally:
        for module, forward in own.items():
            if forward is _ABSENT:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@dataclass
class _Record:
    outputs: dict[nn.Module, Any]
    feature: Any = None


@contextlib.contextmanager
def _recording(modules: list[nn.Module]) -> Iterator[_Record]:
    """What these modules give in one call: shapes and dtypes of all, and the tensor of the last."""
    record = _Record({})

    def seen(module: nn.Module, args: tuple, output: Any) -> None:
        record.outputs[module] = _each(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), output)
        if module is modules[-1]:
            record.feature = output[0] if isinstance(output, tuple) else output

    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_hook(seen))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _filled(output: Any, like: Tensor) -> Callable[[], Any]:
    """Room of an output's shapes: nobody reads it, but a ControlNet's residuals are added to it."""
    return lambda: _each(lambda t: torch.empty(t.shape, dtype=t.dtype, device=like.device), output)


def _with(output: Any, feature: Tensor) -> Callable[[], Any]:
    return lambda: (feature,) if isinstance(output, tuple) else feature


def _each(make: Callable[[Tensor], Tensor], output: Any) -> Any:
    if isinstance(output, Tensor):
        return make(output)
    return tuple(_each(make, part) for part in output)
