"""Signed sums of LoRAs: addition, negation and analogies a - b + c (arXiv 2306.14870), in the space of updates."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from multilora.blocks import merged_card, weighted_sum, weights_of
from multilora.lora import Lora
from multilora.method import Opt, method

USUAL = {0: "", 1: "+", 2: "+-", 3: "+-+"}


@method(
    title="Signed sum, exact: a - b + c",
    paper="https://arxiv.org/abs/2306.14870",
    cost="1",
    laws=("single", "zero", "gauge"),
)
def analogy(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    signs: Annotated[str, Opt("one + or - per LoRA; empty: + for one, +- for two, +-+ for three")] = "",
) -> Lora:
    """sum_i sign_i w_i delta_i, exact, as one LoRA whose rank is the sum of the ranks.

    "+-+" is an analogy (what c is to b, but for a), "+-" a difference, "-" a negation, "++" an addition. The paper
    adds factors (`factor` with signed weights is its formula); this adds updates: a - a is zero, and no cross terms
    appear. Raises ValueError as `linear` does, and when signs and LoRAs do not fit.
    """
    signs = signs.replace(" ", "").replace(",", "")
    if not signs and len(loras) not in USUAL:
        raise ValueError(f"analogy: signs are wanted for {len(loras)} LoRAs, one + or - each, e.g. '+-++' for four")
    signs = signs or USUAL[len(loras)]
    if set(signs) - set("+-") or len(signs) != len(loras):
        raise ValueError(f"analogy: signs={signs!r}, wanted one + or - for each of {len(loras)} LoRAs")
    weights_of(loras, weights, name="analogy")
    signed = [w if sign == "+" else _negated(w) for w, sign in zip(weights, signs, strict=True)]
    return Lora(weighted_sum(loras, signed, name="analogy"), merged_card(loras, signed, "analogy", signs=signs))


def _negated(weight: float | Mapping[str, float]) -> float | Mapping[str, float]:
    """The weight with its sign turned; modules that no glob matches weigh 1, so they get a -1 of their own."""
    if isinstance(weight, Mapping):
        default = {} if "*" in weight else {"*": -1.0}
        return {**default, **{glob: -value for glob, value in weight.items()}}
    return -weight
