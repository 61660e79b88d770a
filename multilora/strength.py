"""How strong a stack of LoRAs is, before it burns the picture: a measure from the factors, and a warning.

The relative update of a row of weights w is the root mean square over the adapted layers l of

    ||sum_i w_i Delta_i,l|| / ||W_l||        (Frobenius norms, from r x r products; no update is multiplied out)

and its strength is that number divided by the largest one of a single LoRA of the stack at weight 1. One LoRA at
weight w has strength w; k LoRAs that share no directions, at weight 1, have about sqrt(k); k equal ones have k.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from multilora.compare import inner
from multilora.lora import Lora, LowRank
from multilora.method import Bound
from multilora.plan import Moment, instead
from multilora.schedule import SIGMA, Schedule
from multilora.sites import Site, quantised, sites_of

# Merges of one to four LoRAs of the embedded world's train split at weights from 0.5 to 6, 20 steps, guidance 3, read
# by recogniser A and the embedded CLIP. Strength: share of the designs seen, CLIP score, pictures:
#     1 to 2: 0.94, 78, 40;  2 to 2.5: 0.98, 72, 20;  2.5 to 3: 0.97, 67, 16;  3 to 3.5: 0.96, 52, 14;
#     3.5 to 4.5: 0.67, 45, 16;  6: 0.0, 30, 6
# Looked at, outlines and colours break between 2.5 and 2.7; recognisers still name the designs for a while.
LIMIT = 2.5
_norms: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, int], float]] = weakref.WeakKeyDictionary()


class TooStrong(UserWarning):
    """The LoRAs of a run add up to more than pictures usually bear."""


@dataclass(frozen=True)
class Stack:
    """k LoRAs on a model.

    gram  [k][k] sums over the adapted layers of <Delta_i, Delta_j> / ||W||², block factors included, divided by the
          number of layers
    """

    names: tuple[str, ...]
    gram: tuple[tuple[float, ...], ...]

    def update(self, row: Sequence[float]) -> float:
        """Root mean square over the layers of the relative update of a row of weights."""
        terms = (a * b * g for a, line in zip(row, self.gram, strict=True) for b, g in zip(row, line, strict=True))
        return math.sqrt(max(0.0, math.fsum(terms)))

    def strength(self, row: Sequence[float]) -> float:
        """The update of a row in units of the strongest LoRA alone at weight 1; 0 where none has an effect."""
        one = math.sqrt(max((self.gram[i][i] for i in range(len(self.names))), default=0.0))
        return self.update(row) / one if one else 0.0


def stack_of(
    model: nn.Module,
    loras: Sequence[Lora],
    component: str | None = None,
    *,
    names: Sequence[str] | None = None,
    blocks: Sequence[Mapping[str, float] | None] | None = None,
) -> Stack:
    """Measure k LoRAs on a model; a layer whose weight cannot be read (quantised) counts as one of unit entries.

    Raises ValueError as multilora.sites.sites_of does.
    """
    k = len(loras)
    sites = [site for site in sites_of(model, loras, component, blocks) if any(p is not None for p in site.parts)]
    total = [[0.0] * k for _ in range(k)]
    norms = _weight_norms([site.module for site in sites])
    for site, norm in zip(sites, norms, strict=True):
        gram = _gram(site)
        for i in range(k):
            for j in range(k):
                total[i][j] += gram[i][j] * site.factors[i] * site.factors[j] / (norm * norm * len(sites))
    shown = names or [lora.card.name or f"number {i + 1}" for i, lora in enumerate(loras)]
    return Stack(tuple(shown), tuple(tuple(line) for line in total))


def _gram(site: Site) -> list[list[float]]:
    """[k][k] inner products of the updates of one layer; stacked factors give all of them in two products."""
    k, parts = len(site.parts), site.parts
    found = [[0.0] * k for _ in range(k)]
    here = [i for i, part in enumerate(parts) if part is not None]
    if all(isinstance(parts[i], LowRank) for i in here):
        ups = torch.cat([parts[i].up.float() for i in here], dim=1)
        downs = torch.cat([parts[i].down.float().flatten(1) for i in here])
        product = ((ups.T @ ups) * (downs @ downs.T)).split([parts[i].rank for i in here])
        sums = torch.stack([torch.stack([b.sum() for b in line.split([parts[i].rank for i in here], 1)])
                            for line in product]).tolist()  # fmt: skip
    else:
        sums = [[inner(parts[i], parts[j]) for j in here] for i in here]
    for a, i in enumerate(here):
        for b, j in enumerate(here):
            found[i][j] = sums[a][b]
    return found


def _weight_norms(modules: Sequence[nn.Module]) -> list[float]:
    """[modules] Frobenius norms of the weights, remembered until a weight changes."""
    fresh: dict[int, Tensor] = {}
    found = [0.0] * len(modules)
    for i, module in enumerate(modules):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or quantised(module) or weight.device.type == "meta":
            found[i] = math.sqrt(weight.numel()) if isinstance(weight, Tensor) else 1.0
            continue
        stamp = (weight.data_ptr(), weight._version)
        known = _norms.get(module)
        if known is not None and known[0] == stamp:
            found[i] = known[1]
        else:
            fine = torch.float64 if weight.dtype == torch.float64 else torch.float32
            fresh[i] = torch.linalg.vector_norm(weight.detach(), dtype=fine).float().cpu()
    values = torch.stack(list(fresh.values())).tolist() if fresh else []
    for i, value in zip(fresh, values, strict=True):
        weight = modules[i].weight
        found[i] = value
        _norms[modules[i]] = ((weight.data_ptr(), weight._version), value)
    return [value if value > 0 else 1.0 for value in found]


def rows_of(
    plan: Callable[[Moment], list], moment: Moment, schedules: Sequence[Schedule], masked: Sequence[bool]
) -> dict[tuple[float, ...], int]:
    """The rows of all passes of a plan over a run, each with the first step that has it.

    moment   any moment of the run: its number of steps, cards and text are used
    masked   LoRAs that act in a region only count without the other ones of this kind

    A weight that goes by sigma counts at its largest; a pass with a gate is left out.
    """
    found: dict[tuple[float, ...], int] = {}
    for step in range(moment.steps):
        weights = tuple(s.peak if s.unit == SIGMA else s.at(step, moment.steps) for s in schedules)
        for p in plan(dataclasses.replace(moment, step=step, weights=weights)):
            if callable(p.row):
                continue
            for region in [i for i, m in enumerate(masked) if m and p.row[i]] or [-1]:
                row = (0.0 if m and i != region else w for i, (w, m) in enumerate(zip(p.row, masked, strict=True)))
                found.setdefault(tuple(row), step)
    return found


def guarded(
    bound: Bound, stack: Callable[[], Stack], schedules: Sequence[Schedule], masked: Sequence[bool] | None = None
) -> Bound:
    """The same method with a warning, before the first run of a picture, when a pass of it is too strong.

    stack      measures the LoRAs; called at most once, and only when a row's weights add up to more than LIMIT
    schedules  [k] the users' weights

    Methods that run LoRAs one at a time do not add up and are measured so: by the rows of their passes.
    """
    record, measured = bound.record, []
    masked = [False] * len(schedules) if masked is None else list(masked)

    def plan_of(loras: Sequence[Lora], **options: Any) -> Any:
        plan, waiting = record.fn(loras, **options), [True]

        def watched(moment: Moment) -> list:
            if waiting and waiting.pop() and _sum(s.peak for s in schedules) > LIMIT:
                rows = rows_of(record.fn(loras, **options), moment, schedules, masked)
                # No LoRA is stronger than the strongest: below this sum there is nothing to measure.
                rows = {row: step for row, step in rows.items() if _sum(row) > LIMIT}
                if rows and not measured:
                    measured.append(stack())
                found = max(((measured[0].strength(row), row) for row in rows), default=(0.0, ()))
                if found[0] > LIMIT:
                    text = _message(record.name, measured[0].names, found[0], rows[found[1]], found[1])
                    warn(TooStrong(text), stacklevel=2)
            return plan(moment)

        return instead(plan, watched)

    return Bound(dataclasses.replace(record, fn=plan_of), bound.options)


def _sum(row: Iterable[float]) -> float:
    return math.fsum(abs(w) for w in row)


def _message(method: str, names: Sequence[str], strength: float, step: int, row: Sequence[float]) -> str:
    used = [(name, weight) for name, weight in zip(names, row, strict=True) if weight]
    by = math.floor(100 * LIMIT / strength) / 100
    stack = ", ".join(f"{name} at {weight:g}" for name, weight in used)
    weights = ", ".join(f"{name} at {math.copysign(math.floor(100 * by * abs(w)) / 100, w):g}" for name, w in used)
    instead = "" if len(used) < 2 else ", or use method 'composite' or 'switch', where LoRAs do not add up"
    return (
        f"{stack}: together {strength:.1f} times as strong as one LoRA at weight 1 (method {method}, step {step}); "
        f"above {LIMIT:g} pictures break. Lower the weights by a factor of {by:.2f} ({weights}){instead}"
    )
