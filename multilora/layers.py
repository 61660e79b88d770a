"""The tensors that a file has for one layer -> its update: LowRank or Dense, several for a fused projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multilora import keys as spelling
from multilora.bases import Base
from multilora.dora import base_weight, materialised
from multilora.lora import Dense, LowRank
from multilora.lycoris import LOHA, LOHA_CORES, LOKR, loha, lokr, tucker, unflattened
from multilora.scales import Scales, alpha_of, checked_scale

MAGNITUDES = ("dora_scale", "magnitude")
# Which tensors an update may be made of; exactly one of these sets per layer.
_KINDS = {
    "lora": {"down", "up", "mid", "up_bias"},
    "embedding": {"embedding_down", "embedding_up"},
    "loha": {*LOHA, *LOHA_CORES},
    "lokr": set(LOKR),
    "diff": {"diff"},
    "norm": {"norm"},
}


# PEFT's names of the kinds, as a configuration gives them.
_PEFT_KINDS = {"lora": "LORA", "embedding": "LORA", "loha": "LOHA", "lokr": "LOKR"}


def low_rank(roles: Mapping) -> bool:
    """Whether a layer's tensors are factors of an update, rather than a difference or a bias."""
    return any(own & set(roles) for kind, own in _KINDS.items() if kind not in ("diff", "norm"))


@dataclass
class Found:
    """What was met while a file was read: names of algorithms, alphas."""

    algorithms: set[str] = field(default_factory=set)
    alphas: set[float] = field(default_factory=set)


def layer_parts(
    layer: str,
    roles: Mapping[str, tuple[str, Tensor]],
    targets: Sequence[str],
    scales: Scales,
    base: Base | None,
    source: str,
    found: Found,
) -> list[LowRank | Dense]:
    """The updates of `targets` that one layer of a file holds.

    layer   its name in the file
    roles   what a tensor is to it -> (key, tensor)
    found   gets the algorithm and the alpha added

    Raises ValueError beginning with source and a key of the layer.
    """
    got = {role: tensor for role, (_, tensor) in roles.items()}
    kinds = [kind for kind, own in _KINDS.items() if own & set(got)]
    shown = roles[next((r for r in got if kinds and r in _KINDS[kinds[0]]), next(iter(got)))][0]
    try:
        if len(kinds) > 1:
            both = " and ".join(roles[next(r for r in got if r in _KINDS[kind])][0] for kind in kinds[:2])
            raise ValueError(f"two kinds of update for one layer, {kinds[0]} and {kinds[1]} ({both})")
        said = scales.kind(layer)
        if said and kinds and said != _PEFT_KINDS.get(kinds[0], said):
            raise ValueError(f"the configuration says peft_type={said}, this is a tensor of {_PEFT_KINDS[kinds[0]]}")
        magnitude = next((m for m in MAGNITUDES if m in got), "")
        if not kinds and not ({"bias", "whole_bias"} & set(got)):
            what = "a DoRA magnitude" if magnitude else "an alpha"
            raise ValueError(f"{what} without its factors")
        bias = got["bias"].flatten() if "bias" in got else _bias(targets, got, base)
        part = _update(kinds[0] if kinds else "", layer, roles, got, bias, scales, f"{source}: key {shown}", found)
        shapes = [base.shapes.get(target) for target in targets] if base else []
        if kinds and kinds[0] in ("loha", "lokr") and len(shapes) == 1 and shapes[0]:
            part = unflattened(part, shapes[0])
        if magnitude:
            weight = base_weight(base, targets)
            if part.shape is not None and part.shape != tuple(weight.shape):
                part = part.reshaped(tuple(weight.shape))
            part = materialised(part, got[magnitude], weight, spelling=magnitude)
            found.algorithms.add("dora")
        elif scales.says_dora(layer) and kinds and kinds[0] in ("lora", "embedding"):
            raise ValueError("an incomplete DoRA: use_dora is set, but the layer has no magnitude vector")
        if spelling.halves_swapped(layer) and part.shape and part.shape[0] == 2 * part.shape[1]:
            part = _rows(part, torch.arange(part.shape[0]).roll(part.shape[1]))
        return [part] if len(targets) == 1 else _split_rows(part, shapes, len(targets))
    except ValueError as error:
        raise ValueError(f"{source}: key {shown}: {error}") from None


