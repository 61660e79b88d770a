"""Factors combined apart, then multiplied: PEM addition (arXiv 2306.14870), LoRAHub (2307.13269), PEFT's `linear`.

For parity with published results only: the product of two sums has cross terms up_i @ down_j that belong to no LoRA,
and it changes when a LoRA's factors are rewritten without changing the LoRA. The sum of updates is `linear`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from multilora.blocks import merged_card, weights_of
from multilora.lora import Lora, LowRank
from multilora.method import Opt, method
from multilora.sites import label


@method(
    title="Factors summed apart, with cross terms: parity with PEM, LoRAHub and PEFT's linear",
    paper="https://arxiv.org/abs/2306.14870",
    cost="1",
    laws=("zero", "permutation", "mean_of_equals"),
)
def factor(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    convention: Annotated[Literal["pem", "lorahub", "peft"], Opt("how a weight is shared by the two factors")] = "pem",
    normalise: Annotated[bool, Opt("divide the weights by the sum of their sizes first, as PEM's code does")] = False,
    scales: Annotated[str, Opt("alpha / rank of each LoRA, where they differ, for full parity: '2,1,0.5'")] = "",
) -> Lora:
    """(sum_i u_i up_i) @ (sum_i d_i down_i), with u_i and d_i made of the weight w_i:

    pem      u = w, d = |w|: negation turns one factor's sign, addition is quadratic in the weights
    lorahub  u = w, d = w: quadratic, and w and -w are the same
    peft     u = sqrt|w|, d = sign(w) sqrt|w|: one LoRA at w is itself at w (add_weighted_adapter "linear"). The sign
             is on the other factor than PEM's, which matters to the cross terms

    A LoRA's scale s = alpha / rank is folded into its `up` when it is read, so cross terms are s_i B_i A_j. PEM and
    LoRAHub keep A and B as they are and run the result under the first adapter's scale: that is this when all scales
    are equal. PEFT has sqrt(s_i s_j) B_i A_j: the same when all are equal; for others give `scales`, and with
    "peft" sqrt(s) goes to either factor, with "pem" and "lorahub" the first LoRA's scale stands for all.

    Equal ranks are wanted; a module that a LoRA lacks counts as zero in both factors. Bias updates are summed at w_i.
    Raises ValueError naming both LoRAs and the module for unequal ranks, for dense updates, as `linear` does, and for
    scales that do not fit.
    """
    weight_at = weights_of(loras, weights, name="factor")
    given = _scales(scales, len(loras))
    parts: dict[str, LowRank] = {}
    for key in dict.fromkeys(key for lora in loras for key in lora):
        row = weight_at(key)
        total = math.fsum(abs(w) for w in row) if normalise else 1.0
        here = [i for i, (lora, w) in enumerate(zip(loras, row, strict=True)) if w and key in lora]
        if not here:
            continue
        _alike(loras, here, key)
        wide = functools.reduce(torch.promote_types, [loras[i][key].dtype for i in here], torch.float32)
        up = down = bias = 0.0
        for i in here:
            part, w = loras[i][key], row[i] / total
            u, d = _split(w, convention)
            if given and convention == "peft":
                u, d = u / math.sqrt(given[i]), d * math.sqrt(given[i])
            elif given:
                u = u / given[i] * given[0]
            up, down = up + part.up.to(wide) * u, down + part.down.to(wide) * d
            if part.bias is not None:
                bias = bias + part.bias.to(wide) * w
        parts[key] = LowRank(down, up, bias if isinstance(bias, Tensor) else None, loras[here[0]][key].kind)
    facts = {"convention": convention, "normalise": normalise, "scales": given or ""}
    return Lora(parts, merged_card(loras, weights, "factor", **facts))


def _split(w: float, convention: str) -> tuple[float, float]:
    """(on up, on down)"""
    if convention == "peft":
        root = math.sqrt(abs(w))
        return root, math.copysign(root, w)
    return w, w if convention == "lorahub" else abs(w)


def _scales(text: str | Sequence[float], count: int) -> list[float]:
    try:
        found = [float(s) for s in (text.split(",") if isinstance(text, str) else text) if str(s).strip()]
    except ValueError:
        raise ValueError(f"factor: scales={text!r}, wanted numbers with commas between them") from None
    if found and (len(found) != count or not all(math.isfinite(s) and s > 0 for s in found)):
        raise ValueError(f"factor: scales={text!r}, wanted a positive number for each of {count} LoRAs")
    return found


def _alike(loras: Sequence[Lora], here: Sequence[int], key: str) -> None:
    first = loras[here[0]][key]
    for i in here:
        part, who = loras[i][key], f"factor: {label(loras[i], i)}, {key}"
        if not isinstance(part, LowRank):
            raise ValueError(f"{who}: a dense update has no factors; truncate(rank=...) it, or merge with linear")
        if part.rank != first.rank:
            raise ValueError(
                f"{who}: rank {part.rank}, but {label(loras[here[0]], here[0])} has rank {first.rank} there; factors "
                f"of one rank are wanted: resize one of them, or merge with linear"
            )
        if (part.shape, part.kind) != (first.shape, first.kind):
            raise ValueError(
                f"{who}: {part.kind} {list(part.shape)}, but {label(loras[here[0]], here[0])} has {first.kind} "
                f"{list(first.shape)} there"
            )
