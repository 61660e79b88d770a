"""LoRAs side by side, from their factors: how much they agree, where their energy is, which directions they share.

    found = compare([fox, robe])
    found.cosine[0][1]                  # of the whole updates, in [-1, 1]
    found.blocks["unet.mid_block"]      # the same per block, with the norms
    found.overlap_in[0][1]              # shared input directions, 0 to 1, beside what chance gives

No update is ever multiplied out: <up_i down_i, up_j down_j> is the trace of a product of two r x r matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from multilora.lora import COMPONENTS, Dense, Lora, LowRank
from multilora.sites import label

SHARES = (0.5, 0.9, 0.95, 0.99)  # of energy, for which the needed rank is told


@dataclass(frozen=True)
class Block:
    """One block of a model: its number of modules there, norms [k] and cosines [k][k] (None where one has norm 0)."""

    modules: int
    norms: list[float]
    cosine: list[list[float | None]]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found about k LoRAs.

    names        [k]
    norms        [k] Frobenius norms of all weight updates together
    modules      how many modules each has [k], and how many all have
    cosine       [k][k] of the whole updates; modules that one lacks count as zero there
    blocks       the same by block, in the order of the keys
    spectrum     [k] lists: share of the energy that the r largest directions of every module hold, r = 1, 2, ...
    ranks        [k] mappings share -> the smallest r that holds it, None without an effect
    overlap_in, overlap_out  [k][k] share of the smaller one's input (output) directions that lie in the other's, mean
                 over the modules that both have; the diagonal is 1, None where they share no low-rank module
    chance_in, chance_out    the same for random directions of these ranks and sizes
    """

    names: list[str]
    norms: list[float]
    modules: list[int]
    shared: int
    cosine: list[list[float | None]]
    blocks: dict[str, Block]
    spectrum: list[list[float]] = field(default_factory=list)
    ranks: list[dict[str, int | None]] = field(default_factory=list)
    overlap_in: list[list[float | None]] = field(default_factory=list)
    overlap_out: list[list[float | None]] = field(default_factory=list)
    chance_in: list[list[float | None]] = field(default_factory=list)
    chance_out: list[list[float | None]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "blocks": {name: vars(block) for name, block in self.blocks.items()}}


def block_of(key: str) -> str:
    """The block that a module belongs to: its path up to the first number, whole for "mid_block"."""
    words = key.split(".")
    start = 1 if words[0] in COMPONENTS and len(words) > 1 else 0
    if words[start] == "mid_block":
        return ".".join(words[: start + 1])
    number = next((i for i in range(start, len(words)) if words[i].isdecimal()), None)
    return ".".join(words[: start + 1 if number is None else number + 1])


def inner(a: LowRank | Dense, b: LowRank | Dense) -> float:
    """<a, b>, the sum of the products of their entries, biases left out, in float64 where the device has it.

    Raises ValueError when they are updates of different layers.
    """
    if a.shape is None or b.shape is None:
        return 0.0
    if a.shape != b.shape:
        raise ValueError(f"updates of different layers: {list(a.shape)} and {list(b.shape)}")
    if isinstance(a, Dense) and isinstance(b, LowRank):
        a, b = b, a
    if isinstance(a, Dense):
        return float((_fine(a.weight) * _fine(b.weight)).sum())
    up, down = _fine(a.up), _fine(a.down).flatten(1)
    if isinstance(b, Dense):
        matrix = _fine(b.weight)
        matrix = matrix.T if a.kind == "embedding" else matrix.flatten(1)
        return float((up * (matrix @ down.T)).sum())
    return float(((up.T @ _fine(b.up)) * (down @ _fine(b.down).flatten(1).T)).sum())


