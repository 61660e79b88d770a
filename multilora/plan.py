"""What a route method sees and what it answers: `plan(moment) -> list[Pass]`.

A plan may also carry `plan.combine(outputs, moment) -> prediction`, which replaces the weighted mean of the passes;
`outputs` is the list of the passes' predictions in order; and `plan.explains() -> str`, a line on what it has chosen.
Where a recipe is made again, `explained_before()` is the line that was said when it was made: a method that chooses
takes what it took then, so that the picture is the same one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_BEFORE: ContextVar[str] = ContextVar("explained_before", default="")


def explained_before() -> str:
    """What `plan.explains()` said when the recipe that is being made again was made; "" for a new picture."""
    return _BEFORE.get()


@contextlib.contextmanager
def as_explained(line: str) -> Iterator[None]:
    """For the length of the block, methods that choose take what this line says, as far as they can read it."""
    token = _BEFORE.set(line)
    try:
        yield
    finally:
        _BEFORE.reset(token)


@dataclass(frozen=True)
class Moment:
    """One call of the denoiser (or one token).

    step      0-based step that is being run; an image-to-image run starts at 0 too
    steps     number of steps of this run
    t         the timestep as the denoiser gets it, a float
    sigma     noise level of the step where the scheduler has one, else None
    weights   [loras] the users' weights at this step, schedules applied
    cards     [loras] the LoRAs' cards (name, category, triggers)
    text      the prompt encodings by row, for methods that look at words; None where there is no prompt
    guidance  scale of the guidance between the halves, 1 and below without a negative half; None where nobody says
    """

    step: int
    steps: int
    t: float
    sigma: float | None
    weights: tuple[float, ...]
    cards: tuple[Any, ...] = ()
    text: Any = None
    guidance: float | None = None


@dataclass(frozen=True)
class Pass:
    """One run of the model.

    row       [loras] factor of each LoRA in this pass (the user's weight times what the method does with it), or a
              gate: a callable `gate(path, x) -> row` that every adapted layer asks
    mix       the pass's share of the prediction; None means 1 / passes. May be negative
    text      which prompt encoding the pass runs on: "own" (that of its row) or "base" (no LoRA in the text encoder)
    negative  factor on the row in the negative (unconditional) half; without one the row acts everywhere
    """

    row: Sequence[float] | Any
    mix: float | None = None
    text: str = "own"
    negative: float = 1.0


def one_hot(weights: Sequence[float], index: int) -> tuple[float, ...]:
    """[loras] the user's weight at `index`, zero elsewhere."""
    return tuple(w if i == index else 0.0 for i, w in enumerate(weights))


def instead(plan: Any, watched: Any) -> Any:
    """`watched` with what `plan` carries, to stand in its place."""
    for name in ("combine", "explains"):
        if getattr(plan, name, None) is not None:
            setattr(watched, name, getattr(plan, name))
    return watched


def shares(passes: Sequence[Pass]) -> list[float]:
    """[passes] the mix of each pass, with 1 / passes where it gave none."""
    return [1.0 / len(passes) if p.mix is None else float(p.mix) for p in passes]
