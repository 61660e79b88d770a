"""Compiled models: torch.compile ignores a hook that is added after its first call, so a side branch runs eagerly."""

from __future__ import annotations

from typing import Any

from torch import nn


class Eager:
    """Where a model is compiled, and a switch that runs those places eagerly; their compiled graphs are kept.

    compiled  whether anything in the model is compiled: `model.compile()` in place (also diffusers'
              `compile_repeated_blocks`), a `torch.compile(module)` wrapper, or a compiled `forward`
    on        whether those places run eagerly now
    """

    def __init__(self, model: nn.Module):
        self.on = False
        self._swaps: list[tuple[nn.Module, str, Any]] = []
        self._saved: list[tuple[nn.Module, str, Any]] = []
        for module in model.modules():
            own = module.__dict__
            if "_orig_mod" in module._modules:
                self._swaps.append((module, "forward", module._orig_mod.__call__))
            elif "forward" in own and hasattr(own["forward"], "_torchdynamo_orig_callable"):
                self._swaps.append((module, "forward", own["forward"]._torchdynamo_orig_callable))
            if own.get("_compiled_call_impl") is not None:
                self._swaps.append((module, "_compiled_call_impl", None))

    @property
    def compiled(self) -> bool:
        return bool(self._swaps)

    def turn(self, on: bool) -> None:
        """Run the compiled places eagerly (True) or as before (False)."""
        if on and not self.on:
            self.on = True
            for module, name, plain in self._swaps:
                self._saved.append((module, name, module.__dict__[name]))
                module.__dict__[name] = plain
        elif not on:
            while self._saved:
                module, name, value = self._saved.pop()
                module.__dict__[name] = value
            self.on = False
