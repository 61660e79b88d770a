"""Where a LoRA set acts: module paths against the live model, shapes, per-block factors."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from multilora.lora import Dense, Lora, LowRank

# Levels of a module path that wrappers add and LoRA files do not name.
_WRAPPERS = frozenset({"_orig_mod", "base_layer"})
_GLOB = frozenset("*?[")


@dataclass(eq=False)
class Site:
    """One adapted module.

    path     as the LoRAs name it, relative to the component
    module   the live module, inside any wrapper (PEFT layer, compiled module)
    kind     "linear", "conv", "embedding" or "norm"
    parts    [k] LowRank, Dense or None, one per LoRA, in the shape of the module's weight
    factors  [k] the LoRAs' per-block factors here
    """

    path: str
    module: nn.Module
    kind: str
    parts: tuple[LowRank | Dense | None, ...]
    factors: tuple[float, ...]
    ranks: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = tuple((part.rank or 0) if part is not None else 0 for part in self.parts)

    def row(self, row: Sequence[float]) -> list[float]:
        """[k] the row as it acts here: times the block factors, zero where a LoRA has no part."""
        values = zip(row, self.factors, self.parts, strict=True)
        return [v * f if part is not None else 0.0 for v, f, part in values]

    @property
    def channels(self) -> int:
        """The dimension of the output that holds the channels."""
        return 1 if self.kind == "conv" or hasattr(self.module, "num_groups") else -1


def canonical(path: str) -> str:
    """A module path without the levels that wrappers, PEFT and older transformers add."""
    levels = [level for level in path.split(".") if level and level not in _WRAPPERS]
    if levels[:2] == ["base_model", "model"]:
        levels = levels[2:]
    if levels[:1] == ["text_model"]:
        levels = levels[1:]
    return ".".join(levels)


def live_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Canonical path -> module; where wrappers share a path, the innermost module."""
    return {canonical(name): module for name, module in model.named_modules(remove_duplicate=False)}


def kind_of(module: nn.Module) -> str:
    """The kind of layer a module is, by what it carries. A foreign module counts as linear."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or hasattr(module, "kernel_size"):
        return "conv"
    if isinstance(module, nn.Embedding) or hasattr(module, "num_embeddings"):
        return "embedding"
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, Tensor) and weight.ndim == 1
    return "norm" if is_vector and not hasattr(module, "in_features") else "linear"


def shape_of(module: nn.Module) -> tuple[int, ...] | None:
    """The shape that a module's weight has or would have unquantised; None when it does not say."""
    kind = kind_of(module)
    if kind == "conv" and hasattr(module, "in_channels"):
        groups = getattr(module, "groups", 1)
        return (module.out_channels, module.in_channels // groups, *module.kernel_size)
    if kind == "embedding" and hasattr(module, "num_embeddings"):
        return (module.num_embeddings, module.embedding_dim)
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return (module.out_features, module.in_features)
    if hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D keeps its weight transposed
        return (module.nf, module.nx)
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) and weight.is_floating_point() else None


def quantised(module: nn.Module) -> str:
    """What a module is whose weight is not plain floating point, such as "Linear with a weight in int8"; else ""."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return ""
    kind = type(weight)  # torchao, quanto, GGUF and bitsandbytes have tensor classes of their own
    if kind not in (Tensor, nn.Parameter):
        return f"{type(module).__name__} with a weight of type {kind.__name__}"
    if weight.is_floating_point() and weight.element_size() > 1:
        return ""
    return f"{type(module).__name__} with a weight in {str(weight.dtype).removeprefix('torch.')}"


def nearest(name: str, known: Sequence[str], count: int = 3) -> str:
    """`; nearest: a, b, c`, or an empty string when nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)
    return f"; nearest: {', '.join(found)}" if found else ""


def label(lora: Lora, index: int) -> str:
    return f"LoRA {lora.card.name!r}" if lora.card.name else f"LoRA number {index + 1}"


