"""LoRA files <-> Lora: diffusers, kohya / A1111 and PEFT, read and written.

Only safetensors are read, by extension and by content. A file's metadata drives nothing but the scale of its own
tensors (and, of a PEFT folder, the component they belong to), and is refused where it contradicts them. Every error is
a ValueError that names file and key or field.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora import keys as spelling
from multilora.bases import FAMILIES, Base, base_of, family_of, family_of_model
from multilora.lora import COMPONENTS, Card, Dense, Lora, LowRank
from multilora.reading import read_tensors
from multilora.writing import save, state

__all__ = ["family_of", "family_of_model", "fits", "load", "read", "save", "state"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# Fields of a PEFT configuration that change what the weights mean; set, they make the adapter another kind.
_OTHER_PEFT = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules saved beside the LoRA (modules_to_save)",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA of bare parameters (target_parameters)",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "megatron_config": "Megatron layers",
    "arrow_config": "Arrow routing",
}
_MOST = 10  # names listed in one error


def _names(found: list[str]) -> str:
    return ", ".join(found[:_MOST]) + (f", and {len(found) - _MOST} more" if len(found) > _MOST else "")


def load(path: str | Path, base: Any = None, *, name: str | None = None) -> Lora:
    """The Lora in a .safetensors file or a PEFT folder, checked.

    base  a diffusers pipeline, a module, a saved pipeline's folder or "embedded": every key must then name one of its
          layers with the right shape. Without it paths are taken from the keys alone, and nothing is checked against
          a model
    name  of the card; default is the name written into the file by `save`, else the file's

    Raises ValueError naming file, key or field, what was expected and what was found.
    """
    path = Path(path).expanduser()
    against = None if base is None else base_of(base)
    if path.is_dir():
        return _load_folder(path, against, name)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name}: wanted a .safetensors file or a PEFT folder with {PEFT_CONFIG} in it")
    tensors, metadata, digest = read_tensors(path)
    lora = read(tensors, metadata, base=against, source=path.name)
    return lora.replace(card=_card(lora, metadata, digest, path, name, against))


def _load_folder(path: Path, base: Base | None, name: str | None, component: str = "") -> Lora:
    if not (path / PEFT_CONFIG).is_file():
        parts = [c for c in COMPONENTS if (path / c / PEFT_CONFIG).is_file()]
        if not parts:
            raise ValueError(f"{path.name}: no PEFT folder, {PEFT_CONFIG} is missing; or give a .safetensors file")
        loras = [_load_folder(path / c, base, name or path.name, c) for c in parts]
        return Lora({k: p for lora in loras for k, p in lora.items()}, loras[0].card)
    where = f"{path.name}/{PEFT_CONFIG}"
    try:
        config = json.loads((path / PEFT_CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{where}: holds a {type(config).__name__}, wanted an object")
    if not (path / PEFT_WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").exists()
        hint = "; adapter_model.bin is a pickle, which is never read" if pickled else ""
        raise ValueError(f"{path.name}: {PEFT_WEIGHTS} is missing{hint}")
    tensors, metadata, digest = read_tensors(path / PEFT_WEIGHTS)
    component = component or str(_own(metadata).get("component", ""))
    component = component if component in COMPONENTS else ""
    lora = read(tensors, metadata, config, base=base, source=path.name, component=component)
    return lora.replace(card=_card(lora, metadata, digest, path, name, base))


def _own(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `save` wrote about the LoRA: names and words to show, and the component of a PEFT folder."""
    try:
        own = json.loads(metadata.get("multilora", "{}"))
    except (json.JSONDecodeError, RecursionError):
        own = {}
    return own if isinstance(own, dict) else {}


