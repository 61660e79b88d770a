"""Guided merge: all LoRAs in one pass, held back in the negative half so that guidance enlarges what they change.

Our own; multilora.guided has the formula and why. It takes no more runs of the model than Merge.
"""

from typing import Annotated

from multilora.guided import share
from multilora.method import Opt, method
from multilora.plan import Moment, Pass


@method(
    title="All LoRAs at once, held back in the negative half, so that guidance gives each its strength back",
    paper="multilora",
    cost="1",
    laws=("single", "zero", "gauge", "permutation"),
)
def guided_merge(
    loras,
    *,
    boost: Annotated[float, Opt("how much more a change counts, for many LoRAs; 0 is merge", 0.0, 3.0)] = 1.25,
):
    """One pass with `row = weights`, and a share of that in the negative half.

    Without guidance there is no negative half and this is merge. Where a pipeline has one and does not say its scale,
    4 is taken.
    """

    def plan(moment: Moment) -> list[Pass]:
        return [Pass(moment.weights, negative=share(moment, boost))]

    return plan
