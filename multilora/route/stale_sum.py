"""Sum of differences with few runs a step: the LoRAs' changes are reused between the steps that run them.

Our own; multilora.stale says how. The cost does not grow with the number of LoRAs. The first step runs all k + 1.
"""

from typing import Annotated

from multilora.method import Opt, method
from multilora.plan import Moment
from multilora.route.sum_of_differences import factors_of, sum_of_differences
from multilora.stale import stale


@method(
    title="Sum of differences with most of them reused from earlier steps: the same cost for any number of LoRAs",
    paper="multilora",
    cost="rows",
    laws=("single", "zero", "gauge"),
)
def stale_sum(
    loras,
    *,
    rows: Annotated[int, Opt("runs of the model a step, after the first one", minimum=1)] = 2,
    extrapolate: Annotated[
        float, Opt("how far a reused change follows its last trend: 0 not at all, 1 all the way", 0.0, 1.0)
    ] = 0.75,
    exact: Annotated[float, Opt("share of the steps, the first ones, that run everything", 0.0, 1.0)] = 0.0,
    strength: Annotated[float, Opt("factor on every difference", minimum=0.0, maximum=4.0)] = 1.0,
    strengths: Annotated[str, Opt("more factors, by LoRA and over the steps, as in sum_of_differences")] = "",
):
    """Sum of differences itself where `rows` pays for all of it, and with one LoRA."""
    if len(loras) == 1 or rows > len(loras):
        return sum_of_differences(loras, strength=strength, strengths=strengths)
    factors = factors_of(loras, strengths)

    def at(moment: Moment) -> list[float]:
        return [strength * f.at(moment.step, moment.steps, moment.sigma) for f in factors]

    return stale(len(loras), at, rows, extrapolate, exact)
