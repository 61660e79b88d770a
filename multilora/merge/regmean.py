"""RegMean: the update that answers most like every LoRA on that LoRA's own inputs (arXiv 2212.09849)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from multilora.blocks import merged_card, weights_of
from multilora.lora import Dense, Lora, LowRank
from multilora.method import Opt, method
from multilora.sites import label
from multilora.stored import Stored

RIDGE = 1e-8  # of the mean diagonal, on every Gram matrix: an input that nobody uses gets the plain weighted mean


@method(
    title="Least-squares mean of the updates over the inputs that each LoRA sees",
    paper="https://arxiv.org/abs/2212.09849",
    cost="1",
    laws=("single", "zero", "gauge", "permutation", "mean_of_equals"),
)
def regmean(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    grams: Annotated[
        str | Sequence[Any] | None, Opt("one file of Gram matrices per LoRA (lab.train.gram), joined by commas")
    ] = None,
    shrink: Annotated[float, Opt("factor of the entries off the diagonal, below 1 for stability", 0.0, 1.0)] = 0.9,
) -> Lora:
    """(sum_i w_i delta_i G_i) (sum_i |w_i| G_i)^-1 sum_i |w_i|, which minimises sum_i w_i |X_i (delta - delta_i)|².

    G_i = X_iᵀ X_i [in, in] is the Gram matrix of the layer's inputs while LoRA i does its own work. At weights 1 / k
    this is the paper's mean; one LoRA at w is itself at w; where all G_i are equal it is `linear`. The base weights
    drop out of the formula. Exact and of low rank: only `down` changes.

    grams   one per LoRA, in their order: a path, or a mapping {key: G [in, in], or its diagonal [in]}; in one text,
            paths joined by commas. An embedding's G is over its entries, a convolution's over flattened patches
    shrink  G <- shrink G + (1 - shrink) diag(G); the paper has 0.9 to 1

    A LoRA that lacks a module takes part with a zero update where its Gram matrix is given. Computed in float64, one
    module at a time. Biases are summed at the weights. Raises ValueError as `linear` does, naming LoRA and key for
    a Gram matrix that is missing, not finite or of another size, and for sums that are singular at shrink=1.
    """
    weight_at = weights_of(loras, weights, name="regmean")
    parts: dict[str, LowRank | Dense] = {}
    with contextlib.ExitStack() as files:
        known = _given(loras, grams, files)
        for key in dict.fromkeys(key for lora in loras for key in lora):
            row = weight_at(key)
            here = [i for i, lora in enumerate(loras) if key in lora and row[i]]
            if not here:
                continue
            matrix = any(len(loras[i][key].shape or ()) > 1 for i in here)
            regress = _regression(loras, known, row, key, here, shrink) if matrix else None
            for i in here:
                try:
                    term = loras[i][key] * row[i]
                    term = term if regress is None or term.shape is None else _through(term, regress, i)
                    parts[key] = parts[key] + term if key in parts else term
                except ValueError as error:
                    raise ValueError(f"regmean: {label(loras[i], i)}, {key}: {error}") from None
    return Lora(parts, merged_card(loras, weights, "regmean", shrink=shrink))


def _given(loras: Sequence[Lora], grams: Any, files: contextlib.ExitStack) -> list[Mapping[str, Tensor]]:
    """One mapping per LoRA; files are read one matrix at a time."""
    if isinstance(grams, (str, Path)):
        grams = [text.strip() for text in str(grams).split(",")]
    grams = [] if grams is None else [grams] if isinstance(grams, Mapping) else list(grams)
    if len(grams) != len(loras):
        raise ValueError(
            f"regmean: {len(grams)} sets of Gram matrices for {len(loras)} LoRAs, wanted one each: "
            "multilora.lab.train.gram collects them (grams='fox.grams.safetensors,robe.grams.safetensors')"
        )
    found = []
    for i, (lora, one) in enumerate(zip(loras, grams, strict=True)):
        if not isinstance(one, (str, Path, Mapping)):
            who = f"regmean: the Gram matrices of {label(lora, i)}"
            raise ValueError(f"{who}: wanted a file or a mapping, got {one!r:.60}")
        found.append(one if isinstance(one, Mapping) else files.enter_context(Stored(one)))
    return found


def _regression(
    loras: Sequence[Lora],
    grams: Sequence[Mapping[str, Tensor]],
    row: list[float],
    key: str,
    here: list[int],
    shrink: float,
) -> Callable[[Tensor, int], Tensor]:
    """A function (rows [n, in], i) -> rows G_i (sum_j |w_j| G_j)^-1 sum_j |w_j| of one module."""
    part = next(loras[i][key] for i in here if len(loras[i][key].shape or ()) > 1)
    size = part.shape[0] if part.kind == "embedding" else math.prod(part.shape[1:])
    found: dict[int, Tensor] = {}
    for i, lora in enumerate(loras):
        where = f"regmean: the Gram matrix of {label(lora, i)} for {key!r}"
        if row[i] and key not in grams[i] and key in lora:
            raise ValueError(f"{where} is missing; collect it for the modules of this LoRA")
        if not row[i] or key not in grams[i]:
            continue
        g = grams[i][key].to(torch.float64)
        if tuple(g.shape) not in ((size, size), (size,)):
            raise ValueError(f"{where} is {list(g.shape)}, wanted [{size}, {size}] or its diagonal [{size}]")
        if not torch.isfinite(g).all() or (g.diagonal() if g.ndim == 2 else g).min() < 0:
            raise ValueError(f"{where} is none: an entry is not finite or a square below 0")
        found[i] = g
    if any(g.ndim == 1 for g in found.values()):
        found = {i: g if g.ndim == 1 else g.diagonal() for i, g in found.items()}
    whole = math.fsum(abs(row[i]) for i in found)
    diagonals = {i: g if g.ndim == 1 else g.diagonal() for i, g in found.items()}
    ridge = RIDGE * max(float(sum(d.mean() for d in diagonals.values())) / len(found), 1e-300)
    for i, g in found.items():
        if g.ndim == 1:
            found[i] = g + ridge
        else:
            found[i] = shrink * g
            found[i].diagonal().add_((1.0 - shrink) * diagonals[i] + ridge)
    total = sum(abs(row[i]) / whole * g for i, g in found.items())
    if total.ndim == 1:
        return lambda rows, i: rows * (found[i] / total)
    # Scaled to a unit diagonal first: inputs differ in size by orders of magnitude.
    unit = total.diagonal().rsqrt()
    factor, failed = torch.linalg.cholesky_ex(unit[:, None] * total * unit)
    if failed:
        raise ValueError(f"regmean: the Gram matrices for {key!r} are singular together; lower shrink or collect more")
    # rows G total^-1 = (total^-1 (rows G)ᵀ)ᵀ, both are symmetric
    return lambda rows, i: (unit[:, None] * torch.cholesky_solve(unit[:, None] * (rows @ found[i]).T, factor)).T


def _through(part: LowRank | Dense, regress: Callable[[Tensor, int], Tensor], i: int) -> LowRank | Dense:
    """The update of LoRA i times its matrix from the right."""
    embedding = part.kind == "embedding"
    whole = part.down if isinstance(part, LowRank) else part.weight.T if embedding else part.weight
    rows = regress(whole.flatten(1).to(torch.float64), i)
    rows = rows.to(torch.promote_types(torch.float32, whole.dtype)).reshape(whole.shape)
    if isinstance(part, LowRank):
        return LowRank(rows, part.up, part.bias, part.kind)
    return Dense(rows.T.contiguous() if embedding else rows, part.bias, part.kind)
