"""Merges that look at every entry of the weight updates: module by module, so that one module's updates are in memory.

    def mean(key, deltas, weights):                      # see `elementwise` for what it may rely on
        return sum(w * d for w, d in zip(weights, deltas)) / len(deltas)

    elementwise(loras, [1, 1], mean, name="mean")        # -> Lora, its card says what share of the energy was lost

An entry-wise function of low-rank matrices has full rank. The result is cut back to a rank by a randomised svd, unless
dense=True keeps the whole matrices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any

import torch
from torch import Tensor

from multilora.blocks import merged_card, weights_of
from multilora.lora import Dense, Lora, LowRank
from multilora.method import Opt
from multilora.sites import label

# Options of every elementwise merge.
Rank = Annotated[int | None, Opt("largest rank of a layer; none: the sum of the LoRAs' ranks there", minimum=1)]
Whole = Annotated[bool, Opt("keep whole matrices, exact and large, instead of cutting them to a rank")]

Combine = Callable[[str, list[Tensor], list[float]], Tensor]
Echo = Callable[[str, int, int], None]

# Of the randomised svd, a block Krylov space (Musco and Musco, arXiv 1504.05477): how many more columns than the rank
# a block has, and how many blocks follow the first. Trimmed and dropped updates have flat spectra: on them two power
# iterations with twice the rank in columns, as in torch.svd_lowrank, leave up to 0.4% more than the best residual,
# this less than 0.05% in about the same time (tests/test_merge_elementwise.py holds it to 0.1%).
OVER, BLOCKS = 8, 3

_ECHO: ContextVar[Echo | None] = ContextVar("echo", default=None)


@contextmanager
def echoing(echo: Echo) -> Iterator[None]:
    """Every elementwise merge inside calls echo(key, modules done, modules in all) after each module."""
    token = _ECHO.set(echo)
    try:
        yield
    finally:
        _ECHO.reset(token)


@torch.no_grad()
def elementwise(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    combine: Combine,
    *,
    name: str,
    rank: int | None = None,
    dense: bool = False,
    options: Mapping[str, Any] | None = None,
    echo: Echo | None = None,
) -> Lora:
    """One LoRA whose update of each layer is combine(key, deltas, weights).

    combine  gets one delta per LoRA, contiguous, in the layer's weight shape and in float32 (float64 where a LoRA is),
             zeros where a LoRA lacks the module or has weight 0 there, and one weight per LoRA; it owns the deltas
             and may overwrite them. Bias updates go through it too, one-dimensional, under the key "<module>.bias"
    name     of the method, for errors and the card
    rank     largest rank of a module's result; None for the sum of the ranks of the LoRAs that act there. Never more
             than the layer's smaller side. One-dimensional weights, and with rank=None the layers where one of the
             LoRAs is dense, stay whole
    dense    keep whole matrices; nothing is lost
    options  of the method, for the card
    echo     called with (key, modules done, modules in all) after each module; None: that of `echoing`, if any

    The card's provenance["merge"] holds the method, its options, `energy_lost` (the share of the squared norm of all
    combined weights that the cut to `rank` lost) and `energy_lost_by_module` (key -> share). Raises ValueError
    for bad weights, for dense=True together with a rank, for two LoRAs with different layers under one key, and for a
    result that is not finite, naming method and key.
    """
    loras, echo = list(loras), echo or _ECHO.get()
    weights_at = weights_of(loras, weights, name=name)
    if dense and rank is not None:
        raise ValueError(f"{name}: dense=True keeps whole matrices, rank={rank} cuts them; give one of the two")
    keys = list(dict.fromkeys(key for lora in loras for key in lora))
    parts: dict[str, LowRank | Dense] = {}
    lost: dict[str, float] = {}
    energies: list[tuple[float, float]] = []
    for done, key in enumerate(keys, 1):
        row = [float(w) for w in weights_at(key)]
        here = [lora.get(key) if w != 0 else None for lora, w in zip(loras, row, strict=True)]
        if any(p is not None for p in here):
            _same_layer(loras, here, name, key)
            weight, bias = _combined(here, row, combine, key)
            parts[key], gone, energy = _part(here, weight, bias, name, key, rank, dense)
            energies.append((gone, energy))
            if isinstance(parts[key], LowRank):
                lost[key] = gone / energy if energy else 0.0
        if echo is not None:
            echo(key, done, len(keys))
    energy = math.fsum(e for _, e in energies)
    share = math.fsum(g for g, _ in energies) / energy if energy else 0.0
    facts = {**(options or {}), "rank": rank, "dense": dense, "energy_lost": share, "energy_lost_by_module": lost}
    return Lora(parts, merged_card(loras, weights, name, **facts))


def _same_layer(loras: Sequence[Lora], parts: Sequence[LowRank | Dense | None], name: str, key: str) -> None:
    for what in (lambda p: p.shape and f"{p.kind} {list(p.shape)}", lambda p: None if p.bias is None else _bias(p)):
        found = [(i, what(p)) for i, p in enumerate(parts) if p is not None and what(p)]
        for i, other in found[1:]:
            if other != found[0][1]:
                raise ValueError(
                    f"{name}: {key!r} is {found[0][1]} in {label(loras[found[0][0]], found[0][0])} and {other} in "
                    f"{label(loras[i], i)}; LoRAs of one base model are wanted"
                )


def _bias(part: LowRank | Dense) -> str:
    return f"a layer with bias {list(part.bias.shape)}"


def _combined(
    parts: Sequence[LowRank | Dense | None], weights: list[float], combine: Combine, key: str
) -> tuple[Tensor | None, Tensor | None]:
    """(weight, bias) of one module, each None where no LoRA has one."""
    have = [p for p in parts if p is not None]
    dtype = functools.reduce(torch.promote_types, [p.dtype for p in have], torch.float32)
    weight = bias = None
    if any(p.shape is not None for p in have):
        weight = combine(key, _filled([None if p is None else _own_delta(p, dtype) for p in parts]), list(weights))
    if any(p.bias is not None for p in have):
        biases = [None if p is None or p.bias is None else p.bias.to(dtype, copy=True) for p in parts]
        bias = combine(f"{key}.bias", _filled(biases), list(weights))
    return weight, bias


def _own_delta(part: LowRank | Dense, dtype: torch.dtype) -> Tensor | None:
    """The update as a tensor that may be overwritten: a dense part hands out its own, which is copied."""
    delta = part.delta(dtype) if part.shape is not None else None
    return delta.clone(memory_format=torch.contiguous_format) if isinstance(part, Dense) and part.shape else delta


def _filled(deltas: list[Tensor | None]) -> list[Tensor]:
    """The same list with zeros for None, all on the device of the first one there is."""
    first = next(d for d in deltas if d is not None)
    return [torch.zeros_like(first) if d is None else d.to(first.device) for d in deltas]


def _part(
    parts: Sequence[LowRank | Dense | None],
    weight: Tensor | None,
    bias: Tensor | None,
    name: str,
    key: str,
    rank: int | None,
    dense: bool,
) -> tuple[LowRank | Dense, float, float]:
    """(part, energy lost, energy) of one module's result; the weight is used up."""
    if bias is not None and not math.isfinite(energy_of(bias)):
        raise ValueError(f"{name}: the result for {key + '.bias'!r} is not finite")
    if weight is None:
        return Dense(bias=bias), 0.0, 0.0
    have = [p for p in parts if p is not None and p.shape is not None]
    energy = energy_of(weight)
    if not math.isfinite(energy):
        raise ValueError(f"{name}: the result for {key!r} is not finite")
    if dense or weight.ndim < 2 or (rank is None and any(p.rank is None for p in have)):
        return Dense(weight, bias, have[0].kind), 0.0, energy
    part, lost = low_rank(weight, rank or sum(p.rank for p in have), have[0].kind, bias)
    return part, lost, energy


