"""LoRA files <-> Lora: diffusers, kohya / A1111, LyCORIS and PEFT, read and written.

Only safetensors are read, by extension and by content. A file's metadata drives nothing but the scale of its own
tensors (and, of a PEFT folder, the component they belong to), and is refused where it contradicts them. Every error is
a ValueError that names file and key or field.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora import keys as spelling
from multilora.bases import FAMILIES, Base, base_of, family_of, family_of_model
from multilora.detect import description, format_of, trainer_of, words
from multilora.layers import MAGNITUDES, Found, layer_parts, low_rank
from multilora.limits import LOCAL, Limits, broken, growth_within, shown, within
from multilora.lora import COMPONENTS, Card, Dense, Lora, LowRank
from multilora.reading import SUFFIXES, located, parse_json, read_json, read_tensors
from multilora.scales import Scales
from multilora.writing import save, state

__all__ = ["describe", "family_of", "family_of_model", "fits", "load", "read", "save", "state"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
_MOST = 10  # names listed in one error
_MOST_TRIGGERS = 100


def _names(found: list[str]) -> str:
    return ", ".join(found[:_MOST]) + (f", and {len(found) - _MOST} more" if len(found) > _MOST else "")


def load(
    path: str | Path,
    base: Any = None,
    *,
    name: str | None = None,
    allow_partial: bool = False,
    limits: Limits = LOCAL,
    root: str | Path | None = None,
) -> Lora:
    """The Lora in a .safetensors file or a PEFT folder, checked.

    base  a diffusers pipeline, a module, a saved pipeline's folder or "embedded": every key must then name one of its
          layers with the right shape. Without it paths are taken from the keys alone, and nothing is checked against
          a model
    name  of the card; default is the name written into the file by `save`, else the file's
    allow_partial  read what fits when some keys are unknown or name layers that the base lacks; the keys left out are
          warned about and listed in card.provenance["left_out"]
    limits, root  as in multilora.admit.admit, which is this function with tighter limits

    DoRA needs a live base, which its update depends on. The card's provenance says what the file is: "format",
    "trainer", "algorithms", "alphas" and the "metadata" worth showing.

    Raises ValueError naming file, key or field, what was expected and what was found.
    """
    path = located(path, root)
    against = None if base is None else base_of(base)
    options = {"allow_partial": allow_partial, "limits": limits}
    if path.is_dir():
        return _load_folder(path, against, name, options, root)
    if path.suffix != ".safetensors":
        kind = f"; this is {SUFFIXES[path.suffix]}" if path.suffix in SUFFIXES else ""
        wanted = f"wanted a .safetensors file or a PEFT folder with {PEFT_CONFIG} in it"
        raise ValueError(f"{shown(path.name)}: {wanted}{kind}")
    tensors, metadata, digest = read_tensors(path, limits, root=root)
    lora = read(tensors, metadata, base=against, source=shown(path.name), **options)
    return lora.replace(card=_card(lora, metadata, digest, path, name, against))


def _load_folder(
    path: Path, base: Base | None, name: str | None, options: dict[str, Any], root: Any, component: str = ""
) -> Lora:
    source, limits = shown(path.name), options["limits"]
    if not (path / PEFT_CONFIG).is_file():
        parts = [c for c in COMPONENTS if (path / c / PEFT_CONFIG).is_file()]
        if not parts:
            there = [shown(p.name) for p in sorted(path.glob("*.safetensors"))]
            which = f", name one of {_names(there)}" if there else ""
            wanted = f"{PEFT_CONFIG} is missing; or give a .safetensors file{which}"
            raise ValueError(f"{source}: no PEFT folder, {wanted}")
        loras = [_load_folder(path / c, base, name or source, options, root, c) for c in parts]
        return Lora({k: p for lora in loras for k, p in lora.items()}, _shared_card([lora.card for lora in loras]))
    where = f"{source}/{PEFT_CONFIG}"
    config = read_json(located(path / PEFT_CONFIG), limits, root=root, where=where)
    if not isinstance(config, dict):
        raise ValueError(f"{where}: holds a {type(config).__name__}, wanted an object")
    if not (path / PEFT_WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").exists()
        hint = "; adapter_model.bin is a pickle, which is never read" if pickled else ""
        raise ValueError(f"{source}: {PEFT_WEIGHTS} is missing{hint}")
    tensors, metadata, digest = read_tensors(
        path / PEFT_WEIGHTS, limits, root=root, where=f"{source}/{PEFT_WEIGHTS}"
    )
    component = component or str(_own(metadata).get("component", ""))
    component = component if component in COMPONENTS else ""
    lora = read(tensors, metadata, config, base=base, source=source, component=component, **options)
    return lora.replace(card=_card(lora, metadata, digest, path, name, base))


def _shared_card(cards: list[Card]) -> Card:
    """The card of a folder of several components: the first one's, with what was met in any of them."""
    met = {}
    for name in ("algorithms", "alphas", "left_out", "notes"):
        values = list(dict.fromkeys(v for card in cards for v in card.provenance.get(name, ())))
        met |= {name: sorted(values) if name in ("algorithms", "alphas") else values} if values else {}
    return cards[0].replace(provenance={**cards[0].provenance, **met})


