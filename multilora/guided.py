"""LoRAs held back in the negative half of guidance, so that guidance enlarges what they change: how far.

    prediction = e_n + g (e_p - e_n),   e_p with the LoRAs at their weights,   e_n with n times these
    n = (g - f) / (g - 1) within 0..1,  f = 1 + boost (1 - 1/k)

A change that is the same in both halves counts g - (g - 1) n = f times, at any scale g of the guidance: k LoRAs that
weaken each other in one run get their strength back, and one LoRA stays what it is. Larger weights would do the same
to the prediction, but push the layers further into each other. n = 1 is guidance as ever, which takes back g - 1 times
what the LoRAs change in the negative half. Autoguidance (arXiv 2406.02507) is a relative: there too the negative
prediction is of a model that knows less.
"""

from __future__ import annotations

from multilora.plan import Moment

UNKNOWN = 4.0  # guidance where a pipeline does not say (true_cfg_scale of FLUX.1 and Qwen-Image); Qwen-Image's own


def share(moment: Moment, boost: float) -> float:
    """n above for the LoRAs whose weight is not 0; 1 without guidance."""
    scale = UNKNOWN if moment.guidance is None else moment.guidance
    if scale <= 1.0:
        return 1.0
    factor = 1.0 + boost * (1.0 - 1.0 / max(sum(w != 0.0 for w in moment.weights), 1))
    return min(max((scale - factor) / (scale - 1.0), 0.0), 1.0)
