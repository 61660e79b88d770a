"""Balanced weights: in the merge, every LoRA keeps the same share of its own effect. Our own; no score, no gradient.

    r_i = <e - e_0, d_i> / <d_i, d_i>        d_i = e_i - e_0
    w_i <- w_i (m / r_i)^power, then all times one factor that keeps their mean       m = (prod_i r_i)^(1/k)

e is the prediction with all LoRAs at the weights w, e_0 the base's and e_i that of LoRA i alone at weight 1. LoRAs in
one pass weaken each other, and not evenly: at equal weights one may keep all of its effect and another next to
nothing. What a LoRA keeps grows with its own weight and falls with the others', so a few rounds settle it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from multilora.chosen import Chosen, Enough, Trial, answers_of, checked_set, name_of
from multilora.lora import Lora
from multilora.method import Opt, method

LEAST, MOST = 0.05, 4.0  # of r_i in a step: an effect that is turned round or many times as large says no more
LOW, HIGH = 0.2, 2.5  # of a weight, as a share of the mean


@method(
    title="Weights at which every LoRA keeps the same share of its own effect; no score needed",
    paper="multilora",
    cost="rounds measurements of k + 2 runs of the model a step",
)
def balanced(
    loras: Sequence[Lora],
    objective: Any,
    *,
    rounds: Annotated[int, Opt("weights to measure, one after the other", 1, 1000)] = 5,
    mean: Annotated[float, Opt("of the weights", 0.01, 10)] = 1.0,
    power: Annotated[float, Opt("how far a round goes; 1 all the way", 0.01, 1)] = 0.5,
    close: Annotated[
        float, Opt("end when every LoRA's share is as near as this to the middle one, 0.1 is 10%", 0, 10)
    ] = 0.05,
) -> Chosen:
    """The most even of the weights that were measured, the first of which are all `mean`.

    objective  (loras, rows) -> [k] shares r_i per row: multilora.lab.objectives_kept has them for pipelines and for
               language models. A trial's loss is max_i |ln(r_i / m)|, and at least -ln(0.05) where a LoRA keeps less
               than 0.05 or is turned round: such weights are never taken for even ones
    mean       weights are within 0.2 and 2.5 of it

    Raises ValueError naming the LoRA where a share is no number (it changes nothing where it was measured).
    """
    loras = checked_set(loras, "balanced")
    weights, trials, ended = [float(mean)] * len(loras), [], "budget"
    for _ in range(rounds):
        try:
            kept = _shares(answers_of(objective, loras, [tuple(weights)])[0], loras, objective)
        except Enough:
            if not trials:
                raise
            ended = "stopped"
            break
        floored = [max(r, LEAST) for r in kept]
        middle = math.exp(math.fsum(map(math.log, floored)) / len(kept))
        lost = -math.log(LEAST) if min(kept) < LEAST else 0.0
        trials.append(Trial(tuple(weights), max(lost, *(abs(math.log(r / middle)) for r in floored))))
        if trials[-1].loss <= math.log1p(close):
            ended = f"converged: every LoRA keeps {middle:.2f} of its effect, within {close:.0%}"
            break
        wanted = [w * (middle / min(r, MOST)) ** power for w, r in zip(weights, floored, strict=True)]
        weights = _scaled(wanted, float(mean))
    best = min(trials, key=lambda trial: trial.loss)
    return Chosen(best.weights, trials, best, ended)


def _scaled(weights: Sequence[float], mean: float) -> list[float]:
    """All times one factor, cut to LOW and HIGH of the mean, so that the mean is `mean`: the factor by bisection."""

    def cut(factor: float) -> list[float]:
        return [min(max(w * factor, LOW * mean), HIGH * mean) for w in weights]

    low, high = LOW * mean / max(weights), HIGH * mean / min(weights)  # all at LOW, all at HIGH
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(cut(middle)) < mean * len(weights) else (low, middle)
    return cut(high)


def _shares(found: Any, loras: Sequence[Lora], objective: Any) -> list[float]:
    """[k] what each keeps."""
    try:
        kept = [float(r) for r in found]
    except (TypeError, ValueError):
        kept = []
    if len(kept) != len(loras):
        raise ValueError(f"balanced: {name_of(objective)!r} returned {found!r:.80}, wanted a share of its effect for "
                         f"each of {len(loras)} LoRAs (multilora.lab.objectives_kept)")  # fmt: skip
    for i, r in enumerate(kept):
        if not math.isfinite(r):
            name = loras[i].card.name or f"number {i + 1}"
            raise ValueError(f"balanced: LoRA {name!r} changes nothing where it was measured ({r}): give prompts with "
                             "its trigger words")  # fmt: skip
    return kept
