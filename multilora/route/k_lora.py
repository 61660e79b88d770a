"""K-LoRA: every layer has one LoRA at each step, contents early and the style late (arXiv 2502.18461).

multilora.gate_klora has the scores and what differs from the paper and its code.
"""

from typing import Annotated

from multilora.method import Opt, method
from multilora.plan import Moment, Pass


@method(
    title="Each layer has the one LoRA with the largest entries there; a style gains over the steps",
    paper="https://arxiv.org/abs/2502.18461",
    cost="1",
    laws=("single", "zero", "gauge"),
)
def k_lora(
    loras,
    *,
    alpha: Annotated[float, Opt("how much the style's score grows over the steps", minimum=0.0)] = 1.5,
    beta: Annotated[float, Opt("factor on the style's score at the first step", minimum=0.0)] = 0.5,
):
    """One pass whose row is one-hot in every layer; the users' weights multiply it.

    The style LoRA is the first whose card says "style", else the last of the set.
    """
    from multilora.gate_klora import KLoraRouter, Sums
    from multilora.routing import Asked

    known = {}

    def plan(moment: Moment) -> list[Pass]:
        if not known:
            styles = [i for i, card in enumerate(moment.cards) if card and card.category == "style"]
            known["sums"] = Sums(loras, styles[0] if styles else len(loras) - 1)
        done = moment.step / max(moment.steps - 1, 1)
        return [Pass(Asked(KLoraRouter(known["sums"], alpha * done + beta), moment.weights, moment.t))]

    return plan
