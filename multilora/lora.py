"""`Lora` and its exact algebra: weight updates by module path, with a card.

Nothing is truncated unless asked. Tensors are shared between Loras and never written to: who wants to change one
clones it first. multilora/parts.py has the updates of single layers and says what is exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from multilora.parts import Dense, LowRank, finite_factor

__all__ = ["COMPONENTS", "Card", "Dense", "Lora", "LowRank"]

# First word of a key that names a component of a pipeline; a LoRA of a bare model has none.
COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "controlnet",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What is known about a LoRA beside its weights.

    family      base model family ("sd15", "sdxl", "sd3", "flux", ...), "" when unknown
    sha256      of the file it was read from; "" for one that was computed
    provenance  anything else worth keeping: format, key words of the file's metadata, terms of a sum
    """

    name: str = ""
    category: str = ""
    triggers: tuple[str, ...] = ()
    family: str = ""
    sha256: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def replace(self, **fields: Any) -> Card:
        return dataclasses.replace(self, **fields)

    def terms(self) -> list[dict[str, Any]]:
        """The files that a computed LoRA is the sum of, each with name, sha256 and weight."""
        return list(self.provenance.get("terms") or [{"name": self.name, "sha256": self.sha256, "weight": 1.0}])

    def scaled(self, by: float) -> Card:
        if by == 1.0:
            return self
        terms = [{**t, "weight": t["weight"] * by} for t in self.terms()]
        return self.replace(sha256="", provenance={"terms": terms})

    def plus(self, other: Card) -> Card:
        return Card(
            name=" + ".join(dict.fromkeys(n for n in (self.name, other.name) if n)),
            category=self.category if self.category == other.category else "",
            triggers=tuple(dict.fromkeys((*self.triggers, *other.triggers))),
            family=self.family if other.family in ("", self.family) else other.family if not self.family else "",
            provenance={"terms": [*self.terms(), *other.terms()]},
        )


