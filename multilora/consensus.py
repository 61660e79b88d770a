"""What merges do to single entries of weight updates: make each update sparse, then settle where the updates disagree.

Sparse (one tensor at a time): `keep_largest_`, `drop_`, `drop_by_rank_`. Consensus (one tensor per LoRA, all of one
shape): `weighted_sum_`, `agreed_sum_`. A merge is one of the first and one of the second.

As with torch's own functions, an underscore at the end says that the tensors given are overwritten: a merge that owns
its updates then needs no copies. All are contiguous and floating point. Nothing here draws from torch's global random
state: random drops take a generator, `generator_of` makes one per LoRA and key, so that neither the order of the
modules nor what ran before changes a merge.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from multilora.method import Opt

# Options that several merges have.
Density = Annotated[float, Opt("share of each update's entries that stays", minimum=0.001, maximum=1.0)]
Seed = Annotated[int, Opt("of the random drops: the same seed drops the same entries")]

Rescale = Literal["chance", "l1", "none"]
Majority = Literal["total", "frequency"]

PIECE = 1 << 16  # entries


def generator_of(seed: int, key: str, index: int) -> torch.Generator:
    """The generator of LoRA number `index` at module `key`: a hash of the three is its seed."""
    digest = hashlib.sha256(f"{seed}\n{index}\n{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# -- sparse -----------------------------------------------------------------------------------------------------------


def keep_largest_(x: Tensor, density: float) -> Tensor:
    """x with all but its largest entries by magnitude set to 0.

    Exactly max(1, int(density * entries)) stay, as in PEFT (which keeps none where that is 0 of them). Of entries
    whose magnitudes are equal at the limit, those that come first in memory stay; PEFT's topk leaves that open.
    """
    keep = max(1, int(density * x.numel()))
    if keep >= x.numel():
        return x
    sizes = x.abs().flatten()
    limit = kth_largest(sizes, keep)
    surplus = int(torch.count_nonzero(sizes >= limit)) - keep
    spare = (sizes == limit).nonzero()[-surplus:, 0] if surplus else None
    # hardshrink zeroes |x| <= its limit in one pass; the number just below keeps the entries that are equal to it.
    below = torch.nextafter(limit, torch.zeros_like(limit))
    torch.ops.aten.hardshrink.out(x, float(below), out=x)
    if spare is not None:
        x.view(-1)[spare] = 0
    return x


def kth_largest(sizes: Tensor, k: int, sample: int = 4096) -> Tensor:
    """The k-th largest of [n] numbers, 1 <= k <= n, as a scalar tensor; exact.

    kthvalue on all n is the slow part of a trim. So an evenly spaced sample brackets the answer by 4 standard errors,
    and only what lies inside is searched; where the bracket misses (it is checked), everything is.
    """
    n = sizes.numel()
    if n > 4 * sample:
        drawn = sizes[:: n // sample | 1].sort().values
        share, count = 1 - k / n, drawn.numel()
        error = 4 * math.sqrt(share * (1 - share) / count) + 2 / count
        low = drawn[max(0, int((share - error) * count))]
        high = drawn[min(count - 1, int((share + error) * count))]
        inside = sizes[(sizes >= low) & (sizes <= high)]
        above = int(torch.count_nonzero(sizes > high))
        if above < k <= above + inside.numel():
            return inside.kthvalue(inside.numel() - (k - above) + 1).values
    return sizes.kthvalue(n - k + 1).values


def drop_(x: Tensor, density: float, generator: torch.Generator, rescale: Rescale = "chance") -> Tensor:
    """x with each entry kept with chance `density` and else set to 0, then rescaled (DARE, arXiv 2311.03099).

    rescale  "chance": by 1 / density, so that every entry keeps its mean (the paper, PEFT); "l1": to the L1 norm that
             x had, so that its total size is kept exactly (mergekit); "none"
    """
    before = _l1(x) if rescale == "l1" else 0.0
    x.mul_(_uniform(x, generator).lt_(density))
    return x.div_(density) if rescale == "chance" else _to_l1(x, before) if rescale == "l1" else x


def drop_by_rank_(
    x: Tensor, density: float, epsilon: float, generator: torch.Generator, rescale: Rescale = "chance"
) -> Tensor:
    """x with large entries kept more often than small ones (DELLA's MAGPRUNE, arXiv 2406.11617).

    In each row (of the weight flattened to [out, rest]; a one-dimensional x is one row) the chance of an entry to stay
    grows evenly with the rank of its magnitude, from density - epsilon to density + epsilon. The paper's epsilon is
    the whole window, twice this one, mergekit's is this one. A row of one entry stays with chance `density`.

    rescale  "chance": each kept entry by 1 / its own chance, so that it keeps its mean (the paper); "l1" as in drop_
             (mergekit); "none"
    """
    before = _l1(x) if rescale == "l1" else 0.0
    rows = x.view(1, -1) if x.ndim == 1 else x.view(x.shape[0], -1)
    width = epsilon if rows.shape[1] > 1 else 0.0
    ladder = torch.linspace(density - width, density + width, rows.shape[1], dtype=x.dtype, device=x.device)
    order = rows.abs().argsort(stable=True, dim=1)
    chance = torch.empty_like(rows).scatter_(1, order, ladder.expand_as(rows))
    rows.mul_(_uniform(rows, generator).lt_(chance))
    if rescale == "chance":
        rows.div_(chance)
    return _to_l1(x, before) if rescale == "l1" else x


def _uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1) from the generator (on the CPU, for the same mask on every device), in the form of x."""
    return torch.rand(x.shape, generator=generator).to(x.device, x.dtype)


def _l1(x: Tensor) -> float:
    fine = torch.float32 if x.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(x, 1, dtype=fine))


