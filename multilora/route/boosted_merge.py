"""Boosted merge: prediction = base + f (merged - base), all LoRAs at once and their common change made larger.

The guidance of AutoLoRA (arXiv 2410.03941), there for one LoRA, on the merge of several. LoRAs in one pass weaken each
other, the more of them the more: f = 1 + boost (1 - 1/k), so that one LoRA stays what it is. Unlike larger weights it
does not push the layers further than the merge does.
"""

from typing import Annotated

from multilora.method import Opt, method
from multilora.plan import Moment, Pass


@method(
    title="All LoRAs at once, and the change that they make to the prediction enlarged",
    paper="https://arxiv.org/abs/2410.03941",
    cost="2",
    laws=("single", "zero", "gauge", "permutation"),
)
def boosted_merge(
    loras,
    *,
    boost: Annotated[float, Opt("how much larger, for many LoRAs; 0 is merge", minimum=0.0, maximum=3.0)] = 0.5,
):
    """A base pass at 1 - f and a pass of all LoRAs at f; one pass where f is 1."""
    k = len(loras)
    factor = 1.0 + boost * (1.0 - 1.0 / max(k, 1))

    def plan(moment: Moment) -> list[Pass]:
        if factor == 1.0:
            return [Pass(moment.weights)]
        return [Pass((0.0,) * k, mix=1.0 - factor), Pass(moment.weights, mix=factor)]

    return plan