class Lora(Mapping):
    """An immutable mapping {module path: LowRank | Dense} with a card.

    Keys carry the pipeline's component ("unet.down_blocks.0...to_q", "text_encoder.encoder.layers.0...", text encoders
    without "text_model."); a LoRA of a bare model has plain module paths. Two Loras are added module by module, a
    module that one of them lacks counts as zero there.

    Raises ValueError when a key is not a path or a value is not a part.
    """

    __slots__ = ("__weakref__", "_card", "_parts")

    def __init__(self, parts: Mapping[str, LowRank | Dense], card: Card | None = None) -> None:
        parts = dict(parts)
        for key, part in parts.items():
            if not isinstance(key, str) or not key or not isinstance(part, (LowRank, Dense)):
                raise ValueError(f"a Lora maps module paths to LowRank or Dense, got {key!r}: {type(part).__name__}")
        object.__setattr__(self, "_parts", MappingProxyType(parts))
        object.__setattr__(self, "_card", card or Card())

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Lora is immutable, {name} cannot be set; use replace() or the algebra")

    def __getitem__(self, path: str) -> LowRank | Dense:
        return self._parts[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __reduce__(self) -> tuple:
        return Lora, (dict(self._parts), self._card)

    def __repr__(self) -> str:
        ranks = sorted({p.rank for p in self.values() if p.rank})
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "dense"
        where = ", ".join(c for c in self.components if c)
        return f"Lora({self.card.name or 'unnamed'}: {len(self)} modules, {shown}{', ' + where if where else ''})"

    @property
    def card(self) -> Card:
        return self._card

    def replace(self, *, card: Card) -> Lora:
        """The same weights under another card."""
        return Lora(self._parts, card)

    @property
    def components(self) -> tuple[str, ...]:
        """The pipeline components that the keys name, sorted; "" stands for keys of a bare model."""
        first = {key.split(".", 1)[0] for key in self if "." in key}
        found = first & set(COMPONENTS)
        bare = any(key.split(".", 1)[0] not in COMPONENTS or "." not in key for key in self)
        return tuple(sorted(found | ({""} if bare else set())))

    def part(self, component: str | None) -> dict[str, LowRank | Dense]:
        """The parts of one component by path relative to it; None or "" gives all keys as they are."""
        if not component:
            return dict(self._parts)
        prefix = component + "."
        return {key[len(prefix) :]: p for key, p in self.items() if key.startswith(prefix)}

    def to(self, dtype: torch.dtype | None = None, device: Any = None) -> Lora:
        return Lora({k: p.to(dtype, device) for k, p in self.items()}, self.card)

    def norm(self) -> float:
        """The Frobenius norm of all updates together, biases included."""
        return math.hypot(0.0, *(p.norm() for p in self.values()))

    def truncate(self, rank: int | None = None, energy: float | None = None) -> Lora:
        """Every update replaced by the nearest one of a smaller rank; a rank that is small enough already stays.

        rank    the largest rank of a module, at least 1
        energy  the share, above 0 and at most 1, of each module's squared singular values that must stay; the
                smallest rank that holds it is taken. With both, both limits hold

        Low-rank parts are cut from their factors (never through the full matrix) and are exact in the sense of Eckart
        and Young; dense parts go through their svd; biases stay. The card's provenance["truncated"] holds the limits,
        `energy_lost` and `energy_lost_by_module` (see `truncated`). Raises ValueError for other limits.
        """
        if rank is None and energy is None:
            raise ValueError("truncate wants rank=, energy= or both")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"truncate: rank={rank!r}, wanted a whole number of at least 1")
        if energy is not None and not (isinstance(energy, (int, float)) and 0.0 < energy <= 1.0):
            raise ValueError(f"truncate: energy={energy!r}, wanted a number above 0 and at most 1")
        parts, lost = truncated(self, dict.fromkeys(self, rank), energy)
        kept = {"truncated": {"rank": rank, "energy": energy, **lost}}
        return Lora(parts, self.card.replace(sha256="", provenance={"terms": self.card.terms(), **kept}))

    def __mul__(self, by: float) -> Lora:
        by = finite_factor(by)
        return self if by == 1.0 else Lora({k: p * by for k, p in self.items()}, self.card.scaled(by))

    __rmul__ = __mul__

    def __neg__(self) -> Lora:
        return self * -1.0

    def __add__(self, other: Lora) -> Lora:
        if not isinstance(other, Lora):
            return NotImplemented
        parts = dict(self._parts)
        for key, part in other.items():
            try:
                parts[key] = parts[key] + part if key in parts else part
            except ValueError as error:
                raise ValueError(f"{self.card.name or 'LoRA'} + {other.card.name or 'LoRA'}, {key}: {error}") from None
        return Lora(parts, self.card.plus(other.card))

    def __sub__(self, other: Lora) -> Lora:
        return self + -other if isinstance(other, Lora) else NotImplemented


def truncated(
    parts: Mapping[str, LowRank | Dense], ranks: Mapping[str, int | None], energy: float | None = None
) -> tuple[dict[str, LowRank | Dense], dict[str, Any]]:
    """(every update cut to its rank in `ranks` and to `energy`, what that lost); see Lora.truncate.

    The second is {"energy_lost": share of the squared norm of all low-rank or matrix updates, "energy_lost_by_module":
    key -> share}; biases and one-dimensional weights, which are never cut, count as no energy.
    """
    cut: dict[str, LowRank | Dense] = {}
    shares: dict[str, float] = {}
    gone = total = 0.0
    for key, part in parts.items():
        rank = ranks[key]
        if energy is None and rank is not None and part.rank is not None and part.rank <= rank:
            cut[key], lost, whole = part, 0.0, part.energy()
        else:
            cut[key], lost, whole = part.truncated(rank, energy)
        if part.shape is not None and len(part.shape) > 1:
            shares[key] = lost / whole if whole else 0.0
            gone, total = gone + lost, total + whole
    return cut, {"energy_lost": gone / total if total else 0.0, "energy_lost_by_module": shares}