def _to_l1(x: Tensor, size: float) -> Tensor:
    now = _l1(x)
    return x.mul_(size / now) if now > 0 else x


# -- consensus --------------------------------------------------------------------------------------------------------


def weighted_sum_(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """sum_i weights[i] * deltas[i], in the first of them."""
    total = deltas[0].mul_(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total


def settled_(
    deltas: list[Tensor], weights: list[float], *, ties: bool, mergekit: bool, majority: Majority
) -> Tensor:
    """What follows random drops: the weighted sum, or (ties) the agreed one by PEFT's or mergekit's rule."""
    if not ties:
        return weighted_sum_(deltas, weights)
    vote, divide = ("weighted", "none") if mergekit else ("delta", "count")
    return agreed_sum_(deltas, weights, majority=majority, vote=vote, divide=divide)


def elected(deltas: list[Tensor], majority: Majority = "total") -> Tensor:
    """The sign, 1 or -1, that wins at every entry; a draw goes to 1, as in PEFT and mergekit.

    majority  "total": the sign of the sum (TIES, arXiv 2306.01708); "frequency": that of most entries
    """
    total = deltas[0].sign() if majority == "frequency" else deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta.sign() if majority == "frequency" else delta)
    return total.ge_(0).mul_(2).sub_(1)


def agreed_sum_(
    deltas: list[Tensor],
    weights: list[float],
    *,
    majority: Majority = "total",
    vote: Literal["delta", "weighted"] = "delta",
    divide: Literal["count", "weights", "none"] = "count",
) -> Tensor:
    """The weighted sum at every entry over the deltas that have the elected sign there, divided (TIES); in deltas[0].

    vote    "delta": the deltas as they are elect and are asked for their sign, weights only scale (the paper, PEFT);
            "weighted": weights[i] * deltas[i] do, so that a negative weight turns its vote round (mergekit)
    divide  by how many agree ("count": the paper, PEFT), by the sum of their weights, where that is not 0 ("weights":
            mergekit's normalize), or not at all. "weights" makes the weights relative, a single LoRA comes out at
            weight 1; and where weights of both signs agree their sum may be small or negative and enlarges or turns
            round the result
    """
    # Piece by piece: what is needed on the way stays in the processor's cache, which is 3 times faster.
    for pieces in zip(*(d.view(-1).split(PIECE) for d in deltas), strict=True):
        pieces[0].copy_(_agreed(list(pieces), weights, majority, vote, divide))
    return deltas[0]


def _agreed(deltas: list[Tensor], weights: list[float], majority: Majority, vote: str, divide: str) -> Tensor:
    scales = list(weights)
    if vote == "weighted":
        for i, delta in enumerate(deltas):
            delta.mul_(weights[i])
            scales[i] = 1.0
    sign = elected(deltas, majority)
    total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, scale, weight in zip(deltas, scales, weights, strict=True):
        delta.mul_(sign).relu_()  # the size of what agrees, 0 for what does not and for what is 0
        total.add_(delta, alpha=scale)
        if divide != "none":
            divisor.add_(delta.sign_(), alpha=1.0 if divide == "count" else weight)
    total.mul_(sign)
    if divide != "none":
        total.div_(divisor.add_(divisor.clone().eq_(0)))  # 1 where nothing agrees
    return total
