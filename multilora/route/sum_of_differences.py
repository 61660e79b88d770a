"""Sum of differences: prediction = base + sum_i s (e_i - base), the update of every LoRA added in prediction space.

Our own: Composite gives each LoRA 1/k of its effect; this keeps all of it without mixing weights, for k + 1 passes.
With one LoRA it is AutoLoRA's guidance (arXiv 2410.03941) at strength s.
"""

from typing import Annotated

from multilora.method import Opt, method
from multilora.plan import Moment, Pass, one_hot


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
):
    """A base pass at 1 - k * strength and k one-hot passes at strength.

    With one LoRA at strength 1 the base pass has share 0 and is left out.
    """
    k = len(loras)

    def plan(moment: Moment) -> list[Pass]:
        own = [Pass(one_hot(moment.weights, i), mix=strength) for i in range(k)]
        share = 1.0 - k * strength
        return own if share == 0.0 else [Pass((0.0,) * k, mix=share), *own]

    return plan
