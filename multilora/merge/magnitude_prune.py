"""Magnitude pruning: keep the largest entries of each update, then add the updates up."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from multilora.consensus import Density, keep_largest_, weighted_sum_
from multilora.elementwise import Rank, Whole, elementwise
from multilora.lora import Lora
from multilora.method import method


@method(
    title="Keeps the largest entries of each update and adds them up",
    paper="https://huggingface.co/docs/peft/developer_guides/model_merging",
    cost="1",
    laws=("zero", "gauge", "permutation"),
)
def magnitude_prune(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    density: Density = 0.5,
    rank: Rank = None,
    dense: Whole = False,
) -> Lora:
    """sum_i w_i trim(Delta_i), cut to `rank` (see multilora/elementwise.py).

    trim keeps the share `density` of entries that are largest by magnitude, unscaled: PEFT's magnitude_prune_svd.
    TIES without its vote; at density 1 the exact sum. Raises ValueError for bad options and as `elementwise` does.
    """

    def combine(key: str, deltas: list[Tensor], row: list[float]) -> Tensor:
        for delta in deltas:
            keep_largest_(delta, density)
        return weighted_sum_(deltas, row)

    options = {"density": density}
    return elementwise(loras, weights, combine, name="magnitude_prune", rank=rank, dense=dense, options=options)
