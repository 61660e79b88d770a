"""LoRA Switch: one LoRA at a time, in turn over the steps (arXiv 2402.16843, equation 4)."""

from typing import Annotated, Literal

from multilora.method import Opt, method
from multilora.plan import Moment, Pass, one_hot


@method(
    title="One LoRA per step, in turn: no interference, each LoRA gets 1/k of the steps",
    paper="https://arxiv.org/abs/2402.16843",
    cost="1",
    laws=("single", "zero", "gauge"),
)
def switch(
    loras,
    *,
    every: Annotated[int, Opt("steps that a LoRA stays before the next one takes over", minimum=1)] = 5,
    schedule: Annotated[
        Literal["paper", "reference"], Opt("the paper's formula, or its published code, which is one step later")
    ] = "paper",
    compensate: Annotated[
        float, Opt("weights times k ** compensate: 1 gives back what turns take, 0 nothing", minimum=0.0, maximum=1.0)
    ] = 0.0,
):
    """A moving one-hot row.

    A LoRA that has one of k turns keeps about 1/k of its effect; `compensate` (ours, not the paper's) makes up for it
    in the weight: times k at 1, sqrt(k) at 0.5. Layers bear about 2.5 (multilora.strength).

    With fewer than k * every steps, `every` shrinks to steps // k so that each LoRA has a turn. Raises ValueError at
    the first step when there are fewer steps than LoRAs.
    """
    k = len(loras)

    def plan(moment: Moment) -> list[Pass]:
        if moment.steps < k:
            raise ValueError(
                f"switch needs at least one step per LoRA: {moment.steps} steps for {k} LoRAs. "
                "Use more steps, or method 'composite', which runs every LoRA at every step."
            )
        stay = min(every, moment.steps // k)
        # The published callback fires after step i when i > 0 and i % every == 0: the first LoRA runs one step more.
        step = moment.step if schedule == "paper" else max(0, moment.step - 1)
        weights = tuple(w * k**compensate for w in moment.weights)
        return [Pass(one_hot(weights, step // stay % k))]

    return plan
