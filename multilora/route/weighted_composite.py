"""W-Composite: Composite with shares by the influence of the LoRAs' trigger words (arXiv 2606.03792).

prediction = sum_i s_i e_i with s_i the influence by "triggers" (multilora.influence), as the paper's code has it. As
in Composite, raw predictions are averaged, conditional and unconditional each.
"""

from typing import Annotated, Literal

from multilora.influence import influence
from multilora.method import Opt, method
from multilora.plan import Moment, Pass, one_hot


@method(
    title="One pass per LoRA, averaged by how much its trigger words say in the prompt",
    paper="https://arxiv.org/abs/2606.03792",
    cost="k",
    laws=("single", "zero", "gauge", "permutation"),
)
def weighted_composite(
    loras,
    *,
    by: Annotated[
        Literal["triggers", "ablation"],
        Opt("influence: similarity of prompt and trigger words (the paper's), or the change without them"),
    ] = "triggers",
):
    """k one-hot passes; LoRA i at the user's weight has the share s_i of the prediction.

    The shares hold for the whole picture. A LoRA without trigger words in the prompt gets the mean share, with a
    warning.
    """
    shares: list[float] = []

    def plan(moment: Moment) -> list[Pass]:
        if not shares:
            shares.extend(influence(moment.cards, moment.text, by=by))
        return [Pass(one_hot(moment.weights, i), mix=share) for i, share in enumerate(shares)]

    return plan