def _fine(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "mps" else tensor.to(torch.float64)


def grams(loras: Sequence[Lora]) -> dict[str, list[list[float]]]:
    """key -> [k][k] inner products of the LoRAs' updates there, zero where one lacks the module.

    Raises ValueError naming the LoRAs and the key when they are updates of different layers.
    """
    found = {}
    for key in dict.fromkeys(key for lora in loras for key in lora):
        gram = [[0.0] * len(loras) for _ in loras]
        for i, one in enumerate(loras):
            for j, other in enumerate(loras[: i + 1]):
                if key in one and key in other:
                    try:
                        gram[i][j] = gram[j][i] = inner(one[key], other[key])
                    except ValueError as error:
                        raise ValueError(f"{label(one, i)} and {label(other, j)}, {key}: {error}") from None
        found[key] = gram
    return found


def shares_of(merged: Lora, loras: Sequence[Lora]) -> list[float | None]:
    """[k] how much of each LoRA is in `merged`: <merged, lora> / <lora, lora>; None for one without any effect.

    A sum of LoRAs at right angles has its weights here; a LoRA that others agree with has more.
    """
    found: list[float | None] = []
    for lora in loras:
        mixed = math.fsum(inner(merged[key], part) for key, part in lora.items() if key in merged)
        own = math.fsum(inner(part, part) for part in lora.values())
        found.append(mixed / own if own else None)
    return found


def energy_kept(before: Lora, after: Lora) -> tuple[float, dict[str, float]]:
    """(share in all, {key: share}) of the energy of `before` that `after` still holds: 1 - |b - a|² / |b|².

    Measured on the difference, whatever made `after`; biases are left out. Modules without an update count as kept.
    """
    kept: dict[str, float] = {}
    lost, total = [], []
    for key, part in before.items():
        if part.shape is None:
            continue
        own = inner(part, part)
        gone = own if key not in after else _weight_only(part, after[key])
        kept[key] = 1.0 - gone / own if own else 1.0
        lost.append(gone)
        total.append(own)
    whole = math.fsum(total)
    return (1.0 - math.fsum(lost) / whole if whole else 1.0), kept


def _weight_only(a: LowRank | Dense, b: LowRank | Dense) -> float:
    """|a - b|², biases left out, through the small matrices of the factors, so that it may be far below |a|²."""
    difference = a + b * -1.0
    if isinstance(difference, Dense):
        return float(_fine(difference.weight).square().sum())
    return float(difference.singular_values().square().sum())


def energies(lora: Lora) -> dict[str, float]:
    """Squared norm of the weight updates by block, in the order of the keys."""
    found: dict[str, list[float]] = {}
    for key, part in lora.items():
        found.setdefault(block_of(key), []).append(inner(part, part))
    return {block: math.fsum(values) for block, values in found.items()}


def spectrum_of(lora: Lora) -> list[float]:
    """Share of the energy that the r largest directions of every module hold, r = 1, 2, ...; [] without an effect."""
    return _spectrum([_values(part) for part in lora.values()])


def _values(part: LowRank | Dense) -> Tensor:
    """The singular values of an update, largest first; of a norm's weight the absolute values."""
    if isinstance(part, LowRank):
        return part.singular_values()
    if part.weight is None:
        return torch.zeros(0)
    weight = _fine(part.weight)
    if weight.ndim < 2:
        return weight.abs().flatten().sort(descending=True)[0]
    return torch.linalg.svdvals(weight.flatten(1))


def _spectrum(found: Sequence[Tensor]) -> list[float]:
    squares = [values.square().to("cpu", torch.float64) for values in found]
    held = torch.zeros(max((len(s) for s in squares), default=0), dtype=torch.float64)
    for s in squares:
        held[: len(s)] += s
    total = float(held.sum())
    if not total:
        return []
    shares = (held.cumsum(0) / total).clamp(max=1.0)
    return shares[: int((shares >= 1.0 - 1e-12).int().argmax()) + 1].tolist()


def compare(loras: Sequence[Lora]) -> Comparison:
    """Compare LoRAs of one base, biases left out. Raises ValueError for updates of different layers under one key."""
    loras = list(loras)
    if not loras:
        raise ValueError("compare: wanted at least one LoRA, got none")
    by_key = grams(loras)
    blocks: dict[str, list[list[list[float]]]] = {}
    for key, gram in by_key.items():
        blocks.setdefault(block_of(key), []).append(gram)
    total = _summed(list(by_key.values()), len(loras))
    spectra = [spectrum_of(lora) for lora in loras]
    sides = _overlaps(loras)
    return Comparison(
        names=[lora.card.name or f"LoRA {i + 1}" for i, lora in enumerate(loras)],
        norms=_norms(total),
        modules=[len(lora) for lora in loras],
        shared=sum(all(key in lora for lora in loras) for key in by_key),
        cosine=_cosines(total),
        blocks={name: _block(part, len(loras)) for name, part in blocks.items()},
        spectrum=spectra,
        ranks=[_ranks(shares) for shares in spectra],
        overlap_in=sides["in"][0],
        overlap_out=sides["out"][0],
        chance_in=sides["in"][1],
        chance_out=sides["out"][1],
    )


def _summed(found: Sequence[Sequence[Sequence[float]]], k: int) -> list[list[float]]:
    return [[math.fsum(gram[i][j] for gram in found) for j in range(k)] for i in range(k)]


def _norms(gram: Sequence[Sequence[float]]) -> list[float]:
    return [math.sqrt(max(gram[i][i], 0.0)) for i in range(len(gram))]


def _cosines(gram: Sequence[Sequence[float]]) -> list[list[float | None]]:
    norms = _norms(gram)

    def one(i: int, j: int) -> float | None:
        return max(-1.0, min(1.0, gram[i][j] / (norms[i] * norms[j]))) if norms[i] and norms[j] else None

    return [[one(i, j) for j in range(len(gram))] for i in range(len(gram))]


def _block(found: Sequence[Sequence[Sequence[float]]], k: int) -> Block:
    gram = _summed(found, k)
    return Block(len(found), _norms(gram), _cosines(gram))


def _ranks(shares: Sequence[float]) -> dict[str, int | None]:
    return {f"{s:g}": next((r for r, held in enumerate(shares, 1) if held >= s - 1e-9), None) for s in SHARES}


def _spans(part: LowRank) -> dict[str, Tensor] | None:
    """Orthonormal input and output directions [n, r] of an update; None without an effect."""
    left, a = torch.linalg.qr(_fine(part.up))
    right, b = torch.linalg.qr(_fine(part.down).flatten(1).T)
    u, s, vh = torch.linalg.svd(a @ b.T, full_matrices=False)
    if not float(s[0]) > 0:
        return None
    keep = s > 1e-5 * s[0]  # below are the roundings of float32 factors, which have no direction
    return {"in": right @ vh[keep].T, "out": left @ u[:, keep]}


def _overlaps(loras: Sequence[Lora]) -> dict[str, tuple[list[list[float | None]], list[list[float | None]]]]:
    """side -> ([k][k] mean overlap, [k][k] what chance gives), over the low-rank modules that both have.

    |U_i^T U_j|² / min(r_i, r_j) with orthonormal U: the measure of arXiv 2106.09685, section 7.2, equation 4. For
    random directions in n dimensions its mean is max(r_i, r_j) / n.
    """
    k = len(loras)
    seen: dict[str, list[list[list[tuple[float, float]]]]] = {
        side: [[[] for _ in range(k)] for _ in range(k)] for side in ("in", "out")
    }
    for key in dict.fromkeys(key for lora in loras for key in lora):
        spans = [_spans(part) if isinstance(part := lora.get(key), LowRank) else None for lora in loras]
        for i, j in itertools.combinations_with_replacement(range(k), 2):
            one, other = spans[i], spans[j]
            if one is None or other is None:
                continue
            for side, found in seen.items():
                low, high = sorted((one[side].shape[1], other[side].shape[1]))
                share = float((one[side].T @ other[side]).square().sum()) / low
                found[i][j].append((share, high / len(one[side])))
    return {side: _means(found) for side, found in seen.items()}


def _means(found: Sequence[Sequence[Sequence[tuple[float, float]]]]) -> tuple[list, list]:
    """Of the upper triangle of lists of pairs: the [k][k] means of the first and of the second numbers."""
    means = [[_mean(found[min(i, j)][max(i, j)]) for j in range(len(found))] for i in range(len(found))]
    return [[m[0] for m in row] for row in means], [[m[1] for m in row] for row in means]


def _mean(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    if not pairs:
        return None, None
    return math.fsum(p[0] for p in pairs) / len(pairs), math.fsum(p[1] for p in pairs) / len(pairs)


def in_words(found: Comparison, i: int, j: int) -> str:
    """One line about two of the LoRAs, for people."""
    pair, cosine = f"{found.names[i]} and {found.names[j]}", found.cosine[i][j]
    if cosine is None:
        return f"{pair}: one has no effect"
    how = "nearly at right angles" if abs(cosine) < 0.1 else "slightly alike" if cosine > 0 else "slightly opposed"
    how = "nearly the same" if cosine > 0.9 else "alike" if cosine > 0.3 else "opposed" if cosine < -0.3 else how
    return f"{pair}: cosine {cosine:+.3f}, {how}"
