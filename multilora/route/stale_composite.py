"""Composite with few runs a step: the LoRAs' changes are reused between the steps that run them.

The mean of k predictions is base + sum_i (e_i - base) / k, a sum of differences at strength 1/k (Composite: arXiv
2402.16843); multilora.stale says how the changes are reused. The cost does not grow with the number of LoRAs. The
first step runs all k + 1.
"""

from typing import Annotated

from multilora.method import Opt, method
from multilora.route.composite import composite
from multilora.stale import stale


@method(
    title="Composite with most of its changes reused from earlier steps: the same cost for any number of LoRAs",
    paper="multilora",
    cost="rows",
    laws=("single", "zero", "gauge"),
)
def stale_composite(
    loras,
    *,
    rows: Annotated[int, Opt("runs of the model a step, after the first one", minimum=1)] = 2,
    extrapolate: Annotated[
        float, Opt("how far a reused change follows its last trend: 0 not at all, 1 all the way", 0.0, 1.0)
    ] = 0.75,
    exact: Annotated[float, Opt("share of the steps, the first ones, that run everything", 0.0, 1.0)] = 0.0,
):
    """Composite itself where `rows` pays for all of it."""
    k = len(loras)
    if rows >= k:
        return composite(loras)
    return stale(k, lambda moment: (1.0 / k,) * k, rows, extrapolate, exact)
