"""The exact weighted sum of LoRAs: W' = W + sum_i w_i up_i down_i (arXiv 2402.16843, section 3)."""

from collections.abc import Sequence

from multilora.lora import Card, Lora
from multilora.method import method


@method(
    title="Weighted sum of the updates, exact: ranks are concatenated",
    paper="https://arxiv.org/abs/2402.16843",
    cost="1",
    laws=("single", "zero", "gauge", "permutation", "mean_of_equals", "linear"),
)
def linear(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """sum_i weights[i] * loras[i], as one LoRA whose rank is the sum of the ranks.

    A LoRA at weight 0 is left out; with no LoRA left the result is empty. Raises ValueError when the counts differ, a
    weight is not a finite number, or two LoRAs have different layers under one key.
    """
    if len(loras) != len(weights):
        raise ValueError(f"linear: {len(weights)} weights for {len(loras)} LoRAs, wanted one each")
    total: Lora | None = None
    for lora, weight in zip(loras, weights, strict=True):
        term = lora * weight
        if weight != 0:
            total = term if total is None else total + term
    return Lora({}, Card()) if total is None else total
