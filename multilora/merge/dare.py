"""DARE: drop entries of each update at random and rescale the rest, then add or settle signs (arXiv 2311.03099)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from torch import Tensor

from multilora.consensus import Density, Seed, drop_, generator_of, settled_
from multilora.elementwise import Rank, Whole, elementwise
from multilora.lora import Lora
from multilora.method import Opt, method


@method(
    title="Drops entries of each update at random, rescales the rest, then adds them up or settles their signs",
    paper="https://arxiv.org/abs/2311.03099",
    cost="1",
    laws=("zero", "gauge"),
)
def dare(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    density: Density = 0.5,
    consensus: Annotated[Literal["linear", "ties"], Opt("the weighted sum, or TIES' elected signs")] = "linear",
    convention: Annotated[
        Literal["peft", "mergekit"], Opt("whose rescaling, signs and divisor: see the text of the method")
    ] = "peft",
    majority: Annotated[
        Literal["total", "frequency"], Opt("with consensus=ties: a sign wins by sum or by number")
    ] = "total",
    seed: Seed = 0,
    rank: Rank = None,
    dense: Whole = False,
) -> Lora:
    """The LoRAs merged in update space, then cut to `rank` (see multilora/elementwise.py).

    Each entry stays with chance `density`, drawn anew for each LoRA and layer from the seed, the layer's key and the
    LoRA's place in the list; so the order of layers changes nothing, the order of LoRAs changes which entries go.

    convention="peft"      what stays is divided by density, so that each entry keeps its mean (the paper). With
                           consensus="ties" the updates elect, and the weighted sum is divided by the number that agree
    convention="mergekit"  what stays is scaled to the L1 norm that the update had. With consensus="ties" the weighted
                           updates elect, and the weighted sum is not divided (mergekit's default here)

    The default is PEFT's: it is the paper's, and the mean of the merge over seeds is then the exact sum (linear).
    Dropping adds noise of (1 - density) / density times the update's energy, spread over all directions; the cut to a
    rank takes most of it away again, and the card's `energy_lost` counts it.

    Raises ValueError for bad options and as `elementwise` does.
    """
    mergekit = convention == "mergekit"

    def combine(key: str, deltas: list[Tensor], row: list[float]) -> Tensor:
        for i, delta in enumerate(deltas):
            drop_(delta, density, generator_of(seed, key, i), "l1" if mergekit else "chance")
        return settled_(deltas, row, ties=consensus == "ties", mergekit=mergekit, majority=majority)

    options = {"density": density, "consensus": consensus, "convention": convention}
    options |= {"majority": majority, "seed": seed}
    return elementwise(loras, weights, combine, name="dare", rank=rank, dense=dense, options=options)