def block_factors(paths: Sequence[str], blocks: Mapping[str, float] | None, who: str) -> dict[str, float]:
    """Factor of every path: of the pattern that is exactly it, else of the last glob that matches it, else 1.

    A glob is matched against the whole dotted path; `*` spans dots. Raises ValueError for a pattern that matches no
    path of the LoRA and for a factor that is not a finite number.
    """
    factors = dict.fromkeys(paths, 1.0)
    if not blocks:
        return factors
    exact: dict[str, float] = {}
    for pattern, value in blocks.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"block {pattern!r} of {who}: a finite number is wanted, got {value!r}")
        plain, hits = canonical(pattern), matching(pattern, paths)
        if not hits:
            inside = [p for p in paths if p.startswith(f"{plain}.")]
            whole = f"; for all {len(inside)} modules in it write {plain + '.*'!r}"
            hint = whole if inside else _near_glob(plain, paths)
            raise ValueError(f"block {pattern!r} of {who} matches none of its {len(paths)} modules{hint}")
        (exact if hits == [plain] else factors).update(dict.fromkeys(hits, float(value)))
    return {**factors, **exact}


def matching(pattern: str, paths: Sequence[str]) -> list[str]:
    """The paths that a pattern means: the one it is exactly, else those it matches as a glob."""
    plain = canonical(pattern)
    return [p for p in paths if p == plain] or (
        [p for p in paths if fnmatchcase(p, plain)] if _GLOB & set(plain) else []
    )


def _near_glob(pattern: str, paths: Sequence[str]) -> str:
    """Nearest names for a glob: whole paths, and their leading parts at the glob's depth."""
    stem = pattern.rstrip("*").rstrip(".")
    depth = stem.count(".") + 1
    heads = list(dict.fromkeys(".".join(p.split(".")[:depth]) for p in paths))
    return nearest(stem, heads) or nearest(pattern, paths)


def sites_of(
    model: nn.Module,
    loras: Sequence[Lora],
    component: str | None = None,
    blocks: Sequence[Mapping[str, float] | None] | None = None,
) -> list[Site]:
    """The modules of `model` that the LoRAs adapt, in the model's order.

    Raises ValueError, naming LoRA, path and nearest names, for a path that is no module of the model, a shape that is
    not the module's, and a block pattern that matches nothing.
    """
    blocks = [None] * len(loras) if blocks is None else list(blocks)
    if len(blocks) != len(loras):
        raise ValueError(f"blocks: {len(blocks)} entries for {len(loras)} LoRAs, wanted one each (None for no blocks)")
    live = live_modules(model)
    parts: dict[str, list[LowRank | Dense | None]] = {}
    factors: dict[str, list[float]] = {}
    for i, lora in enumerate(loras):
        who = label(lora, i)
        own = {canonical(path): part for path, part in lora.part(component).items()}
        missing = [path for path in own if path not in live]
        if missing:
            raise ValueError(
                f"{who}: {missing[0]!r} is no module of {type(model).__name__} ({len(missing)} of its {len(own)} "
                f"modules are not){nearest(missing[0], list(live))}"
            )
        for path, part in own.items():
            parts.setdefault(path, [None] * len(loras))[i] = fitted(part, live[path], f"{who}: {path!r}")
        for path, factor in block_factors(list(own), blocks[i], who).items():
            factors.setdefault(path, [1.0] * len(loras))[i] = factor
    return [
        Site(path, live[path], kind_of(live[path]), tuple(parts[path]), tuple(factors[path]))
        for path in live
        if path in parts
    ]


def fitted(part: LowRank | Dense, module: nn.Module, where: str) -> LowRank | Dense:
    """The part in the shape of a module's weight, where a 1x1 convolution and a linear are one; else ValueError."""
    kind, wanted = kind_of(module), shape_of(module)
    what = f"{where} is a {type(module).__name__}"
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(f"{what} with max_norm, which rewrites its weight when it is called; not supported")
    if part.shape is not None and wanted is not None:
        try:
            part = part.reshaped(wanted)
        except ValueError:
            raise ValueError(
                f"{what} with a weight of shape {list(wanted)}, the LoRA's is {list(part.shape)}: it was made for "
                f"another model"
            ) from None
    if part.shape is not None and part.kind != kind and (part.rank is not None or len(part.shape) > 1):
        raise ValueError(f"{what}, which is a {kind} layer; the LoRA's part is for {part.kind}")
    size = None if wanted is None else wanted[1] if kind == "embedding" else wanted[0]
    if part.bias is not None and size is not None and tuple(part.bias.shape) != (size,):
        raise ValueError(f"{what} with a bias of {size}, the LoRA's has shape {list(part.bias.shape)}")
    return part
