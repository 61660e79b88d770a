"""CMLoRA's turns: one LoRA dominates each step, backgrounds in the late steps (arXiv 2502.04923).

    share of the dominant LoRA  (k - 1/2) / (2k - 3/2),   of every other one  1 / (2k - 3/2)

They sum to 1. The paper finds that some LoRAs act on high frequencies and some on low ones, and lets styles,
characters, clothes and objects lead early and backgrounds late. Its published code differs from that in many places (a
decay of the weights that is never applied, a step number that does not follow the number of steps, caches that are
never used); this follows the paper. Without its feature caches: the others are run in full, so that a step costs k.
"""

from typing import Annotated

from multilora.method import Opt, method
from multilora.plan import Moment, Pass, one_hot

LATE = ("background",)


@method(
    title="One pass per LoRA, averaged; each step one LoRA leads: backgrounds late, all others early",
    paper="https://arxiv.org/abs/2502.04923",
    cost="k",
    laws=("single", "zero", "gauge"),
)
def cmlora(
    loras,
    *,
    every: Annotated[int, Opt("steps that a LoRA leads before the next one does", minimum=1)] = 1,
    turn: Annotated[float, Opt("share of the steps after which the late LoRAs lead", 0.0, 1.0)] = 0.5,
):
    """k one-hot passes at the shares above.

    A LoRA whose card says "background" is a late one, all others are early ones, each group in the set's order. Where
    one of the groups is empty the other leads throughout.
    """
    k = len(loras)

    def plan(moment: Moment) -> list[Pass]:
        late = [i for i, card in enumerate(moment.cards) if card and card.category in LATE]
        early = [i for i in range(k) if i not in late]
        first = round(turn * moment.steps)
        ahead = moment.step < first
        group, step = (early, moment.step) if ahead and early else (late, moment.step - first)
        if not group or not early:
            group, step = early or late, moment.step
        leads = group[step // every % len(group)]
        return [
            Pass(one_hot(moment.weights, i), mix=(k - 0.5 if i == leads else 1.0) / (2 * k - 1.5)) for i in range(k)
        ]

    return plan
