"""Null-space projection of LoRAs around a protected one: NP-LoRA (arXiv 2511.11051)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from multilora.blocks import merged_card, weights_of
from multilora.lora import Dense, Lora, LowRank
from multilora.method import Opt, method
from multilora.sites import label


@method(
    title="Protects one LoRA: the others are turned away from the inputs it acts on",
    paper="https://arxiv.org/abs/2511.11051",
    cost="1",
    laws=("single", "zero", "gauge"),
)
def np(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    mu: Annotated[float, Opt("strength of the projection: mu / (1 + mu) of the shared part is removed", 0.0)] = 0.5,
    hard: Annotated[bool, Opt("remove all of the shared part (mu at infinity)")] = False,
    protect: Annotated[int, Opt("number of the protected LoRA, from 1; the paper protects the style", 1)] = 1,
    against: Annotated[
        Literal["protected", "earlier"],
        Opt("turn the others from the protected LoRA only, or also from each other, in their order"),
    ] = "protected",
) -> Lora:
    """w_p delta_p + sum_i w_i delta_i (I - c Q Qᵀ), with c = mu / (1 + mu), or 1 with hard=True.

    Q [in, rank] is an orthonormal basis of the protected update's row space: what of its input a layer's update
    answers to. With hard=True the merge answers to inputs in that space exactly as the protected LoRA alone. With
    against="earlier" the LoRAs keep their order after the protected one and Q spans all that come before.

    Exact and of low rank: only `down` of the others changes. The row space is that of the update (singular vectors
    above rounding), not of `down`: rewritten factors give the same merge. Where the protected LoRA lacks a module or
    has weight 0, nothing is projected there. Biases are summed. Raises ValueError as `linear` does, for a number that
    is none of the LoRAs, and where the protected update is a whole matrix, which leaves no null space.
    """
    weight_at = weights_of(loras, weights, name="np")
    if loras and not 1 <= protect <= len(loras):
        raise ValueError(f"np: protect={protect}, wanted the number of one of {len(loras)} LoRAs, from 1")
    order = [protect - 1, *(i for i in range(len(loras)) if i != protect - 1)]
    share = 1.0 if hard else mu / (1.0 + mu)
    parts: dict[str, LowRank | Dense] = {}
    for key in dict.fromkeys(key for lora in loras for key in lora):
        row, span = weight_at(key), None
        for i in order:
            part = loras[i].get(key)
            if part is None or not row[i]:
                continue
            try:
                turned = part if row[i] == 1.0 else part * row[i]
                turned = turned if span is None else _turned(turned, span, share)
                parts[key] = parts[key] + turned if key in parts else turned
            except ValueError as error:
                raise ValueError(f"np: {label(loras[i], i)}, {key}: {error}") from None
            if (i == order[0] or against == "earlier") and part.shape is not None and len(part.shape) > 1:
                span = _rows(part, span, f"np: {label(loras[i], i)}, {key}")
    facts = {"mu": mu, "hard": hard, "protect": protect, "against": against}
    return Lora(parts, merged_card(loras, weights, "np", **facts))


def _rows(part: LowRank | Dense, span: Tensor | None, where: str) -> Tensor:
    """[in, n] orthonormal basis of the rows of the update and of what `span` holds already, in float64."""
    if isinstance(part, Dense):
        raise ValueError(f"{where}: a whole matrix leaves no null space to the others; truncate(rank=...) it first")
    basis = part.row_space()
    if span is None:
        return basis
    u, s, _ = torch.linalg.svd(torch.cat([span, basis], dim=1), full_matrices=False)
    return u[:, s > s[0] * len(s) * torch.finfo(s.dtype).eps]


def _turned(part: LowRank | Dense, q: Tensor, share: float) -> LowRank | Dense:
    """part (I - share q qᵀ)"""
    if part.shape is None or len(part.shape) < 2:
        return part
    embedding = part.kind == "embedding"
    whole = part.down if isinstance(part, LowRank) else part.weight.T if embedding else part.weight
    rows = whole.flatten(1).to(q)
    if rows.shape[1] != q.shape[0]:
        raise ValueError(f"{list(part.shape)} takes {rows.shape[1]} inputs, the protected LoRA {q.shape[0]}")
    rows = (rows - share * (rows @ q) @ q.T).to(torch.promote_types(torch.float32, whole.dtype)).reshape(whole.shape)
    if isinstance(part, LowRank):
        return LowRank(rows, part.up, part.bias, part.kind)
    return Dense(rows.T.contiguous() if embedding else rows, part.bias, part.kind)
