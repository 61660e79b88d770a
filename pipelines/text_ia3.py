"""(IA)^3 vectors of a language model: read from PEFT's folders, added and negated, and as updates of the weights.

(IA)^3 (arXiv 2205.05638) rescales keys and values where they leave their layers, and the inner activations of a
feed-forward block where they enter its last layer: y = (W x) * l, or y = W (x * l). Either is W plus an update that is
linear in l - 1, so that as Loras the vectors obey PEM's rules (arXiv 2306.14870) in update space: a weighted sum is
1 + sum_i w_i (l_i - 1), negation 2 - l is weight -1, an analogy weights 1, 1 and -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from multilora.limits import LOCAL, shown, within
from multilora.lora import Card, Dense, Lora
from multilora.reading import read_json, read_tensors
from multilora.rebuilt import pristine

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _END = "base_model.model.", ".ia3_l"


@dataclass(frozen=True)
class Scale:
    """An (IA)^3 vector of one layer. side: "out", on what it gives [out], or "in", on what it gets [in]."""

    vector: Tensor
    side: str


def is_ia3(path: Path) -> bool:
    """Whether a PEFT folder says that it holds (IA)^3 vectors."""
    config = path / PEFT_CONFIG
    said = read_json(config, where=f"{path.name}/{PEFT_CONFIG}") if config.is_file() else None
    return isinstance(said, Mapping) and str(said.get("peft_type")).rpartition(".")[2] == "IA3"


def load_ia3(path: Path, model: nn.Module, name: str | None = None) -> Lora:
    """The vectors of a PEFT folder as a Lora of `model`, in whose weights the updates are.

    Raises ValueError naming file and key for what is no (IA)^3 vector of a linear layer of the model, or has values
    above the limits of a LoRA's.
    """
    scales, digest = read_ia3(path)
    lora = as_lora(scales, model, name or path.name)
    within(lora, LOCAL, source=shown(path.name))
    about = {"file": path.name, "format": "peft", "algorithms": ["ia3"]}
    return lora.replace(card=lora.card.replace(sha256=digest, provenance=about))


def read_ia3(path: Path) -> tuple[dict[str, Scale], str]:
    """({path of a layer: vector}, sha256) of a PEFT folder. The vector's shape says its side: [out, 1] or [1, in]."""
    where = f"{path.name}/{PEFT_WEIGHTS}"
    if not (path / PEFT_WEIGHTS).is_file():
        raise ValueError(f"{path.name}: {PEFT_WEIGHTS} is missing")
    tensors, _, digest = read_tensors(path / PEFT_WEIGHTS, where=where)
    scales = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX) or not key.endswith(_END):
            raise ValueError(f"{where}: key {key}: wanted {_PREFIX}<layer>{_END}, an (IA)^3 vector")
        if tensor.ndim != 2 or 1 not in tensor.shape:
            raise ValueError(f"{where}: key {key} has shape {list(tensor.shape)}, wanted [out, 1] or [1, in]")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: key {key} holds values that are no finite numbers")
        layer = key.removeprefix(_PREFIX).removesuffix(_END)
        scales[layer] = Scale(tensor.flatten(), "out" if tensor.shape[1] == 1 else "in")
    if not scales:
        raise ValueError(f"{where}: holds no (IA)^3 vector")
    return scales, digest


def combined(terms: Sequence[Mapping[str, Scale]], weights: Sequence[float]) -> dict[str, Scale]:
    """1 + sum_i w_i (l_i - 1): PEM's addition for weights that sum to 1, its negation 2 - l for one term at -1."""
    found = {}
    for path in dict.fromkeys(path for term in terms for path in term):
        here = [(term[path], w) for term, w in zip(terms, weights, strict=True) if path in term]
        found[path] = Scale(1.0 + sum(w * (one.vector - 1.0) for one, w in here), here[0][0].side)
    return found


def as_lora(scales: Mapping[str, Scale], model: nn.Module, name: str = "") -> Lora:
    """The vectors as updates of the model's weights: W * (l - 1) along the rows or columns, biases with the rows.

    Raises ValueError for a layer that is no nn.Linear, or that a vector does not fit.
    """
    parts, layers = {}, dict(model.named_modules())
    for path, scale in scales.items():
        layer: Any = layers.get(path)
        if not isinstance(layer, nn.Linear):
            here = "the model has no such layer" if layer is None else f"this is a {type(layer).__name__}"
            raise ValueError(f"{path}: (IA)^3 vectors belong to linear layers, {here}")
        if not layer.weight.is_floating_point():
            raise ValueError(f"{path}: its weight is {layer.weight.dtype}, (IA)^3 wants a floating-point one")
        wanted = layer.out_features if scale.side == "out" else layer.in_features
        if tuple(scale.vector.shape) != (wanted,):
            raise ValueError(f"{path}: a vector of {list(scale.vector.shape)}, the layer wants [{wanted}]")
        change = (scale.vector - 1.0).to(layer.weight)
        weight = pristine(layer.weight) * (change[:, None] if scale.side == "out" else change[None])
        bias = pristine(layer.bias) * change if scale.side == "out" and layer.bias is not None else None
        parts[path] = Dense(weight, bias)
    return Lora(parts, Card(name, family=str(getattr(model.config, "model_type", ""))))
