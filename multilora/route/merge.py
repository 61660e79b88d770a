"""Merge: every LoRA at its weight in one pass, W' = W + sum_i w_i up_i down_i (arXiv 2402.16843, section 3)."""

from multilora.method import method
from multilora.plan import Moment, Pass


@method(
    title="All LoRAs at once in one pass: full strength, but they interfere in the weights",
    paper="https://arxiv.org/abs/2402.16843",
    cost="1",
    laws=("single", "zero", "gauge", "permutation", "mean_of_equals", "linear"),
)
def merge(loras):
    """One pass with `row = weights`."""

    def plan(moment: Moment) -> list[Pass]:
        return [Pass(moment.weights)]

    return plan