def _card(lora: Lora, metadata: Mapping[str, str], digest: str, path: Path, name: str | None, base: Any) -> Card:
    own = _own(metadata)
    text = {k: own[k] for k in ("name", "category", "family") if isinstance(own.get(k), str)}
    triggers = own.get("triggers") if isinstance(own.get("triggers"), list) else []
    triggers = [t for t in triggers if isinstance(t, str)]
    family = (base.family if base else "") or text.get("family", "") or family_of(lora)
    provenance = {**lora.card.provenance, "file": path.name}
    own_name = name or text.get("name") or (path.stem if path.is_file() else path.name)
    return Card(own_name, text.get("category", ""), tuple(triggers), family, digest, provenance)


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    base: Any = None,
    source: str = "state dict",
    component: str = "",
) -> Lora:
    """The Lora in a state dict of any known format; pure. Tensors are shared with it where nothing had to be scaled.

    metadata  the header texts of a safetensors file; only diffusers' `lora_adapter_metadata` has a meaning
    config    PEFT's adapter configuration
    base      as in load
    source    what errors call the state dict
    component  put before every path, for formats that hold one component and do not name it

    Raises ValueError naming source and key or field.
    """
    against = None if base is None else base_of(base)
    scales = _Scales(metadata or {}, config, source)
    layers: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        try:
            layer, role = spelling.split(key)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            dtype = getattr(tensor, "dtype", type(tensor).__name__)
            if not (role == "alpha" and isinstance(tensor, Tensor) and not tensor.dtype.is_complex):
                raise ValueError(f"{source}: key {key} is {dtype}, wanted float16, bfloat16, float32 or float64")
        broken = tensor.numel() - int(torch.isfinite(tensor).sum())
        if broken:
            raise ValueError(f"{source}: key {key} has {broken} values that are NaN or infinite, of {tensor.numel()}")
        if role in layers.setdefault(layer, {}):
            raise ValueError(f"{source}: keys {layers[layer][role][0]} and {key} are the same tensor in two spellings")
        layers[layer][role] = (key, tensor)
    if not layers:
        raise ValueError(f"{source}: contains no LoRA tensors")
    parts: dict[str, LowRank | Dense] = {}
    for layer, roles in layers.items():
        path = f"{component}.{layer.removeprefix('base_model.model.')}" if component else layer
        targets = against.locate(path) if against else spelling.locate(path)
        for target, part in zip(targets, _parts(layer, roles, len(targets), scales, against, source), strict=True):
            if target in parts:
                raise ValueError(f"{source}: two layers of the file mean {target}, one of them is {layer}")
            if against and against.shapes.get(target) and part.shape:
                want = against.shapes[target]
                if want != part.shape and want[:2] == part.shape[:2] and {*want[2:], *part.shape[2:]} == {1}:
                    part = part.reshaped(want)
            parts[target] = part
    kind = "peft" if config is not None else "kohya" if any(k.startswith("lora_") for k in tensors) else "diffusers"
    lora = Lora(parts, Card(family=family_of(parts), provenance={"format": kind}))
    if against:
        fits(lora, against, source=source)
    return lora


