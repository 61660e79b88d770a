"""KnOTS: updates are rotated into one shared basis before they are merged there (arXiv 2410.19735)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from multilora.blocks import merged_card, weights_of
from multilora.consensus import agreed_sum_, keep_largest_, weighted_sum_
from multilora.lora import Dense, Lora, LowRank
from multilora.method import Opt, method
from multilora.sites import label


@method(
    title="Merges in the shared singular basis of the updates, where they can be compared entry by entry",
    paper="https://arxiv.org/abs/2410.19735",
    cost="1",
    laws=("zero", "gauge", "permutation"),
)
def knots(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    combine: Annotated[Literal["ties", "sum"], Opt("how the rotated updates are merged; sum is `linear`")] = "ties",
    density: Annotated[float, Opt("ties: share of each rotated update's entries that stays", 0.0, 1.0)] = 0.2,
    majority: Annotated[Literal["total", "frequency"], Opt("ties: whose sign wins, by size or by count")] = "total",
) -> Lora:
    """U S merge(V_1, ..., V_k), where [delta_1 | ... | delta_k] = U S [V_1 | ... | V_k] is an svd.

    combine  "ties": each V_i [n, in] keeps its largest entries, a sign is elected per entry, and V is the mean of the
             w_i V_i that have it (multilora.consensus.agreed_sum_ in PEFT's convention); "sum": V = sum_i w_i V_i,
             which is the plain mean of the updates at weights 1 / k, and no other merge than `linear`

    The decomposition is made from the factors, in float64: the full matrices appear nowhere, and the result has at
    most the sum of the ranks. Singular values that are rounding noise, as equal LoRAs have them, are left out: their
    vectors mean nothing and would take part in the election. A LoRA at weight 0 takes no part. Biases are merged by
    the same rule, in their own basis. Raises ValueError as `linear` does, and for a density of 0.
    """
    if density == 0.0:
        raise ValueError("knots: density=0.0 keeps nothing, wanted a share above 0")
    weight_at = weights_of(loras, weights, name="knots")

    def merged(tensors: list[Tensor], row: list[float]) -> Tensor:
        if combine == "sum":
            return weighted_sum_(tensors, row)
        return agreed_sum_([keep_largest_(t, density) for t in tensors], row, majority=majority)

    parts: dict[str, LowRank | Dense] = {}
    for key in dict.fromkeys(key for lora in loras for key in lora):
        row = weight_at(key)
        here = [i for i, lora in enumerate(loras) if key in lora and row[i]]
        if here:
            found = [loras[i][key] for i in here]
            for i, part in zip(here, found, strict=True):
                if (part.shape, part.kind) != (found[0].shape, found[0].kind):
                    raise ValueError(
                        f"knots: {label(loras[i], i)}, {key}: {part.kind} {part.shape}, but "
                        f"{label(loras[here[0]], here[0])} has {found[0].kind} {found[0].shape} there"
                    )
            parts[key] = _module(found, [row[i] for i in here], merged)
    facts = {"combine": combine, **({"density": density, "majority": majority} if combine == "ties" else {})}
    return Lora(parts, merged_card(loras, weights, "knots", **facts))


def _module(parts: Sequence[LowRank | Dense], row: list[float], merged: object) -> LowRank | Dense:
    biases = [(p.bias.to(torch.float64, copy=True), w) for p, w in zip(parts, row, strict=True) if p.bias is not None]
    bias = merged([b for b, _ in biases], [w for _, w in biases]).to(_stored(parts)) if biases else None
    first = parts[0]
    if first.shape is None:
        return Dense(bias=bias, kind=first.kind)
    if len(first.shape) < 2:
        return Dense(merged([p.delta(torch.float64).clone() for p in parts], row).to(_stored(parts)), bias, first.kind)
    # A whole matrix has as many singular values as its smaller side; cut to that it loses nothing.
    low = [p if isinstance(p, LowRank) else p.truncate(min(p.shape[0], p.weight[0].numel())) for p in parts]
    basis, rotated = _rotated(low)
    down = merged(rotated, row).to(_stored(parts)).reshape(-1, *low[0].down.shape[1:])
    return LowRank(down, basis.to(_stored(parts)), bias, first.kind)


def _rotated(parts: Sequence[LowRank]) -> tuple[Tensor, list[Tensor]]:
    """(U S [out, n], the V_i [n, in]) of the updates side by side.

    up_i = Q R_i for one Q, and down_i = L_i P_i with orthonormal rows P_i, so that what is decomposed is Q times the
    small matrix [R_1 L_1 | ... | R_k L_k] times a block diagonal of orthonormal rows.
    """
    ups = torch.cat([p.up.to(torch.float64) for p in parts], dim=1)
    q, r = torch.linalg.qr(ups)
    lows, rows, at = [], [], 0
    for p in parts:
        basis, low = torch.linalg.qr(p.down.to(torch.float64).flatten(1).T)
        lows.append(r[:, at : at + p.rank] @ low.T)
        rows.append(basis.T)
        at += p.rank
    u, s, vh = torch.linalg.svd(torch.cat(lows, dim=1), full_matrices=False)
    # float32 factors carry their own rounding: what lies below it is noise, whatever precision this is done in.
    coarse = any(p.dtype != torch.float64 for p in parts)
    floor = torch.finfo(torch.float32 if coarse else torch.float64).eps * len(s) * s[0]
    n = max(int((s > floor).sum()), 1)
    blocks = vh[:n].split([low.shape[1] for low in lows], dim=1)
    return q @ (u[:, :n] * s[:n]), [b @ row for b, row in zip(blocks, rows, strict=True)]


def _stored(parts: Sequence[LowRank | Dense]) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
