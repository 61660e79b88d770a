"""What the controls of Compose say as a recipe, and a recipe as what the controls say."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multilora.method import resolve, unknown
from multilora.recipe import LoraUse, Recipe
from multilora.schedule import Schedule
from multilora.web.service import Entry, Refused, Service, Session
from multilora.web.service.spec import opened

# Fields of one LoRA of the list; everything but `reference` may be left out.
FIELDS = ("reference", "name", "weight", "on", "text_encoder_weight", "blocks", "positive_only", "mask")
# Controls by the names of a recipe's fields; "" or None stands for the base's own value.
SETTINGS = ("prompt", "negative_prompt", "loras", "method", "options", "seed", "steps", "guidance_scale", "width",
            "height", "scheduler", "base")  # fmt: skip
PNG = "data:image/png;base64,"


@dataclass(frozen=True)
class Restored:
    """A recipe that the controls were filled from. While they say `settings`, it is made again to the bit, if it is
    `whole`: nothing of it is missing here."""

    recipe: Recipe
    settings: dict[str, Any]
    whole: bool


def recipe_of(
    service: Service, session: Session, settings: Mapping[str, Any], restored: Restored | None = None
) -> tuple[Recipe, dict[str, bytes]]:
    """(recipe, masks by the LoRA's name) of the controls, for a request to the service.

    settings  by the names of SETTINGS; LoRAs as `read_uses` takes them

    Raises ValueError (Refused and pydantic's are some) naming the control.
    """
    if restored is not None and restored.whole and plain(settings) == plain(restored.settings):
        return restored.recipe, {}  # its masks are in it
    facts = service.about(settings.get("base") or None)
    given = {name: settings.get(name) for name in SETTINGS}
    given = {name: value for name, value in given.items() if value is not None and value != ""}
    uses, masks = read_uses(service, session, given.pop("loras", []))
    known = {name: facts[name] for name in ("steps", "guidance_scale", "width", "height", "scheduler")}
    bound = resolve("route", given.pop("method", "auto"), **given.pop("options", {}))
    fields = {"prompt": "", "seed": 0, **known, **given, "method": bound.record.name, "options": bound.options}
    fields |= {"base": facts["base"], "base_family": facts["family"], "loras": uses}
    for name in ("seed", "steps", "width", "height"):
        fields[name] = _whole(name, fields[name])
    if restored is not None:  # what no control shows stays as the recipe has it
        old = restored.recipe
        fields = {"text_encoder": old.text_encoder, "scale": old.scale, "pipeline_options": old.pipeline_options,
                  **fields}  # fmt: skip
        if old.scheduler == fields["scheduler"]:
            fields["scheduler_config"] = old.scheduler_config
    recipe = Recipe.checked(fields, "these settings")
    return recipe, {name: _sized(mask, recipe, name) for name, mask in masks.items()}


def read_uses(
    service: Service, session: Session, listed: Sequence[str | Mapping[str, Any]]
) -> tuple[list[LoraUse], dict[str, bytes]]:
    """(uses, masks as PNG by name) of a list whose entries are references of the library, or mappings of FIELDS.

    LoRAs that are switched off are left out. Raises ValueError naming the LoRA and the field.
    """
    if isinstance(listed, (str, Mapping)) or not isinstance(listed, Sequence):
        raise ValueError(f"loras={listed!r:.80}: a list is wanted, of references or of objects with {FIELDS}")
    if len(listed) > (most := service.limits.loras):
        raise Refused(f"number of LoRAs is {len(listed)}, this server allows up to {most}", "limit")
    uses: list[LoraUse] = []
    masks: dict[str, bytes] = {}
    for each in listed:
        given = {"reference": each} if isinstance(each, str) else dict(each)
        for name in given:
            if name not in FIELDS:
                raise unknown("field of a LoRA", name, FIELDS)
        entry = service.entry(session, str(given.get("reference", "")))
        if not given.get("on", True):
            continue
        name = _free(str(given.get("name") or entry.name), [use.name for use in uses])
        try:
            use = LoraUse(
                name=name,
                reference=entry.reference,
                weight=_weight(given.get("weight", 1.0)),
                text_encoder_weight=_number(given.get("text_encoder_weight")),
                blocks=given.get("blocks") or {},
                positive_only=bool(given.get("positive_only")),
            )
        except ValueError as error:
            raise ValueError(f"LoRA {name!r}: {_plainly(error)}") from None
        uses.append(use)
        if given.get("mask"):
            masks[name] = _picture(str(given["mask"]), name)
    return uses, masks


def settings_of(service: Service, session: Session, recipe: Recipe) -> tuple[Restored, list[str]]:
    """(what the controls must say for a recipe, what could not be restored or is worth knowing, a sentence each).

    A LoRA is looked for by its content, then by its reference. Raises Refused when the recipe is not one of a picture
    from text.
    """
    if recipe.pictures or recipe.controlnet:
        raise Refused(
            f"this picture was made from another one ({recipe.task}), which is not in the file; it can be made again "
            "with: multilora compose --from FILE --image PICTURE"
        )
    notes, listed, uses = [], [], []
    coded = recipe.extra.get("masks") or {}
    for use in recipe.loras:
        entry, note = _found(service.library(session), use)
        notes += [note] if note else []
        if entry is None:
            continue
        uses.append(use.model_copy(update={"reference": entry.reference, "mask": None}))
        listed.append({
            "reference": entry.reference, "name": use.name, "weight": use.weight, "on": True,
            "text_encoder_weight": use.text_encoder_weight, "blocks": dict(use.blocks),
            "positive_only": use.positive_only, "mask": PNG + coded[use.name] if use.name in coded else "",
        })  # fmt: skip
        if use.mask_sha256 and use.name not in coded:
            notes.append(f"The mask of {use.name} is not in the recipe; paint it again.")
    if recipe.base not in service.bases:
        notes.append(f"It was made with base {recipe.base!r}, which is not served here.")
    settings = {
        "prompt": recipe.prompt, "negative_prompt": recipe.negative_prompt, "loras": listed, "method": recipe.method,
        "options": resolve("route", recipe.method, **recipe.options).options, "seed": recipe.seed + recipe.index,
        "steps": recipe.steps, "guidance_scale": recipe.guidance_scale, "width": recipe.width,
        "height": recipe.height, "scheduler": recipe.scheduler, "base": recipe.base,
    }  # fmt: skip
    own = recipe.model_copy(update={"loras": uses})
    return Restored(own, settings, len(uses) == len(recipe.loras)), notes


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in one spelling, so that equal ones are equal."""
    said = {name: settings.get(name) for name in SETTINGS}
    said["loras"] = [
        {
            "reference": use.get("reference"), "weight": str(Schedule.parse(use.get("weight", 1.0))),
            "text_encoder_weight": _number(use.get("text_encoder_weight")), "blocks": use.get("blocks") or {},
            "positive_only": bool(use.get("positive_only")), "mask": use.get("mask") or "",
        }
        for use in ({"reference": use} if isinstance(use, str) else use for use in settings.get("loras") or [])
        if use.get("on", True)
    ]  # fmt: skip
    if said["method"]:
        said["options"] = resolve("route", said["method"], **(said["options"] or {})).options
    return {name: None if value == "" else value for name, value in said.items()}


def _found(library: Sequence[Entry], use: LoraUse) -> tuple[Entry | None, str]:
    same = [e for e in library if use.sha256 and e.sha256 == use.sha256]
    if same:
        return same[0], ""
    called = [e for e in library if use.reference in (e.reference, e.name) or use.name == e.name]
    if not called:
        return (
            None,
            f"LoRA {use.name} is not in your library: upload its file in Library, then drop the picture again.",
        )
    if use.sha256 and called[0].sha256 and called[0].sha256 != use.sha256:
        return (
            None,
            f"Your LoRA {use.name} is another file than the one in the recipe; upload the one it was made with.",
        )
    return called[0], ""


def _free(name: str, taken: Sequence[str]) -> str:
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _weight(value: Any) -> float | str:
    schedule = Schedule.parse(value)
    return schedule.constant if schedule.constant is not None else str(schedule)


def _number(value: Any) -> float | None:
    return None if value is None or value == "" else float(value)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:  # NaN, too, and infinity
        raise ValueError(f"{name}={value!r:.40}: a whole number is wanted")
    return int(value)


def _picture(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text.removeprefix(PNG), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"mask of LoRA {name!r}: a PNG in base64 is wanted, {text[:20]!r} is none") from None


def _sized(mask: bytes, recipe: Recipe, name: str) -> bytes:
    """The mask in the size of the picture, as grey PNG."""
    try:
        image = opened(mask).convert("L")
    except ValueError as error:
        raise ValueError(f"mask of LoRA {name!r}: {error}") from None
    if image.size != (recipe.width, recipe.height):
        image = image.resize((recipe.width, recipe.height))
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def _plainly(error: ValueError) -> str:
    """Pydantic's complaints on one line."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    issue = errors(include_url=False)[0]
    return (
        f"{'.'.join(map(str, issue['loc']))}: {issue['msg'].removeprefix('Value error, ')}, got {issue['input']!r:.60}"
    )
