"""A LoRA out of two checkpoints: what fine-tuning changed, cut to a rank, module by module.

    lora = extract("tuned.safetensors", "base.safetensors", rank=16)
    lora.card.provenance["energy_kept"]        # share of the squared norm of the change, in all

The difference of two checkpoints has full rank, so it is cut by the randomised svd of multilora.elementwise.low_rank
(arXiv 0909.4061). One module's difference is in memory at a time. The same files give the same LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora.bases import family_of
from multilora.elementwise import energy_of, low_rank
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.method import unknown
from multilora.modelfiles import ModelFiles, is_embedding

_FIRST_RANK = 32  # the first try for an energy; doubled until it holds
_MARGIN = 16  # more ranks are sought than stay: the last ones that a sketch finds are not the best there are


@torch.no_grad()
def extract(
    tuned: str | Path,
    base: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    vectors: bool = False,
    embeddings: bool = True,
    only: Sequence[str] = (),
    name: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Lora:
    """The LoRA that turns `base` into `tuned`, as nearly as its rank allows.

    tuned, base  checkpoints: .safetensors files, folders of models or of pipelines (multilora.modelfiles); the two may
                 be spelled differently
    rank         largest rank of a module
    energy       the share of each module's squared change that must stay, above 0 and at most 1; the smallest rank
                 that was found to hold it is taken. With both, `rank` is the limit
    vectors      also the changes of biases and norms, whole (the kohya format can hold them)
    embeddings   also the changes of tables of vectors (only the peft format can hold them)
    only         globs of modules, such as "*attn*"; all others are left out
    name         of the card, default the tuned checkpoint's
    progress     called with (key, modules done, modules in all)

    The card's provenance says what was kept, measured on the factors: "energy_kept" in all, "modules" {key: {rank,
    energy_kept, norm}}, "left_out" {tensor: norm of its change, or the reason}. Raises ValueError when the two have no
    tensor in common, a tensor has another shape or a value that is not finite (naming it), and when nothing changed.
    """
    _check(rank, energy)
    with ModelFiles(tuned) as new, ModelFiles(base) as old:
        return _extracted(new, old, _Wanted(rank, energy, vectors, embeddings, tuple(only)), name, progress)


@dataclass(frozen=True)
class _Wanted:
    rank: int | None
    energy: float | None
    vectors: bool
    embeddings: bool
    only: tuple[str, ...]

    def takes(self, layer: str) -> bool:
        return not self.only or any(fnmatchcase(layer, glob) for glob in self.only)


def _extracted(
    new: ModelFiles,
    old: ModelFiles,
    wanted: _Wanted,
    name: str | None,
    progress: Callable[[str, int, int], None] | None,
) -> Lora:
    left: dict[str, Any] = {n: "only in the tuned checkpoint" for n in new.entries if n not in old.entries}
    left |= {n: "only in the base" for n in old.entries if n not in new.entries}
    both = _shared(new, old)
    for glob in wanted.only:
        if not any(fnmatchcase(_layer(n), glob) for n in both):
            raise unknown("module or glob", glob, {_layer(n) for n in both})
    parts: dict[str, LowRank | Dense] = {}
    kept: dict[str, dict[str, Any]] = {}
    for done, n in enumerate(both, 1):
        layer = _layer(n)
        change = _change(new, old, n) if wanted.takes(layer) else None
        if change is not None:
            _take(parts, kept, left, n, change, new.fused.get(n), wanted)
        if progress:
            progress(layer, done, len(both))
    if not parts:
        raise ValueError(f"{new.name} and {old.name} have the same weights: nothing to extract")
    total = math.fsum(k["norm"] ** 2 for k in kept.values())
    held = math.fsum(k["norm"] ** 2 * k["energy_kept"] for k in kept.values())
    inputs = {side: {"name": c.name, "sha256": c.sha256()} for side, c in (("tuned", new), ("base", old))}
    said = {"method": "extract", "rank": wanted.rank, "energy": wanted.energy, **inputs}
    facts = {"merge": said, "energy_kept": held / total if total else 1.0, "modules": kept, "left_out": left}
    lora = Lora(parts, Card(name or new.name, provenance=facts))
    return lora.replace(card=lora.card.replace(family=family_of(lora)))


def _shared(new: ModelFiles, old: ModelFiles) -> list[str]:
    """The names that both have, in order, with equal shapes."""
    both = [n for n in new.entries if n in old.entries]
    if not both:
        raise ValueError(
            f"{new.name} and {old.name} have no tensor in common ({next(iter(new.entries))}, ... and "
            f"{next(iter(old.entries))}, ...): two checkpoints of one model are wanted"
        )
    for n in both:
        here, there = new.entries[n].shape, old.entries[n].shape
        if here != there:
            raise ValueError(f"{n} is {list(here)} in {new.name} and {list(there)} in {old.name}: another model")
    return both


def _check(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise ValueError("extract wants rank=, energy= or both")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"extract: rank={rank!r}, wanted a whole number of at least 1")
    if energy is not None and not (isinstance(energy, (int, float)) and 0.0 < energy <= 1.0):
        raise ValueError(f"extract: energy={energy!r}, wanted a number above 0 and at most 1")


def _layer(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _change(new: ModelFiles, old: ModelFiles, name: str) -> Tensor | None:
    """tuned - base in float32 at least; None where they are equal."""
    a, b = new.read(name), old.read(name)
    if not a.dtype.is_floating_point or not b.dtype.is_floating_point:
        return None if torch.equal(a, b) else a.float() - b.float()
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    change = a.to(dtype, copy=True).sub_(b.to(dtype))
    if not math.isfinite(energy_of(change)):
        which = new.name if not torch.isfinite(a).all() else old.name
        raise ValueError(f"{which}: {name} has values that are NaN or infinite")
    return change if change.any() else None


def _take(
    parts: dict[str, LowRank | Dense],
    kept: dict[str, dict[str, Any]],
    left: dict[str, Any],
    name: str,
    change: Tensor,
    fused: tuple[str, ...] | None,
    wanted: _Wanted,
) -> None:
    """Put the change of one tensor into `parts`, or its norm into `left`."""
    layer, whole = _layer(name), math.sqrt(energy_of(change))
    table = change.ndim == 2 and is_embedding(layer)
    if name.endswith(".weight") and change.ndim > 1 and (wanted.embeddings or not table):
        for key, rows in zip(fused or (layer,), _rows(change, fused), strict=True):
            norm = math.sqrt(energy_of(rows))
            if not norm:
                continue
            part, lost = _cut(rows, "embedding" if table else "conv" if rows.ndim > 2 else "linear", wanted)
            bias = parts[key].bias if key in parts else None
            parts[key] = LowRank(part.down, part.up, bias, part.kind)
            kept[key] = {"rank": part.rank, "energy_kept": 1.0 - lost / norm**2, "norm": norm}
    elif wanted.vectors and name.endswith((".weight", ".bias")) and change.ndim == 1 and not fused:
        parts[layer] = _with_vector(parts.get(layer), change, name.endswith(".bias"))
    else:
        left[name] = whole


def _rows(change: Tensor, fused: tuple[str, ...] | None) -> list[Tensor]:
    """The layers of a fused projection: equal parts, or q, k, v of the input's width and the rest."""
    if not fused:
        return [change]
    count, (out, wide) = len(fused), change.shape[:2]
    sizes = [out // count] * count if count == 3 else [wide] * (count - 1) + [out - wide * (count - 1)]
    if sum(sizes) != out or min(sizes) < 1:
        raise ValueError(f"{fused[0]}: {out} rows of a fused projection cannot be split into {count} parts")
    return [part.contiguous() for part in change.split(sizes)]


def _cut(change: Tensor, kind: str, wanted: _Wanted) -> tuple[LowRank, float]:
    """(the update, squared norm of what it leaves out); `change` is used up."""
    rank, energy = wanted.rank, wanted.energy
    side = min(change.shape if kind == "embedding" else change.flatten(1).shape)
    limit = min(rank or side, side)
    most = min(limit + _MARGIN, side)
    total = energy_of(change)
    tried = most if energy is None else min(_FIRST_RANK, most)
    part, lost = low_rank(change.clone(), tried, kind)
    while energy is not None and tried < most and lost > (1.0 - energy) * total:
        tried = min(2 * tried, most)
        part, lost = low_rank(change.clone(), tried, kind)
    # Of what `part` holds: energy is a share of the whole change.
    share = None if energy is None else min(energy * total / max(total - lost, energy * total), 1.0)
    part = part.truncate(rank=limit, energy=share)
    return part, energy_of(change.sub_(part.delta()))


def _with_vector(part: LowRank | Dense | None, change: Tensor, bias: bool) -> LowRank | Dense:
    """The part with the change of its bias, or of the weight of a norm."""
    if not bias:
        return Dense(change, None if part is None else part.bias)
    if isinstance(part, LowRank):
        return LowRank(part.down, part.up, change, part.kind)
    return Dense(None if part is None else part.weight, change)