class _Scales:
    """Alpha and rsLoRA of a layer, as diffusers' metadata or a PEFT configuration give them."""

    def __init__(self, metadata: Mapping[str, str], config: Mapping[str, Any] | None, source: str) -> None:
        self.source, self.sections = source, {}
        if config is not None:
            self.sections[""] = self._checked(dict(config), "adapter_config.json")
        elif "lora_adapter_metadata" in metadata:
            try:
                fields = json.loads(metadata["lora_adapter_metadata"])
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{source}: metadata lora_adapter_metadata is no JSON ({error})") from None
            if not isinstance(fields, dict):
                raise ValueError(f"{source}: metadata lora_adapter_metadata holds a {type(fields).__name__}")
            for component in COMPONENTS:
                own = {k.removeprefix(component + "."): v for k, v in fields.items() if k.startswith(component + ".")}
                if own:
                    self.sections[component] = self._checked(own, "lora_adapter_metadata")
            if not self.sections and fields:
                self.sections[""] = self._checked(fields, "lora_adapter_metadata")

    def _checked(self, fields: dict[str, Any], where: str) -> dict[str, Any]:
        kind = str(fields.get("peft_type", "LORA")).rpartition(".")[2]
        if kind != "LORA":
            raise ValueError(f"{self.source}: {where} says peft_type={kind}, only LORA is read here")
        for name, kind in _OTHER_PEFT.items():
            if fields.get(name):
                raise ValueError(f"{self.source}: {where} sets {name}: this is {kind}, which is not read here")
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = fields.get(name) or {}
            if not isinstance(patterns, dict):
                raise ValueError(f"{self.source}: {where}, {name} holds a {type(patterns).__name__}, wanted an object")
            for pattern in patterns:
                # Never compiled as a regular expression: a file could hang the reader with one.
                if not re.fullmatch(r"\^?[A-Za-z0-9_.\\]+", pattern):
                    raise ValueError(f"{self.source}: {where}, {name} {pattern!r}: only plain module paths are read")
        return {**fields, "where": where}

    def _number(self, fields: Mapping[str, Any], name: str, path: str) -> float | None:
        value = fields.get("r" if name == "rank_pattern" else "lora_alpha")
        for pattern, own in (fields.get(name) or {}).items():
            plain = pattern.replace("\\", "")
            if path == plain.removeprefix("^") or (not plain.startswith("^") and path.endswith("." + plain)):
                value = own
                break
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{self.source}: {fields['where']}, {name} of {path} is {value!r}, wanted a number")
        return value

    def of(self, layer: str, rank: int) -> tuple[float | None, bool]:
        """(alpha or None, rsLoRA) of a layer. Raises ValueError when the rank there is not that of the tensors."""
        component, _, path = layer.removeprefix("base_model.model.").partition(".")
        fields, path = self.sections.get(component), path
        if fields is None:
            fields, path = self.sections.get(""), layer.removeprefix("base_model.model.")
        if fields is None:
            return None, False
        said = self._number(fields, "rank_pattern", path)
        if said is not None and said != rank:
            raise ValueError(f"{self.source}: {fields['where']} gives {path} rank {said}, its tensors have {rank}")
        return self._number(fields, "alpha_pattern", path), bool(fields.get("use_rslora"))


def _parts(
    layer: str, roles: dict[str, tuple[str, Tensor]], count: int, scales: _Scales, base: Base | None, source: str
) -> list[LowRank | Dense]:
    """The updates that one layer of a file holds: `count` of them when it is a fused projection."""
    got = {role: tensor for role, (_, tensor) in roles.items()}
    embedding = "embedding_down" in got or "embedding_up" in got
    low, high = ("embedding_down", "embedding_up") if embedding else ("down", "up")
    shown = (roles.get(low) or roles.get(high) or next(iter(roles.values())))[0]
    try:
        bias = got["bias"].flatten() if "bias" in got else _bias(layer, got, base, source)
        if low not in got and high not in got:
            if "alpha" in got and len(got) == 1:
                raise ValueError("an alpha without its factors")
            weight = got.get("diff")
            if weight is not None and weight.ndim == 4 and weight.shape[1:] == (1, 1, 1):
                weight = weight.flatten()  # LyCORIS writes the weight of a norm so
            kind = "conv" if weight is not None and weight.ndim > 2 else "linear"
            if count > 1:
                raise ValueError("a dense difference of a fused projection is not read here")
            return [Dense(weight, bias, kind)]
        if "diff" in got:
            raise ValueError(f"both factors and a dense difference ({roles['diff'][0]})")
        for one, other in ((low, high), (high, low)):
            if one not in got:
                there = roles[other][0]
                raise ValueError(f"{there} has no partner: its {'up' if one == high else 'down'} factor is missing")
        down, up = got[low], got[high]
        if down.ndim < 2 or not min(down.shape) or up.ndim < 2:
            raise ValueError(f"factors {list(down.shape)} and {list(up.shape)}: wanted [rank, in] and [out, rank]")
        alpha, rslora = scales.of(layer, down.shape[0])
        if "alpha" in got:
            if got["alpha"].numel() != 1:
                raise ValueError(f"its alpha has shape {list(got['alpha'].shape)}, wanted one number")
            alpha, rslora = float(got["alpha"]), False
        if alpha is not None and alpha <= 0:
            effect = "no" if alpha == 0 else "a reversed"
            warnings.warn(f"{source}: key {shown}: alpha is {alpha:g}, {effect} effect", stacklevel=3)
        kind = "embedding" if embedding else None
        whole = LowRank.from_factors(
            down, up, alpha=alpha, rslora=rslora, bias=bias, up_bias=got.get("up_bias"), kind=kind
        )
        return [whole] if count == 1 else _split_rows(whole, count)
    except ValueError as error:
        raise ValueError(f"{source}: key {shown}: {error}") from None


