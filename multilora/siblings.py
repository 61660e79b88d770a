"""Linear modules of one parent that are called in turn with one input (queries, keys, values; gate and up): their
LoRAs' first matmuls are done as one, so that the input is read once and two kernels of three are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from multilora.kernels import choice
from multilora.kernels import routed as kernels
from multilora.sites import Site

# Names in the order in which the parent's forward calls them, and what the parent must be called. A cross attention
# gives its queries another input than its keys and values.
_RUNS = (
    (("to_q", "to_k", "to_v"), ""),
    (("q_proj", "k_proj", "v_proj"), "self_attn"),
    (("gate_proj", "up_proj"), "mlp"),
)


@dataclass(eq=False)
class Siblings:
    """A run of such modules: sites in the order of their calls, and the first matmul's result from the first call on
    until the last has taken its part."""

    sites: tuple[Site, ...]
    kept: tuple[Any, Tensor, int, Any] | None = field(default=None, repr=False)

    def shrunk(self, n: int, row: Any, x: Tensor, down: Tensor, wide: Tensor | None, segments: int) -> Tensor:
        """x @ down for member n, down [in, R'] or [segments, in, R']; `wide` has the members' downs side by side, and
        `row` is any object that is one row's alone."""
        h = None if wide is None else self.once(n, row, x, lambda: kernels.shrunk(x, wide, segments))
        rank = down.shape[-1]
        return kernels.shrunk(x, down, segments) if h is None else h[..., n * rank : (n + 1) * rank]

    def once(self, n: int, row: Any, x: Tensor, make: Callable[[], Any]) -> Any:
        """What `make` gives for all members, called by the first of them; None where x is not what that one saw."""
        if n == 0:
            if x.is_inference() or torch.compiler.is_compiling():  # what may have changed cannot be told
                self.kept = None
                return None
            self.kept = (row, x, x._version, make())
            return self.kept[3]
        kept = self.kept
        if n == len(self.sites) - 1:
            self.kept = None
        if kept is None or kept[0] is not row or kept[1] is not x or kept[2] != x._version:
            return None
        return kept[3]


def siblings_of(sites: Sequence[Site], parents: Mapping[str, Any]) -> dict[Site, tuple[Siblings, int]]:
    """site -> (its run, its number there), for the sites that have siblings. `parents`: module path -> module."""
    if choice.asked() == "triton":  # its kernel does both matmuls at once
        return {}
    by_path = {site.path: site for site in sites}
    found: dict[Site, tuple[Siblings, int]] = {}
    for path in {site.path.rpartition(".")[0] for site in sites}:
        for names, wanted in _RUNS:
            if wanted and path.rpartition(".")[2] != wanted:
                continue
            if names[0] == "to_q" and getattr(parents.get(path), "is_cross_attention", False):
                names = names[1:]
            run = [by_path.get(f"{path}.{name}") for name in names]
            if None not in run and len({_shape(site) for site in run}) == 1 and sum(run[0].ranks):
                group = Siblings(tuple(run))
                found |= {site: (group, n) for n, site in enumerate(run)}
    return found


def _shape(site: Site) -> tuple:
    """What must agree for one row to fold into all factors alike."""
    return site.kind == "linear", getattr(site.module, "in_features", id(site)), site.ranks, site.factors
