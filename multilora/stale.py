"""Sums of the LoRAs' changes that are not all run anew at each step: what the stale route methods share.

    prediction = base + sum_i s_i d_i       d_i = e_i - base, the change that LoRA i alone makes to the prediction

The first step runs the base and every LoRA. After it a step runs `rows` of them, and every d_i that is not run anew
comes from when it last was, carried on along its last trend:

    d_i(n) = d_i(m) + extrapolate (n - m) (d_i(m) - d_i(l)) / (m - l)         l < m < n, the last two measurements

The LoRAs take turns, and the base has one after every three of them. A step without it has base = the mean of
e_i - d_i over the LoRAs that it runs, with the d_i carried on; what d_i was at that step is settled when the base is
next known, on a straight line between its two neighbours. A change is taken as proportional to the user's weight, so
that weights may follow a schedule; a LoRA that comes in later is run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from multilora.plan import Moment, Pass, one_hot
from multilora.predictions import each, mean, shapes

BASE = -1
# LoRAs that are run between two runs of the base, all of them where there are fewer. On recorded runs over three and
# five LoRAs of the embedded world's train split, two rows a step with the base after one, two, three, five or seven
# LoRAs: three is best or second in each, with a third to a half less error than the base in every step. Running the
# LoRA whose change moves most, in place of turns, gained nothing; neither did, at the same number of runs over four
# and five LoRAs, more rows early (all of them in the first tenth), more rows late, or the merge of all LoRAs in every
# step with its distance from the sum kept between steps that run everything.
BETWEEN = 3


@dataclass
class _Change:
    """The change of one LoRA at the step of its last measurement, with its trend per step, at that step's weight."""

    step: int
    value: Any
    weight: float
    trend: Any = None

    def measured(self, step: int, value: Any, weight: float) -> _Change:
        steps, scale = step - self.step, weight / self.weight
        trend = each(lambda new, old: (new - old * scale) / steps, value, self.value) if steps > 0 else None
        return _Change(step, value, weight, trend)

    def at(self, step: int, weight: float, extrapolate: float) -> Any:
        scale, ahead = weight / self.weight, extrapolate * (step - self.step)
        if self.trend is None or not ahead:
            return each(lambda v: v * scale, self.value)
        return each(lambda v, t: (v + t * ahead) * scale, self.value, self.trend)


@dataclass
class _Slot:
    """What is known between the steps of one call: solvers of second order and separate halves call more than once."""

    changes: dict[int, _Change] = field(default_factory=dict)
    base: tuple[int, Any] | None = None
    waiting: list[tuple[int, int, Any, float]] = field(default_factory=list)  # LoRA, step, prediction, weight
    turns: int = 0  # of LoRAs since the base was last run
    ran: dict[int, int] = field(default_factory=dict)  # LoRA -> how many runs of LoRAs came before its last one
    runs: int = 0
    asked: list[int] = field(default_factory=list)


def stale(
    k: int, strengths: Callable[[Moment], Sequence[float]], rows: int, extrapolate: float, exact: float = 0.0
) -> Any:
    """A plan for k LoRAs at strengths(moment) [k] with `rows` runs a step; see the module's docstring.

    exact  share of the steps, the first ones, that run everything; the very first one always does

    Where predictions change their shape in a run (Z-Image drops the negative half late), that one step has only the
    changes that it ran itself, and the next runs all anew.
    """
    slots: dict[int, _Slot] = {}
    where = [-1, -1]  # the step, and how many calls it had before this one

    def plan(moment: Moment) -> list[Pass]:
        where[:] = [moment.step, where[1] + 1 if where[0] == moment.step else 0]
        slot = slots.setdefault(where[1], _Slot())
        live = [i for i, w in enumerate(moment.weights) if w]
        slot.asked = _asked(slot, live, rows, moment.step < round(exact * moment.steps))
        found = strengths(moment)
        share = 1.0 - sum(found[i] for i in slot.asked if i != BASE)
        passes = [
            Pass((0.0,) * k, mix=share) if i == BASE else Pass(one_hot(moment.weights, i), mix=found[i])
            for i in slot.asked
        ]
        return passes if BASE in slot.asked else [Pass(p.row) for p in passes]

    def combine(outputs: Sequence[Any], moment: Moment) -> Any:
        slot = slots[where[1]]
        if slot.base is not None and shapes(slot.base[1]) != shapes(outputs[0]):
            slots[where[1]] = _Slot()
            slot.changes.clear()
            slot.waiting.clear()
        return _combined(slot, outputs, moment, strengths(moment), extrapolate)

    plan.combine = combine
    return plan


def _asked(slot: _Slot, live: Sequence[int], rows: int, everything: bool) -> list[int]:
    """What a step runs: BASE and numbers of LoRAs."""
    new = [i for i in live if everything or i not in slot.changes]
    if new or not live:
        slot.turns = 0
        _ran(slot, new)
        return [BASE, *new]
    asked: list[int] = []
    while len(asked) < min(rows, len(live) + 1):
        left = [i for i in live if i not in asked]
        if BASE not in asked and (not left or slot.turns >= min(BETWEEN, len(live))):
            asked.insert(0, BASE)
            slot.turns = 0
        else:  # whose turn it is goes by when each was run last, so that LoRAs may come and go
            asked.append(min(left, key=lambda i: (slot.ran.get(i, -1), i)))
            _ran(slot, asked[-1:])
            slot.turns += 1
    return asked


def _ran(slot: _Slot, loras: Sequence[int]) -> None:
    for i in loras:
        slot.ran[i] = slot.runs
        slot.runs += 1


def _combined(
    slot: _Slot, outputs: Sequence[Any], moment: Moment, strengths: Sequence[float], extrapolate: float
) -> Any:
    step, weights = moment.step, moment.weights
    own = dict(zip(slot.asked, outputs, strict=True))
    base = own.pop(BASE, None)
    whole = base is not None
    if whole:
        _settle(slot, step, base)
        slot.base = (step, _kept(base))
    elif any(i not in slot.changes for i in own):  # the shape has changed and nothing is known
        return outputs[0]
    else:
        guesses = [_minus(e, slot.changes[i].at(step, weights[i], extrapolate)) for i, e in own.items()]
        base = mean(guesses, [1.0 / len(guesses)] * len(guesses))
        slot.waiting += [(i, step, _kept(e), weights[i]) for i, e in own.items()]
    changes = {i: _minus(e, base) for i, e in own.items()}
    if whole:
        for i, change in changes.items():
            _measure(slot, i, step, change, weights[i])
    for i, known in slot.changes.items():
        if i not in changes and weights[i]:
            changes[i] = known.at(step, weights[i], extrapolate)
    return mean([base, *changes.values()], [1.0, *(strengths[i] for i in changes)])


def _minus(a: Any, b: Any) -> Any:
    return each(lambda x, y: x - y, a, b)


def _kept(prediction: Any) -> Any:
    """A copy: a compiled model may write its next output into the same memory."""
    return each(lambda p: p.clone(), prediction)


def _settle(slot: _Slot, step: int, base: Any) -> None:
    """Measure the LoRAs that ran without the base since it was last known."""
    for i, at, prediction, weight in slot.waiting:
        before, old = slot.base
        share = (at - before) / (step - before)
        change = each(lambda e, a, b, f=share: e - (a + (b - a) * f), prediction, old, base)
        _measure(slot, i, at, change, weight)
    slot.waiting.clear()


def _measure(slot: _Slot, i: int, step: int, value: Any, weight: float) -> None:
    known = slot.changes.get(i)
    slot.changes[i] = _Change(step, value, weight) if known is None else known.measured(step, value, weight)
