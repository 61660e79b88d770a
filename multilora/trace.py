"""What a plan did, step by step, for those who want to see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from multilora.lora import Lora
from multilora.method import Bound
from multilora.plan import Moment, Pass, instead, shares


@dataclass(frozen=True)
class Seen:
    """One call of a plan: the step, the users' weights [loras] at it, and the passes that it asked for."""

    step: int
    steps: int
    weights: tuple[float, ...]
    passes: tuple[Pass, ...]

    @property
    def effects(self) -> tuple[float, ...] | None:
        """[loras] weight of each LoRA in each pass times the pass's share, summed; None where a gate decides."""
        if any(callable(p.row) for p in self.passes):
            return None
        mix = shares(self.passes)
        return tuple(
            sum(m * p.row[i] for p, m in zip(self.passes, mix, strict=True)) for i in range(len(self.weights))
        )


def traced(bound: Bound) -> tuple[Bound, list[list[Seen]]]:
    """The same method, and the list that fills with what each of its plans does; a plan is one picture."""
    record = bound.record
    runs: list[list[Seen]] = []

    def plan_of(loras: Sequence[Lora], **options: Any) -> Any:
        plan, seen = record.fn(loras, **options), []
        runs.append(seen)

        def watched(moment: Moment) -> list[Pass]:
            passes = plan(moment)
            seen.append(Seen(moment.step, moment.steps, moment.weights, tuple(passes)))
            return passes

        return instead(plan, watched)

    return Bound(dataclasses.replace(record, fn=plan_of), bound.options), runs


def by_step(seen: Sequence[Seen]) -> list[Seen]:
    """The first call of each step, in order; samplers of second order and separate negative calls have more."""
    found: dict[int, Seen] = {}
    for one in seen:
        found.setdefault(one.step, one)
    return [found[step] for step in sorted(found)]
