"""Guided merge: the LoRAs act less on the negative half, so that guidance enlarges what they change; our own.

    prediction = e_n + g (e_p - e_n),   e_p under sum_i w_i delta_i,   e_n under n sum_i w_i delta_i
    n = (g - f) / (g - 1) within 0..1,  f = 1 + boost (1 - 1/k), k LoRAs whose weight is not 0

A change that is the same in both halves counts g - (g - 1) n = f times, at any scale g of the guidance: LoRAs that
weaken each other in one pass get their strength back, and one LoRA stays what it is. Larger weights would do the same
to the prediction, but push the layers into each other further. Guidance as ever has n = 1 and takes back g - 1 times
what the LoRAs change in the negative half. Its price is nothing: one run a step, as Merge.
"""

from typing import Annotated

from multilora.method import Opt, method
from multilora.plan import Moment, Pass

UNKNOWN = 4.0  # guidance where a pipeline does not say; Qwen-Image's own


@method(
    title="All LoRAs at once, held back in the negative half: guidance gives each its strength back, at no cost",
    paper="multilora",
    cost="1",
    laws=("single", "zero", "gauge", "permutation"),
)
def guided_merge(
    loras,
    *,
    boost: Annotated[
        float, Opt("how much larger a change counts, for many LoRAs; 0 is merge", minimum=0.0, maximum=3.0)
    ] = 1.25,
):
    """One pass with `row = weights`, and n times that in the negative half.

    Without guidance there is no negative half and this is merge. Where a pipeline has one and does not say its scale
    (true_cfg_scale of FLUX.1 and Qwen-Image), 4 is taken.
    """

    def plan(moment: Moment) -> list[Pass]:
        factor = 1.0 + boost * (1.0 - 1.0 / max(sum(w != 0.0 for w in moment.weights), 1))
        scale = UNKNOWN if moment.guidance is None else moment.guidance
        share = 1.0 if scale <= 1.0 else min(max((scale - factor) / (scale - 1.0), 0.0), 1.0)
        return [Pass(moment.weights, negative=share)]

    return plan
