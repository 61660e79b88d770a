"""The exact weighted sum of LoRAs: W' = W + sum_i w_i up_i down_i (arXiv 2402.16843, section 3)."""

from collections.abc import Mapping, Sequence

from multilora.blocks import merged_card, weighted_sum
from multilora.lora import Lora
from multilora.method import method


@method(
    title="Weighted sum of the updates, exact: ranks are concatenated",
    paper="https://arxiv.org/abs/2402.16843",
    cost="1",
    laws=("single", "zero", "gauge", "permutation", "mean_of_equals", "linear"),
)
def linear(loras: Sequence[Lora], weights: Sequence[float | Mapping[str, float]]) -> Lora:
    """sum_i weights[i] * loras[i], as one LoRA whose rank is the sum of the ranks.

    A weight is a number or {glob: number} (multilora.blocks.weights_of). A LoRA at weight 0 is left out, a module
    where all weigh 0 too. Raises ValueError for weights that do not fit, and where two LoRAs have different layers
    under one key.
    """
    return Lora(weighted_sum(loras, weights, name="linear"), merged_card(loras, weights, "linear"))