def low_rank(weight: Tensor, rank: int, kind: str = "linear", bias: Tensor | None = None) -> tuple[LowRank, float]:
    """(a nearly best update of rank at most `rank`, the squared norm of what it leaves out), deterministic.

    weight [out, in, *kernel], or an embedding's [num_embeddings, embedding_dim], floating point; it is used up: what
    is left in it is not to be relied on. The squared norm is measured on the stored factors. Components that are below
    the rounding of the largest one are left out.

    A randomised svd with a fixed seed where its sketch is smaller than the layer, else exact (by the Gram matrix of
    the smaller side in float64: components below 1e-8 of the largest are mixed, which moves energies by 1e-16).
    """
    matrix = weight.T if kind == "embedding" else weight.flatten(1)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    block = rank + OVER
    basis = None if (BLOCKS + 1) * block >= wide.shape[0] else _range(wide, block)
    core = wide if basis is None else basis.T @ wide
    gram = core.cpu().to(torch.float64)
    vectors = torch.linalg.eigh(gram @ gram.T)[1].flip(1)[:, :rank].to(core.device, core.dtype)
    left, right = vectors if basis is None else basis @ vectors, vectors.T @ core
    sizes = torch.linalg.vector_norm(right, dim=1)
    kept = sizes > 8 * torch.finfo(sizes.dtype).eps * sizes[0]
    kept[0] = True
    # A zero update has no direction: both factors are zero then, never 0 / 0.
    root = sizes[kept].sqrt()
    up, down = left[:, kept] * root, right[kept] / root.clamp(min=torch.finfo(root.dtype).tiny)[:, None]
    if wide is not matrix:
        up, down = down.T.contiguous(), up.T.contiguous()
    lost = energy_of(matrix.addmm_(up, down, alpha=-1.0))
    shape = down.shape[1:] if kind == "embedding" else weight.shape[1:]
    return LowRank(down.reshape(-1, *shape), up, bias, kind), lost


def _range(matrix: Tensor, columns: int) -> Tensor:
    """[m, (BLOCKS + 1) columns] orthonormal columns that hold what the leading singular vectors of [m, n] span.

    The QR of all blocks together, not block by block against the earlier ones: a matrix of a low rank fills the space
    early, and what then is left of a block is rounding, which is not orthogonal to anything.
    """
    probe = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    blocks = [torch.linalg.qr(matrix @ probe.to(matrix.device, matrix.dtype))[0]]
    for _ in range(BLOCKS):
        blocks.append(torch.linalg.qr(matrix @ (matrix.T @ blocks[-1]))[0])
    return torch.linalg.qr(torch.cat(blocks, dim=1))[0]


def energy_of(tensor: Tensor) -> float:
    """The squared Frobenius norm, summed in float64."""
    fine = torch.float32 if tensor.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(tensor, dtype=fine)) ** 2