def _own(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `save` wrote about the LoRA: names and words to show, and the component of a PEFT folder."""
    try:
        own = parse_json(metadata.get("multilora", "{}"), where="multilora")
    except ValueError:
        own = {}
    return own if isinstance(own, dict) else {}


def _card(lora: Lora, metadata: Mapping[str, str], digest: str, path: Path, name: str | None, base: Any) -> Card:
    own = _own(metadata)
    text = {k: shown(own[k]) for k in ("name", "category", "family") if isinstance(own.get(k), str) and own[k]}
    triggers = own.get("triggers") if isinstance(own.get("triggers"), list) else []
    triggers = [shown(t) for t in triggers[:_MOST_TRIGGERS] if isinstance(t, str)]
    family = (base.family if base else "") or text.get("family", "") or family_of(lora)
    provenance = {**lora.card.provenance, "file": shown(path.name)}
    own_name = name or text.get("name") or shown(path.stem if path.is_file() else path.name)
    return Card(own_name, text.get("category", ""), tuple(triggers), family, digest, provenance)


def describe(path_or_lora: str | Path | Lora, base: Any = None) -> dict[str, Any]:
    """What a LoRA is, in words and numbers (multilora.detect.description); a path is loaded first, as by load."""
    lora = path_or_lora if isinstance(path_or_lora, Lora) else load(path_or_lora, base)
    return description(lora)


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    base: Any = None,
    source: str = "state dict",
    component: str = "",
    allow_partial: bool = False,
    limits: Limits = LOCAL,
) -> Lora:
    """The Lora in a state dict of any known format; pure. Tensors are shared with it where nothing had to be scaled.

    metadata  the header texts of a safetensors file; only diffusers' `lora_adapter_metadata` has a meaning
    config    PEFT's adapter configuration
    base      as in load
    source    what errors call the state dict
    component  put before every path, for formats that hold one component and do not name it
    allow_partial, limits  as in load

    Raises ValueError naming source and key or field.
    """
    against = None if base is None else base_of(base)
    metadata = metadata or {}
    scales, found = Scales(metadata, config, source), Found()
    layers, left = _layers(tensors, source, allow_partial)
    growth_within(layers, limits, source=source)
    where = {}
    for layer in layers:
        path = f"{component}.{layer.removeprefix('base_model.model.')}" if component else layer
        where[layer] = against.locate(path) if against else spelling.locate(path)
    _whole_dora(layers, where, source)
    parts: dict[str, LowRank | Dense] = {}
    for layer, roles in layers.items():
        targets = where[layer]
        if allow_partial and (set(roles) == {"alpha"} or (against and any(_absent(t, against) for t in targets))):
            left += [key for key, _ in roles.values()]
            continue
        made = layer_parts(layer, roles, targets, scales, against, source, found)
        for target, part in zip(targets, made, strict=True):
            if target in parts:
                raise ValueError(f"{source}: two layers of the file mean {target}, one of them is {layer}")
            if against and against.shapes.get(target) and part.shape:
                want = against.shapes[target]
                if want != part.shape and want[:2] == part.shape[:2] and {*want[2:], *part.shape[2:]} == {1}:
                    part = part.reshaped(want)
            parts[target] = part
    family = family_of(Lora(parts)) if parts else ""
    if not against:
        parts = {spelling.of_family(key, family): part for key, part in parts.items()}
    provenance = {
        "format": format_of(tensors, found.algorithms, peft=config is not None),
        "trainer": trainer_of(tensors, metadata, peft=config is not None),
        "algorithms": sorted(found.algorithms),
        "alphas": sorted(found.alphas),
        "metadata": words(metadata),
    }
    lora = Lora(parts, Card(family=family, provenance=provenance))
    if against and parts:
        bad = _misfits(lora, against) if allow_partial else {}
        if bad and len(bad) < len(parts):
            left += [key for n, roles in layers.items() if bad.keys() & set(where[n]) for key, _ in roles.values()]
            lora = Lora({k: p for k, p in parts.items() if k not in bad}, lora.card)
        fits(lora, against, source=source)
    if left:
        if not lora:
            raise ValueError(f"{source}: nothing in it fits, all {len(left)} keys would be left out: {_names(left)}")
        warnings.warn(f"{source}: {len(left)} keys left out (allow_partial): {_names(left)}", stacklevel=2)
        lora = lora.replace(card=lora.card.replace(provenance={**provenance, "left_out": left}))
    if notes := within(lora, limits, source=source):
        lora = lora.replace(card=lora.card.replace(provenance={**lora.card.provenance, "notes": notes}))
    return lora


def _layers(
    tensors: Mapping[str, Tensor], source: str, allow_partial: bool
) -> tuple[dict[str, dict[str, tuple[str, Tensor]]], list[str]]:
    """({layer: {what a tensor is to it: (key, tensor)}}, unknown keys); the tensors are checked one by one."""
    layers: dict[str, dict[str, tuple[str, Tensor]]] = {}
    unknown: dict[str, str] = {}
    for key, tensor in tensors.items():
        try:
            layer, role = spelling.split(key)
        except ValueError as error:
            unknown[key] = str(error)
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            dtype = getattr(tensor, "dtype", type(tensor).__name__)
            if not (role == "alpha" and isinstance(tensor, Tensor) and not tensor.dtype.is_complex):
                raise ValueError(f"{source}: key {key} is {dtype}, wanted float16, bfloat16, float32 or float64")
        if wrong := broken(tensor):
            raise ValueError(f"{source}: key {key} has {wrong} values that are NaN or infinite, of {tensor.numel()}")
        if role in layers.setdefault(layer, {}):
            raise ValueError(f"{source}: keys {layers[layer][role][0]} and {key} are the same tensor in two spellings")
        layers[layer][role] = (key, tensor)
    if unknown and not (allow_partial and layers):
        more = f". All that are not read: {_names(list(unknown))}" if len(unknown) > 1 else ""
        hint = "; allow_partial=True reads the rest" if layers else ""
        raise ValueError(f"{source}: {next(iter(unknown.values()))}{more}{hint}")
    if not layers:
        raise ValueError(f"{source}: contains no LoRA tensors")
    return layers, list(unknown)


def _whole_dora(layers: Mapping[str, Mapping], where: Mapping[str, tuple[str, ...]], source: str) -> None:
    """Refuse a component where only some low-rank layers have a DoRA magnitude: trainers give one to all."""
    with_it: dict[str, list[str]] = {}
    without: dict[str, list[str]] = {}
    for layer, roles in layers.items():
        if low_rank(roles):
            side = with_it if set(roles) & set(MAGNITUDES) else without
            side.setdefault(where[layer][0].split(".", 1)[0], []).append(layer)
    for component in with_it.keys() & without.keys():
        bare, count = without[component], len(without[component]) + len(with_it[component])
        raise ValueError(
            f"{source}: key {bare[0]}: an incomplete DoRA, {len(bare)} of {count} layers of {component} have no "
            f"magnitude (dora_scale, lora_magnitude_vector): {_names(bare)}"
        )


def _absent(target: str, base: Base) -> bool:
    """Whether the base, which has the target's component, lacks its layer."""
    first = target.split(".", 1)[0]
    if target in base.shapes or (first in COMPONENTS and first not in base.components):
        return False
    return len(base.components) != 1 or spelling.plain(base.components[0], target) not in base.shapes


def fits(lora: Lora, base: Any, *, source: str | None = None) -> None:
    """Check that every key of a Lora names a layer of the base with the right shape.

    Keys of components that the base does not hold (a bare denoiser has no text encoder) are not checked, as long as
    it holds one of them. Raises one ValueError naming source, the first key that does not fit, what was expected and
    found, and how many modules match.
    """
    base = base_of(base)
    source = source or lora.card.name or "LoRA"
    checked = _checked(lora, base)
    bad = _misfits(lora, base)
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


def _checked(lora: Lora, base: Base) -> list[str]:
    elsewhere = set(lora.components) - set(base.components) if len(base.components) == 1 else set()
    return [k for k in lora if k.split(".", 1)[0] not in elsewhere] or list(lora)


def _misfits(lora: Lora, base: Base) -> dict[str, str]:
    """key -> why it does not fit the base."""
    return {k: why for k in _checked(lora, base) if (why := _misfit(lora[k], base, k))}


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
