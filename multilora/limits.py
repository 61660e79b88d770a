"""Bounds that a LoRA file must keep, and the one-line text that anything a file says about itself is shown as.

Two sets: `Limits()` for files of strangers, and `LOCAL`, wide enough for every file that a person would keep on their
own disk (mixtures of experts, dense differences of whole models, sums of many LoRAs). Both bound everything.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora.lora import Dense, Lora, LowRank

# Typographic twins: harmless in HTML, in an attribute, in a shell and in a table, and still readable.
_TWINS = str.maketrans({"<": "‹", ">": "›", '"': "”", "`": "‘", "\\": "＼"})


@dataclass(frozen=True)
class Limits:
    """What a file may hold at most. Every refusal names the limit by its name here.

    file_bytes      apparent size, so a sparse file counts in full. The largest published LoRAs (FLUX.1, all layers,
                    rank 128, 16 bits) have 1.3 GB; a file is read into memory once
    header_bytes    of the JSON header; 3,000 tensors with long names need 400 kB, and parsing is pure Python
    tensors         in a file; an SDXL LoRA with text encoders has 2,400, a LyCORIS of everything 8,000
    ndim            of a tensor: 5 is a convolution over time
    dimension       of a tensor; vocabularies have some 10^5 rows
    key_chars       of a tensor's name: letters, digits, dots, underscores and hyphens (Z-Image has a layer "2-1")
    text_bytes      of one metadata text that is parsed, and of a PEFT configuration
    json_depth      of nested objects and lists in those
    rank            of a low-rank update; servers of LoRAs stop at 512, extracted ones go to 1,024. A rank above the
                    layer's own is read with a note
    value           largest |value| of a stored factor or difference: the largest float16, beyond which a model in half
                    precision gets infinities
    norm            Frobenius norm of one module's update; the weights themselves have norms of 10 to 200
    expanded        values of one module's whole difference, where a small file (LoHa, LoKr) becomes a large one;
                    FLUX.1's widest layer has 66 million
    expanded_total  the same, of all modules of a file; FLUX.1 as a whole has 12 billion

    The scale alpha / rank has a bound of its own, multilora.scales.SCALE_CAP, the same for all files.
    """

    file_bytes: int = 2**31
    header_bytes: int = 10**6
    tensors: int = 20_000
    ndim: int = 5
    dimension: int = 2**24
    key_chars: int = 256
    text_bytes: int = 10**6
    json_depth: int = 8
    rank: int = 1024
    value: float = 65504.0
    norm: float = 1000.0
    expanded: int = 2**27
    expanded_total: int = 2**34

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"limit {name}={value!r}: wanted a number above 0")


# A file on one's own disk: larger where legitimate files are, never unbounded.
LOCAL = Limits(
    file_bytes=2**36, header_bytes=16 * 10**6, tensors=200_000, text_bytes=16 * 10**6, rank=2**15, norm=1e6,
    expanded=2**31, expanded_total=2**37,
)  # fmt: skip


def shown(text: object, most: int = 100) -> str:
    """Any text as one line that can be displayed anywhere: the name of a file, a key, a label, a metadata value.

    Control, format (bidirectional, zero-width), surrogate and private characters are spelled as \\uXXXX with a wide
    backslash, white space becomes one blank, characters with a meaning in HTML become their typographic twins, and
    what is longer than `most` characters is cut with "…". Nothing is left of an empty text but "(unnamed)".
    """
    text = text if isinstance(text, str) else str(text)
    cut = text[: most + 1]
    words = "".join(
        " " if c.isspace() else f"＼u{ord(c):04x}" if unicodedata.category(c) in _UNSEEN else c for c in cut
    ).translate(_TWINS)
    words = " ".join(words.split())
    return (words if len(words) <= most and len(text) <= most else words[: most - 1] + "…") or "(unnamed)"


_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn"}


def broken(tensor: Tensor) -> int:
    """How many values are NaN or infinite. One reduction when none is, which costs a fortieth of torch.isfinite."""
    if not tensor.numel():
        return 0
    if tensor.dtype.is_floating_point:
        low, high = torch.aminmax(tensor)  # NaN comes through
        if math.isfinite(float(low)) and math.isfinite(float(high)):
            return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def _largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def _expanded(got: Mapping[str, tuple[str, Tensor]]) -> int:
    """Values of the difference that LyCORIS' products in one layer may become, at most; 0 for other updates."""

    def side(name: str, core: str) -> int:
        size = got[name][1].numel() if name in got else 1
        if f"{name}_a" in got and f"{name}_b" in got:
            a, b = got[f"{name}_a"][1], got[f"{name}_b"][1]
            size = max(a.shape, default=1) * max(b.numel() // max(b.shape[0], 1) if b.ndim else 1, 1)
        return size * (math.prod(got[core][1].shape[2:]) if core in got else 1)

    if any(role.startswith("hada_") for role in got):
        return max(side("hada_w1", "hada_t1"), side("hada_w2", "hada_t2"))
    if any(role.startswith("lokr_") for role in got):
        return side("lokr_w1", "") * side("lokr_w2", "lokr_t2")
    return 0


def growth_within(layers: Mapping[str, Mapping[str, tuple[str, Tensor]]], limits: Limits, *, source: str) -> None:
    """Raise ValueError when the products in a file (layer -> role -> (key, tensor)) are too large to be built."""
    total = 0
    for layer, got in layers.items():
        size = _expanded(got)
        total += size
        if size > limits.expanded:
            limit = f"above the limit expanded={limits.expanded:,}"
            raise ValueError(f"{source}: key {layer}: its whole difference would have {size:,} values, {limit}")
    if total > limits.expanded_total:
        limit = f"above the limit expanded_total={limits.expanded_total:,}"
        raise ValueError(f"{source}: its whole differences would have {total:,} values, {limit}")


def within(lora: Lora, limits: Limits, *, source: str) -> list[str]:
    """Check ranks, values and norms of a Lora; the notes on what is odd but allowed come back.

    Raises ValueError naming source, key, the value found and the limit.
    """
    above = []
    for key, part in lora.items():
        where = f"{source}: key {key}"
        if part.rank is not None and part.rank > limits.rank:
            raise ValueError(f"{where}: rank {part.rank} is above the limit rank={limits.rank}")
        if part.rank is not None and part.rank > min(part.shape[0], math.prod(part.shape[1:])):
            above.append(key)
        named = [(n, t) for n in ("down", "up", "weight", "bias") if (t := getattr(part, n, None)) is not None]
        for name, tensor in named:
            largest = _largest(tensor) if tensor.numel() else 0.0
            if not largest <= limits.value:
                raise ValueError(f"{where}: its {name} holds {largest:.3g}, above the limit value={limits.value:g}")
        norm = _norm_bound(part)
        norm = norm if norm <= limits.norm else _norm(part)
        if not norm <= limits.norm:
            raise ValueError(f"{where}: norm {norm:.3g} of its update is above the limit norm={limits.norm:g}")
    if not above:
        return []
    return [f"rank above the layer's own in {len(above)} modules, first {above[0]}: more than it can use"]


def _norm(part: LowRank | Dense) -> float:
    """The Frobenius norm of the update, to the precision of float32, by the Gram matrices of its factors."""
    if not isinstance(part, LowRank):
        return part.norm()
    down, up = part.down.float().flatten(1), part.up.float()
    square = float(((up.T @ up) * (down @ down.T)).sum(dtype=torch.float64))
    return math.hypot(math.sqrt(max(square, 0.0)), 0.0 if part.bias is None else float(part.bias.float().norm()))


def _norm_bound(part: LowRank | Dense) -> float:
    """At least the Frobenius norm of the update, from the factors' norms alone."""
    bias = 0.0 if part.bias is None else float(torch.linalg.vector_norm(part.bias))
    if isinstance(part, LowRank):
        return math.hypot(float(torch.linalg.vector_norm(part.down)) * float(torch.linalg.vector_norm(part.up)), bias)
    return math.hypot(0.0 if part.weight is None else float(torch.linalg.vector_norm(part.weight)), bias)
