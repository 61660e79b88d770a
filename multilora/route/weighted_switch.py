"""W-Switch: Switch with turns as long as the influence of the LoRAs' trigger words (arXiv 2606.03792).

A turn of LoRA i has max(1, round(every * s_i / max_j s_j)) steps, with s_i the influence by "ablation"
(multilora.influence); turns follow each other in the order of the LoRAs, again and again. The last steps belong to the
LoRA of the category "character", where there is one: the paper's code gives it 5 of 100.
"""

from typing import Annotated, Literal

from multilora.influence import influence
from multilora.method import Opt, method
from multilora.plan import Moment, Pass, one_hot


@method(
    title="One LoRA per step, turns as long as its trigger words say much in the prompt",
    paper="https://arxiv.org/abs/2606.03792",
    cost="1",
    laws=("single", "zero", "gauge"),
)
def weighted_switch(
    loras,
    *,
    every: Annotated[int, Opt("steps of a turn of the LoRA with the most influence", minimum=1)] = 5,
    tail: Annotated[
        float, Opt("share of the steps, the last ones, that a character LoRA runs alone", minimum=0.0, maximum=1.0)
    ] = 0.05,
    by: Annotated[
        Literal["ablation", "triggers"],
        Opt("influence: change of the prompt without the trigger words (the paper's), or similarity to them"),
    ] = "ablation",
):
    """A moving one-hot row.

    With too few steps for a turn of every LoRA, `every` shrinks until all turns fit, and the tail first of all. Raises
    ValueError at the first step when there are fewer steps than LoRAs. A LoRA without trigger words in the prompt gets
    the mean influence, with a warning.
    """
    order: list[int] = []

    def plan(moment: Moment) -> list[Pass]:
        if not order:
            order.extend(turns(influence(moment.cards, moment.text, by=by), moment, every, tail))
        return [Pass(one_hot(moment.weights, order[min(moment.step, len(order) - 1)]))]

    return plan


def turns(shares: list[float], moment: Moment, every: int, tail: float) -> list[int]:
    """[steps] the LoRA of each step."""
    k, steps = len(shares), moment.steps
    if steps < k:
        raise ValueError(
            f"weighted_switch needs at least one step per LoRA: {steps} steps for {k} LoRAs. Use more steps, or "
            "method 'weighted_composite', which runs every LoRA at every step."
        )
    character = next((i for i, card in enumerate(moment.cards) if card and card.category == "character"), None)
    last = 0 if character is None else min(round(tail * steps), steps - k)
    for stay in range(every, 0, -1):
        lengths = [max(1, round(stay * share / max(shares))) for share in shares]
        if sum(lengths) <= steps - last:
            break
    cycle = [i for i, length in enumerate(lengths) for _ in range(length)]
    body = [cycle[step % len(cycle)] for step in range(steps - last)]
    return body + [character] * last
