"""Sum of differences: prediction = base + sum_i s_i (e_i - base), the update of every LoRA added in prediction space.

Our own: Composite gives each LoRA 1/k of its effect; this keeps all of it without mixing weights, for k + 1 passes.
With one LoRA it is AutoLoRA's guidance (arXiv 2410.03941) at strength s. Raw predictions are combined, conditional and
unconditional each; where guidance is linear that equals the same sum of guided predictions, so there is no choice of
before or after guidance to make. To leave the unconditional half alone, set `positive_only` on the LoRAs.
"""

from typing import Annotated

from multilora.method import Opt, method
from multilora.plan import Moment, Pass, one_hot
from multilora.predictions import each, mean, norms
from multilora.schedule import Schedule


@method(
    title="Base plus every LoRA's own change of the prediction: full effect, no interference in the weights",
    paper="multilora",
    cost="k + 1",
    laws=("single", "zero", "gauge", "permutation", "linear"),
)
def sum_of_differences(
    loras,
    *,
    strength: Annotated[float, Opt("factor on every difference", minimum=0.0, maximum=4.0)] = 1.0,
    strengths: Annotated[
        str, Opt("more factors, by LoRA and over the steps: '0.8', 'fox=1.2 | robe=1@0,0.5@1'; none: 1 for all")
    ] = "",
    guard: Annotated[
        float, Opt("most that the sum of changes may measure, 1: as unrelated changes would; 0: no limit", minimum=0.0)
    ] = 0.0,
):
    """A base pass at 1 - sum s_i and a one-hot pass at s_i for each LoRA with s_i other than 0.

    strengths  entries joined by |, each a schedule (multilora.schedule) for all LoRAs or NAME=schedule for one of
               them; a later entry replaces an earlier one. Multiplied by `strength`
    guard      the sum D of the differences d_i = s_i (e_i - base) is scaled down, sample by sample, to
               ||D|| <= guard sqrt(sum_i ||d_i||^2). Unrelated differences meet guard=1 as they are; what all LoRAs
               have in common, and the sum would count k times, does not

    With one LoRA there is nothing to guard, and at strength 1 the base pass has share 0 and is left out. Raises
    ValueError for a strength that is no schedule and for the name of no LoRA of the set.
    """
    k = len(loras)
    factors = factors_of(loras, strengths)

    def plan(moment: Moment) -> list[Pass]:
        found = [strength * f.at(moment.step, moment.steps, moment.sigma) for f in factors]
        own = [Pass(one_hot(moment.weights, i), mix=s) for i, s in enumerate(found) if s]
        share = 1.0 - sum(found)
        guarded = guard and k > 1
        return own if share == 0.0 and own and not guarded else [Pass((0.0,) * k, mix=share), *own]

    def combine(outputs, moment: Moment):
        found = [strength * f.at(moment.step, moment.steps, moment.sigma) for f in factors]
        return guarded_sum(outputs[0], outputs[1:], [s for s in found if s], guard)

    if guard and k > 1:
        plan.combine = combine
    return plan


def guarded_sum(base, own, strengths, guard: float):
    """base + D min(1, guard sqrt(sum_i ||d_i||^2) / ||D||) with d_i = s_i (e_i - base), D their sum, per sample."""
    if not own:
        return base
    changes = [each(lambda e, b, s=s: s * (e - b), e, base) for e, s in zip(own, strengths, strict=True)]
    whole = mean(changes, [1.0] * len(changes))
    squares = mean([each(lambda n: n * n, norms(c)) for c in changes], [1.0] * len(changes))
    # A sum that is 0 needs no limit, and has no direction.
    factor = each(lambda q, n: (guard * q.sqrt() / n.clamp(min=1e-30)).clamp(max=1.0), squares, norms(whole))
    return each(lambda b, d, f: b + d * f.to(d.dtype), base, whole, factor)


def factors_of(loras, text: str) -> list[Schedule]:
    """[loras] the schedule of each LoRA's strength."""
    found = [Schedule.parse(1.0)] * len(loras)
    names = [] if "=" not in text else [lora.card.name for lora in loras]
    for entry in text.split("|") if text.strip() else []:
        name, own, schedule = entry.rpartition("=")
        name = name.strip()
        if own and name not in names:
            raise ValueError(f"strengths={text!r}: no LoRA is named {name!r}; the set has {', '.join(names)}")
        read = Schedule.parse(schedule.strip())
        found = [read if not own or name == names[i] else f for i, f in enumerate(found)]
    return found
