"""Which modules a LoRA set is on now: two sets on one module would mix two users' pictures."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence

from torch import nn

from multilora.sites import Site

_HELD: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_HELD_LOCK = threading.Lock()


@contextlib.contextmanager
def holding(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Nobody else attaches LoRAs to the model or to these sites meanwhile; RuntimeError when somebody has."""
    root = getattr(model, "_orig_mod", model)
    wanted = {root, *(site.module for site in sites)}
    mine: set[nn.Module] = set()
    try:
        with _HELD_LOCK:
            taken = next((module for module in wanted if module in _HELD), None)
            if taken is not None:
                where = next((f" (at {site.path})" for site in sites if site.module is taken), "")
                raise RuntimeError(
                    f"LoRAs are attached to this {type(root).__name__} already{where}: leave that `attached(...)` "
                    f"block first, or give all LoRAs to one"
                )
            mine = wanted
            for module in mine:
                _HELD.add(module)
        yield
    finally:
        with _HELD_LOCK:
            for module in mine:
                _HELD.discard(module)