def _bias(layer: str, got: Mapping[str, Tensor], base: Base | None, source: str) -> Tensor | None:
    """PEFT's bias="all" stores the layer's whole trained bias: its update is the difference to the base's."""
    if "whole_bias" not in got:
        return None
    own = base.modules.get(base.locate(layer)[0]) if base else None
    there = getattr(getattr(own, "base_layer", own), "bias", None)
    if not isinstance(there, Tensor) or there.shape != got["whole_bias"].shape:
        raise ValueError("a whole trained bias needs its base model: load it with base=")
    dtype = torch.promote_types(got["whole_bias"].dtype, torch.float32)
    return got["whole_bias"].to(dtype) - there.detach().to("cpu", dtype)


def _split_rows(whole: LowRank, count: int) -> list[LowRank]:
    """A fused projection as its parts in row order: thirds, or q, k, v of the input's width and the rest."""
    out, wide = whole.up.shape[0], whole.down.shape[1]
    rows = [out // count] * count if count == 3 else [wide] * (count - 1) + [out - wide * (count - 1)]
    if sum(rows) != out or min(rows) < 1:
        raise ValueError(f"{out} rows of a fused projection cannot be split into {count} parts")
    biases = [None] * count if whole.bias is None else whole.bias.split(rows)
    return [LowRank(whole.down, up, b, whole.kind) for up, b in zip(whole.up.split(rows), biases, strict=True)]


def fits(lora: Lora, base: Any, *, source: str | None = None) -> None:
    """Check that every key of a Lora names a layer of the base with the right shape.

    Keys of components that the base does not hold (a bare denoiser has no text encoder) are not checked, as long as
    it holds one of them. Raises one ValueError naming source, the first key that does not fit, what was expected and
    found, and how many modules match.
    """
    base = base_of(base)
    source = source or lora.card.name or "LoRA"
    checked = [k for k in lora if not _elsewhere(k, lora, base)] or list(lora)
    bad = {k: why for k in checked if (why := _misfit(lora[k], base, k))}
    if not bad:
        return
    family = lora.card.family or family_of(lora)
    made = FAMILIES.get(family, family)
    matching = f"{len(checked) - len(bad)} of {len(checked)} modules match"
    apart = made != base.name and ((family and base.family) or len(bad) > len(checked) // 2)
    head = f"made for {made}, this is {base.name}: {matching}" if apart else f"does not fit {base.name}: {matching}"
    first = next(iter(bad))
    near = difflib.get_close_matches(first, base.shapes, n=1) if first not in base.shapes else []
    hint = f" (nearest is {near[0]})" if near else ""
    raise ValueError(f"{source}: {head}. Key {first}: {bad[first]}{hint}. All that do not match: {_names(list(bad))}")


def _elsewhere(key: str, lora: Lora, base: Base) -> bool:
    return len(base.components) == 1 and key.split(".", 1)[0] in set(lora.components) - set(base.components)


def _misfit(part: LowRank | Dense, base: Base, key: str) -> str:
    if key not in base.shapes and len(base.components) == 1:  # plain paths of a bare denoiser
        key = spelling.plain(base.components[0], key)
    if key not in base.shapes:
        return "the base has no such layer"
    want = base.shapes[key]
    if part.shape is not None and part.shape != want:
        return f"expected a weight update of shape {list(want)}, found {list(part.shape)}"
    out = want[1] if part.kind == "embedding" else want[0]
    if part.bias is not None and part.bias.shape[0] != out:
        return f"expected a bias update of {out} values, found {part.bias.shape[0]}"
    return ""
