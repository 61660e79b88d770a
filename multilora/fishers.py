"""Diagonal Fisher information: the numbers by parameter name, their file, and the mean weighted by them.

Names are those of the parameters: "unet.mid_block...to_q.weight", "model.layers.0.mlp.up_proj.weight". Shapes are
those of the weights, whatever a LoRA's rank. `multilora.lab.train.fisher` estimates Fishers; `multilora.merge.fisher`
and `multilora.checkpoint_merge.merge_checkpoints` use them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora.elementwise import energy_of
from multilora.stored import Stored, write_tensors

FIELD = "multilora_fisher"  # of the header's metadata
VERSION = 1


class Fisher(Mapping):
    """{parameter name: tensor of squares, in the parameter's shape}, with what is known about its making.

    tensors  a mapping, or a Stored file, of which one tensor is read at a time
    about    estimator, examples, base, lora, lora_sha256, weight, unit, ...; see multilora.lab.train.fisher

    A tensor is checked when it is read: ValueError for one that is not floating point, has a negative value, or one
    that is not finite.
    """

    def __init__(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None, name: str = "") -> None:
        self.tensors, self.about, self.name = tensors, dict(about or {}), name

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        where = f"Fisher {self.name or 'mapping'}, {name!r}"
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{where}: wanted a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor))}")
        if not bool((tensor >= 0).all()) or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: has values that are negative or not finite; a Fisher is a mean of squares")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def close(self) -> None:
        """Let go of the file, if there is one."""
        if isinstance(self.tensors, Stored):
            self.tensors.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header where there is a file."""
        return self.tensors.layout[name][1] if isinstance(self.tensors, Stored) else tuple(self.tensors[name].shape)

    def of(self, key: str) -> str | None:
        """The name that the weight of module `key` has here ("<key>.weight", or the bare key); None without one."""
        return next((n for n in (f"{key}.weight", key) if n in self), None)


def save_fisher(fisher: Fisher, path: str | Path) -> Path:
    """Write a Fisher as a .safetensors file, atomically."""
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in fisher.tensors.items()}
    about = {"version": VERSION, **fisher.about}
    return write_tensors(path, layout, fisher.values(), {"format": "pt", FIELD: json.dumps(about)})


def load_fisher(path: str | Path) -> Fisher:
    """A Fisher file, its tensors read one at a time as they are asked for.

    Raises ValueError for a file that is none: another kind of safetensors file, a later version, no tensors.
    """
    stored = Stored(path)
    try:
        about = json.loads(stored.metadata.get(FIELD, "null"))
    except (json.JSONDecodeError, RecursionError):
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("version"), int):
        stored.close()
        raise ValueError(
            f"{Path(path).name}: no Fisher file (no {FIELD} in its metadata); wanted one that `multilora fisher` wrote"
        )
    if about["version"] > VERSION or not len(stored):
        stored.close()
        what = "holds no tensors" if not len(stored) else f"is of version {about['version']}, known is {VERSION}"
        raise ValueError(f"{Path(path).name}: this Fisher file {what}")
    return Fisher(stored, about, Path(path).name)


def checked_fisher(given: Any, who: str, files: ExitStack) -> Fisher:
    """A Fisher from a path, a mapping or a Fisher; ValueError, beginning with `who`, for anything else.

    A file that is opened here is closed with `files`.
    """
    if isinstance(given, Fisher):
        return given
    if isinstance(given, (str, Path)):
        fisher = load_fisher(given)
        files.callback(fisher.close)
        return fisher
    if isinstance(given, Mapping) and given:
        return Fisher(dict(given))
    raise ValueError(f"{who}: wanted a Fisher file or a mapping {{parameter name: tensor}}, got {given!r:.60}")


def consents(weights: Sequence[Any], count: int, name: str, what: str) -> None:
    """ValueError unless there is one finite weight of at least 0 for each, not all 0: shares of a mean."""
    if len(weights) != count:
        raise ValueError(f"{name}: {len(weights)} weights for {count} {what}, wanted one each")
    for i, w in enumerate(weights, 1):
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w) or w < 0:
            raise ValueError(f"{name}: weight number {i} is {w!r}, wanted a finite number of at least 0")
    if not any(weights):
        raise ValueError(f"{name}: all weights are 0, a mean needs one above 0")


def norm_over(fisher: Fisher, names: Iterable[str]) -> float:
    """The L2 norm of all entries under `names` together, summed in float64; 1 where they are all 0."""
    return math.sqrt(math.fsum(energy_of(fisher[name]) for name in names)) or 1.0


def fisher_mean(
    values: Sequence[Tensor],
    fishers: Sequence[Tensor | None] | None,
    weights: Sequence[float],
    *,
    norms: Sequence[float] | None = None,
    floor: float = 0.0,
    favor_target: bool = False,
) -> Tensor:
    """sum_m c_m F_m v_m / sum_m c_m F_m elementwise, c_m = weights[m] / norms[m]; in float32 at least.

    values        tensors of one shape
    fishers       of the same shape, at least 0; None in their place leaves that value out, None for all of them takes
                  F = 1
    norms         one per value, None for 1 each: the published code divides by the L2 norm of a model's whole Fisher
    floor         the least that F counts as (before it is divided by the norm, as published)
    favor_target  the floor holds for the first value only: where no other model's F is above it, that one wins

    Where the denominator is 0 the result is the mean with the weights alone, the limit of equal small F.
    """
    dtype = torch.float32
    for tensor in values:
        dtype = torch.promote_types(dtype, tensor.dtype)
    above: Tensor | None = None
    below: Tensor | None = None
    for m, value in enumerate(values):
        f = torch.ones_like(value, dtype=dtype) if fishers is None else fishers[m]
        if f is None or not weights[m]:
            continue
        f = f.to(value.device, dtype)
        if fishers is not None and floor and (m == 0 or not favor_target):
            f = f.clamp(min=floor)
        f = f * (weights[m] / (1.0 if norms is None or fishers is None else norms[m]))
        term = f * value.to(dtype)
        above = term if above is None else above.add_(term)
        below = f if below is None else below.add_(f)
    if below is None:
        return torch.zeros_like(values[0], dtype=dtype)
    empty = below == 0
    result = above / torch.where(empty, torch.ones_like(below), below)
    if empty.any():
        use = [w if fishers is None or fishers[m] is not None else 0.0 for m, w in enumerate(weights)]
        plain = sum(w * v.to(dtype) for w, v in zip(use, values, strict=True)) / sum(use)
        result = torch.where(empty, plain, result)
    return result
