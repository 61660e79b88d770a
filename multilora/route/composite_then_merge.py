"""Composite early, Merge late: predictions settle the layout, merged weights draw the details.

Our own, from two facts about the methods of arXiv 2402.16843: one pass per LoRA keeps LoRAs apart and each of them
weak, one pass with all of them is strong and mixes them. Early steps decide what is where, late ones how it looks.
"""

from typing import Annotated, Literal

from multilora.method import Opt, method
from multilora.plan import Moment, Pass
from multilora.route.composite import composite
from multilora.route.merge import merge
from multilora.route.sum_of_differences import sum_of_differences


@method(
    title="One pass per LoRA in the early steps, all at once in the late ones",
    paper="multilora",
    cost="1 + crossover (k - 1)",
    laws=("single", "zero", "gauge", "permutation"),
)
def composite_then_merge(
    loras,
    *,
    crossover: Annotated[float, Opt("share of the steps, the first ones, with a pass per LoRA", 0.0, 1.0)] = 0.4,
    early: Annotated[
        Literal["composite", "sum_of_differences"],
        Opt("what the early steps do: average predictions, or add the LoRAs' changes up (one pass more)"),
    ] = "composite",
):
    """Method `early` for the first round(crossover * steps) steps, then Merge."""
    first = (composite if early == "composite" else sum_of_differences)(loras)
    then = merge(loras)

    def plan(moment: Moment) -> list[Pass]:
        return (first if moment.step < round(crossover * moment.steps) else then)(moment)

    return plan
