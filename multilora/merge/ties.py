"""TIES: trim each update, elect a sign per entry, average what agrees (arXiv 2306.01708)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from torch import Tensor

from multilora.consensus import Density, agreed_sum_, keep_largest_
from multilora.elementwise import Rank, Whole, elementwise
from multilora.lora import Lora
from multilora.method import Opt, method


@method(
    title="Keeps the largest entries of each update, and where the signs differ only the side that wins",
    paper="https://arxiv.org/abs/2306.01708",
    cost="1",
    laws=("zero", "gauge", "permutation"),
)
def ties(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    density: Density = 0.2,
    convention: Annotated[
        Literal["peft", "mergekit"], Opt("whose signs and divisor: see the text of the method")
    ] = "peft",
    majority: Annotated[
        Literal["total", "frequency"], Opt("a sign wins by the sum of the entries or by their number")
    ] = "total",
    rank: Rank = None,
    dense: Whole = False,
) -> Lora:
    """The LoRAs merged in update space, then cut to `rank` (see multilora/elementwise.py).

    Of each update the share `density` of largest entries stays (0.2 is the paper's). Then, at every entry:

    convention="peft"      the updates as they are elect the sign; the weighted sum of those that have it is divided by
                           their number. Weights act as strengths: half the weights give half the update
    convention="mergekit"  the weighted updates elect the sign; the sum of those that have it is divided by the sum of
                           their weights. Weights are relative: a single LoRA comes out at weight 1

    The default is PEFT's, the paper's rule at equal weights, because there a weight means what it means in every other
    method, and the divisor is never small. Neither does justice to negative weights. PEFT's lets a subtracted LoRA
    vote for the sign it would have if it were added. mergekit's turns the vote round, but divides by a sum of weights
    of both signs: (1, -0.9) divides by 0.1, and where only the negative one agrees its sign turns back. To take a
    LoRA away, give its negation (-lora) a positive weight: both conventions then agree on what is meant.

    Raises ValueError for bad options and as `elementwise` does.
    """
    mergekit = convention == "mergekit"

    def combine(key: str, deltas: list[Tensor], row: list[float]) -> Tensor:
        for delta in deltas:
            keep_largest_(delta, density)
        vote, divide = ("weighted", "weights") if mergekit else ("delta", "count")
        return agreed_sum_(deltas, row, majority=majority, vote=vote, divide=divide)

    options = {"density": density, "convention": convention, "majority": majority}
    return elementwise(loras, weights, combine, name="ties", rank=rank, dense=dense, options=options)
