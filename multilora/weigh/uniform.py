"""Equal shares: every LoRA at 1 / k (arXiv 2402.15414, "uniform")."""

from collections.abc import Sequence
from typing import Any

from multilora.chosen import Chosen, checked_set
from multilora.lora import Lora
from multilora.method import method


@method(
    title="Equal shares, 1 / k each: nothing is tried",
    paper="https://arxiv.org/abs/2402.15414",
    cost="0",
)
def uniform(loras: Sequence[Lora], objective: Any = None) -> Chosen:
    """1 / k for each of k LoRAs; the objective is never called. Raises ValueError for an empty set."""
    loras = checked_set(loras, "uniform")
    return Chosen([1.0 / len(loras)] * len(loras), ended="nothing was tried")
