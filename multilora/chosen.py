"""What choosing weights has in common: the objective's contract, what was tried, and the answer.

An objective is a plain callable `objective(loras, rows) -> one loss per row`, lower is better. A row has one weight
per LoRA: numbers [k], or for gradients a tensor [k], or {Lora key: tensor [k]} for a row per adapted layer. It may
carry a `name`, for errors and records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.lora import Lora
from multilora.writing import _write

Row = Any
Objective = Callable[[Sequence[Lora], Sequence[Row]], Sequence[Any]]


class Enough(Exception):
    """Raised by an objective to end a search now: the best of what was tried is the answer."""


@dataclass(frozen=True)
class Trial:
    """One candidate: its weights (of a row per layer their mean over the layers), its loss, what was added to it."""

    weights: tuple[float, ...]
    loss: float
    penalty: float = 0.0

    @property
    def total(self) -> float:
        return self.loss + self.penalty


class Chosen(list):
    """The weights, one per LoRA: numbers, or {Lora key: number} where each layer has its own; merges take both.

    trials  what was tried, in order
    best    the trial that the weights are from; None where nothing was tried
    ended   why the search ended: "budget", "converged: ...", "stopped"
    form    "delta": weights of the updates (merge `linear`, routes); "factor": of merge `factor`, convention "lorahub"
    """

    def __init__(
        self,
        weights: Sequence[float | Mapping[str, float]],
        trials: Sequence[Trial] = (),
        best: Trial | None = None,
        ended: str = "budget",
        form: str = "delta",
    ) -> None:
        super().__init__(weights)
        self.trials, self.best, self.ended, self.form = tuple(trials), best, ended, form


def name_of(objective: Any) -> str:
    return str(getattr(objective, "name", "") or getattr(objective, "__name__", "") or type(objective).__name__)


def checked_set(loras: Sequence[Lora], who: str) -> list[Lora]:
    """The LoRAs as a list. Raises ValueError when there are none, or one is no Lora."""
    loras = list(loras)
    if not loras:
        raise ValueError(f"{who}: no LoRAs given, there is nothing to weigh")
    for i, lora in enumerate(loras):
        if not isinstance(lora, Lora):
            raise ValueError(f"{who}: LoRA number {i + 1} is a {type(lora).__name__}, wanted a Lora")
    return loras


def answers_of(objective: Objective, loras: Sequence[Lora], rows: Sequence[Row]) -> list[Any]:
    """What the objective says to rows, one entry each. Raises ValueError naming it when the count is another."""
    if not callable(objective):
        raise ValueError(f"objective={objective!r}: wanted a callable (loras, rows) -> one loss per row")
    found = objective(loras, rows)
    try:
        found = list(found)
    except TypeError:
        said = f"{type(found).__name__} {found!r:.60}"
        raise ValueError(f"score {name_of(objective)!r} returned {said} for {len(rows)} candidates, wanted a list "
                         "with one number each") from None  # fmt: skip
    if len(found) != len(rows):
        raise ValueError(f"score {name_of(objective)!r} returned {len(found)} numbers for {len(rows)} candidates")
    return found


def number_of(value: Any, objective: Any, weights: Sequence[float]) -> float:
    """A loss as a float. Raises ValueError naming the score, the value and the weights when it is no finite number."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        shown = "[" + ", ".join(f"{w:.4g}" for w in weights) + "]"
        raise ValueError(
            f"score {name_of(objective)!r} returned no number but {value!r:.80} for the weights {shown}: wanted a "
            "finite number for every candidate"
        )
    return number


def write_json(path: Path, value: Any) -> None:
    """One JSON document, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode())