def _update(kind, layer, roles, got, bias, scales, where, found) -> LowRank | Dense:
    """The update of a whole projection, scale folded in."""
    if kind in ("diff", "norm", ""):
        weight = got.get(kind)
        if weight is not None and weight.ndim == 4 and weight.shape[1:] == (1, 1, 1):
            weight = weight.flatten()  # LyCORIS writes the weight of a norm so
        found.algorithms.add(kind or "bias")
        return Dense(weight, bias, "conv" if weight is not None and weight.ndim > 2 else "linear")
    alpha = alpha_of(got["alpha"]) if "alpha" in got else None
    if kind in ("loha", "lokr"):
        part, rank = loha(got) if kind == "loha" else lokr(got)
        if alpha is None:
            alpha, rank, rslora = scales.of(layer, rank)
        else:
            rslora = False
        scale = checked_scale(alpha, rank, rslora, where=where)
        part = part if scale == 1.0 else part * scale
        found.algorithms.add(kind)
        _remember(found, alpha, rslora)
        if bias is None:
            return part
        return Dense(part.weight, bias, part.kind) if isinstance(part, Dense) else _with_bias(part, bias)
    low, high = ("embedding_down", "embedding_up") if kind == "embedding" else ("down", "up")
    for one, other in ((low, high), (high, low)):
        if one not in got:
            there = roles.get(other, next(iter(roles.values())))[0]
            raise ValueError(f"{there} has no partner: its {'up' if one == high else 'down'} factor is missing")
    down, up = got[low], got[high]
    if down.ndim < 2 or not min(down.shape) or up.ndim < 2:
        raise ValueError(f"factors {list(down.shape)} and {list(up.shape)}: wanted [rank, in] and [out, rank]")
    if "mid" in got:
        down = tucker(down, got["mid"])
    rslora = False
    if alpha is None:
        alpha, _, rslora = scales.of(layer, down.shape[0])
    checked_scale(alpha, down.shape[0], rslora, where=where)
    found.algorithms.add("locon" if "mid" in got or (down.ndim > 2 and down[0, 0].numel() > 1) else "lora")
    _remember(found, alpha, rslora)
    return LowRank.from_factors(
        down, up, alpha=alpha, rslora=rslora, bias=bias, up_bias=got.get("up_bias"),
        kind="embedding" if kind == "embedding" else None,
    )  # fmt: skip


def _remember(found: Found, alpha: float | None, rslora: bool) -> None:
    if alpha is not None:
        found.alphas.add(float(alpha))
    if rslora:
        found.algorithms.add("rslora")


def _with_bias(part: LowRank, bias: Tensor) -> LowRank:
    return LowRank(part.down, part.up, bias, part.kind)


def _bias(targets: Sequence[str], got: Mapping[str, Tensor], base: Base | None) -> Tensor | None:
    """PEFT's bias="all" stores the layer's whole trained bias: its update is the difference to the base's."""
    if "whole_bias" not in got:
        return None
    own = base.modules.get(targets[0]) if base and len(targets) == 1 else None
    there = getattr(getattr(own, "base_layer", own), "bias", None)
    if not isinstance(there, Tensor) or there.shape != got["whole_bias"].shape:
        raise ValueError("a whole trained bias needs its base model: load it with base=")
    dtype = torch.promote_types(got["whole_bias"].dtype, torch.float32)
    return got["whole_bias"].to(dtype) - there.detach().to("cpu", dtype)


def _rows(part: LowRank | Dense, rows: Tensor) -> LowRank | Dense:
    """The update of some outputs of a layer, in the order of `rows`."""
    bias = None if part.bias is None else part.bias[rows]
    if isinstance(part, Dense):
        return Dense(None if part.weight is None else part.weight[rows], bias, part.kind)
    return LowRank(part.down, part.up[rows], bias, part.kind)


def _split_rows(whole: LowRank | Dense, shapes: Sequence[tuple | None], count: int) -> list[LowRank | Dense]:
    """A fused projection as its parts in row order: of the base's rows, else thirds, or q, k, v of the input's width
    and the rest."""
    if whole.shape is None:
        raise ValueError("a bias of a fused projection alone is not read here")
    out, wide = whole.shape[:2]
    rows = [shape[0] if shape else 0 for shape in shapes]
    if sum(rows) != out or not all(rows):
        rows = [out // count] * count if count == 3 else [wide] * (count - 1) + [out - wide * (count - 1)]
    if sum(rows) != out or min(rows) < 1:
        raise ValueError(f"{out} rows of a fused projection cannot be split into {count} parts")
    starts = [sum(rows[:i]) for i in range(count)]
    if isinstance(whole, LowRank):  # views, as the file has them
        biases = [None] * count if whole.bias is None else whole.bias.split(rows)
        return [LowRank(whole.down, up, b, whole.kind) for up, b in zip(whole.up.split(rows), biases, strict=True)]
    return [_rows(whole, torch.arange(start, start + n)) for start, n in zip(starts, rows, strict=True)]
