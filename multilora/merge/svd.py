"""The weighted sum of LoRAs, cut to a rank by its singular value decomposition."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from multilora.blocks import merged_card, weighted_sum
from multilora.lora import Lora, truncated
from multilora.method import Opt, method


@method(
    title="Weighted sum cut to a rank or an energy, the best of that rank; says what was lost",
    paper="https://doi.org/10.1007/BF02288367",
    cost="1",
    laws=("single", "zero", "gauge", "permutation", "mean_of_equals"),
)
def svd(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    rank: Annotated[int | None, Opt("largest rank of a module; none, and no energy: its LoRAs' largest", 1)] = None,
    energy: Annotated[float | None, Opt("share of each module's squared singular values to keep", 0.0, 1.0)] = None,
) -> Lora:
    """The update of rank `rank` nearest to sum_i w_i delta_i in every module (Eckart and Young, 1936).

    With `energy`, the smallest rank that keeps this share; with both, both limits hold. With neither, a module keeps
    the largest rank that one of its LoRAs has there, as PEFT's `svd` does. The sum is never multiplied out.
    provenance["merge"] of the card says what was lost: `energy_lost` and `energy_lost_by_module`. Raises ValueError as
    `linear` does, and for an energy of 0.
    """
    if energy == 0.0:
        raise ValueError("svd: energy=0.0, wanted a share above 0")
    total = weighted_sum(loras, weights, name="svd")
    usual = {key: max([lora[key].rank or 0 for lora in loras if key in lora]) or None for key in total}
    ranks = usual if rank is None and energy is None else dict.fromkeys(total, rank)
    parts, lost = truncated(total, ranks, energy)
    return Lora(parts, merged_card(loras, weights, "svd", rank=rank, energy=energy, **lost))
