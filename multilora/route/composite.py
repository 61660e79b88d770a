"""LoRA Composite: one pass per LoRA, predictions averaged (arXiv 2402.16843, equation 5).

The average is taken over raw predictions, conditional and unconditional each, before the pipeline's guidance. Where
guidance is linear that equals the paper's mean of guided predictions; with guidance rescale or other guiders this
order is our definition.
"""

from typing import Annotated, Literal

from multilora.method import Opt, method
from multilora.plan import Moment, Pass, one_hot


@method(
    title="One pass per LoRA, predictions averaged: clean blends, each LoRA has 1/k of its effect",
    paper="https://arxiv.org/abs/2402.16843",
    cost="k",
    laws=("single", "zero", "gauge", "permutation", "linear"),
)
def composite(
    loras,
    *,
    mix: Annotated[
        Literal["mean", "paper"],
        Opt("mean: the weight scales the LoRA in its pass; paper: LoRAs at 1, the weight scales the prediction"),
    ] = "mean",
):
    """k one-hot passes; shares 1/k, or w_i / k with mix="paper"."""
    k = len(loras)

    def plan(moment: Moment) -> list[Pass]:
        if mix == "paper":
            ones = (1.0,) * k
            return [Pass(one_hot(ones, i), mix=w / k) for i, w in enumerate(moment.weights)]
        return [Pass(one_hot(moment.weights, i)) for i in range(k)]

    return plan
