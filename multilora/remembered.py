"""Outputs of adapted modules that are kept while their input is the same tensor and the row the same numbers.

The keys and values of a prompt are the same at every denoising step: with them remembered, a quarter of the adapted
layers of Stable Diffusion 1.5 run once per prompt and LoRA instead of at every step, the base layer included. What is
handed out again is the very tensor that the module gave, so nothing changes by a bit.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from multilora import stacked
from multilora.attach import Bank
from multilora.side import Row
from multilora.sites import live_modules

_BYTES = 512 << 20  # of outputs that are kept
_PATIENCE = 16  # calls of every module after which nothing is kept any more where nothing was ever asked for again


def text_projections(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Those of these paths that project a prompt as it comes: keys and values of diffusers' cross attentions."""
    live = live_modules(model)
    found = []
    for path in paths:
        parent, _, name = path.rpartition(".")
        attention = live.get(parent)
        plain = getattr(attention, "is_cross_attention", False) and attention.norm_cross is None
        if plain and name in ("to_k", "to_v"):
            found.append(path)
    return found


class Remembered:
    """What was kept. hits, misses: calls so far that did not and did run."""

    def __init__(self, bank: Bank):
        self.bank, self.hits, self.misses, self.nbytes = bank, 0, 0, 0
        self._kept: OrderedDict[Any, tuple[Tensor, Any, Tensor]] = OrderedDict()  # -> input, row, output

    def clear(self) -> None:
        self._kept.clear()
        self.nbytes = 0

    def _key(self, path: str, x: Any) -> Any:
        """What an output depends on, or None where that cannot be told."""
        bank, row = self.bank, self.bank._row
        if not isinstance(x, Tensor) or x.requires_grad or x.is_inference() or bank.gate is not None:
            return None
        if row is not None and not isinstance(row, Row):
            return None
        return path, id(x), x._version, id(row), bank._in_weights

    def _found(self, key: Any) -> Tensor | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._kept.move_to_end(key)
        return kept[2]

    def _keep(self, key: Any, x: Tensor, output: Tensor) -> None:
        if not self.hits and self.misses > _PATIENCE * len(self.bank.paths):
            self.clear()
            return
        # The input and the row are kept too: as long as they live, no other object has their id.
        self._kept[key] = (x, self.bank._row, output)
        self.nbytes += output.numel() * output.element_size()
        while self.nbytes > _BYTES:
            _, (_, _, dropped) = self._kept.popitem(last=False)
            self.nbytes -= dropped.numel() * dropped.element_size()

    @contextlib.contextmanager
    def _around(self, path: str, module: nn.Module) -> Iterator[None]:
        own, before, pending = module.forward, module.__dict__.get("forward"), []

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            key = None if args or kwargs else self._key(path, x)
            kept = None if key is None else self._found(key)
            if kept is not None:
                self.bank.ready.add(path)
                self.hits += 1
                return kept
            self.bank.ready.discard(path)
            self.misses += 1
            pending[:] = [] if key is None else [(key, x)]
            return own(x, *args, **kwargs)

        def called(module: nn.Module, args: tuple, output: Any) -> None:
            if pending:
                self._keep(*pending.pop(), output)

        handle = module.register_forward_hook(called)  # after the bank's own, so that it sees the LoRAs' part
        try:
            module.__dict__["forward"] = forward
            yield
        finally:
            handle.remove()
            self.bank.ready.discard(path)
            if module.__dict__.get("forward") is forward:
                if before is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = before


@contextlib.contextmanager
def remembering(bank: Bank, paths: Sequence[str]) -> Iterator[Remembered]:
    """The modules of these paths of the bank remember what they gave, for the length of the block.

    For models that run without gradients. Left as they are: a compiled model, whose graph would not ask, and modules
    whose forward something else has replaced (offloading). Raises ValueError for a path that is no linear module of
    the bank.
    """
    sites = {site.path: site for site in bank.sites}
    unknown = [path for path in paths if path not in sites or sites[path].kind != "linear"]
    if unknown:
        raise ValueError(f"remembering: {unknown[0]!r} is no linear module that the LoRAs adapt")
    remembered = Remembered(bank)
    with contextlib.ExitStack() as stack:
        if not bank.eager.compiled:
            for path in paths:
                replaced = sites[path].module.__dict__.get("forward")
                if replaced is None or getattr(replaced, "__module__", "") == stacked.__name__:
                    stack.enter_context(remembered._around(path, sites[path].module))
        stack.callback(remembered.clear)
        yield remembered
