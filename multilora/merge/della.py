"""DELLA: drop small entries of each update more often than large ones, then settle signs (arXiv 2406.11617)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from torch import Tensor

from multilora.consensus import Density, Seed, drop_by_rank_, generator_of, settled_
from multilora.elementwise import Rank, Whole, elementwise
from multilora.lora import Lora
from multilora.method import Opt, method


@method(
    title="Drops small entries more often than large ones, rescales the rest, then settles their signs",
    paper="https://arxiv.org/abs/2406.11617",
    cost="1",
    laws=("zero", "gauge"),
)
def della(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    density: Density = 0.5,
    epsilon: Annotated[
        float, Opt("entries stay with chance density - epsilon (smallest) to + epsilon (largest)", 0.0, 0.5)
    ] = 0.15,
    consensus: Annotated[Literal["ties", "linear"], Opt("TIES' elected signs, or the weighted sum")] = "ties",
    convention: Annotated[
        Literal["paper", "mergekit"], Opt("whose rescaling, signs and divisor: see the text of the method")
    ] = "paper",
    majority: Annotated[
        Literal["total", "frequency"], Opt("with consensus=ties: a sign wins by sum or by number")
    ] = "total",
    seed: Seed = 0,
    rank: Rank = None,
    dense: Whole = False,
) -> Lora:
    """The LoRAs merged in update space, then cut to `rank` (see multilora/elementwise.py).

    Each entry stays with a chance that grows with its rank by magnitude in its row. `epsilon` is half the window of
    chances, as in mergekit; the paper's epsilon is the whole. At 0 this is DARE. Draws are seeded as in `dare`.

    convention="paper"     each entry that stays is divided by its own chance, so that it keeps its mean; the updates
                           elect the sign, and the weighted sum is divided by the number that agree (at equal weights
                           the paper's mean, times lambda)
    convention="mergekit"  what stays is scaled to the L1 norm that the update had; the weighted updates elect, and
                           the weighted sum is not divided (mergekit's default here)

    PEFT has no DELLA. The default is the paper's, for the reason given in `dare`. consensus="linear" is mergekit's
    della_linear. Raises ValueError for bad options, for a window that leaves (0, 1], and as `elementwise` does.
    """
    low, high = density - epsilon, density + epsilon
    if low <= 0 or high > 1 + 1e-9:
        raise ValueError(
            f"option epsilon={epsilon} of della: with density={density} entries would stay with chances {low:.3g} to "
            f"{high:.3g}; wanted above 0 and at most 1, so an epsilon below {min(density, 1 - density):.3g}"
        )
    mergekit = convention == "mergekit"

    def combine(key: str, deltas: list[Tensor], row: list[float]) -> Tensor:
        for i, delta in enumerate(deltas):
            drop_by_rank_(delta, density, epsilon, generator_of(seed, key, i), "l1" if mergekit else "chance")
        return settled_(deltas, row, ties=consensus == "ties", mergekit=mergekit, majority=majority)

    options = {"density": density, "epsilon": epsilon, "consensus": consensus, "convention": convention}
    options |= {"majority": majority, "seed": seed}
    return elementwise(loras, weights, combine, name="della", rank=rank, dense=dense, options=options)
