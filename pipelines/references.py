"""LoRAs as a config names them: a reference, its sha256, options; read into Members when there is a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from multilora.lora import Lora
from multilora.method import unknown
from multilora.pipelines.composing import member
from multilora.pipelines.load import find_lora
from multilora.pipelines.members import Member, read_mask
from multilora.recipe import LoraUse
from multilora.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Reference:
    """A LoRA of a config. `lora` is set for one that is in memory only."""

    use: LoraUse
    lora: Lora | None = None

    def member(self, base: Any) -> Member:
        """Loaded for `base`, a pipeline or anything with its components as attributes.

        Raises ValueError naming LoRA and file when it does not fit, or the file is not the one of the config.
        """
        use = self.use
        found = member(
            base,
            use.reference if self.lora is None else self.lora,
            name=use.name,
            weight=use.weight,
            text_encoder_weight=use.text_encoder_weight,
            blocks=use.blocks,
            positive_only=use.positive_only,
            mask=use.mask,
        )
        _check_sha256(use, found.lora.card.sha256)
        if found.mask is not None:
            _check_mask(use, found.mask)
        return found

    def check_saved(self) -> None:
        """ValueError when a config could not find this LoRA again."""
        if self.lora is not None:
            raise ValueError(
                f"LoRA {self.use.name!r} is in memory only, a config holds paths: save it with multilora.save(lora, "
                "path) and give the path"
            )


def references(loras: Any, weights: Sequence[Any] | None = None) -> list[Reference]:
    """Paths, library names, Loras or dicts with LoraUse's fields (a Mapping of them gives names) as References.

    In a dict, "lora" may hold a Lora in memory in place of the reference.

    weights go over the weights in the dicts. Files are looked for and hashed here, read later. Raises ValueError
    naming the LoRA and field for what cannot be read, a missing file or one whose sha256 is another.
    """
    if isinstance(loras, (Lora, Reference, LoraUse, str, Path)):
        loras = [loras]
    named = isinstance(loras, Mapping)
    names: list[str | None] = [str(n) for n in loras] if named else [None] * len(loras)
    items = list(loras.values()) if named else list(loras)
    if weights is not None and len(weights) != len(items):
        raise ValueError(f"weights: {len(weights)} values for {len(items)} LoRAs, wanted one each")
    found = [_reference(item, name) for item, name in zip(items, names, strict=True)]
    if weights is not None:
        found = [_weighted(r, w) for r, w in zip(found, weights, strict=True)]
    for r in found:
        try:
            Schedule.parse(r.use.weight)
        except ValueError as error:
            raise ValueError(f"weight of LoRA {r.use.name!r}: {error}") from None
    return found


def _reference(item: Any, name: str | None) -> Reference:
    if isinstance(item, Reference):
        return item if name is None else Reference(item.use.model_copy(update={"name": name}), item.lora)
    if isinstance(item, Lora):
        item = {"lora": item}
    if isinstance(item, (str, Path)):
        item = {"reference": str(item)}
    if isinstance(item, LoraUse):
        item = item.model_dump()
    if not isinstance(item, Mapping):
        raise ValueError(f"LoRA {item!r}: wanted a path, a library name, a Lora, or a dict with LoraUse's fields")
    fields = {**item, **({"name": name} if name else {})}
    lora = fields.pop("lora", None)
    who = fields.get("name") or fields.get("reference")
    for field in fields:
        if field not in LoraUse.model_fields:
            raise unknown(f"field of LoRA {who!r}", field, LoraUse.model_fields)
    if isinstance(lora, Lora):
        return Reference(_with_mask(_use({"name": lora.card.name or "lora", **fields, "reference": ""})), lora)
    reference = fields.get("reference")
    if not reference:
        raise ValueError(
            f"LoRA {fields.get('name', '')!r} has no reference: it was in memory only; give its file or library name"
        )
    path, entry = find_lora(reference)
    fields["reference"] = entry["name"] if entry else str(path.absolute())
    fields.setdefault("name", entry["name"] if entry else path.stem)
    use = _with_mask(_use(fields))
    digest = _sha256(path)
    _check_sha256(use, digest)
    return Reference(use.model_copy(update={"sha256": use.sha256 or digest or None}))


def _use(fields: dict[str, Any]) -> LoraUse:
    try:
        return LoraUse.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{field} of LoRA {fields['name']!r}: {first['msg']}, got {first['input']!r}") from None


def _with_mask(use: LoraUse) -> LoraUse:
    """With the mask's absolute path and the sha256 of its values."""
    if not use.mask:
        return use
    mask, _ = read_mask(use.mask, use.name)
    digest = _check_mask(use, mask)
    return use.model_copy(update={"mask": str(Path(use.mask).absolute()), "mask_sha256": digest})


def _check_mask(use: LoraUse, mask: Tensor) -> str:
    digest = hashlib.sha256(mask.numpy().tobytes()).hexdigest()
    if use.mask_sha256 and digest != use.mask_sha256:
        raise ValueError(f"mask of LoRA {use.name!r}: {use.mask} is not the picture of the config (sha256)")
    return digest


def _weighted(r: Reference, weight: Any) -> Reference:
    try:
        weight = Schedule.parse(weight)
    except ValueError as error:
        raise ValueError(f"weight of LoRA {r.use.name!r}: {error}") from None
    plain = weight.constant if weight.constant is not None else str(weight)
    return Reference(r.use.model_copy(update={"weight": plain}), r.lora)


def _sha256(path: Path) -> str:
    """Of a .safetensors file, or of the weights in a PEFT folder of one component; "" for other folders."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_sha256(use: LoraUse, found: str) -> None:
    if use.sha256 and found and found != use.sha256:
        raise ValueError(
            f"LoRA {use.name!r} at {use.reference!r} is not the file of the config: its sha256 begins {found[:12]}, "
            f"wanted {use.sha256[:12]}"
        )
